// Between torch and the kernels: checks, layouts, devices, streams, memory. The only file that knows torch.
#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <map>

#include "batches.h"
#include "kernels.h"
#ifdef MUP2_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace mup2 {
namespace {

namespace py = pybind11;
using at::Tensor;

// ---------------------------------------------------------------------------------------------- tensors to pointers

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kF32;
    case at::kDouble: return kF64;
    case at::kBFloat16: return kBF16;
    case at::kHalf: return kF16;
    default:
      TORCH_CHECK_TYPE(false, "mup2_fused takes float32, float64, bfloat16 and float16, not ", t.scalar_type(),
                       "; mup2_ref.SAM takes the others");
  }
}

float* floats(const Tensor& t) { return t.data_ptr<float>(); }
int32_t* ints(const Tensor& t) { return t.data_ptr<int32_t>(); }

bool is_cuda(at::Device d) { return d.is_cuda(); }

void check_device(const Tensor& t) {
  TORCH_CHECK_TYPE(!t.unsafeGetTensorImpl()->is_python_dispatch(), "mup2_fused takes plain tensors and DTensors, no other "
                   "tensor subclasses; mup2_ref.SAM takes those that behave like tensors");
#ifdef MUP2_CUDA
  const bool ours = t.is_cpu() || t.is_cuda();
#else
  TORCH_CHECK(!t.is_cuda(), "mup2_fused was built without CUDA, but a parameter is on ", t.device(), ": build it where "
              "torch has CUDA and nvcc is found (MUP2_CUDA=1 python setup.py build_ext --inplace), or use mup2_ref.SAM");
  const bool ours = t.is_cpu();
#endif
  TORCH_CHECK(ours, "mup2_fused runs on the CPU and on CUDA, not on ", t.device(), "; mup2_ref.SAM runs there");
}

bool equal(at::IntArrayRef a, at::IntArrayRef b) {  // that of ArrayRef is a call of memcmp
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}
bool same_order(const Tensor& a, const Tensor& b) {
  return equal(a.strides(), b.strides()) || (a.is_contiguous() && b.is_contiguous());
}
bool overlaps_itself(const Tensor& t) {
  return !t.is_non_overlapping_and_dense() && at::has_internal_overlap(t) == at::MemOverlap::Yes;
}

// One parameter in one launch. Tensors whose elements do not lie as the parameter's do are copied into its order, and the
// kernels work on the copies; `written` ones are copied back.
struct DeviceEntry : Entry {
  at::Device device = at::kCPU;
  int index = 0;  // the caller's number
  std::tuple<int, int, int> bucket() const { return {is_cuda(device) ? device.index() : -1, types.w, types.g}; }
};

class Entries {
 public:
  std::vector<DeviceEntry> list;
  explicit Entries(size_t expected = 0) { list.reserve(expected); }

  // All tensors of an entry get the strides of w, or if that has gaps those of a contiguous tensor. w must exist until the
  // last set(): a reference counted for every tensor takes longer than the rest.
  DeviceEntry& add(const Tensor& w, int group) {
    list.emplace_back();
    DeviceEntry& e = list.back();
    check_device(w);
    e.numel = w.numel(), e.group = group, e.device = w.device();
    e.types = {type_of(w), type_of(w)};
    order_ = w.is_non_overlapping_and_dense() ? &w : &(contiguous_ = at::empty_like(w, at::MemoryFormat::Contiguous));
    set(kW, w, true);
    return e;
  }
  // In the place of an empty part of a tensor: one element of each kind, which are 0 and stay so.
  DeviceEntry& add_zero(const Tensor& w, const Tensor& g, int group) {
    const auto zero = [&](const Tensor& like) {
      copies_.push_back({{}, at::zeros({}, like.options()), false});  // keeps it
      return copies_.back().copy;
    };
    const Tensor zero_w = zero(w);
    add(zero_w, group);
    set(kG, zero(g), false);
    for (int which : {kBackup, kM, kV}) set(which, zero(w), false);
    list.back().ptr[kSteps] = zero(at::empty({}, w.options().dtype(at::kFloat))).data_ptr();
    return list.back();
  }
  void set(int which, const Tensor& t, bool written) {
    DeviceEntry& e = list.back();
    TORCH_CHECK(equal(t.sizes(), order_->sizes()) && t.device() == e.device, "a tensor of shape ", t.sizes(), " on ", t.device(),
                " belongs to a parameter of shape ", order_->sizes(), " on ", e.device);
    if (t.scalar_type() == order_->scalar_type()) {
      // e.types say so already
    } else if (which == kG) {
      e.types.g = type_of(t);
      TORCH_CHECK_TYPE(e.types.g == e.types.w || e.types.g == kF32, "a gradient is ", t.scalar_type(),
                       ", its parameter another type; only float32 gradients may differ");
    } else {
      TORCH_CHECK_TYPE(false, "a state tensor is ", t.scalar_type(), ", its parameter another type");
    }
    TORCH_CHECK(!written || !overlaps_itself(t), "a tensor that is written has several elements "
                "in one place (shape ", t.sizes(), ", strides ", t.strides(), "): clone() it");
    if (t.numel() == 0) {
      static char nothing;
      e.ptr[which] = &nothing;  // takes part, with no chunk
    } else if (same_order(t, *order_) && !t.is_neg()) {
      e.ptr[which] = t.data_ptr();
    } else {
      Tensor copy = at::empty_strided(order_->sizes(), order_->strides(), t.options());
      copy.copy_(t);
      e.ptr[which] = copy.data_ptr();
      copies_.push_back({t, copy, written});
    }
  }
  void copy_back() {
    for (auto& [tensor, copy, written] : copies_)
      if (written) tensor.copy_(copy);
    copies_.clear();
  }
  // By device and types, otherwise in order.
  void sort() {
    const auto before = [](const DeviceEntry& a, const DeviceEntry& b) { return a.bucket() < b.bucket(); };
    if (!std::is_sorted(list.begin(), list.end(), before)) std::stable_sort(list.begin(), list.end(), before);
  }

