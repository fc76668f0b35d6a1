// From torch's tensors to the pointers that kernels take: checks, order of elements, copies where needed.
#pragma once
#include <ATen/Functions.h>

#include <tuple>
#include <vector>

#include "core/packing.h"

namespace mup2 {

using at::Tensor;

// ------------------------------------------------------------------------------------------------ checks

#ifdef MUP2_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

// The errors of the checks below. They are functions of their own to keep the checks small.
[[noreturn]] void refuse_type(const Tensor& t);
[[noreturn]] void refuse_device(const Tensor& t);
[[noreturn]] void refuse_overlap(const Tensor& t);
[[noreturn]] void refuse_misfit(const Tensor& t, const Tensor& parameter, at::Device device);

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
// Whether the kernels have the type and layout of a tensor.
inline bool has_kernel(const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return t.layout() == at::kStrided &&
         (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf);
}
inline bool is_subclass(const Tensor& t) { return t.unsafeGetTensorImpl()->is_python_dispatch(); }

// Raises TypeError for subclasses of tensors, and RuntimeError for devices without kernels.
inline void check_device(const Tensor& t) {
  if (is_subclass(t) || !(t.is_cpu() || (kBuiltWithCuda && t.is_cuda()))) refuse_device(t);
}
// Whether several elements of a tensor surely lie in one place.
bool has_overlap(const Tensor& t);
inline bool overlaps_itself(const Tensor& t) { return !t.is_non_overlapping_and_dense() && has_overlap(t); }

inline float* floats(const Tensor& t) { return t.data_ptr<float>(); }
inline int32_t* ints(const Tensor& t) { return t.data_ptr<int32_t>(); }

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

// ------------------------------------------------------------------------------------------------ entries

// One parameter of a call, with its device and the number by which the caller knows it.
struct DeviceEntry : Entry {
  at::Device device = at::kCPU;
  int index = 0;
  // Entries of one launch have equal buckets.
  std::tuple<int, int, int> bucket() const { return {device.is_cuda() ? device.index() : -1, types.w, types.g}; }
};

// The parameters of a call. A tensor whose elements do not lie as the elements of its parameter do is copied into that
// order, and the kernels work on the copy. At the end, copy_back() copies what they have written.
class Entries {
 public:
  std::vector<DeviceEntry> list;
  explicit Entries(size_t expected = 0) { list.reserve(expected); }

  // Begins the entry of a parameter. All its tensors get the order of w, or the order of a contiguous tensor if w has
  // gaps. w must live until the last set() of the entry: counting a reference per tensor would cost more than the rest.
  DeviceEntry& add(const Tensor& w, int group) {
    list.emplace_back();
    DeviceEntry& e = list.back();
    check_device(w);
    e.numel = w.numel(), e.group = group, e.device = w.device();
    e.types = {type_of(w), type_of(w)};
    order_ = w.is_non_overlapping_and_dense() ? &w : &(contiguous_ = at::empty_like(w, at::MemoryFormat::Contiguous));
    set(kW, w, true);
    return e;
  }

  // Sets one tensor of the last entry. which: a position in Item::ptr; written: the kernels write to it.
  void set(int which, const Tensor& t, bool written) {
    DeviceEntry& e = list.back();
    if (!equal(t.sizes(), order_->sizes()) || t.device() != e.device) refuse_misfit(t, *order_, e.device);
    if (t.scalar_type() != order_->scalar_type()) set_type(which, t);
    if (written && overlaps_itself(t)) refuse_overlap(t);
    if (t.numel() == 0) {
      static char nothing;
      e.ptr[which] = &nothing;  // not null, which would mean that there is no such tensor
    } else if (same_order(t, *order_) && !t.is_neg()) {
      e.ptr[which] = t.data_ptr();
    } else {
      e.ptr[which] = copy(t, written);
    }
  }

  // Adds an entry that stands for an empty part of a distributed tensor: one element of every kind, all 0.
  DeviceEntry& add_zero(const Tensor& w, const Tensor& g, int group);
  void copy_back();
  // Sorts by device and types, and leaves the order within these as it is.
  void sort();

 private:
  struct Copy {
    Tensor tensor, copy;
    bool written;
  };
  void set_type(int which, const Tensor& t);
  void* copy(const Tensor& t, bool written);

  std::vector<Copy> copies_;
  Tensor contiguous_;
  const Tensor* order_ = nullptr;
};

}  // namespace mup2
