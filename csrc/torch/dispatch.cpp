#include "torch/dispatch.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <fstream>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#ifdef MUP2_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace mup2 {
namespace {

// Whether weights, gradients and backups are more than the last cache holds. Then the kernels write past the caches.
bool streams(Slice entries) {
  // The cache that this processor shares. sysconf() would add up the caches of all parts of an AMD processor, although
  // a core reaches only one of them.
  static const int64_t cache = [] {
    int64_t kilobytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;  // "32768K"
    return kilobytes > 0 ? kilobytes << 10 : 1 << 25;
  }();
  int64_t bytes = 0;
  for (const DeviceEntry& e : entries) bytes += e.numel * (e.types.w == kF64 ? 8 : e.types.w == kF32 ? 4 : 2);
  return 3 * bytes > cache;
}

constexpr int64_t kGrain = 1 << 14;      // elements; fewer are not worth another thread
constexpr int64_t kFull = kChunk + 128;  // cost of a full chunk in elements: every chunk costs 128 elements extra

template <class B> int64_t work_of(const B& batch, uint32_t item) {
  const Chunk first = chunk_of(batch, item, batch.items[item].first_chunk);
  return first.chunks * kFull + batch.items[item].tail - kChunk;
}

// The first chunk of a batch before which at least `target` work lies.
template <class B> int64_t chunk_at(const B& batch, int64_t target) {
  for (uint32_t i = 0; i < batch.n_items; ++i) {
    const int64_t work = work_of(batch, i);
    if (target < work) return batch.items[i].first_chunk + (target + kFull - 1) / kFull;
    target -= work;
  }
  return batch.n_chunks;
}

// Calls f(begin, end) for the chunks of a batch, on as many threads as pay. Threads get equal work, not equal numbers
// of chunks: a model may have one large tensor and a hundred tensors of one small chunk each.
template <class B, class F> void in_parallel(const B& batch, F f) {
  int64_t work = 0;
  for (uint32_t i = 0; i < batch.n_items; ++i) work += work_of(batch, i);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (work + kGrain - 1) / kGrain);
  if (threads < 2) return f(0, batch.n_chunks);
  at::parallel_for(0, threads, 1, [&](int64_t a, int64_t b) {
    f(chunk_at(batch, work * a / threads), chunk_at(batch, work * b / threads));
  });
}

// On a GPU calls cuda(stream) with the current stream, and raises the error that it returns; otherwise calls cpu().
// cuda is a template, so that a build without CUDA contains no call of the CUDA kernels.
template <class Cuda, class Cpu> void on(at::Device device, [[maybe_unused]] Cuda cuda, Cpu cpu) {
  if (device.is_cpu()) return cpu();
#ifdef MUP2_CUDA
  const int error = cuda((void*)c10::cuda::getCurrentCUDAStream(device.index()).stream());
  TORCH_CHECK(error == 0, "mup2_fused: CUDA says ", cudaGetErrorString(cudaError_t(error)));
#else
  TORCH_INTERNAL_ASSERT(false, "mup2_fused was built without CUDA");
#endif
}

// The norm over the entries of one device.
void norm(Slice entries, const std::vector<Radius>& radii, Variant variant, Workspace& ws) {
  int64_t chunks = 0;
  for (const DeviceEntry& e : entries) chunks += chunks_of(e.numel);
  ws.reserve(entries.size(), chunks, variant == kLayerwise);
  const NormState& s = ws.state();
  const at::Device device = entries[0].device;
  if (entries[0].ptr[kSums])
    in_batches<SumsBatch>(entries, radii, [&](const SumsBatch& batch, Types) {
      on(device, [&](auto stream) { return cuda_norm_of_sums(batch, s, stream); }, [&] {
        for (uint32_t i = 0; i < batch.n_items; ++i)
          finish_tensor(batch, i, pointer<double>(batch.items[i], kSums), s, false);
      });
    });
  else
    in_batches<NormBatch>(entries, radii, [&](const NormBatch& batch, Types types) {
      on(device, [&](auto stream) { return cuda_norm(batch, s, types, variant, stream); }, [&] {
        in_parallel(batch, [&](int64_t a, int64_t b) { cpu_kernels().norm(batch, s, types, variant, a, b); });
        const double* partials = s.partials + batch.first_partial;
        for (uint32_t i = 0; i < batch.n_items; ++i)
          finish_tensor(batch, i, partials + batch.items[i].first_chunk, s, variant == kLayerwise);
      });
    });
  if (device.is_cpu()) finish_all(s, ordered_sum(s.contribution, s.n_tensors));
}

