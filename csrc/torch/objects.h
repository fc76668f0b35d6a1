// What the plan reads from Python's objects: tensors, whether they share memory, and the options and the state of base
// optimizers, as torch.optim keeps them.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "core/updates.h"
#include "torch/tensors.h"

namespace mup2 {

namespace py = pybind11;

// The tensor that a Python object is. Raises TypeError if it is none.
inline const Tensor& unpack(py::handle h) {
  TORCH_CHECK_TYPE(h && THPVariable_Check(h.ptr()), "mup2_fused: a tensor is missing, or is another object");
  return THPVariable_Unpack(h.ptr());
}
[[gnu::noinline]] inline const Tensor& part_of_subclass(const Tensor& t) {
  const py::object whole = py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
  if (!py::hasattr(whole, "_local_tensor")) return t;
  const py::object part = whole.attr("_local_tensor");
  return unpack(py::hasattr(part, "trigger_wait") ? part.attr("trigger_wait")() : part);  // waits for its collective
}
// The part of a DTensor that lies in this process, which the DTensor keeps alive. Any other tensor itself.
inline const Tensor& local(const Tensor& t) { return is_subclass(t) ? part_of_subclass(t) : t; }
// Tells autograd that a tensor changes.
inline void bump(const Tensor& t) {
  t.unsafeGetTensorImpl()->bump_version();
  if (is_subclass(t) && &local(t) != &t) local(t).unsafeGetTensorImpl()->bump_version();
}

// Whether some of the tensors may share memory. Then a launch must not have them together.
class Overlap {
 public:
  bool among(const std::vector<const Tensor*>& tensors) {
    ranges_.clear();
    for (const Tensor* whole : tensors) {
      const Tensor& t = local(*whole);
      if (t.numel() == 0) continue;
      if (overlaps_itself(t)) return true;
      int64_t extent = t.numel();
      if (!t.is_non_overlapping_and_dense()) {
        extent = 1;
        for (int64_t i = 0; i < t.dim(); ++i) extent += (t.size(i) - 1) * t.stride(i);
      }
      const char* begin = (const char*)t.data_ptr();
      ranges_.emplace_back(begin, begin + extent * t.itemsize());
    }
    if (ranges_ == known_) return answer_;  // parameters rarely move
    known_ = ranges_;
    std::sort(ranges_.begin(), ranges_.end());
    answer_ = false;
    for (size_t i = 1; i < ranges_.size(); ++i) answer_ |= ranges_[i].first < ranges_[i - 1].second;
    return answer_;
  }

 private:
  std::vector<std::pair<const char*, const char*>> ranges_, known_;
  bool answer_ = false;
};

// The keys that the plan looks up. They are made once: to make and hash a key takes longer than to look it up.
namespace key {
inline py::handle make(const char* text) { return PyUnicode_InternFromString(text); }
inline const py::handle params = make("params"), rho = make("rho"), gradnorm_scaling = make("gradnorm_scaling");
inline const py::handle perturb = make("perturb"), maximize = make("maximize"), lr = make("lr");
inline const py::handle weight_decay = make("weight_decay"), momentum = make("momentum"), eps = make("eps");
inline const py::handle dampening = make("dampening"), nesterov = make("nesterov"), betas = make("betas");
inline const py::handle amsgrad = make("amsgrad"), decoupled_weight_decay = make("decoupled_weight_decay");
inline const py::handle momentum_buffer = make("momentum_buffer"), step = make("step");
inline const py::handle exp_avg = make("exp_avg"), exp_avg_sq = make("exp_avg_sq");
inline const py::handle backups = make("backups");  // of the phase
}  // namespace key

// dict[key], a borrowed reference; null if the key is absent.
inline py::handle get(py::handle dict, py::handle key) { return PyDict_GetItemWithError(dict.ptr(), key.ptr()); }
inline bool is_true(py::handle h) {
  const int answer = h ? PyObject_IsTrue(h.ptr()) : 0;
  if (answer < 0) throw py::error_already_set();
  return answer;
}

// optimizer.state, read in the order in which optimizers fill it. Looking up a parameter would call Python to hash it.
class States {
 public:
  explicit States(py::handle dict) : dict_(dict) {}
  // state[parameter], a borrowed reference; null if it is absent.
  py::handle find(py::handle parameter) {
    PyObject *key, *value;
    Py_ssize_t next = position_;
    if (PyDict_Next(dict_.ptr(), &next, &key, &value) && key == parameter.ptr()) {
      position_ = next;
      return value;
    }
    return PyDict_GetItem(dict_.ptr(), parameter.ptr());
  }