 private:
  struct Copy { Tensor tensor, copy; bool written; };
  std::vector<Copy> copies_;
  Tensor contiguous_;
  const Tensor* order_ = nullptr;
};

// ---------------------------------------------------------------------------------------------- entries to launches

const CpuKernels& cpu() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    const char* wish = getenv("MUP2_CPU");
    const std::string name = wish ? wish : "";
    TORCH_CHECK(name.empty() || name == "baseline" || name == "avx2" || name == "avx512",
                "MUP2_CPU is baseline, avx2 or avx512, not ", name);
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (name.empty() || name == "avx512")) return kCpuAvx512;
    if (avx2 && name != "baseline") return kCpuAvx2;
#endif
    return kCpuBaseline;
  }();
  return chosen;
}

// Bytes of the last cache that this processor shares. sysconf() has that of all of an AMD processor's parts together, of
// which a core reaches one.
int64_t last_cache() {
  int64_t kilobytes = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;  // "32768K"
  return kilobytes > 0 ? kilobytes << 10 : 1 << 25;
}
// More bytes than the last cache holds are better written past it.
bool streams(const DeviceEntry* begin, const DeviceEntry* end) {
  static const int64_t cache = last_cache();
  int64_t bytes = 0;
  for (const DeviceEntry* e = begin; e != end; ++e) bytes += e->numel * (e->types.w == kF64 ? 8 : e->types.w == kF32 ? 4 : 2);
  return 3 * bytes > cache;  // w, g and the backup
}

constexpr int64_t kGrain = 1 << 14;      // elements; fewer are not worth another thread
constexpr int64_t kFull = kChunk + 128;  // cost of a full chunk in elements: any chunk takes as long as so many more

// f(begin, end) for chunks of a batch, on as many threads as pay, which get equal work: a model may have one large tensor
// and a hundred that are a chunk each.
template <class B, class F> void in_parallel(const B& batch, F f) {
  const auto work_of = [&](uint32_t i) -> int64_t {
    const uint32_t end = i + 1 < batch.n_items ? batch.items[i + 1].first_chunk : batch.n_chunks;
    return (end - batch.items[i].first_chunk) * kFull + batch.items[i].tail - kChunk;
  };
  int64_t work = 0;
  for (uint32_t i = 0; i < batch.n_items; ++i) work += work_of(i);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (work + kGrain - 1) / kGrain);
  if (threads < 2) return f(0, batch.n_chunks);
  const auto chunk_at = [&](int64_t target) -> int64_t {  // the first one before which so much work lies
    for (uint32_t i = 0; i < batch.n_items; ++i) {
      if (target < work_of(i)) return batch.items[i].first_chunk + (target + kFull - 1) / kFull;
      target -= work_of(i);
    }
    return batch.n_chunks;
  };
  at::parallel_for(0, threads, 1, [&](int64_t a, int64_t b) { f(chunk_at(work * a / threads), chunk_at(work * b / threads)); });
}

#ifdef MUP2_CUDA
void* stream_of(at::Device d) { return c10::cuda::getCurrentCUDAStream(d.index()).stream(); }
void check(int error) { TORCH_CHECK(error == 0, "mup2_fused: CUDA says ", cuda_error(error)); }
#define MUP2_ON_CUDA(call) return check(call)
#else
#define MUP2_ON_CUDA(call)
#endif

// ---------------------------------------------------------------------------------------------- the three phases

// Memory of one device: results of the norm, and counters that kernels leave at 0.
struct Workspace {
  Tensor doubles, ints, skipped;
  NormState state = {};

  explicit Workspace(at::Device d)
      : ints(at::zeros({2}, at::TensorOptions().device(d).dtype(at::kInt))),
        skipped(at::zeros({1}, at::TensorOptions().device(d).dtype(at::kLong))) {}
  // ints: [nonfinite, counter of the update, counters of the norm ...]
  // doubles: [norm, its square, 3 results of each tensor ..., its two sums ..., its radius ..., partials ...]
  void reserve(int64_t tensors, int64_t partials, bool layerwise) {
    static_assert(sizeof(Radius) == 2 * sizeof(double));
    const int64_t n_doubles = 2 + 7 * tensors + partials * (layerwise ? 2 : 1), n_ints = 3 + tensors;
    if (ints.numel() < n_ints) {
      Tensor more = at::zeros({2 * n_ints}, ints.options());
      more.slice(0, 0, 2).copy_(ints.slice(0, 0, 2));
      ints = more;
    }
    if (!doubles.defined() || doubles.numel() < n_doubles)
      doubles = at::empty({n_doubles + n_doubles / 4}, ints.options().dtype(at::kDouble));
    double *d = doubles.data_ptr<double>(), *each = d + 2, *sums = each + 3 * tensors;
    int32_t* i = ints.data_ptr<int32_t>();
    state = {sums + 4 * tensors, each, each + tensors, each + 2 * tensors, (double(*)[2])sums, (Radius*)(sums + 2 * tensors),
             d, i, (uint32_t*)i + 2, int32_t(tensors), partials};
  }
  Tensor sums() const { return doubles.slice(0, 2 + 3 * state.n_tensors, 2 + 5 * state.n_tensors).view({-1, 2}); }
  Control control() {
    int32_t* i = ints.data_ptr<int32_t>();
    return {i, nullptr, nullptr, nullptr, nullptr, (uint32_t*)i + 1};
  }
};

