// The second pass.
#include <algorithm>

#include "torch/plan.h"

namespace mup2 {

bool Plan::descend(const py::list& groups, const py::dict& state, const py::object& phase, const std::string& method,
                   const py::function& create, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf, bool skip_nonfinite, const py::object& share) {
  const at::NoGradGuard no_grad;
  const UpdateOptions options = {grad_scale, found_inf, skip_nonfinite, true, share};
  const Descent d = {groups, state, phase, create, method == "adamw", options};
  return method == "sgd" ? descend_with<Sgd>(d) : descend_with<Adam>(d);
}

void Plan::restore(const py::list& backups) {
  const at::NoGradGuard no_grad;
  const Backups given(backups);
  Entries entries(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    const Tensor& p = unpack(given.parameter(i));
    entries.add(local(p), 0);
    entries.set(kBackup, local(given.backup(i)), false);
    bump(p);
  }
  UpdateOptions options;
  options.counts = false;
  run<Sgd>(entries, {Sgd::Hyper{}}, options);
}

template <class Method> bool Plan::descend_with(const Descent& d) {
  Updates<Method> updates;
  if (!collect(d, updates) || updated_.among(updates.changed)) return false;
  Entries entries(updates.list.size());
  for (const Update& u : updates.list) {
    entries.add(*u.w, u.group);
    if (u.backup) entries.set(kBackup, *u.backup, false);
    if (u.g) entries.set(kG, *u.g, d.options.grad_scale.has_value());
    if (u.g) add_state(entries, updates.hypers[u.group], u, d.create);
  }
  // A process without any part of the tensors launches for one zero, and so counts a step that is skipped.
  const auto has_gradient = [](const DeviceEntry& e) { return e.numel && e.ptr[kG]; };
  if (!d.options.share.is_none() && std::none_of(entries.list.begin(), entries.list.end(), has_gradient)) {
    const auto u = std::find_if(updates.list.begin(), updates.list.end(), [](const Update& u) { return u.g; });
    if (u != updates.list.end()) entries.add_zero(*u->w, *u->g, u->group);
  }
  for (const Tensor* w : updates.changed) bump(*w);
  run<Method>(entries, updates.hypers, d.options);
  if (PyObject_SetAttr(d.phase.ptr(), keys().backups.ptr(), Py_None)) throw py::error_already_set();
  return true;
}

// Collects what is to be restored or updated. Everything that may turn out to have no kernel is looked at here, before
// any state is made. Returns false if there is no kernel, or no work for one.
template <class Method> bool Plan::collect(const Descent& d, Updates<Method>& updates) {
  const Backups backups(d.phase.attr(keys().backups));
  OptionsReader reader = {d.decoupled};
  States states(d.state);
  size_t taken = 0;  // backups
  bool work = false;
  for (py::handle group : d.groups) {
    updates.hypers.emplace_back();
    const auto& hyper = updates.hypers.back();
    if (!reader.read(group, updates.hypers.back())) return false;
    for (py::handle parameter : get(group, keys().params)) {
      const Tensor &p = unpack(parameter), &w = local(p), &g = local(p.grad());
      Update u = {parameter, {}, &w, g.defined() ? &g : nullptr, nullptr, int(updates.hypers.size()) - 1};
      if (taken < backups.size() && backups.parameter(taken).ptr() == parameter.ptr())
        u.backup = &local(backups.backup(taken++));
      if (!u.backup && !u.g) continue;
      if (!has_kernel(w) || (u.g && !has_kernel(g))) return false;
      if (hyper.lr_tensor && reader.lr_device != w.device()) return false;
      if (u.g) u.state = states.find(parameter);
      if (u.g && !fits(hyper, u.state)) return false;
      work |= u.g && p.numel();  // of the whole tensor, not of this process's part: all processes must decide alike
      updates.list.push_back(u);
      updates.changed.push_back(&p);
    }
  }
  // Without work no kernel would run, and none would count a skipped step. Backups that are left over belong to
  // parameters that have moved to another place between the passes, or that have left.
  return work && taken == backups.size();
}

template <class Method>
void Plan::run(Entries& entries, const std::vector<typename Method::Hyper>& hypers, const UpdateOptions& options) {
  const py::gil_scoped_release release;
  entries.sort();
  if (options.skip_nonfinite) find_nonfinite(entries, options.share);
  bool counts = options.counts;
  per_device(entries.list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
    const bool known = workspaces_.count(device);
    Workspace& ws = workspace(workspaces_, device);
    if (!known) copy_flag_to(ws);
    Control control = ws.control();
    Tensor scale, inf, skipped = ws.skipped();
    if (options.grad_scale) control.grad_scale = floats(scale = options.grad_scale->to(device, at::kFloat));
    if (options.found_inf) control.found_inf = floats(inf = options.found_inf->to(device, at::kFloat));
    if (options.skip_nonfinite && second_.count(device))
      control.nonfinite_second = second_.at(device).control().nonfinite;
    if (counts) control.skipped = skipped.data_ptr<int64_t>();
    counts = false;  // the first device counts for all
    update<Method>(begin, end, hypers, control);
  });
  entries.copy_back();
}

// Sets the flag of each workspace of the second pass: whether a gradient of the second pass is not finite.
void Plan::find_nonfinite(const Entries& entries, const py::object& share) {
  std::vector<DeviceEntry> with_gradient;
  for (const DeviceEntry& e : entries.list)
    if (e.ptr[kG] && e.numel) {
      with_gradient.push_back(e);
      with_gradient.back().group = 0;
    }
  for (const DeviceEntry& e : entries.list) workspace(second_, e.device);
  for (auto& [device, ws] : second_) ws.nonfinite().zero_();  // the norm sets it on devices with gradients only
  mup2::norms(with_gradient, {{1, 1}}, kSam, second_);
  const py::gil_scoped_acquire acquire;
  if (!share.is_none())
    for (auto& [device, ws] : second_) share(ws.nonfinite());
}

}  // namespace mup2
