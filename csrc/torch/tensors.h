// From torch's tensors to the pointers that kernels take: checks, order of elements, copies where needed.
#pragma once
#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <c10/core/DispatchKeySet.h>

#include <tuple>
#include <vector>

#include "core/packing.h"

namespace mup2 {

using at::Tensor;

#ifdef MUP2_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

// The errors are functions of their own that are never inlined, to keep the checks small and fast.
#define MUP2_ERROR [[noreturn, gnu::cold, gnu::noinline]] inline void
constexpr char kOtherwise[] = ": use SAM(..., backend=\"torch\")";

MUP2_ERROR refuse_type(const Tensor& t) {
  TORCH_CHECK_TYPE(false, "mup2_fused has kernels for float32, float64, bfloat16 and float16, not for ",
                   t.scalar_type(), kOtherwise);
}
MUP2_ERROR refuse_storage(const Tensor& t) {
  TORCH_CHECK_TYPE(false, "mup2_fused has kernels for plain tensors and DTensors, not for sparse tensors and not for "
                   "tensors that wrap others (", t.toString(), ")", kOtherwise);
}
MUP2_ERROR refuse_freed(const Tensor& t) {
  TORCH_CHECK(false, "a tensor of shape ", t.sizes(), " has no memory, because its storage was freed: allocate it "
              "before the step");
}
MUP2_ERROR refuse_device(const Tensor& t) {
  TORCH_CHECK(!t.is_cuda(), "mup2_fused was built without CUDA, but a parameter is on ", t.device(), ": build it where "
              "torch has CUDA and nvcc is found (MUP2_CUDA=1 python setup.py build_ext --inplace), or use "
              "SAM(..., backend=\"torch\")");
  TORCH_CHECK(false, "mup2_fused has kernels for the CPU and for CUDA, not for ", t.device(), kOtherwise);
}
MUP2_ERROR refuse_overlap(const Tensor& t) {
  TORCH_CHECK(false, "several elements of a tensor that is written lie in one place (shape ", t.sizes(), ", strides ",
              t.strides(), "): clone() the tensor");
}
MUP2_ERROR refuse_misfit(const Tensor& t, const Tensor& parameter, at::Device device) {
  TORCH_CHECK(false, "a tensor of shape ", t.sizes(), " on ", t.device(), " belongs to a parameter of shape ",
              parameter.sizes(), " on ", device, ": they must be equal");
}

// Raises TypeError if the kernels have no such type of number.
inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kF32;
    case at::kDouble: return kF64;
    case at::kBFloat16: return kBF16;
    case at::kHalf: return kF16;
    default: refuse_type(t);
  }
}

// What a tensor may be if its numbers are to lie in its own memory, as they are. Sparse tensors, and those that wrap
// others (of subclasses such as DTensor, of torch.func), have more keys.
constexpr c10::DispatchKeySet kPlainKeys =
    c10::DispatchKeySet(c10::DispatchKeySet::RAW, c10::full_backend_mask) | c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::AutogradFunctionality,
                         c10::DispatchKey::ADInplaceOrView});
