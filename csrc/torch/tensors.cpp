#include "torch/tensors.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

namespace mup2 {

namespace {
constexpr char kOtherwise[] = ": use SAM(..., backend=\"torch\")";
}  // namespace

void refuse_type(const Tensor& t) {
  TORCH_CHECK_TYPE(false, "mup2_fused has kernels for float32, float64, bfloat16 and float16, not for ",
                   t.scalar_type(), kOtherwise);
}

void refuse_device(const Tensor& t) {
  TORCH_CHECK_TYPE(!is_subclass(t), "mup2_fused has kernels for plain tensors and DTensors, not for other subclasses "
                   "of tensors", kOtherwise);
  TORCH_CHECK(!t.is_cuda(), "mup2_fused was built without CUDA, but a parameter is on ", t.device(), ": build it where "
              "torch has CUDA and nvcc is found (MUP2_CUDA=1 python setup.py build_ext --inplace), or use "
              "SAM(..., backend=\"torch\")");
  TORCH_CHECK(false, "mup2_fused has kernels for the CPU and for CUDA, not for ", t.device(), kOtherwise);
}

void refuse_overlap(const Tensor& t) {
  TORCH_CHECK(false, "several elements of a tensor that is written lie in one place (shape ", t.sizes(), ", strides ",
              t.strides(), "): clone() the tensor");
}

void refuse_misfit(const Tensor& t, const Tensor& parameter, at::Device device) {
  TORCH_CHECK(false, "a tensor of shape ", t.sizes(), " on ", t.device(), " belongs to a parameter of shape ",
              parameter.sizes(), " on ", device, ": they must be equal");
}

bool has_overlap(const Tensor& t) { return at::has_internal_overlap(t) == at::MemOverlap::Yes; }

void Entries::set_type(int which, const Tensor& t) {
  Types& types = list.back().types;
  TORCH_CHECK_TYPE(which == kG, "a state tensor is ", t.scalar_type(), ", its parameter is ", order_->scalar_type(),
                   ": they must have the same type");
  types.g = type_of(t);
  TORCH_CHECK_TYPE(types.g == types.w || types.g == kF32, "a gradient is ", t.scalar_type(), ", its parameter is ",
                   order_->scalar_type(), ": only float32 gradients may have another type than their parameter");
}

void* Entries::copy(const Tensor& t, bool written) {
  Tensor ordered = at::empty_strided(order_->sizes(), order_->strides(), t.options());
  ordered.copy_(t);
  copies_.push_back({t, ordered, written});
  return ordered.data_ptr();
}

DeviceEntry& Entries::add_zero(const Tensor& w, const Tensor& g, int group) {
  const auto zero = [&](const Tensor& like) {
    copies_.push_back({{}, at::zeros({}, like.options()), false});  // keeps it alive
    return copies_.back().copy;
  };
  const Tensor zero_w = zero(w);
  add(zero_w, group);
  set(kG, zero(g), false);
  for (int which : {kBackup, kM, kV}) set(which, zero(w), false);
  list.back().ptr[kSteps] = zero(at::empty({}, w.options().dtype(at::kFloat))).data_ptr();
  return list.back();
}

void Entries::copy_back() {
  for (auto& [tensor, copy, written] : copies_)
    if (written) tensor.copy_(copy);
  copies_.clear();
}

void Entries::sort() {
  const auto before = [](const DeviceEntry& a, const DeviceEntry& b) { return a.bucket() < b.bucket(); };
  if (!std::is_sorted(list.begin(), list.end(), before)) std::stable_sort(list.begin(), list.end(), before);
}

}  // namespace mup2
