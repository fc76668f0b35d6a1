#include "torch/workspace.h"

namespace mup2 {

Workspace::Workspace(at::Device device)
    : ints_(at::zeros({IntLayout(0).size}, at::TensorOptions().device(device).dtype(at::kInt))),
      skipped_(at::zeros({1}, at::TensorOptions().device(device).dtype(at::kLong))) {}

void Workspace::reserve(int64_t tensors, int64_t chunks, bool layerwise) {
  static_assert(sizeof(Radius) == 2 * sizeof(double) && sizeof(int32_t) == sizeof(uint32_t));
  layout_ = DoubleLayout(tensors, chunks * (layerwise ? 2 : 1));
  const IntLayout int_layout(tensors);
  if (ints_.numel() < int_layout.size) {
    Tensor more = at::zeros({2 * int_layout.size}, ints_.options());
    more.slice(0, 0, IntLayout::norm_counters).copy_(ints_.slice(0, 0, IntLayout::norm_counters));
    ints_ = more;
  }
  if (!doubles_.defined() || doubles_.numel() < layout_.size)
    doubles_ = at::empty({layout_.size + layout_.size / 4}, ints_.options().dtype(at::kDouble));
  double* d = doubles_.data_ptr<double>();
  int32_t* i = ints_.data_ptr<int32_t>();
  state_.partials = d + layout_.partials;
  state_.contribution = d + layout_.contribution;
  state_.numerator = d + layout_.numerator;
  state_.coefficient = d + layout_.coefficient;
  state_.sums = (double(*)[2])(d + layout_.sums);
  state_.radii = (Radius*)(d + layout_.radii);
  state_.norm = d + layout_.norm;
  state_.nonfinite = i + IntLayout::nonfinite;
  state_.counters = (uint32_t*)(i + IntLayout::norm_counters);
  state_.n_tensors = tensors;
  state_.n_partials = chunks;
}

Control Workspace::control() {
  int32_t* i = ints_.data_ptr<int32_t>();
  Control control = {};
  control.nonfinite = i + IntLayout::nonfinite;
  control.counter = (uint32_t*)(i + IntLayout::update_counter);
  return control;
}

void Workspace::append_to(std::vector<Tensor>& tensors) const {
  for (const Tensor& t : {doubles_, ints_, skipped_})
    if (t.defined()) tensors.push_back(t);
}

Workspace& workspace(Workspaces& all, at::Device device) {
  const auto found = all.find(device);
  return found != all.end() ? found->second : all.emplace(device, Workspace(device)).first->second;
}

}  // namespace mup2
