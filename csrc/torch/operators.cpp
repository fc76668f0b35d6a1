// The kernels as operators, torch.ops.mup2.*, for use under torch.compile.
#include <torch/library.h>

#include "torch/dispatch.h"

namespace mup2 {
namespace {

// Entries of the lists that an operator is given. All tensors are on one device. Empty ones are left out.
struct Lists : Entries {
  struct List {
    int which;  // position in Item::ptr
    at::TensorList tensors;
    bool written, optional = false;
  };
  Lists(at::TensorList w, std::initializer_list<List> others, bool writes_w = true) {
    for (const List& other : others)
      TORCH_CHECK(other.tensors.size() == w.size() || (other.optional && other.tensors.empty()),
                  "lists of tensors must have equal lengths; an optional list may be empty");
    for (size_t i = 0; i < w.size(); ++i) {
      if (writes_w) w[i].unsafeGetTensorImpl()->bump_version();
      TORCH_CHECK(w[i].device() == w[0].device(), "all tensors of one call must be on one device");
      if (w[i].numel() == 0) continue;
      add(w[i], i).index = i;
      for (const List& other : others) {
        if (other.tensors.empty()) continue;
        set(other.which, other.tensors[i], other.written);
        if (other.written && !other.tensors[i].is_inference()) other.tensors[i].unsafeGetTensorImpl()->bump_version();
      }
    }
    sort();
  }
  // For each entry, in the order of the kernels: its position in the operator's lists.
  Tensor positions(at::Device device) const {
    std::vector<int64_t> index;
    for (const DeviceEntry& e : list) index.push_back(e.index);
    return at::tensor(index, at::kLong).to(device);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> joint_norm(at::TensorList w, at::TensorList g, at::ArrayRef<double> rho,
                                                      at::ArrayRef<double> gradnorm_scaling,
                                                      c10::string_view variant) {
  TORCH_CHECK(!w.empty() && rho.size() == w.size() && gradnorm_scaling.size() == w.size(), "joint_norm needs one or "
              "more tensors, and for each of them a gradient, a rho and a gradnorm_scaling");
  Lists lists(w, {{kG, g, false}}, false);
  std::vector<Radius> radii;
  for (size_t i = 0; i < w.size(); ++i) radii.push_back({rho[i], gradnorm_scaling[i]});
  Workspaces all;
  norms(lists.list, radii, variant_of(std::string(variant)), all);
  Workspace& ws = workspace(all, w[0].device());
  if (lists.list.empty()) {
    ws.reserve(0, 0, false);
    ws.norm().zero_();
  }
  const Tensor positions = lists.positions(w[0].device());
  const auto at_positions = [&](const Tensor& x) {
    return at::zeros({int64_t(w.size())}, x.options()).index_copy(0, positions, x);
  };
  return {ws.norm().clone(), at_positions(ws.coefficient()), at_positions(ws.contribution()).sqrt(),
          ws.nonfinite().clone()};
}

void perturb_(at::TensorList w, at::TensorList g, at::TensorList backup, const Tensor& coefficients,
              c10::string_view variant) {
  Lists lists(w, {{kG, g, false}, {kBackup, backup, true}});
  const Tensor c = coefficients.to(at::kDouble).index_select(0, lists.positions(coefficients.device()));
  per_device(lists.list, [&](Slice entries, at::Device device) {
    TORCH_CHECK(c.device() == device, "coefficients must be on the device of the tensors");
    perturb(entries, c.data_ptr<double>(), variant_of(std::string(variant)));
  });
  lists.copy_back();
}

// The update of all entries with the same hyper-parameters. skip, if given: one number; not 0: only restore.
template <class Method>
void update_lists(Lists& lists, const typename Method::Hyper& hyper, const std::optional<Tensor>& skip) {
  for (DeviceEntry& e : lists.list) e.group = 0;
  per_device(lists.list, [&](Slice entries, at::Device device) {
    Workspace ws(device);
    Control control = ws.control();
    Tensor flag;
    TORCH_CHECK(!skip || skip->numel() == 1, "skip must be one number");
    if (skip) control.nonfinite = (int32_t*)address(flag = skip->to(device, at::kInt));
    update<Method>(entries, {hyper}, control);
  });
  lists.copy_back();
}

void restore_(at::TensorList w, at::TensorList backup) {
  Lists lists(w, {{kBackup, backup, false}});
  Workspaces all;
  restore(lists, all);
}

// Sets the learning rate. Returns the tensor that the kernels read it from; it must live until they are started.
template <class Hyper> Tensor set_lr(Hyper& h, const Tensor& lr, const at::TensorList w) {
  const Tensor on_device = !w.empty() && w[0].is_cuda() && lr.is_cuda() ? lr.to(w[0].device(), at::kFloat) : lr;
  h.lr_tensor = on_device.is_cuda() ? (const float*)address(on_device) : nullptr;
  h.lr = h.lr_tensor ? 0 : lr.item<double>();
  return on_device;
}

void sgd_(at::TensorList w, at::TensorList g, at::TensorList backup, at::TensorList momentum_buffer, const Tensor& lr,
          double weight_decay, double momentum, double dampening, bool nesterov, bool maximize, bool first,
          const std::optional<Tensor>& skip) {
  Lists lists(w, {{kG, g, false}, {kBackup, backup, false, true}, {kM, momentum_buffer, true, momentum == 0}});
  Sgd::Hyper h = {0, weight_decay, momentum, dampening, nullptr, nesterov, maximize, first};
  const Tensor keep = set_lr(h, lr, w);
  update_lists<Sgd>(lists, h, skip);
}

void adam_(at::TensorList w, at::TensorList g, at::TensorList backup, at::TensorList exp_avg, at::TensorList exp_avg_sq,
           at::TensorList steps, const Tensor& lr, double weight_decay, double beta1, double beta2, double eps,
           bool decoupled, bool maximize, const std::optional<Tensor>& skip) {
  TORCH_CHECK(steps.size() == w.size(), "adam_ needs a step count for each tensor");
  for (size_t i = 0; i < w.size(); ++i)
    TORCH_CHECK(steps[i].device() == w[i].device() && steps[i].scalar_type() == at::kFloat && steps[i].numel() == 1,
                "a step count is one float32 number on the device of its tensor");
  Lists lists(w, {{kG, g, false}, {kBackup, backup, false, true}, {kM, exp_avg, true}, {kV, exp_avg_sq, true}});
  for (DeviceEntry& e : lists.list) e.ptr[kSteps] = address(steps[e.index]);
  Adam::Hyper h = {0, weight_decay, beta1, beta2, eps, nullptr, decoupled, maximize};
  const Tensor keep = set_lr(h, lr, w);
  update_lists<Adam>(lists, h, skip);
}

void implement(torch::Library& m) {
  m.impl("joint_norm", joint_norm);
  m.impl("perturb_", perturb_);
  m.impl("restore_", restore_);
  m.impl("sgd_", sgd_);
  m.impl("adam_", adam_);
}

TORCH_LIBRARY(mup2, m) {
  m.def("joint_norm(Tensor[] w, Tensor[] g, float[] rho, float[] gradnorm_scaling, str variant) -> "
        "(Tensor norm, Tensor coefficients, Tensor norms, Tensor nonfinite)");
  m.def("perturb_(Tensor(a!)[] w, Tensor[] g, Tensor(b!)[] backup, Tensor coefficients, str variant) -> ()");
  m.def("restore_(Tensor(a!)[] w, Tensor[] backup) -> ()");
  m.def("sgd_(Tensor(a!)[] w, Tensor[] g, Tensor[] backup, Tensor(b!)[] momentum_buffer, Tensor lr, *, "
        "float weight_decay=0, float momentum=0, float dampening=0, bool nesterov=False, bool maximize=False, "
        "bool first=False, Tensor? skip=None) -> ()");
  m.def("adam_(Tensor(a!)[] w, Tensor[] g, Tensor[] backup, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] steps, Tensor lr, *, float weight_decay=0, float beta1=0.9, float beta2=0.999, float eps=1e-8, "
        "bool decoupled=True, bool maximize=False, Tensor? skip=None) -> ()");
}
TORCH_LIBRARY_IMPL(mup2, CPU, m) { implement(m); }
#ifdef MUP2_CUDA
TORCH_LIBRARY_IMPL(mup2, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace mup2
