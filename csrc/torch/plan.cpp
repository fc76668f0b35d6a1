#include "torch/plan.h"

#include <algorithm>
#include <cmath>

namespace mup2 {

bool Plan::climb(const py::list& groups, const py::object& phase, const std::string& variant,
                 const py::object& reduce, const py::list& backups, const py::object& state,
                 const py::str& moment) {
  const at::NoGradGuard no_grad;
  const Variant kind = variant_of(variant);
  Climb climb(backups, state, moment);
  for (py::handle group : groups)
    if (!collect(group, !reduce.is_none(), climb)) return false;
  if (perturbed_.among(climb.changed)) return false;
  climb.backups.keep(n_backups_ = climb.n_backups);
  for (const Tensor* w : climb.changed) bump(*w);
  sums_moments_ = may_sum && climb.moments && kind == kSam;
  run(climb, kind, reduce);
  sums_.clear();
  // In C++, because an interrupt may come before Python has the result. Not earlier, because until now the backups were
  // those of the step before.
  if (PyObject_SetAttr(phase.ptr(), key::backups.ptr(), backups.ptr())) throw py::error_already_set();
  climb.entries.copy_back();
  return true;
}

// Adds the parameters of a group. with_empty: those of which this process has an empty part take part in the norm too.
bool Plan::collect(py::handle group, bool with_empty, Climb& climb) {
  if (!PyDict_Check(group.ptr())) return false;
  double rho, gradnorm_scaling;
  const py::handle perturb = get(group, key::perturb), params = get(group, key::params);
  const auto in_range = [](double x) { return x >= 0 && x < HUGE_VAL; };
  if (!perturb || !params || !number(get(group, key::rho), rho) || !in_range(rho) ||
      !number(get(group, key::gradnorm_scaling), gradnorm_scaling) || !in_range(gradnorm_scaling) || !gradnorm_scaling)
    return false;  // torch_passes says what is wrong
  const bool downhill = climb.moments || is_true(get(group, key::maximize));
  climb.radii.push_back({downhill ? -rho : rho, gradnorm_scaling});
  if (!is_true(perturb)) return true;
  const int group_number = climb.radii.size() - 1;
  for (py::handle parameter : params) {
    const Tensor &p = unpack(parameter), &w = local(p);
    const Tensor* direction = p.grad().defined() ? &local(p.grad()) : nullptr;
    if (climb.moments && !find(climb.moments->find(parameter), climb.moment, direction)) return false;
    if (!direction) continue;
    const Tensor& g = *direction;
    if (!is_gradient(g, w)) return false;
    const int index = climb.n_backups++;
    const Tensor& backup = climb.backups.backup(index, parameter, w);
    climb.changed.push_back(&p);
    if (w.numel() == 0) {
      if (with_empty) climb.entries.add_zero(w, g, group_number).index = index;
      continue;
    }
    climb.entries.add(w, group_number).index = index;
    climb.entries.set(kG, g, false);
    climb.entries.place(kBackup, backup, true);
    if (climb.moments) climb.entries.list.back().ptr[kSums] = sums_.take(g);
  }
  return true;
}

void Plan::run(Climb& climb, Variant variant, const py::object& reduce) {
  Reduce call;
  if (!reduce.is_none())
    call = [&](const Tensor& sums, Slice entries) {
      std::vector<int> rows;
      for (const DeviceEntry& e : entries) rows.push_back(e.index);
      const py::gil_scoped_acquire acquire;
      reduce(sums, rows);
    };
  const py::gil_scoped_release release;
  auto& list = climb.entries.list;
  if (!sums_moments_ || !std::all_of(list.begin(), list.end(), [](const auto& e) { return e.ptr[kSums]; }))
    for (DeviceEntry& e : list) e.ptr[kSums] = nullptr;
  climb.entries.sort();
  order_.clear();
  mup2::norms(list, climb.radii, variant, workspaces_, call);
  per_device(list, [&](Slice entries, at::Device device) {
    perturb(entries, workspace(workspaces_, device).state().coefficient, variant);
    auto& index = order_[device];
    for (const DeviceEntry& e : entries) index.push_back(e.index);
  });
  for (auto& [device, ws] : workspaces_)
    if (!order_.count(device)) copy_flag_to(ws);
}

// ------------------------------------------------------------------------------------------------ second pass

// The arguments of descend().
struct Plan::Descent {
  const py::list& groups;
  const py::dict& state;
  const py::object& phase;
  const py::function& create;
  const Tensor *grad_scale, *found_inf;  // or null
  bool skip_nonfinite, decoupled, sums;
  const py::object& share;
};

bool Plan::descend(const py::list& groups, const py::dict& state, const py::object& phase, const std::string& method,
                   const py::function& create, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf, bool skip_nonfinite, const py::object& share) {
  const at::NoGradGuard no_grad;
  const auto number = [](const std::optional<Tensor>& t) { return t ? &local(*t) : nullptr; };
  const Descent d = {groups, state, phase, create, number(grad_scale), number(found_inf), skip_nonfinite,
                     method == "adamw", sums_moments_ && share.is_none() && !is_fused(groups), share};
  for (const Tensor* t : {d.grad_scale, d.found_inf})
    if (t && !is_number(*t)) return false;
  return method == "sgd" ? descend_with<Sgd>(d) : descend_with<Adam>(d);
}

template <class Method> bool Plan::descend_with(const Descent& d) {
  std::vector<typename Method::Hyper> hypers;  // per group
  std::vector<Update> updates;
  if (!collect<Method>(d, hypers, updates)) return false;
  sums_.clear();
  Entries entries(updates.size());
  for (Update& u : updates) {
    entries.add(*u.w, u.group);
    if (u.backup) entries.place(kBackup, *u.backup, false);
    if (u.g) entries.set(kG, *u.g, d.grad_scale != nullptr);
    if (u.g) add_state(entries, hypers[u.group], u, d.create);
    if (u.g && u.m && d.sums && u.w->numel()) entries.list.back().index = sums_.add(*u.m);
  }
  // A process without any part of the tensors launches for one zero, and so counts a step that is skipped.
  const auto has_gradient = [](const DeviceEntry& e) { return e.numel && e.ptr[kG]; };
  if (!d.share.is_none() && std::none_of(entries.list.begin(), entries.list.end(), has_gradient)) {
    const auto u = std::find_if(updates.begin(), updates.end(), [](const Update& u) { return u.g; });
    if (u != updates.end()) entries.add_zero(*u->w, *u->g, u->group);
  }
  for (const Update& u : updates) {
    bump(*u.whole);
    if (u.m) bump_moment(*u.m);
  }
  run<Method>(entries, hypers, d);
  if (d.sums) sums_.confirm();
  if (PyObject_SetAttr(d.phase.ptr(), key::backups.ptr(), Py_None)) throw py::error_already_set();
  return true;
}

// Collects what is to be restored or updated. Everything that may turn out to have no kernel is looked at here, before
// any state is made. Returns false if there is no kernel, or no work for one.
template <class Method>
bool Plan::collect(const Descent& d, std::vector<typename Method::Hyper>& hypers, std::vector<Update>& updates) {
  const Backups backups(d.phase.attr(key::backups));
  OptionsReader reader = {d.decoupled};
  States states(d.state);
  std::vector<const Tensor*> changed;
  size_t taken = 0;  // backups
  bool work = false;
  for (py::handle group : d.groups) {
    auto& hyper = hypers.emplace_back();
    if (!PyDict_Check(group.ptr()) || !reader.read(group, hyper) || !get(group, key::params)) return false;
    for (py::handle parameter : get(group, key::params)) {
      const Tensor &p = unpack(parameter), &w = local(p), &g = local(p.grad());
      Update u = {parameter, {}, &p, &w, g.defined() ? &g : nullptr, nullptr, int(hypers.size()) - 1};
      if (taken < backups.size() && backups.parameter(taken).ptr() == parameter.ptr())
        u.backup = &local(backups.backup(taken++));
      if (!u.backup && !u.g) continue;
      if (u.g ? !is_gradient(g, w) : !has_kernel(w)) return false;
      if (u.backup && !fits(*u.backup, w)) return false;
      if (hyper.lr_tensor && reader.lr_device != w.device()) return false;
      if (u.g) u.state = states.find(parameter);
      if (u.g && !find_state(hyper, u)) return false;
      work |= u.g && p.numel();  // of the whole tensor, not of this process's part: all processes must decide alike
      updates.push_back(u);
      changed.push_back(&p);
    }
  }
  // Without work no kernel would run, and none would count a skipped step. Backups that are left over belong to
  // parameters that have moved to another place between the passes, or that have left.
  return work && taken == backups.size() && !updated_.among(changed);
}

template <class Method>
void Plan::run(Entries& entries, const std::vector<typename Method::Hyper>& hypers, const Descent& d) {
  const py::gil_scoped_release release;
  entries.sort();
  if (d.skip_nonfinite) find_nonfinite(entries, d.share);
  bool counts = true;
  per_device(entries.list, [&](Slice slice, at::Device device) {
    const bool known = workspaces_.count(device);
    Workspace& ws = workspace(workspaces_, device);
    if (!known) copy_flag_to(ws);
    Control control = ws.control();
    Tensor scale, inf, skipped = ws.skipped();
    if (d.grad_scale) control.grad_scale = (float*)address(scale = float_on(device, *d.grad_scale));
    if (d.found_inf) control.found_inf = (float*)address(inf = float_on(device, *d.found_inf));
    if (d.skip_nonfinite && second_.count(device)) control.nonfinite_second = second_.at(device).control().nonfinite;
    if (d.sums) control.sums = sums_.place(slice, device);
    if (counts) control.skipped = skipped.data_ptr<int64_t>();
    counts = false;  // the first device counts for all
    update<Method>(slice, hypers, control);
  });
  entries.copy_back();
}

// Sets the flag of each workspace of the second pass: whether a gradient of the second pass is not finite.
void Plan::find_nonfinite(const Entries& entries, const py::object& share) {
  std::vector<DeviceEntry> with_gradient;
  for (DeviceEntry e : entries.list) {
    workspace(second_, e.device);
    e.group = 0;
    if (e.ptr[kG] && e.numel) with_gradient.push_back(e);
  }
  for (auto& [device, ws] : second_) ws.nonfinite().zero_();  // the norm sets it on devices with gradients only
  mup2::norms(with_gradient, {{1, 1}}, kSam, second_);
  const py::gil_scoped_acquire acquire;
  if (!share.is_none())
    for (auto& [device, ws] : second_) share(ws.nonfinite());
}

void Plan::restore(const py::list& backups) {
  const at::NoGradGuard no_grad;
  const Backups given(backups);
  Entries entries(given.size());
  std::vector<std::pair<const Tensor*, const Tensor*>> others;  // to which no kernel fits
  for (size_t i = 0; i < given.size(); ++i) {
    const Tensor &p = unpack(given.parameter(i)), &w = local(p), &backup = local(given.backup(i));
    bump(p);
    if (!has_kernel(w) || !has_kernels(w.device()) || !fits(backup, w)) {
      others.emplace_back(&w, &backup);
      continue;
    }
    entries.add(w, 0);
    entries.place(kBackup, backup, false);
  }
  const py::gil_scoped_release release;
  mup2::restore(entries, workspaces_);
  for (const auto& [w, backup] : others) w->copy_(*backup);
}

py::tuple Plan::norms() {
  std::vector<double> squares(n_backups_);
  double square = 0;
  for (auto& [device, index] : order_) {
    Workspace& ws = workspace(workspaces_, device);
    const Tensor contribution = ws.contribution().cpu();
    for (size_t i = 0; i < index.size(); ++i) squares[index[i]] = contribution.data_ptr<double>()[i];
    square = ws.square().item<double>();
  }
  py::list each;
  for (double x : squares) each.append(std::sqrt(x));
  return py::make_tuple(std::sqrt(square), each);
}

}  // namespace mup2
