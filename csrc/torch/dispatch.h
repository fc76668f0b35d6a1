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
Variant variant_of(const std::string& name);

// reduce(sums, begin, end) adds to the sums of the entries [begin, end) of one device, in place, the sums of other
// processes that hold parts of the same tensors. It may set all sums to NaN.
using Reduce = std::function<void(const Tensor& sums, const DeviceEntry* begin, const DeviceEntry* end)>;

// The joint norm over all entries, and their coefficients, into the workspaces of their devices. Entries are sorted.
void norms(std::vector<DeviceEntry>& entries, const std::vector<Radius>& radii, Variant variant, Workspaces& all,
           const Reduce& reduce = {});

// In the next two, the entries [begin, end) belong to one device, which must be current.
// coefficient: one number per entry, in memory of the device.
void perturb(const DeviceEntry* begin, const DeviceEntry* end, const double* coefficient, Variant variant);
// hypers: hyper-parameters per group. Entries without gradient, and all entries if control says so, are only restored.
template <class Method>
void update(const DeviceEntry* begin, const DeviceEntry* end, const std::vector<typename Method::Hyper>& hypers,
            const Control& control);

// Calls f(begin, end, device) for the sorted entries of each device, with that device current.
template <class F> void per_device(std::vector<DeviceEntry>& list, F f) {
  for (size_t i = 0, j; i < list.size(); i = j) {
    for (j = i; j < list.size() && list[j].device == list[i].device;) ++j;
    const c10::DeviceGuard guard(list[i].device);
    f(list.data() + i, list.data() + j, list[i].device);
  }
}

}  // namespace mup2
