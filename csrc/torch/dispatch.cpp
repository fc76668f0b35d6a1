#include "torch/dispatch.h"

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "torch/threads.h"
#ifdef MUP2_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace mup2 {
namespace {

// Calls launch(stream) with the current stream of a GPU, and raises the error that it returns. launch is a template, so
// that a build without CUDA contains no call of the CUDA kernels.
template <class Launch> void on_cuda([[maybe_unused]] at::Device device, [[maybe_unused]] Launch launch) {
#ifdef MUP2_CUDA
  void* stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  const int error = launch(stream);
  TORCH_CHECK(error == 0, "mup2_fused: CUDA says ", cudaGetErrorString(cudaError_t(error)));
#else
  TORCH_INTERNAL_ASSERT(false, "mup2_fused was built without CUDA");
#endif
}

void norm_on_cpu(const NormBatch& batch, const NormState& state, Types types, Variant variant) {
  in_parallel(batch, [&](int64_t a, int64_t b) { cpu_kernels().norm(batch, state, types, variant, a, b); });
  for (uint32_t i = 0; i < batch.n_items; ++i) finish_tensor(batch, i, state, variant == kLayerwise);
}

// The norm over the entries of one device.
void norm(const DeviceEntry* begin, const DeviceEntry* end, const std::vector<Radius>& radii, Variant variant,
          Workspace& ws) {
  int64_t chunks = 0, tensors = 0;
  for (const DeviceEntry* e = begin; e != end; ++e) chunks += chunks_of(e->numel), ++tensors;
  ws.reserve(tensors, chunks, variant == kLayerwise);
  const NormState& s = ws.state();
  const at::Device device = begin->device;
  in_batches<NormBatch>(begin, end, radii, [&](const NormBatch& batch, Types types) {
    if (device.is_cuda())
      on_cuda(device, [&](auto stream) { return cuda_norm(batch, s, types, variant, stream); });
    else
      norm_on_cpu(batch, s, types, variant);
  });
  if (device.is_cpu()) finish_all(s, ordered_sum(s.contribution, tensors));
}

// Norm and coefficients once more, from sums that have been added up over processes.
void from_sums(const NormState& s, bool layerwise, at::Device device) {
  if (device.is_cuda())
    on_cuda(device, [&](auto stream) { return cuda_from_sums(s, layerwise, stream); });
  else
    finish_from_sums(s, layerwise);
}

// Norm and coefficients once more, from the square of the norm over the tensors of all devices.
void combine(const NormState& s, const double* square, at::Device device) {
  if (device.is_cuda())
    on_cuda(device, [&](auto stream) { return cuda_combine(s, square, stream); });
  else
    finish_all(s, *square);
}

void combine_devices(const std::vector<at::Device>& devices, Workspaces& all) {
  Tensor sum = workspace(all, devices[0]).square().clone();
  for (size_t i = 1; i < devices.size(); ++i) sum += workspace(all, devices[i]).square().to(devices[0]);
  for (at::Device device : devices) {
    const c10::DeviceGuard guard(device);
    const Tensor square = sum.to(device);
    combine(workspace(all, device).state(), square.data_ptr<double>(), device);
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

Variant variant_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "sam" || name == "elementwise" || name == "layerwise", "unknown variant ", name,
                    ": it is sam, elementwise or layerwise");
  return name == "sam" ? kSam : name == "elementwise" ? kElementwise : kLayerwise;
}

void norms(std::vector<DeviceEntry>& entries, const std::vector<Radius>& radii, Variant variant, Workspaces& all,
           const Reduce& reduce) {
  std::vector<at::Device> devices;
  per_device(entries, [&](const DeviceEntry* begin, const DeviceEntry* end, at::Device device) {
    Workspace& ws = workspace(all, device);
    norm(begin, end, radii, variant, ws);
    if (reduce) {
      reduce(ws.sums(), begin, end);
      from_sums(ws.state(), variant == kLayerwise, device);
    }
    devices.push_back(device);
  });
  if (devices.size() > 1) combine_devices(devices, all);
}

void perturb(const DeviceEntry* begin, const DeviceEntry* end, const double* coefficient, Variant variant) {
  const at::Device device = begin->device;
  const bool streaming = streams(begin, end);
  in_batches<PerturbBatch>(begin, end, {}, [&](const PerturbBatch& batch, Types types) {
    if (device.is_cuda())
      on_cuda(device, [&](auto stream) { return cuda_perturb(batch, coefficient, types, variant, stream); });
    else
      in_parallel(batch, [&](int64_t a, int64_t b) {
        cpu_kernels().perturb(batch, coefficient, types, variant, streaming, a, b);
      });
  });
}

template <class Method>
void update(const DeviceEntry* begin, const DeviceEntry* end, const std::vector<typename Method::Hyper>& hypers,
            const Control& control) {
  const at::Device device = begin->device;
  const bool streaming = streams(begin, end);
  Control next = control;
  in_batches<UpdateBatch<Method>>(begin, end, hypers, [&](const UpdateBatch<Method>& batch, Types types) {
    const Control now = next;
    if (batch.n_chunks) next.skipped = nullptr;  // the first launch counts a skipped step, the others do not
    if (device.is_cuda())
      on_cuda(device, [&](auto stream) { return cuda_update(batch, now, types, stream); });
    else
      update_on_cpu<Method>(batch, now, types, streaming);
  });
}

template void update<Sgd>(const DeviceEntry*, const DeviceEntry*, const std::vector<Sgd::Hyper>&, const Control&);
template void update<Adam>(const DeviceEntry*, const DeviceEntry*, const std::vector<Adam::Hyper>&, const Control&);

}  // namespace mup2
