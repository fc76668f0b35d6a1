// The passes of SAM for an optimizer in eager mode.
//
// A plan reads parameters, gradients and state directly from Python's objects, which takes a fraction of the time that
// passing lists of tensors takes. It never stores a pointer to them beyond a call: users may replace each of them.
#pragma once
#include <ATen/core/grad_mode.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "torch/dispatch.h"
#include "torch/options.h"
#include "torch/sums.h"

namespace mup2 {

// The plan keeps a workspace per device from step to step.
class Plan {
 public:
  // First pass: perturbs every parameter that has a gradient, and sets phase.backups to the list `backups`, which then
  // has (parameter, backup) for each of them. It begins with those of the last step, whose memory is used again.
  // Returns false, and has changed nothing else, if the kernels cannot do it: tensors are sparse, complex or wrap
  // others, or parameters share memory. reduce(sums, rows), if not None, is called once per device. It adds to the
  // sums, in place, the sums of other processes; row k belongs to the perturbed parameter number rows[k].
  // state, if not None: climb against state[parameter][moment], where it exists, instead of along the gradients. For the
  // variant "sam" updates then sum its squares, so that the next climb need not read it for the norm.
  bool climb(const py::list& groups, const py::object& phase, const std::string& variant, const py::object& reduce,
             const py::list& backups, const py::object& state, const py::str& moment);

  // Second pass: restores and updates at once, and sets phase.backups to None. Returns false, and has changed nothing,
  // if the kernels cannot do it. method: sgd, adam or adamw. create(parameter, keys) makes and returns missing state.
  // grad_scale and found_inf are those of torch.amp.GradScaler. skip_nonfinite: skip the update if a gradient of the
  // second pass is not finite. share(flag), if not None, sets that flag if it is set in another process that holds
  // parts of the tensors.
  bool descend(const py::list& groups, const py::dict& state, const py::object& phase, const std::string& method,
               const py::function& create, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, bool skip_nonfinite, const py::object& share);

  // Writes the backups into the weights. torch's copy_() does it where no kernel fits, as for weights that have another
  // type than their backup since model.double() was called.
  void restore(const py::list& backups);

  // Whether updates sum squares for the next climb. Not where moments change without being counted, as in CUDA graphs.
  bool may_sum = true;

  // Whether the last joint norm was finite. This and the next two wait for the device.
  bool finite() {
    for (auto& [device, ws] : workspaces_)
      if (ws.nonfinite().item<int>()) return false;
    return true;
  }
  // The number of steps that have been skipped.
  int64_t skipped() {
    int64_t sum = 0;
    for (auto& [device, ws] : workspaces_) sum += ws.skipped().item<int64_t>();
    return sum;
  }
  py::tuple norms();  // (joint norm, [gradnorm_scaling ||T g|| per backup]) of the last first pass
  // What kernels write to besides parameters, gradients, backups and state.
  std::vector<Tensor> memory() {
    std::vector<Tensor> found;
    for (Workspaces* all : {&workspaces_, &second_})
      for (auto& [device, ws] : *all) ws.append_to(found);
    return found;
  }

 private:
  struct Climb {
    Entries entries;
    std::vector<Radius> radii;           // per group
    std::vector<const Tensor*> changed;  // parameters
    Backups backups;
    size_t n_backups = 0;
    std::optional<States> moments;  // or none: gradients
    py::handle moment;              // the key of the moments
    Climb(const py::list& last, const py::object& state, const py::str& moment)
        : entries(py::len(last)), backups(last), moment(moment) {
      changed.reserve(py::len(last));
      if (!state.is_none()) moments.emplace(state);
    }
  };
  bool collect(py::handle group, bool with_empty, Climb& climb);
  void run(Climb& climb, Variant variant, const py::object& reduce);
  // For a device without perturbed tensors: the flag of those with some, or 0 if no device has any.
  void copy_flag_to(Workspace& ws) {
    if (order_.empty())
      ws.nonfinite().zero_();
    else
      ws.nonfinite().copy_(workspace(workspaces_, order_.begin()->first).nonfinite());
  }

  struct Descent;
  template <class Method> bool descend_with(const Descent& d);
  template <class Method>
  bool collect(const Descent& d, std::vector<typename Method::Hyper>& hypers, std::vector<Update>& updates);
  template <class Method>
  void run(Entries& entries, const std::vector<typename Method::Hyper>& hypers, const Descent& d);
  void find_nonfinite(const Entries& entries, const py::object& share);

  size_t n_backups_ = 0;       // of the last first pass
  bool sums_moments_ = false;  // whether it asks the update for the sums
  MomentSums sums_;
  Overlap perturbed_, updated_;
  Workspaces workspaces_;  // of the first pass and of updates
  Workspaces second_;      // of the norm of the second gradient
  std::map<at::Device, std::vector<int>, DeviceOrder> order_;  // per device: which backup each tensor of the norm has
};

}  // namespace mup2