// Norm and coefficients once more, from the square of the norm over the tensors of all devices.
void combine(const std::vector<at::Device>& devices, Workspaces& all) {
  Tensor sum = workspace(all, devices[0]).square().clone();
  for (size_t i = 1; i < devices.size(); ++i) sum += workspace(all, devices[i]).square().to(devices[0]);
  for (at::Device device : devices) {
    const c10::DeviceGuard guard(device);
    const NormState& s = workspace(all, device).state();
    const Tensor on_device = sum.to(device);
    const double* square = on_device.data_ptr<double>();
    on(device, [&](auto stream) { return cuda_combine(s, square, stream); }, [&] { finish_all(s, *square); });
  }
}

template <class Method>
void update_on_cpu(const UpdateBatch<Method>& batch, const Control& control, Types types, bool streaming) {
  in_parallel(batch, [&](int64_t a, int64_t b) {
    if constexpr (std::is_same_v<Method, Sgd>)
      cpu_kernels().sgd(batch, control, types, streaming, a, b);
    else
      cpu_kernels().adam(batch, control, types, streaming, a, b);
  });
  const bool skip = skips(control);
  for (uint32_t i = 0; i < batch.n_items; ++i) count_step(batch.items[i], skip);
  if (control.skipped && batch.n_chunks) *control.skipped += skip;
}

}  // namespace

void norms(const std::vector<DeviceEntry>& entries, const std::vector<Radius>& radii, Variant variant, Workspaces& all,
           const Reduce& reduce) {
  std::vector<at::Device> devices;
  const bool layerwise = variant == kLayerwise;
  per_device(entries, [&](Slice slice, at::Device device) {
    Workspace& ws = workspace(all, device);
    norm(slice, radii, variant, ws);
    devices.push_back(device);
    if (!reduce) return;
    reduce(ws.sums(), slice);
    on(device, [&](auto stream) { return cuda_from_sums(ws.state(), layerwise, stream); },
       [&] { finish_from_sums(ws.state(), layerwise); });
  });
  if (devices.size() > 1) combine(devices, all);
}

void perturb(Slice entries, const double* coefficient, Variant variant) {
  const bool streaming = streams(entries);
  in_batches<PerturbBatch>(entries, {}, [&](const PerturbBatch& batch, Types types) {
    on(entries[0].device, [&](auto stream) { return cuda_perturb(batch, coefficient, types, variant, stream); }, [&] {
      in_parallel(batch, [&](int64_t a, int64_t b) {
        cpu_kernels().perturb(batch, coefficient, types, variant, streaming, a, b);
      });
    });
  });
}

template <class Method>
void update(Slice entries, const std::vector<typename Method::Hyper>& hypers, Control control) {
  const bool streaming = streams(entries);
  in_batches<UpdateBatch<Method>>(entries, hypers, [&](const UpdateBatch<Method>& batch, Types types) {
    on(entries[0].device, [&](auto stream) { return cuda_update<Method>(batch, control, types, stream); },
       [&] { update_on_cpu<Method>(batch, control, types, streaming); });
    if (batch.n_chunks) control.skipped = nullptr;  // the first launch counts a skipped step, the others do not
  });
}

template void update<Sgd>(Slice, const std::vector<Sgd::Hyper>&, Control);
template void update<Adam>(Slice, const std::vector<Adam::Hyper>&, Control);

}  // namespace mup2