// Norm of entries of one device into ws.
void norm(const DeviceEntry* begin, const DeviceEntry* end, const std::vector<Radius>& radii, Variant variant, Workspace& ws) {
  int64_t partials = 0, tensors = 0;
  for (const DeviceEntry* e = begin; e != end; ++e) partials += chunks_of(e->numel), ++tensors;
  ws.reserve(tensors, partials, variant == kLayerwise);
  const NormState& s = ws.state;
  const at::Device device = begin->device;
  in_batches<NormBatch>(begin, end, radii, [&](const NormBatch& batch, Types types) {
    if (is_cuda(device)) MUP2_ON_CUDA(cuda_norm(batch, s, types, variant, stream_of(device)));
    in_parallel(batch, [&](int64_t a, int64_t b) { cpu().norm(batch, s, types, variant, a, b); });
    for (uint32_t i = 0; i < batch.n_items; ++i) finish_tensor(batch, i, s, variant == kLayerwise);
  });
  if (!is_cuda(device)) finish_all(s, ordered_sum(s.contribution, tensors));
}

// Norm and coefficients again, from sums that have been added up over processes.
void from_sums(Workspace& ws, bool layerwise, at::Device device) {
  if (is_cuda(device)) MUP2_ON_CUDA(cuda_from_sums(ws.state, layerwise, stream_of(device)));
  finish_from_sums(ws.state, layerwise);
}

// Norm and coefficients again, from the square of a norm over more than this device's tensors.
void combine(const Tensor& square, Workspace& ws, at::Device device) {
  if (is_cuda(device)) MUP2_ON_CUDA(cuda_combine(ws.state, square.data_ptr<double>(), stream_of(device)));
  finish_all(ws.state, *square.data_ptr<double>());
}

void perturb(const DeviceEntry* begin, const DeviceEntry* end, const double* coefficient, Variant variant) {
  const at::Device device = begin->device;
  const bool streaming = streams(begin, end);
  in_batches<PerturbBatch>(begin, end, {}, [&](const PerturbBatch& batch, Types types) {
    if (is_cuda(device)) MUP2_ON_CUDA(cuda_perturb(batch, coefficient, types, variant, stream_of(device)));
    in_parallel(batch, [&](int64_t a, int64_t b) {
      cpu().perturb(batch, coefficient, types, variant, streaming, a, b);
    });
  });
}

template <class Method>
void update(const DeviceEntry* begin, const DeviceEntry* end, const std::vector<typename Method::Hyper>& hypers, const Control& control) {
  const at::Device device = begin->device;
  const bool streaming = streams(begin, end);
  Control launch_control = control;
  in_batches<UpdateBatch<Method>>(begin, end, hypers, [&](const UpdateBatch<Method>& batch, Types types) {
    const Control now = launch_control;
    if (batch.n_chunks) launch_control.skipped = nullptr;  // the first launch counts for all
    if (is_cuda(device)) MUP2_ON_CUDA(cuda_update(batch, now, types, stream_of(device)));
    in_parallel(batch, [&](int64_t a, int64_t b) {
      if constexpr (std::is_same_v<Method, Sgd>)
        cpu().sgd(batch, now, types, streaming, a, b);
      else
        cpu().adam(batch, now, types, streaming, a, b);
    });
    const bool skip = skips(now);
    for (uint32_t i = 0; i < batch.n_items; ++i) count_step(batch.items[i], skip);
    if (now.skipped && batch.n_chunks) *now.skipped += skip;
  });
}

// f(begin, end, device) for the entries of each device, with that device current.
template <class F> void per_device(std::vector<DeviceEntry>& list, F f) {
  for (size_t i = 0, j; i < list.size(); i = j) {
    for (j = i; j < list.size() && list[j].device == list[i].device;) ++j;
    const c10::DeviceGuard guard(list[i].device);
    f(list.data() + i, list.data() + j, list[i].device);
  }
}

using Workspaces = std::map<at::Device, Workspace, bool (*)(at::Device, at::Device)>;
bool device_order(at::Device a, at::Device b) { return std::make_pair(a.type(), a.index()) < std::make_pair(b.type(), b.index()); }

Workspace& workspace(Workspaces& all, at::Device device) {
  auto found = all.find(device);
  return found != all.end() ? found->second : all.emplace(device, Workspace(device)).first->second;
}

// Adds sums of tensors over the processes that hold parts of them; may set all to NaN.
using Reduce = std::function<void(const Tensor& sums, const DeviceEntry* begin, const DeviceEntry* end)>;

// The joint norm over entries of any number of devices.
void norms(std::vector<DeviceEntry>& list, const std::vector<Radius>& radii, Variant variant, Workspaces& all,
           const Reduce& reduce = {}) {
  std::vector<at::Device> devices;
  per_device(list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
    Workspace& ws = workspace(all, device);
    norm(begin, end, radii, variant, ws);
    if (reduce) {
      reduce(ws.sums(), begin, end);
      from_sums(ws, variant == kLayerwise, device);
    }
    devices.push_back(device);
  });
  if (devices.size() < 2) return;
  Tensor square = workspace(all, devices[0]).doubles.slice(0, 1, 2).clone();
  for (size_t i = 1; i < devices.size(); ++i) square += workspace(all, devices[i]).doubles.slice(0, 1, 2).to(devices[0]);
  for (at::Device device : devices) {
    const c10::DeviceGuard guard(device);
    combine(square.to(device), workspace(all, device), device);
  }
}

