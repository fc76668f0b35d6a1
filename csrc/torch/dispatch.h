// From entries to launches: the norm, the perturbation and the update, on the devices on which the entries are.
#pragma once
#include <c10/core/DeviceGuard.h>

#include <functional>
#include <string>
#include <vector>

#include "torch/tensors.h"
#include "torch/workspace.h"

namespace mup2 {

// Raises ValueError for an unknown name.
inline Variant variant_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "sam" || name == "elementwise" || name == "layerwise", "unknown variant ", name,
                    ": it is sam, elementwise or layerwise");
  return name == "sam" ? kSam : name == "elementwise" ? kElementwise : kLayerwise;
}

// reduce(sums, entries) adds to the sums of the entries, in place, the sums of other processes that hold parts of the
// same tensors. It may set all sums to NaN.
using Reduce = std::function<void(const Tensor& sums, Slice entries)>;

// The joint norm over all entries, and their coefficients, into the workspaces of their devices. Entries are sorted.
// All or none of them have kSums; with it, the gradients are not read. This is for kSam only.
void norms(const std::vector<DeviceEntry>& entries, const std::vector<Radius>& radii, Variant variant, Workspaces& all,
           const Reduce& reduce = {});

// coefficient: one number per entry, in memory of the device.
void perturb(Slice entries, const double* coefficient, Variant variant);
// hypers: hyper-parameters per group. Entries without gradient, and all entries if control says so, are only restored.
template <class Method>
void update(Slice entries, const std::vector<typename Method::Hyper>& hypers, Control control);

// Calls f(entries, device) for the sorted entries of each device, with that device current.
template <class F> void per_device(const std::vector<DeviceEntry>& list, F f) {
  for (size_t i = 0, j; i < list.size(); i = j) {
    for (j = i; j < list.size() && list[j].device == list[i].device;) ++j;
    const c10::DeviceGuard guard(list[i].device);
    f(Slice(list.data() + i, j - i), list[i].device);
  }
}

// Writes the backups into the weights of all entries.
inline void restore(Entries& entries, Workspaces& all) {
  entries.sort();
  for (DeviceEntry& e : entries.list) e.group = 0;  // the only one: nothing is updated
  per_device(entries.list, [&](Slice slice, at::Device device) {
    update<Sgd>(slice, {Sgd::Hyper{}}, workspace(all, device).control());
  });
  entries.copy_back();
}

}  // namespace mup2
