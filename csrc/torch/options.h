// What the kernels need of a base optimizer's groups and state, as torch.optim keeps them.
#pragma once
#include "core/updates.h"
#include "torch/objects.h"

namespace mup2 {

// Reads the groups of one call. read() returns false if only the base optimizer itself can do the update: an option has
// no kernel, or has no value that is known on the host.
struct OptionsReader {
  bool decoupled;                   // the base optimizer is AdamW. Before torch 2.7 its groups do not say so
  at::Device lr_device = at::kCPU;  // of the last learning rate that is a tensor on a GPU

  bool read(py::handle group, Sgd::Hyper& h) {
    memset(&h, 0, sizeof h);  // the padding too, because batches compare bytes
    const Keys& k = keys();
    const py::handle weight_decay = get(group, k.weight_decay), momentum = get(group, k.momentum);
    const py::handle dampening = get(group, k.dampening);
    if (!is_number(weight_decay) || !is_number(momentum) || !is_number(dampening)) return false;
    h.weight_decay = weight_decay.cast<double>();
    h.momentum = momentum.cast<double>();
    h.dampening = dampening.cast<double>();
    h.nesterov = is_true(get(group, k.nesterov));
    h.maximize = is_true(get(group, k.maximize));
    return read_lr(group, h);
  }

  bool read(py::handle group, Adam::Hyper& h) {
    memset(&h, 0, sizeof h);
    const Keys& k = keys();
    const auto betas = get(group, k.betas).cast<py::sequence>();
    const py::handle weight_decay = get(group, k.weight_decay), eps = get(group, k.eps);
    if (is_true(get(group, k.amsgrad)) || !is_number(betas[0]) || !is_number(betas[1])) return false;
    if (!is_number(weight_decay) || !is_number(eps)) return false;
    h.weight_decay = weight_decay.cast<double>();
    h.eps = eps.cast<double>();
    h.beta1 = betas[0].cast<double>();
    h.beta2 = betas[1].cast<double>();
    h.decoupled = decoupled || is_true(get(group, k.decoupled_weight_decay));
    h.maximize = is_true(get(group, k.maximize));
    return read_lr(group, h);
  }

 private:
  template <class Hyper> bool read_lr(py::handle group, Hyper& h) {
    const py::handle lr = get(group, keys().lr);
    h.lr_tensor = nullptr;
    if (is_number(lr)) {
      h.lr = lr.cast<double>();
      return true;
    }
    if (!lr || !THPVariable_Check(lr.ptr())) return false;
    const Tensor& t = unpack(lr);
    if (!t.is_cuda()) {
      h.lr = t.item<double>();
      return true;
    }
    if (t.scalar_type() != at::kFloat) return false;
    h.lr_tensor = floats(t);  // a captured CUDA graph reads it in every replay
    lr_device = t.device();
    return true;
  }
};

// One parameter of an update. Tensors are owned by Python. g is null without gradient, backup if it was not perturbed.
struct Update {
  py::handle parameter, state;
  const Tensor *w, *g, *backup;
  int group;
};

// state[key], or null if it is absent or None.
inline py::handle find(py::handle state, py::handle key) {
  const py::handle found = state ? get(state, key) : py::handle();
  return found && found.is_none() ? py::handle() : found;
}

// The step count as the kernels need it, one float32 on the device of its parameter, which it then stays.
inline const Tensor& step_count(py::handle state, const Tensor& w) {
  const Tensor& step = unpack(get(state, keys().step));
  if (step.device() == w.device() && step.scalar_type() == at::kFloat) return step;
  state[keys().step] = step.to(w.device(), at::kFloat).clone();
  return unpack(get(state, keys().step));
}

// Whether a kernel can begin with this state. With dampening the first momentum is the gradient, unless the step is
// skipped: only torch's own code makes that.
inline bool fits(const Sgd::Hyper& h, py::handle state) {
  return h.momentum == 0 || h.dampening == 0 || find(state, keys().momentum_buffer);
}
inline bool fits(const Adam::Hyper&, py::handle) { return true; }

// Adds moments and step count to the last entry. create(parameter, keys) makes and returns the state that is missing.
inline void add_state(Entries& entries, const Sgd::Hyper& h, const Update& u, const py::function& create) {
  if (h.momentum == 0) return;
  const Keys& k = keys();
  py::handle momentum = find(u.state, k.momentum_buffer);
  if (!momentum) momentum = get(create(u.parameter, py::make_tuple(k.momentum_buffer)), k.momentum_buffer);
  entries.set(kM, local(unpack(momentum)), true);
}

inline void add_state(Entries& entries, const Adam::Hyper&, const Update& u, const py::function& create) {
  const Keys& k = keys();
  py::handle state = u.state;
  if (!find(state, k.exp_avg)) state = create(u.parameter, py::make_tuple(k.step, k.exp_avg, k.exp_avg_sq));
  entries.set(kM, local(unpack(get(state, k.exp_avg))), true);
  entries.set(kV, local(unpack(get(state, k.exp_avg_sq))), true);
  entries.list.back().ptr[kSteps] = floats(step_count(state, *u.w));
}

}  // namespace mup2