Variant variant_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "sam" || name == "elementwise" || name == "layerwise", "unknown variant ", name);
  return name == "sam" ? kSam : name == "elementwise" ? kElementwise : kLayerwise;
}

// ---------------------------------------------------------------------------------------------- eager: a plan

const Tensor& unpack(py::handle h) {
  TORCH_CHECK_TYPE(h && THPVariable_Check(h.ptr()), "mup2_fused: something that should be a tensor is missing, or none");
  return THPVariable_Unpack(h.ptr());
}
// The part of a DTensor that lies in this process, which the DTensor keeps alive; any other tensor itself.
const Tensor& local(const Tensor& t) {
  if (!t.unsafeGetTensorImpl()->is_python_dispatch()) return t;
  const py::object whole = py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
  if (!py::hasattr(whole, "_local_tensor")) return t;
  const py::object part = whole.attr("_local_tensor");
  return unpack(py::hasattr(part, "trigger_wait") ? part.attr("trigger_wait")() : part);  // of a collective still under way
}
void bump(const Tensor& t) {
  t.unsafeGetTensorImpl()->bump_version();
  if (&local(t) != &t) local(t).unsafeGetTensorImpl()->bump_version();
}
// A key of a dictionary, made once: making and hashing it takes longer than looking it up.
#define KEY(text) ([] { static PyObject* const key = PyUnicode_InternFromString(text); return py::handle(key); }())
py::handle get(py::handle dict, py::handle key) { return PyDict_GetItemWithError(dict.ptr(), key.ptr()); }  // borrowed; null if absent
bool is_number(py::handle h) { return h && (PyFloat_Check(h.ptr()) || PyLong_Check(h.ptr())); }
bool is_true(py::handle h) {
  const int answer = h ? PyObject_IsTrue(h.ptr()) : 0;
  if (answer < 0) throw py::error_already_set();
  return answer;
}
bool plain(const Tensor& t) {
  return t.layout() == at::kStrided && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ||
                                        t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf);
}

// Whether two of the tensors may share memory: then one must be done with before the next, and no launch does that.
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

// optimizer.state[parameter], in the order in which optimizers fill it: hashing a parameter calls Python.
class States {
 public:
  explicit States(py::handle dict) : dict_(dict) {}
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

// What SAM keeps between calls besides its parameters and their state: backups, and the workspace of each device.
class Plan {
 public:
  // First step of an optimizer: perturbs, and sets its _backup to the list of (parameter, backup) that restoring needs. False
  // if that takes the reference's code (a gradient is sparse or complex, parameters share memory), when nothing has happened.
  // reduce(sums, rows), if not None: called once per device, adds in place to each of the sums those of other processes;
  // row k belongs to perturbed parameter rows[k].
  bool climb(const py::object& optimizer, const py::object& reduce) {
    const at::NoGradGuard no_grad;
    const Variant variant = variant_of(optimizer.attr("variant").cast<std::string>());
    const py::list groups = optimizer.attr("param_groups");
    Entries entries(backups_.size());
    std::vector<Radius> radii;
    std::vector<const Tensor*> changed;
    changed.reserve(backups_.size());
    size_t n = 0;
    for (py::handle group : groups) {
      const double rho = get(group, KEY("rho")).cast<double>();
      radii.push_back({is_true(get(group, KEY("maximize"))) ? -rho : rho, get(group, KEY("gradnorm_scaling")).cast<double>()});
      if (!is_true(get(group, KEY("perturb")))) continue;
      for (py::handle parameter : get(group, KEY("params"))) {
        const Tensor &p = unpack(parameter), &w = local(p), &g = local(p.grad());
        if (!g.defined()) continue;
        if (g.layout() != at::kStrided || g.is_complex()) return false;
        check_device(w);
        const Tensor& backup = this->backup(n++, parameter, w);
        changed.push_back(&p);
        if (w.numel() == 0) {
          if (!reduce.is_none()) entries.add_zero(w, g, radii.size() - 1).index = n - 1;
          continue;
        }
        entries.add(w, radii.size() - 1).index = n - 1;
        entries.set(kG, g, false);
        entries.set(kBackup, backup, true);
      }
    }
    if (perturbed_.among(changed)) return false;
    if (backups_.size() > n) PyList_SetSlice(backups_.ptr(), n, PyList_GET_SIZE(backups_.ptr()), nullptr);
    for (const Tensor* w : changed) bump(*w);
    run_climb(entries, radii, variant, reduce);
    // Here, as an interrupt may come before Python has the result; not before, as the backups were those of another step.
    optimizer.attr("_backup") = backups_;
    entries.copy_back();
    return true;
  }

  // Second step of an optimizer: restores and updates in one pass, and sets its _backup to None. False if that takes another
  // optimizer's code, when nothing has happened. method: sgd, adam or adamw; create(parameter, keys) makes and returns what
  // state[parameter] lacks; skip_nonfinite: do not update if a gradient of any parameter is not finite.
  // share(flag), if not None: makes a flag that is set in one process set in those that hold other parts of the tensors.
  bool descend(const py::object& optimizer, const std::string& method, const py::function& create,
               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, bool skip_nonfinite,
               const py::object& share) {
    const at::NoGradGuard no_grad;
    decoupled_ = method == "adamw";  // torch before 2.7 does not say it in the groups
    return method == "sgd" ? descend_with<Sgd>(optimizer, create, grad_scale, found_inf, skip_nonfinite, share)
                           : descend_with<Adam>(optimizer, create, grad_scale, found_inf, skip_nonfinite, share);
  }