 private:
  py::handle dict_;
  Py_ssize_t position_ = 0;
};

// A list of (parameter, backup), as Phase.backups holds it.
class Backups {
 public:
  explicit Backups(py::list list) : list_(std::move(list)) {}
  size_t size() const { return PyList_GET_SIZE(list_.ptr()); }
  py::handle parameter(size_t i) const { return PyTuple_GET_ITEM(PyList_GET_ITEM(list_.ptr(), i), 0); }
  const Tensor& backup(size_t i) const { return unpack(PyTuple_GET_ITEM(PyList_GET_ITEM(list_.ptr(), i), 1)); }
  void append(py::handle parameter, Tensor backup) {
    list_.append(py::make_tuple(parameter, py::cast(std::move(backup))));
  }
  void keep(size_t n) { PyList_SetSlice(list_.ptr(), n, size(), nullptr); }  // the first n; the others are dropped
  const py::list& list() const { return list_; }

 private:
  py::list list_;
};

// Reads the groups of one call. read() returns false if only the base optimizer itself can do the update: an option has
// no kernel, or has no value that is known on the host.
struct OptionsReader {
  bool decoupled;                   // the base optimizer is AdamW. Before torch 2.7 its groups do not say so
  at::Device lr_device = at::kCPU;  // of the last learning rate that is a tensor on a GPU

  bool read(py::handle group, Sgd::Hyper& h) {
    memset(&h, 0, sizeof h);  // the padding too, because batches compare bytes
    h.nesterov = is_true(get(group, key::nesterov));
    return number(get(group, key::momentum), h.momentum) && number(get(group, key::dampening), h.dampening) &&
           read_common(group, h);
  }

  bool read(py::handle group, Adam::Hyper& h) {
    memset(&h, 0, sizeof h);
    const auto betas = get(group, key::betas).cast<py::sequence>();
    h.decoupled = decoupled || is_true(get(group, key::decoupled_weight_decay));
    return !is_true(get(group, key::amsgrad)) && number(py::object(betas[0]), h.beta1) &&
           number(py::object(betas[1]), h.beta2) && number(get(group, key::eps), h.eps) && read_common(group, h);
  }

 private:
  // Whether an option is a number, which is then stored.
  static bool number(py::handle option, double& value) {
    if (!option || !(PyFloat_Check(option.ptr()) || PyLong_Check(option.ptr()))) return false;
    value = option.cast<double>();
    return true;
  }

  template <class Hyper> bool read_common(py::handle group, Hyper& h) {
    h.maximize = is_true(get(group, key::maximize));
    const py::handle lr = get(group, key::lr);
    if (!number(get(group, key::weight_decay), h.weight_decay)) return false;
    if (number(lr, h.lr)) return true;
    if (!lr || !THPVariable_Check(lr.ptr())) return false;
    const Tensor& t = unpack(lr);
    if (!t.is_cuda()) {
      h.lr = t.item<double>();
      return true;
    }
    if (t.scalar_type() != at::kFloat) return false;
    h.lr_tensor = t.data_ptr<float>();  // a captured CUDA graph reads it in every replay
    lr_device = t.device();
    return true;
  }
};

// One parameter of an update. Tensors are owned by Python. w: the part of the whole that lies in this process. g is
// null without gradient, backup if the parameter was not perturbed.
struct Update {
  py::handle parameter, state;
  const Tensor *whole, *w, *g, *backup;
  int group;
};

// state[key], or null if it is absent or None.
inline py::handle find(py::handle state, py::handle key) {
  const py::handle found = state ? get(state, key) : py::handle();
  return found && found.is_none() ? py::handle() : found;
}

// Whether a kernel can begin with this state. With dampening the first momentum is the gradient, unless the step is
// skipped: only torch's own code makes that.
inline bool fits(const Sgd::Hyper& h, py::handle state) {
  return h.momentum == 0 || h.dampening == 0 || find(state, key::momentum_buffer);
}
inline bool fits(const Adam::Hyper&, py::handle) { return true; }

// Adds moments and step count to the last entry. create(parameter, keys) makes and returns the state that is missing.
inline void add_state(Entries& entries, const Sgd::Hyper& h, const Update& u, const py::function& create) {
  if (h.momentum == 0) return;
  py::handle momentum = find(u.state, key::momentum_buffer);
  if (!momentum) momentum = get(create(u.parameter, py::make_tuple(key::momentum_buffer)), key::momentum_buffer);
  entries.set(kM, local(unpack(momentum)), true);
}

inline void add_state(Entries& entries, const Adam::Hyper&, const Update& u, const py::function& create) {
  py::handle state = u.state;
  if (!find(state, key::exp_avg)) state = create(u.parameter, py::make_tuple(key::step, key::exp_avg, key::exp_avg_sq));
  entries.set(kM, local(unpack(get(state, key::exp_avg))), true);
  entries.set(kV, local(unpack(get(state, key::exp_avg_sq))), true);
  // The kernels need one float32 on the device of the parameter, where the step count then stays.
  const Tensor& step = unpack(get(state, key::step));
  if (step.device() != u.w->device() || step.scalar_type() != at::kFloat)
    state[key::step] = step.to(u.w->device(), at::kFloat).clone();
  entries.list.back().ptr[kSteps] = unpack(get(state, key::step)).data_ptr<float>();
}

}  // namespace mup2