// Plain tensors, and those that a copy makes plain: negated views, and zeros without memory.
constexpr c10::DispatchKeySet kDenseKeys =
    kPlainKeys | c10::DispatchKeySet({c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
inline bool is_plain(const Tensor& t) { return kPlainKeys.isSupersetOf(t.key_set()); }
inline bool is_dense(const Tensor& t) { return kDenseKeys.isSupersetOf(t.key_set()); }

// Where the first element of a plain tensor lies. RuntimeError if the tensor has no memory.
inline void* plain_address(const Tensor& t) {
  void* const found = t.data_ptr();
  if (!found) refuse_freed(t);
  return found;
}
// The same for any tensor. Raises TypeError if the tensor is not plain.
inline void* address(const Tensor& t) {
  if (!is_plain(t)) refuse_storage(t);
  return plain_address(t);
}

// Whether the kernels have the type and layout of a tensor.
inline bool has_kernel(const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return is_dense(t) && (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf);
}
// Whether a tensor is one number that can be copied to where a kernel reads it.
inline bool is_number(const Tensor& t) { return is_dense(t) && t.numel() == 1; }
// The number in float32 on that device, as a plain tensor.
inline Tensor float_on(at::Device device, const Tensor& number) {
  const Tensor x = number.to(device, at::kFloat);
  return is_plain(x) ? x : at::empty(x.sizes(), x.options()).copy_(x);
}
// Whether there are kernels for this device.
inline bool has_kernels(at::Device device) { return device.is_cpu() || (kBuiltWithCuda && device.is_cuda()); }
// Raises TypeError for tensors without memory of their own, and RuntimeError for devices without kernels.
inline void check_device(const Tensor& t) {
  if (!is_dense(t)) refuse_storage(t);
  if (!has_kernels(t.device())) refuse_device(t);
}
// Whether several elements of a tensor surely lie in one place.
inline bool overlaps_itself(const Tensor& t) {
  return !t.is_non_overlapping_and_dense() && at::has_internal_overlap(t) == at::MemOverlap::Yes;
}

// For short lists: == of two IntArrayRefs calls memcmp.
inline bool equal(at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}
// Whether elements with equal indices have equal distances from the first element, for dense tensors of equal sizes.
inline bool same_order(const Tensor& a, const Tensor& b) {
  return equal(a.strides(), b.strides()) || (a.is_contiguous() && b.is_contiguous());
}

// Whether the kernels can take the tensor as the backup or a moment of the parameter w.
inline bool fits(const Tensor& t, const Tensor& w) {
  return t.scalar_type() == w.scalar_type() && is_dense(t) && equal(t.sizes(), w.sizes()) && t.device() == w.device();
}
// Whether the kernels can take g as the gradient of w.
inline bool is_gradient(const Tensor& g, const Tensor& w) {
  return has_kernel(w) && is_dense(g) && (g.scalar_type() == w.scalar_type() || g.scalar_type() == at::kFloat);
}

// One parameter of a call, with its device and the number by which the caller knows it.
struct DeviceEntry : Entry {
  at::Device device = at::kCPU;
  int index = 0;
  // Entries of one launch have equal buckets.
  std::tuple<int, int, int> bucket() const { return {device.is_cuda() ? device.index() : -1, types.w, types.g}; }
};

using Slice = at::ArrayRef<DeviceEntry>;  // the entries of one device, which is current

// The parameters of a call. A tensor whose elements do not lie as the elements of its parameter do is copied into that
// order, and the kernels work on the copy. At the end, copy_back() copies what they have written.
class Entries {
 public:
  std::vector<DeviceEntry> list;
  explicit Entries(size_t expected = 0) { list.reserve(expected); }

  // Begins the entry of a parameter. All its tensors get the order of w, or the order of a contiguous tensor if w has
  // gaps. w must live until the last set() of the entry: counting a reference per tensor would cost more than the rest.
  DeviceEntry& add(const Tensor& w, int group) {
    DeviceEntry& e = list.emplace_back();
    check_device(w);
    e.numel = w.numel(), e.group = group, e.device = w.device();
    e.types = {type_of(w), type_of(w)};
    order_ = w.is_non_overlapping_and_dense() ? &w : &(contiguous_ = at::empty_like(w, at::MemoryFormat::Contiguous));
    place(kW, w, true);
    return e;
  }

  // Sets one tensor of the last entry. which: a position in Item::ptr; written: the kernels write to it.
  void set(int which, const Tensor& t, bool written) {
    const at::Device device = list.back().device;
    if (!is_dense(t)) refuse_storage(t);
    if (!equal(t.sizes(), order_->sizes()) || t.device() != device) refuse_misfit(t, *order_, device);
    if (t.scalar_type() != order_->scalar_type()) set_type(which, t);
    place(which, t, written);
  }
  // The same for a tensor of which it is known that it fits().
  void place(int which, const Tensor& t, bool written) {
    DeviceEntry& e = list.back();
    if (written && overlaps_itself(t)) refuse_overlap(t);
    if (t.numel() == 0) {
      static char nothing;
      e.ptr[which] = &nothing;  // not null, which would mean that there is no such tensor
    } else if (is_plain(t) && same_order(t, *order_)) {
      e.ptr[which] = plain_address(t);
    } else {
      e.ptr[which] = copy(which, t, written);
    }
  }

  // Adds an entry that stands for an empty part of a distributed tensor: one element of every kind, all 0.
  DeviceEntry& add_zero(const Tensor& w, const Tensor& g, int group) {
    const auto zero = [&](const at::TensorOptions& options) {
      copies_.push_back({{}, at::zeros({}, options), false});  // keeps it alive
      return copies_.back().copy;
    };
    const Tensor zero_w = zero(w.options());
    add(zero_w, group);
    set(kG, zero(g.options()), false);
    for (int which : {kBackup, kM, kV}) set(which, zero(w.options()), false);
    list.back().ptr[kSteps] = zero(w.options().dtype(at::kFloat)).data_ptr();
    return list.back();
  }

  void copy_back() {
    for (auto& [tensor, copy, written] : copies_)
      if (written) tensor.copy_(copy);
    copies_.clear();
  }

  // Sorts by device and types, and leaves the order within these as it is.
  void sort() {
    const auto before = [](const DeviceEntry& a, const DeviceEntry& b) { return a.bucket() < b.bucket(); };
    if (!std::is_sorted(list.begin(), list.end(), before)) std::stable_sort(list.begin(), list.end(), before);
  }

 private:
  struct Copy {
    Tensor tensor, copy;
    bool written;
  };
  [[gnu::noinline]] void set_type(int which, const Tensor& t) {
    Types& types = list.back().types;
    TORCH_CHECK_TYPE(which == kG, "a state tensor is ", t.scalar_type(), ", its parameter is ", order_->scalar_type(),
                     ": they must have the same type");
    types.g = type_of(t);
    TORCH_CHECK_TYPE(types.g == types.w || types.g == kF32, "a gradient is ", t.scalar_type(), ", its parameter is ",
                     order_->scalar_type(), ": only float32 gradients may have another type than their parameter");
  }
  [[gnu::noinline]] void* copy(int which, const Tensor& t, bool written) {
    // Zeros without memory cannot be written to. As a gradient they stay what they are when a loss scale divides them.
    const bool zeros = t._is_zerotensor();
    if (zeros && written && which != kG) refuse_overlap(t);
    Tensor ordered = at::empty_strided(order_->sizes(), order_->strides(), t.options());
    ordered.copy_(t);
    copies_.push_back({t, ordered, written && !zeros});
    return ordered.data_ptr();
  }

  std::vector<Copy> copies_;
  Tensor contiguous_;
  const Tensor* order_ = nullptr;
};

}  // namespace mup2
