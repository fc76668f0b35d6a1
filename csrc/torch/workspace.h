// Memory that the kernels need on one device, besides the tensors that they are given.
#pragma once
#include <ATen/Functions.h>

#include <map>
#include <vector>

#include "core/norm.h"
#include "core/updates.h"

namespace mup2 {

using at::Tensor;

// Where the arrays of a NormState lie in one tensor of float64 numbers.
struct DoubleLayout {
  int64_t norm = 0, square = 1, contribution = 2;
  int64_t numerator, coefficient, sums, radii, partials, size;
  DoubleLayout(int64_t tensors = 0, int64_t n_partials = 0)
      : numerator(contribution + tensors), coefficient(numerator + tensors), sums(coefficient + tensors),
        radii(sums + 2 * tensors), partials(radii + 2 * tensors), size(partials + n_partials) {}
};

// Where flags and counters lie in one tensor of int32 numbers. Kernels leave counters at 0.
struct IntLayout {
  static constexpr int64_t nonfinite = 0, update_counter = 1, norm_counters = 2;
  int64_t size;
  explicit IntLayout(int64_t tensors) : size(norm_counters + tensors + 1) {}
};

class Workspace {
 public:
  explicit Workspace(at::Device device);

  // Makes room for the norm of so many tensors with so many chunks, and so sets state().
  void reserve(int64_t tensors, int64_t chunks, bool layerwise);
  const NormState& state() const { return state_; }
  // For an update: the flag of the norm, and a counter. The caller fills in the rest.
  Control control();

  // Views of the last results of the norm.
  Tensor norm() const { return doubles_[layout_.norm]; }
  Tensor square() const { return doubles_.slice(0, layout_.square, layout_.square + 1); }
  Tensor contribution() const { return each(layout_.contribution); }
  Tensor coefficient() const { return each(layout_.coefficient); }
  Tensor sums() const { return doubles_.slice(0, layout_.sums, layout_.radii).view({-1, 2}); }  // as NormState::sums
  Tensor nonfinite() const { return ints_.slice(0, IntLayout::nonfinite, IntLayout::nonfinite + 1); }
  Tensor skipped() const { return skipped_; }  // one int64: the number of steps that have been skipped

  void clear_norm() { doubles_.zero_(); }
  void append_to(std::vector<Tensor>& tensors) const;  // all tensors that kernels write to

 private:
  Tensor each(int64_t begin) const { return doubles_.slice(0, begin, begin + state_.n_tensors); }

  Tensor doubles_, ints_, skipped_;
  DoubleLayout layout_;
  NormState state_ = {};
};

struct DeviceOrder {
  bool operator()(at::Device a, at::Device b) const {
    return std::make_pair(a.type(), a.index()) < std::make_pair(b.type(), b.index());
  }
};
using Workspaces = std::map<at::Device, Workspace, DeviceOrder>;

// The workspace of a device, which is made if there is none yet.
Workspace& workspace(Workspaces& all, at::Device device);

}  // namespace mup2
