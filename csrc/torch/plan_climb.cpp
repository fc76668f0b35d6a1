// The first pass, and what it leaves behind for those who ask.
#include <cmath>

#include "torch/plan.h"

namespace mup2 {

bool Plan::climb(const py::list& groups, const py::object& phase, const std::string& variant,
                 const py::object& reduce) {
  const at::NoGradGuard no_grad;
  const Variant kind = variant_of(variant);
  Climb climb(backups_.size());
  for (py::handle group : groups)
    if (!collect(group, !reduce.is_none(), climb)) return false;
  if (perturbed_.among(climb.changed)) return false;
  if (backups_.size() > climb.n_backups) backups_.keep(climb.n_backups);
  for (const Tensor* w : climb.changed) bump(*w);
  run(climb, kind, reduce);
  // In C++, because an interrupt may come before Python has the result. Not earlier, because until now the backups were
  // those of the step before.
  if (PyObject_SetAttr(phase.ptr(), keys().backups.ptr(), backups_.list().ptr())) throw py::error_already_set();
  climb.entries.copy_back();
  return true;
}

// Adds the parameters of a group. with_empty: those of which this process has an empty part take part in the norm too.
bool Plan::collect(py::handle group, bool with_empty, Climb& climb) {
  const Keys& k = keys();
  const double rho = get(group, k.rho).cast<double>();
  climb.radii.push_back({is_true(get(group, k.maximize)) ? -rho : rho, get(group, k.gradnorm_scaling).cast<double>()});
  if (!is_true(get(group, k.perturb))) return true;
  const int number = climb.radii.size() - 1;
  for (py::handle parameter : get(group, k.params)) {
    const Tensor &p = unpack(parameter), &w = local(p), &g = local(p.grad());
    if (!g.defined()) continue;
    if (g.layout() != at::kStrided || g.is_complex()) return false;
    check_device(w);
    const int index = climb.n_backups++;
    const Tensor& backup = this->backup(index, parameter, w);
    climb.changed.push_back(&p);
    if (w.numel() == 0) {
      if (with_empty) climb.entries.add_zero(w, g, number).index = index;
      continue;
    }
    climb.entries.add(w, number).index = index;
    climb.entries.set(kG, g, false);
    climb.entries.set(kBackup, backup, true);
  }
  return true;
}

// The backup of the n-th perturbed parameter: the one of the last step if it fits.
const Tensor& Plan::backup(size_t n, py::handle parameter, const Tensor& w) {
  if (n < backups_.size()) {
    if (backups_.parameter(n).ptr() == parameter.ptr()) {
      const Tensor& last = backups_.backup(n);
      if (last.sizes() == w.sizes() && last.scalar_type() == w.scalar_type() && last.device() == w.device() &&
          (last.strides() == w.strides() || !w.is_non_overlapping_and_dense()))
        return last;
    }
    backups_.keep(n);
  }
  backups_.append(parameter, at::empty_like(w.detach()));
  return backups_.backup(n);
}

void Plan::run(Climb& climb, Variant variant, const py::object& reduce) {
  Reduce call;
  if (!reduce.is_none())
    call = [&](const Tensor& sums, const DeviceEntry* begin, const DeviceEntry* end) {
      std::vector<int> rows;
      for (const DeviceEntry* e = begin; e != end; ++e) rows.push_back(e->index);
      const py::gil_scoped_acquire acquire;
      reduce(sums, rows);
    };
  const py::gil_scoped_release release;
  auto& list = climb.entries.list;
  climb.entries.sort();
  order_.clear();
  mup2::norms(list, climb.radii, variant, workspaces_, call);
  per_device(list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
    perturb(begin, end, workspace(workspaces_, device).state().coefficient, variant);
    auto& index = order_[device];
    for (const DeviceEntry* e = begin; e != end; ++e) index.push_back(e->index);
  });
  for (auto& [device, ws] : workspaces_)
    if (!order_.count(device)) copy_flag_to(ws);
}

// For a device without perturbed tensors: the flag of those with some, or 0 if no device has any.
void Plan::copy_flag_to(Workspace& ws) {
  if (order_.empty())
    ws.nonfinite().zero_();
  else
    ws.nonfinite().copy_(workspace(workspaces_, order_.begin()->first).nonfinite());
}

bool Plan::finite() {
  for (auto& [device, ws] : workspaces_)
    if (ws.nonfinite().item<int>()) return false;
  return true;
}

int64_t Plan::skipped() {
  int64_t sum = 0;
  for (auto& [device, ws] : workspaces_) sum += ws.skipped().item<int64_t>();
  return sum;
}

std::vector<Tensor> Plan::memory() {
  std::vector<Tensor> found;
  for (size_t i = 0; i < backups_.size(); ++i) found.push_back(backups_.backup(i));
  for (Workspaces* all : {&workspaces_, &second_})
    for (auto& [device, ws] : *all) ws.append_to(found);
  return found;
}

py::tuple Plan::norms() {
  std::vector<double> squares(backups_.size());
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