  void restore(const py::list& backups) {
    const at::NoGradGuard no_grad;
    Entries entries;
    for (py::handle pair : backups) {
      const Tensor& p = unpack(PyTuple_GET_ITEM(pair.ptr(), 0));
      entries.add(local(p), 0);
      entries.set(kBackup, local(unpack(PyTuple_GET_ITEM(pair.ptr(), 1))), false);
      bump(p);
    }
    run_update<Sgd>(entries, {Sgd::Hyper{}}, {}, {}, false, false, py::none());
  }

  bool finite() {
    for (auto& [device, ws] : workspaces_)
      if (ws.ints[0].item<int>()) return false;
    return true;
  }
  int64_t skipped() {
    int64_t sum = 0;
    for (auto& [device, ws] : workspaces_) sum += ws.skipped.item<int64_t>();
    return sum;
  }
  // What kernels of a captured graph write to, besides parameters, gradients and state.
  std::vector<Tensor> memory() {
    std::vector<Tensor> found;
    for (py::handle pair : backups_) found.push_back(unpack(PyTuple_GET_ITEM(pair.ptr(), 1)));
    for (Workspaces* all : {&workspaces_, &second_})
      for (auto& [device, ws] : *all)
        for (const Tensor& t : {ws.doubles, ws.ints, ws.skipped})
          if (t.defined()) found.push_back(t);
    return found;
  }
  // (joint norm, [gradnorm_scaling ||T g|| of each tensor in the list of backups]) of the last first step.
  py::tuple norms() {
    py::list each;
    double square = 0;
    std::map<int, double> found;
    for (auto& [device, index] : order_) {
      Workspace& ws = workspace(workspaces_, device);
      const Tensor contribution = ws.doubles.slice(0, 2, 2 + index.size()).cpu();
      for (size_t i = 0; i < index.size(); ++i) found[index[i]] = contribution.data_ptr<double>()[i];
      square = ws.doubles[1].item<double>();
    }
    for (size_t i = 0; i < backups_.size(); ++i) each.append(std::sqrt(found.count(i) ? found[i] : 0));
    return py::make_tuple(std::sqrt(square), each);
  }

 private:
  // The backup of the n-th perturbed parameter: that of the last step if it fits.
  const Tensor& backup(size_t n, py::handle parameter, const Tensor& w) {
    if (n < backups_.size()) {
      PyObject* pair = PyList_GET_ITEM(backups_.ptr(), n);
      if (PyTuple_GET_ITEM(pair, 0) == parameter.ptr()) {
        const Tensor& last = unpack(PyTuple_GET_ITEM(pair, 1));
        if (last.sizes() == w.sizes() && last.scalar_type() == w.scalar_type() && last.device() == w.device() &&
            (last.strides() == w.strides() || !w.is_non_overlapping_and_dense()))
          return last;
      }
      PyList_SetSlice(backups_.ptr(), n, PyList_GET_SIZE(backups_.ptr()), nullptr);
    }
    backups_.append(py::make_tuple(parameter, py::cast(at::empty_like(w.detach()))));
    return unpack(PyTuple_GET_ITEM(PyList_GET_ITEM(backups_.ptr(), n), 1));
  }

  void run_climb(Entries& entries, const std::vector<Radius>& radii, Variant variant, const py::object& reduce) {
    Reduce call;
    if (!reduce.is_none())
      call = [&](const Tensor& sums, const DeviceEntry* begin, const DeviceEntry* end) {
        std::vector<int> rows;
        for (const DeviceEntry* e = begin; e != end; ++e) rows.push_back(e->index);
        const py::gil_scoped_acquire acquire;
        reduce(sums, rows);
      };
    const py::gil_scoped_release release;
    auto& list = entries.list;
    entries.sort();
    order_.clear();
    mup2::norms(list, radii, variant, workspaces_, call);
    per_device(list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
      perturb(begin, end, workspace(workspaces_, device).state.coefficient, variant);
      auto& index = order_[device];
      for (const DeviceEntry* e = begin; e != end; ++e) index.push_back(e->index);
    });
    for (auto& [device, ws] : workspaces_)
      if (!order_.count(device)) share_flag(ws);
  }

  // A device without perturbed tensors follows the others.
  void share_flag(Workspace& ws) {
    Tensor flag = ws.ints.slice(0, 0, 1);
    if (order_.empty())
      flag.zero_();
    else
      flag.copy_(workspace(workspaces_, order_.begin()->first).ints.slice(0, 0, 1));
  }

