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
#include "torch/objects.h"

namespace mup2 {

// How an update is to be done, besides the options of its groups.
struct UpdateOptions {
  std::optional<Tensor> grad_scale, found_inf;  // of torch.amp.GradScaler
  bool skip_nonfinite = false;                  // skip the update if a gradient of the second pass is not finite
  bool counts = true;                           // count the step if it is skipped
  // share(flag), if not None, sets the flag if it is set in another process that holds parts of the tensors.
  py::object share = py::none();
};

// The plan keeps the backups from step to step, and a workspace per device.
class Plan {
 public:
  // First pass: perturbs every parameter that has a gradient, and sets phase.backups to the list of (parameter,
  // backup). Returns false, and has changed nothing, if the kernels cannot do it: a gradient is sparse or complex, or
  // parameters share memory. reduce(sums, rows), if not None, is called once per device. It adds to the sums, in place,
  // the sums of other processes; row k belongs to the perturbed parameter number rows[k].
  bool climb(const py::list& groups, const py::object& phase, const std::string& variant, const py::object& reduce);

  // Second pass: restores and updates at once, and sets phase.backups to None. Returns false, and has changed nothing,
  // if the kernels cannot do it. method: sgd, adam or adamw. create(parameter, keys) makes and returns missing state.
  bool descend(const py::list& groups, const py::dict& state, const py::object& phase, const std::string& method,
               const py::function& create, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, bool skip_nonfinite, const py::object& share);

  void restore(const py::list& backups);

  bool finite();                // whether the last joint norm was finite; waits for the device
  int64_t skipped();            // number of steps that have been skipped; waits for the device
  std::vector<Tensor> memory();  // what the kernels of a captured graph write to, besides parameters, gradients, state
  py::tuple norms();            // (joint norm, [gradnorm_scaling ||T g|| per backup]) of the last first pass

 private:
  struct Climb {
    Entries entries;
    std::vector<Radius> radii;           // per group
    std::vector<const Tensor*> changed;  // parameters
    size_t n_backups = 0;
    explicit Climb(size_t expected) : entries(expected) { changed.reserve(expected); }
  };
  bool collect(py::handle group, bool with_empty, Climb& climb);
  const Tensor& backup(size_t n, py::handle parameter, const Tensor& w);
  void run(Climb& climb, Variant variant, const py::object& reduce);
  void copy_flag_to(Workspace& ws);

  struct Descent {
    const py::list& groups;
    const py::dict& state;
    const py::object& phase;
    const py::function& create;
    bool decoupled;
    UpdateOptions options;
  };
  template <class Method> struct Updates {
    std::vector<typename Method::Hyper> hypers;  // per group
    std::vector<Update> list;
    std::vector<const Tensor*> changed;  // parameters
  };
  template <class Method> bool descend_with(const Descent& d);
  template <class Method> bool collect(const Descent& d, Updates<Method>& updates);
  template <class Method>
  void run(Entries& entries, const std::vector<typename Method::Hyper>& hypers, const UpdateOptions& options);
  void find_nonfinite(const Entries& entries, const py::object& share);

  Backups backups_{py::list()};
  Overlap perturbed_, updated_;
  Workspaces workspaces_;  // of the first pass and of updates
  Workspaces second_;      // of the norm of the second gradient
  std::map<at::Device, std::vector<int>, DeviceOrder> order_;  // per device: which backup each tensor of the norm has
};

}  // namespace mup2
