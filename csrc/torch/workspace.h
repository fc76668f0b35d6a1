// Memory that the kernels need on one device, besides the tensors that they are given.
#pragma once
#include <ATen/Functions.h>

#include <map>
#include <utility>
#include <vector>

#include "core/sam.h"
#include "core/updates.h"

namespace mup2 {

using at::Tensor;

class Workspace {
 public:
  explicit Workspace(at::Device device)
      : ints_(at::zeros({kCounters + 1}, at::TensorOptions().device(device).dtype(at::kInt))),
        skipped_(at::zeros({1}, ints_.options().dtype(at::kLong))) {}

  // Makes room for the norm of so many tensors with so many chunks, and so sets state().
  void reserve(int64_t tensors, int64_t chunks, bool layerwise) {
    static_assert(sizeof(Radius) == 2 * sizeof(double) && sizeof(int32_t) == sizeof(uint32_t));
    const int64_t n_doubles = 2 + 7 * tensors + (layerwise ? 2 : 1) * chunks, n_ints = kCounters + tensors + 1;
    if (!doubles_.defined() || doubles_.numel() < n_doubles)
      doubles_ = at::empty({n_doubles + n_doubles / 4}, ints_.options().dtype(at::kDouble));
    if (ints_.numel() < n_ints) {
      Tensor more = at::zeros({2 * n_ints}, ints_.options());
      more.slice(0, 0, kCounters).copy_(ints_.slice(0, 0, kCounters));
      ints_ = more;
    }
    double* next = doubles_.data_ptr<double>();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    state_ = {take(2), take(tensors), take(tensors), take(tensors), (double(*)[2])take(2 * tensors),
              (Radius*)take(2 * tensors), next, int_at(kNonfinite), (uint32_t*)int_at(kCounters), int32_t(tensors),
              chunks};
  }
  const NormState& state() const { return state_; }

  // For an update: the flag of the norm, and a counter. The caller fills in the rest.
  Control control() const {
    Control control = {};
    control.nonfinite = int_at(kNonfinite), control.counter = (uint32_t*)int_at(kUpdateCounter);
    return control;
  }

  // Views of the last results of the norm.
  Tensor norm() const { return doubles(state_.norm, 1).squeeze(0); }
  Tensor square() const { return doubles(state_.norm + 1, 1); }
  Tensor contribution() const { return doubles(state_.contribution, state_.n_tensors); }
  Tensor coefficient() const { return doubles(state_.coefficient, state_.n_tensors); }
  Tensor sums() const { return doubles(state_.sums[0], 2 * state_.n_tensors).view({-1, 2}); }  // as NormState::sums
  Tensor nonfinite() const { return ints_.slice(0, kNonfinite, kNonfinite + 1); }
  Tensor skipped() const { return skipped_; }  // one int64: the number of steps that have been skipped

  void append_to(std::vector<Tensor>& tensors) const {  // all tensors that kernels write to
    for (const Tensor& t : {doubles_, ints_, skipped_})
      if (t.defined()) tensors.push_back(t);
  }

 private:
  enum { kNonfinite, kUpdateCounter, kCounters };  // positions in ints_; kernels leave counters at 0
  int32_t* int_at(int64_t position) const { return ints_.data_ptr<int32_t>() + position; }
  Tensor doubles(const double* begin, int64_t n) const {
    const int64_t first = begin - doubles_.data_ptr<double>();
    return doubles_.slice(0, first, first + n);
  }

  Tensor doubles_, ints_, skipped_;
  NormState state_ = {};
};

struct DeviceOrder {
  bool operator()(at::Device a, at::Device b) const {
    return std::make_pair(a.type(), a.index()) < std::make_pair(b.type(), b.index());
  }
};
using Workspaces = std::map<at::Device, Workspace, DeviceOrder>;

// The workspace of a device, which is made if there is none yet.
inline Workspace& workspace(Workspaces& all, at::Device device) {
  return all.try_emplace(device, device).first->second;
}

}  // namespace mup2
