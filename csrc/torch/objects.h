// Python objects as the plan sees them: tensors, parameters that share memory, dictionaries of options and state.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "torch/tensors.h"

namespace mup2 {

namespace py = pybind11;

// ------------------------------------------------------------------------------------------------ tensors

// The tensor that a Python object is. Raises TypeError if it is none.
inline const Tensor& unpack(py::handle h) {
  TORCH_CHECK_TYPE(h && THPVariable_Check(h.ptr()), "mup2_fused: a tensor is missing, or is another object");
  return THPVariable_Unpack(h.ptr());
}
inline const Tensor& part_of_subclass(const Tensor& t) {
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

// ------------------------------------------------------------------------------------------------ dictionaries

// The keys that the plan looks up. They are made once: to make and hash a key takes longer than to look it up.
struct Keys {
  py::handle params = make("params"), rho = make("rho"), gradnorm_scaling = make("gradnorm_scaling");
  py::handle perturb = make("perturb"), maximize = make("maximize");
  py::handle lr = make("lr"), weight_decay = make("weight_decay"), momentum = make("momentum");
  py::handle dampening = make("dampening"), nesterov = make("nesterov"), betas = make("betas"), eps = make("eps");
  py::handle amsgrad = make("amsgrad"), decoupled_weight_decay = make("decoupled_weight_decay");
  py::handle momentum_buffer = make("momentum_buffer"), step = make("step");
  py::handle exp_avg = make("exp_avg"), exp_avg_sq = make("exp_avg_sq");
  py::handle backups = make("backups");  // of the phase

 private:
  static py::handle make(const char* text) { return PyUnicode_InternFromString(text); }
};
inline const Keys& keys() {
  static const Keys all;
  return all;
}

// dict[key], a borrowed reference; null if the key is absent.
inline py::handle get(py::handle dict, py::handle key) { return PyDict_GetItemWithError(dict.ptr(), key.ptr()); }
inline bool is_number(py::handle h) { return h && (PyFloat_Check(h.ptr()) || PyLong_Check(h.ptr())); }
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

}  // namespace mup2