  template <class Method>
  bool descend_with(const py::object& optimizer, const py::function& create, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf, bool skip_nonfinite, const py::object& share) {
    const py::list groups = optimizer.attr("param_groups");
    const py::list backups = optimizer.attr("_backup");
    std::vector<typename Method::Hyper> hypers;
    std::vector<Update> updates;
    std::vector<const Tensor*> changed;
    States states(optimizer.attr("state"));
    size_t n = 0;  // backups taken
    bool work = false;
    for (py::handle group : groups) {  // everything that can say no, before anything is made
      hypers.emplace_back();
      if (!read(group, hypers.back())) return false;
      for (py::handle parameter : get(group, KEY("params"))) {
        const Tensor &p = unpack(parameter), &w = local(p), &g = local(p.grad());
        Update u = {parameter, {}, &w, g.defined() ? &g : nullptr, nullptr, int(hypers.size()) - 1};
        if (n < backups.size() && PyTuple_GET_ITEM(PyList_GET_ITEM(backups.ptr(), n), 0) == parameter.ptr())
          u.backup = &local(unpack(PyTuple_GET_ITEM(PyList_GET_ITEM(backups.ptr(), n++), 1)));
        if (!u.backup && !u.g) continue;
        if (!plain(w) || (u.g && !plain(g)) || (hypers.back().lr_tensor && lr_device_ != w.device())) return false;
        if (u.g) u.state = states.find(parameter);
        if (u.g && !fits(hypers.back(), u.state)) return false;
        work |= u.g && p.numel();  // also if no part of it is here: all processes must go the same way
        updates.push_back(u);
        changed.push_back(&p);
      }
    }
    if (!work) return false;  // no kernel would run, and none count a step that is skipped
    if (n < backups.size() || updated_.among(changed)) return false;  // n: groups have changed between the passes
    Entries entries(updates.size());
    for (Update& u : updates) {
      entries.add(*u.w, u.group);
      if (u.backup) entries.set(kBackup, *u.backup, false);
      if (u.g) entries.set(kG, *u.g, grad_scale.has_value());
      if (u.g) add_state(entries, hypers[u.group], u, create);
    }
    // A process without any part launches for one zero, and so counts a step that is skipped.
    if (!share.is_none() && std::none_of(entries.list.begin(), entries.list.end(), [](const auto& e) { return e.numel && e.ptr[kG]; }))
      for (const Update& u : updates)
        if (u.g) { entries.add_zero(*u.w, *u.g, u.group); break; }
    for (const Tensor* w : changed) bump(*w);
    run_update<Method>(entries, hypers, grad_scale, found_inf, skip_nonfinite, true, share);
    optimizer.attr("_backup") = py::none();
    return true;
  }

  struct Update {
    py::handle parameter, state;
    const Tensor *w, *g, *backup;
    int group;
  };

  // lr as a number, or on a GPU as a tensor that may change under a captured graph. False: leave it to torch.
  template <class Hyper> bool read_lr(py::handle group, Hyper& h) {
    const py::handle lr = get(group, KEY("lr"));
    h.lr_tensor = nullptr;
    if (is_number(lr)) {
      h.lr = lr.cast<double>();
    } else if (!lr || !THPVariable_Check(lr.ptr())) {
      return false;
    } else {
      const Tensor& t = unpack(lr);
      if (t.is_cuda() && t.scalar_type() != at::kFloat) return false;
      if (t.is_cuda())
        h.lr_tensor = floats(t), lr_device_ = t.device();
      else
        h.lr = t.item<double>();
    }
    return true;
  }
  bool read(py::handle group, Sgd::Hyper& h) {
    memset(&h, 0, sizeof h);  // padding too: batches compare bytes
    for (py::handle key : {KEY("weight_decay"), KEY("momentum"), KEY("dampening")})
      if (!is_number(get(group, key))) return false;
    h.weight_decay = get(group, KEY("weight_decay")).cast<double>(), h.momentum = get(group, KEY("momentum")).cast<double>();
    h.dampening = get(group, KEY("dampening")).cast<double>();
    h.nesterov = is_true(get(group, KEY("nesterov"))), h.maximize = is_true(get(group, KEY("maximize")));
    return read_lr(group, h);
  }
  bool read(py::handle group, Adam::Hyper& h) {
    memset(&h, 0, sizeof h);
    const auto betas = get(group, KEY("betas")).cast<py::sequence>();
    if (is_true(get(group, KEY("amsgrad"))) || !is_number(betas[0]) || !is_number(betas[1])) return false;
    for (py::handle key : {KEY("weight_decay"), KEY("eps")})
      if (!is_number(get(group, key))) return false;
    h.weight_decay = get(group, KEY("weight_decay")).cast<double>(), h.eps = get(group, KEY("eps")).cast<double>();
    h.beta1 = betas[0].cast<double>(), h.beta2 = betas[1].cast<double>();
    h.decoupled = decoupled_ || is_true(get(group, KEY("decoupled_weight_decay"))), h.maximize = is_true(get(group, KEY("maximize")));
    return read_lr(group, h);
  }

  // state[key], or null if that is absent or None.
  static py::handle find(py::handle state, py::handle key) {
    const py::handle found = state ? get(state, key) : py::handle();
    return found && found.is_none() ? py::handle() : found;
  }
  // With dampening the first momentum is the gradient, unless that step is skipped: torch's own code makes it.
  static bool fits(const Sgd::Hyper& h, py::handle state) { return h.momentum == 0 || h.dampening == 0 || find(state, KEY("momentum_buffer")); }
  static bool fits(const Adam::Hyper&, py::handle) { return true; }

  void add_state(Entries& entries, const Sgd::Hyper& h, const Update& u, const py::function& create) {
    if (h.momentum == 0) return;
    py::handle momentum = find(u.state, KEY("momentum_buffer"));
    if (!momentum) momentum = get(create(u.parameter, py::make_tuple("momentum_buffer")), KEY("momentum_buffer"));
    entries.set(kM, local(unpack(momentum)), true);
  }
  void add_state(Entries& entries, const Adam::Hyper&, const Update& u, const py::function& create) {
    py::handle state = u.state;
    if (!find(state, KEY("exp_avg"))) state = create(u.parameter, py::make_tuple("step", "exp_avg", "exp_avg_sq"));
    entries.set(kM, local(unpack(get(state, KEY("exp_avg")))), true);
    entries.set(kV, local(unpack(get(state, KEY("exp_avg_sq")))), true);
    py::handle step = get(state, KEY("step"));
    const Tensor& t = unpack(step);
    if (t.device() != u.w->device() || t.scalar_type() != at::kFloat) {
      state[KEY("step")] = t.to(u.w->device(), at::kFloat).clone();
      step = get(state, KEY("step"));
    }
    entries.list.back().ptr[kSteps] = floats(unpack(step));
  }

