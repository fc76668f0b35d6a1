// What the plan reads from Python's objects: tensors, whether they share memory, keys of groups, backups.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "torch/tensors.h"

namespace mup2 {

namespace py = pybind11;

// The tensor that a Python object is. Raises TypeError if it is none.
inline const Tensor& unpack(py::handle h) {
  TORCH_CHECK_TYPE(h && THPVariable_Check(h.ptr()), "mup2_fused: a tensor is missing, or is another object");
  return THPVariable_Unpack(h.ptr());
}
inline bool is_subclass(const Tensor& t) { return t.unsafeGetTensorImpl()->is_python_dispatch(); }
[[gnu::noinline]] inline const Tensor& part_of_subclass(const Tensor& t) {
  const py::object whole = py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
  if (py::hasattr(whole, "_local_tensor")) return part_of_subclass(unpack(whole.attr("_local_tensor")));
  if (!py::hasattr(whole, "trigger_wait")) return t;
  whole.attr("trigger_wait")();
  return unpack(whole.attr("elem"));
}
// The part of a DTensor that lies in this process, and the result of a collective, for which this waits. The subclass
// keeps it alive. Any other tensor itself.
inline const Tensor& local(const Tensor& t) { return is_subclass(t) ? part_of_subclass(t) : t; }
// Tells autograd that a tensor changes.
inline void bump(const Tensor& t) {
  t.unsafeGetTensorImpl()->bump_version();
  if (is_subclass(t) && &local(t) != &t) local(t).unsafeGetTensorImpl()->bump_version();
}

// The same for a moment, which may come from inference mode, where nothing is counted.
inline void bump_moment(const Tensor& t) {
  if (!t.is_inference()) bump(t);
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
      const char* begin = (const char*)address(t);
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
inline const py::handle fused = make("fused");
inline const py::handle amsgrad = make("amsgrad"), decoupled_weight_decay = make("decoupled_weight_decay");
inline const py::handle momentum_buffer = make("momentum_buffer"), step = make("step");
inline const py::handle exp_avg = make("exp_avg"), exp_avg_sq = make("exp_avg_sq");
inline const py::handle backups = make("backups");  // of the phase
}  // namespace key

// dict[key], a borrowed reference; null if the key is absent.
inline py::handle get(py::handle dict, py::handle key) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}
// Whether a value is a number or can be made one, which is then stored.
inline bool number(py::handle value, double& number) {
  number = value ? PyFloat_AsDouble(value.ptr()) : 0;
  const bool failed = !value || (number == -1 && PyErr_Occurred());
  PyErr_Clear();
  return !failed;
}
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

// A list of (parameter, backup), as Phase.backups holds it. It belongs to Python, so that the garbage collector sees
// which parameters the optimizer holds: they may hold the optimizer in turn.
class Backups {
 public:
  explicit Backups(py::list list) : list_(std::move(list)) {
    for (size_t i = 0; i < size(); ++i) {
      PyObject* const pair = PyList_GET_ITEM(list_.ptr(), i);
      TORCH_CHECK_TYPE(PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2, "backups are pairs (parameter, backup)");
    }
  }
  size_t size() const { return PyList_GET_SIZE(list_.ptr()); }
  py::handle parameter(size_t i) const { return PyTuple_GET_ITEM(PyList_GET_ITEM(list_.ptr(), i), 0); }
  const Tensor& backup(size_t i) const { return unpack(PyTuple_GET_ITEM(PyList_GET_ITEM(list_.ptr(), i), 1)); }
  // The backup of the n-th perturbed parameter: the one of the last step if it fits.
  const Tensor& backup(size_t n, py::handle parameter, const Tensor& w) {
    if (n < size() && this->parameter(n).ptr() == parameter.ptr()) {
      const Tensor& last = backup(n);
      if (fits(last, w) && (equal(last.strides(), w.strides()) || !w.is_non_overlapping_and_dense())) return last;
    }
    keep(n);
    list_.append(py::make_tuple(parameter, py::cast(at::empty_like(w.detach()))));
    return backup(n);
  }
  void keep(size_t n) { PyList_SetSlice(list_.ptr(), n, size(), nullptr); }  // the first n; the others are dropped

 private:
  py::list list_;
};

}  // namespace mup2
