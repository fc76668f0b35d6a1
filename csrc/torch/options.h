// The options and the state of base optimizers, as torch.optim keeps them and as the kernels take them.
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
    return flag(get(group, key::nesterov), h.nesterov) && number(get(group, key::momentum), h.momentum) &&
           number(get(group, key::dampening), h.dampening) && read_common(group, h);
  }

  bool read(py::handle group, Adam::Hyper& h) {
    memset(&h, 0, sizeof h);
    int32_t amsgrad;
    h.decoupled = decoupled || is_true(get(group, key::decoupled_weight_decay));
    return pair(get(group, key::betas), h.beta1, h.beta2) && flag(get(group, key::amsgrad), amsgrad) && !amsgrad &&
           number(get(group, key::eps), h.eps) && read_common(group, h);
  }

 private:
  // Whether an option is a number, which is then stored.
  static bool number(py::handle option, double& value) {
    if (!option || !(PyFloat_Check(option.ptr()) || PyLong_Check(option.ptr()))) return false;
    value = option.cast<double>();
    return true;
  }

  static bool pair(py::handle option, double& first, double& second) {
    if (!option || !(PyTuple_Check(option.ptr()) || PyList_Check(option.ptr()))) return false;
    const auto two = py::reinterpret_borrow<py::sequence>(option);
    return two.size() == 2 && number(py::object(two[0]), first) && number(py::object(two[1]), second);
  }
  static bool flag(py::handle option, int32_t& value) {
    value = is_true(option);
    return bool(option);
  }

  template <class Hyper> bool read_common(py::handle group, Hyper& h) {
    const py::handle lr = get(group, key::lr);
    if (!flag(get(group, key::maximize), h.maximize) || !number(get(group, key::weight_decay), h.weight_decay))
      return false;
    if (number(lr, h.lr)) return true;
    if (!lr || !THPVariable_Check(lr.ptr())) return false;
    const Tensor& t = local(unpack(lr));
    if (!is_number(t)) return false;
    if (!t.is_cuda()) {
      h.lr = t.item<double>();
      return true;
    }
    if (t.scalar_type() != at::kFloat || !is_plain(t)) return false;
    h.lr_tensor = (const float*)address(t);  // a captured CUDA graph reads it in every replay
    lr_device = t.device();
    return true;
  }
};

// Whether base.step() would take torch's fused kernels, which change moments without counting that as a change.
inline bool is_fused(const py::list& groups) {
  return std::any_of(groups.begin(), groups.end(), [](py::handle group) {
    return PyDict_Check(group.ptr()) && is_true(get(group, key::fused));
  });
}

// One parameter of an update. Tensors are owned by Python. w: the part of the whole that lies in this process. g is
// null without gradient, backup if the parameter was not perturbed. m, v, step: the state, null if it is to be made.
struct Update {
  py::handle parameter, state;
  const Tensor *whole, *w, *g, *backup;
  int group;
  const Tensor *m = nullptr, *v = nullptr, *step = nullptr;
};

// Sets found to state[key], or to null if it is absent or None. Returns false if it is anything but a tensor.
inline bool find(py::handle state, py::handle key, const Tensor*& found) {
  found = nullptr;
  if (!state) return true;
  if (!PyDict_Check(state.ptr())) return false;
  const py::handle value = get(state, key);
  if (!value || value.is_none()) return true;
  if (!THPVariable_Check(value.ptr())) return false;
  found = &local(THPVariable_Unpack(value.ptr()));
  return true;
}

// Finds the state of a parameter. Returns false if no kernel can begin with it. With dampening the first momentum is
// the gradient, unless the step is skipped: only torch's own code makes that.
inline bool find_state(const Sgd::Hyper& h, Update& u) {
  if (h.momentum == 0) return true;
  return find(u.state, key::momentum_buffer, u.m) && (u.m ? fits(*u.m, *u.w) : h.dampening == 0);
}
inline bool find_state(const Adam::Hyper&, Update& u) {
  if (!find(u.state, key::exp_avg, u.m)) return false;
  if (!u.m) return true;
  return find(u.state, key::exp_avg_sq, u.v) && find(u.state, key::step, u.step) && u.v && u.step &&
         fits(*u.m, *u.w) && fits(*u.v, *u.w) && is_plain(*u.step) && is_number(*u.step);
}

// Makes the state that is missing. create(parameter, keys) makes and returns it.
template <class Hyper, class... Keys>
void make_state(const Hyper& h, Update& u, const py::function& create, Keys... keys) {
  if (u.m) return;
  u.state = create(u.parameter, py::make_tuple(keys...));  // a dictionary that the optimizer's state holds
  TORCH_CHECK_TYPE(find_state(h, u) && u.m, "the new state of a parameter does not fit the parameter");
}

// Adds moments and step count to the last entry.
inline void add_state(Entries& entries, const Sgd::Hyper& h, Update& u, const py::function& create) {
  if (h.momentum == 0) return;
  make_state(h, u, create, key::momentum_buffer);
  entries.place(kM, *u.m, true);
}
inline void add_state(Entries& entries, const Adam::Hyper& h, Update& u, const py::function& create) {
  make_state(h, u, create, key::step, key::exp_avg, key::exp_avg_sq);
  entries.place(kM, *u.m, true);
  entries.place(kV, *u.v, true);
  // The kernels need one float32 on the device of the parameter, where the step count then stays.
  if (u.step->device() != u.w->device() || u.step->scalar_type() != at::kFloat) {
    u.state[key::step] = u.step->to(u.w->device(), at::kFloat).clone();
    find(u.state, key::step, u.step);
  }
  entries.list.back().ptr[kSteps] = address(*u.step);
}

}  // namespace mup2