  template <class Method>
  void run_update(Entries& entries, const std::vector<typename Method::Hyper>& hypers, const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf, bool skip_nonfinite, bool count, const py::object& share) {
    const py::gil_scoped_release release;
    entries.sort();
    if (skip_nonfinite) {
      std::vector<DeviceEntry> with_gradient;
      for (const DeviceEntry& e : entries.list)
        if (e.ptr[kG] && e.numel) with_gradient.push_back(e), with_gradient.back().group = 0;
      for (const DeviceEntry& e : entries.list) workspace(second_, e.device);
      for (auto& [device, ws] : second_) ws.ints.slice(0, 0, 1).zero_();  // of devices without gradients
      mup2::norms(with_gradient, {{1, 1}}, kSam, second_);
      const py::gil_scoped_acquire acquire;
      if (!share.is_none())
        for (auto& [device, ws] : second_) share(ws.ints.slice(0, 0, 1));
    }
    per_device(entries.list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
      const bool known = workspaces_.count(device);
      Workspace& ws = workspace(workspaces_, device);
      if (!known) share_flag(ws);
      Control control = ws.control();
      Tensor scale, inf;
      if (grad_scale) control.grad_scale = floats(scale = grad_scale->to(device, at::kFloat));
      if (found_inf) control.found_inf = floats(inf = found_inf->to(device, at::kFloat));
      if (skip_nonfinite && second_.count(device)) control.nonfinite_second = second_.at(device).control().nonfinite;
      if (count) control.skipped = ws.skipped.data_ptr<int64_t>();
      count = false;
      update<Method>(begin, end, hypers, control);
    });
    entries.copy_back();
  }

  py::list backups_;
  Overlap perturbed_, updated_;
  Workspaces workspaces_{device_order}, second_{device_order};
  std::map<at::Device, std::vector<int>, bool (*)(at::Device, at::Device)> order_{device_order};
  at::Device lr_device_ = at::kCPU;
  bool decoupled_ = false;
};

// ---------------------------------------------------------------------------------------------- compiled: operators

// Entries of an operator's lists, which are all of one device.
struct Lists {
  Entries entries;

  struct List {
    int which;
    at::TensorList tensors;
    bool written, optional = false;
  };
  void add(at::TensorList w, std::initializer_list<List> others, bool bumps) {
    for (const List& list : others)
      TORCH_CHECK(list.tensors.size() == w.size() || (list.optional && list.tensors.empty()),
                  "lists must have equal lengths; an optional one may be empty");
    for (size_t i = 0; i < w.size(); ++i) {
      if (bumps) w[i].unsafeGetTensorImpl()->bump_version();
      TORCH_CHECK(w[i].device() == w[0].device(), "tensors of one call must be on one device");
      if (w[i].numel() == 0) continue;
      entries.add(w[i], i).index = i;
      for (const List& list : others)
        if (!list.tensors.empty()) entries.set(list.which, list.tensors[i], list.written);
    }
    entries.sort();
  }
  // Which tensors the kernels have, in their order: the empty ones are left out.
  Tensor numbers(at::Device device) const {
    Tensor t = at::empty({int64_t(entries.list.size())}, at::kLong);
    for (size_t i = 0; i < entries.list.size(); ++i) t.data_ptr<int64_t>()[i] = entries.list[i].index;
    return t.to(device);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> joint_norm(at::TensorList w, at::TensorList g, at::ArrayRef<double> rho,
                                                      at::ArrayRef<double> gradnorm_scaling, c10::string_view variant) {
  TORCH_CHECK(!w.empty() && rho.size() == w.size() && gradnorm_scaling.size() == w.size(), "joint_norm needs a gradient, a rho "
              "and a gradnorm_scaling for each of one or more tensors");
  Lists lists;
  lists.add(w, {{kG, g, false}}, false);
  std::vector<Radius> radii;
  for (size_t i = 0; i < w.size(); ++i) radii.push_back({rho[i], gradnorm_scaling[i]});
  Workspaces all{device_order};
  const at::Device device = w[0].device();
  norms(lists.entries.list, radii, variant_of(std::string(variant)), all);
  Workspace& ws = workspace(all, device);
  const int64_t n = lists.entries.list.size(), total = w.size();
  if (n == 0) ws.reserve(0, 0, false), ws.doubles.zero_();
  const auto scattered = [&](const Tensor& x) {
    return at::zeros({total}, x.options()).index_copy(0, lists.numbers(device), x);
  };
  const Tensor& d = ws.doubles;
  return {d[0].clone(), scattered(d.slice(0, 2 + 2 * n, 2 + 3 * n)), scattered(d.slice(0, 2, 2 + n)).sqrt(), ws.ints.slice(0, 0, 1).clone()};
}

void perturb_(at::TensorList w, at::TensorList g, at::TensorList backup, const Tensor& coefficients, c10::string_view variant) {
  Lists lists;
  lists.add(w, {{kG, g, false}, {kBackup, backup, true}}, true);
  const Tensor c = coefficients.to(at::kDouble).index_select(0, lists.numbers(coefficients.device()));
  per_device(lists.entries.list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
    TORCH_CHECK(c.device() == device, "coefficients must be on the device of the tensors");
    perturb(begin, end, c.data_ptr<double>(), variant_of(std::string(variant)));
  });
  lists.entries.copy_back();
}

template <class Method> void update_lists(Lists& lists, const std::vector<typename Method::Hyper>& hypers, const std::optional<Tensor>& skip) {
  per_device(lists.entries.list, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
    Workspace ws(device);
    Control control = ws.control();
    Tensor flag;
    TORCH_CHECK(!skip || skip->numel() == 1, "skip is one number");
    if (skip) control.nonfinite = ints(flag = skip->to(device, at::kInt));
    update<Method>(begin, end, hypers, control);
  });
  lists.entries.copy_back();
}

void restore_(at::TensorList w, at::TensorList backup) {
  Lists lists;
  lists.add(w, {{kBackup, backup, false}}, true);
  update_lists<Sgd>(lists, std::vector<Sgd::Hyper>(w.size()), {});
}

template <class Hyper> Tensor set_lr(Hyper& h, const Tensor& lr, const at::TensorList w) {
  const Tensor on_device = !w.empty() && w[0].is_cuda() && lr.is_cuda() ? lr.to(w[0].device(), at::kFloat) : lr;
  h.lr_tensor = on_device.is_cuda() ? floats(on_device) : nullptr;
  h.lr = h.lr_tensor ? 0 : lr.item<double>();
  return on_device;  // to be kept while kernels may read it
}

void sgd_(at::TensorList w, at::TensorList g, at::TensorList backup, at::TensorList momentum_buffer, const Tensor& lr,
          double weight_decay, double momentum, double dampening, bool nesterov, bool maximize, bool first,
          const std::optional<Tensor>& skip) {
  Lists lists;
  lists.add(w, {{kG, g, false}, {kBackup, backup, false, true}, {kM, momentum_buffer, true, momentum == 0}}, true);
  Sgd::Hyper h = {0, weight_decay, momentum, dampening, nullptr, nesterov, maximize, first};
  const Tensor keep = set_lr(h, lr, w);
  update_lists<Sgd>(lists, std::vector<Sgd::Hyper>(w.size(), h), skip);
}

void adam_(at::TensorList w, at::TensorList g, at::TensorList backup, at::TensorList exp_avg, at::TensorList exp_avg_sq,
           at::TensorList steps, const Tensor& lr, double weight_decay, double beta1, double beta2, double eps, bool decoupled,
           bool maximize, const std::optional<Tensor>& skip) {
  Lists lists;
  TORCH_CHECK(steps.size() == w.size(), "adam_ needs a step count for each tensor");
  for (size_t i = 0; i < w.size(); ++i)
    TORCH_CHECK(steps[i].device() == w[i].device() && steps[i].scalar_type() == at::kFloat && steps[i].numel() == 1,
                "a step count is one float32 number on the device of its tensor");
  lists.add(w, {{kG, g, false}, {kBackup, backup, false, true}, {kM, exp_avg, true}, {kV, exp_avg_sq, true}}, true);
  for (DeviceEntry& e : lists.entries.list) e.ptr[kSteps] = floats(steps[e.index]);
  Adam::Hyper h = {0, weight_decay, beta1, beta2, eps, nullptr, decoupled, maximize};
  const Tensor keep = set_lr(h, lr, w);
  update_lists<Adam>(lists, std::vector<Adam::Hyper>(w.size(), h), skip);
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

void implement(torch::Library& m) {
  m.impl("joint_norm", joint_norm);
  m.impl("perturb_", perturb_);
  m.impl("restore_", restore_);
  m.impl("sgd_", sgd_);
  m.impl("adam_", adam_);
}
TORCH_LIBRARY_IMPL(mup2, CPU, m) { implement(m); }
#ifdef MUP2_CUDA
TORCH_LIBRARY_IMPL(mup2, CUDA, m) { implement(m); }
#endif

// (tensor, first element, number of elements) of each chunk of interest, for tensors of any size, without memory.
std::vector<std::tuple<int64_t, int64_t, int64_t>> walk(const std::vector<int64_t>& sizes, const std::vector<int64_t>& chunks) {
  std::vector<Entry> entries(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) entries[i].numel = sizes[i];
  std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
  in_batches<PerturbBatch>(entries.data(), entries.data() + entries.size(), {}, [&](const PerturbBatch& batch, Types) {
    for (int64_t chunk : chunks) {
      const int64_t local = chunk - batch.first_partial;
      if (local < 0 || local >= batch.n_chunks) continue;
      const Chunk c = locate(batch, local);
      found.emplace_back(batch.first_tensor + c.item, c.begin, c.count);
    }
  });
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<>())
      .def("climb", &Plan::climb)
      .def("descend", &Plan::descend)
      .def("restore", &Plan::restore)
      .def("finite", &Plan::finite)
      .def("skipped", &Plan::skipped)
      .def("memory", &Plan::memory)
      .def("norms", &Plan::norms);
  m.def("walk", walk);
  m.attr("chunk") = kChunk;
  m.attr("tensors_per_launch") =
      py::dict(py::arg("norm") = +NormBatch::kCapacity, py::arg("perturb") = +PerturbBatch::kCapacity,
               py::arg("sgd") = +UpdateBatch<Sgd>::kCapacity, py::arg("adam") = +UpdateBatch<Adam>::kCapacity);
  m.attr("instruction_set") = cpu().name;
  m.attr("cuda") =
#ifdef MUP2_CUDA
      true;
#else
      false;
#endif
}

}  // namespace mup2
