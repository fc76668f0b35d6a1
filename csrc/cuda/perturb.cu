// Backup and perturbation: backup = w, w <- w + c T² g.
#include "cuda/device.h"

namespace mup2 {
namespace {

template <int variant, class W, class G, class B>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ B batch, const double* coefficient) {
  constexpr int V = kVector<W>;
  // Chunks are taken from the last to the first: the L2 cache still has the gradients that the norm read last.
  const Chunk c = locate(batch, batch.n_chunks - 1 - blockIdx.x);
  const Item<3>& item = batch.items[c.item];
  W* w = (W*)item.ptr[kW] + c.begin;
  W* backup = (W*)item.ptr[kBackup] + c.begin;
  const G* g = (const G*)item.ptr[kG] + c.begin;
  const Wide<W> factor = Wide<W>(coefficient[batch.first_tensor + c.item]);
  for (int i = threadIdx.x * V; i < c.count; i += kThreads * V) {
    const int left = c.count - i;
    auto ws = load<W, V>(w + i, left, item.aligned);
    const auto gs = load<G, V>(g + i, left, item.aligned);
    store(backup + i, ws, left, item.aligned);
#pragma unroll
    for (int j = 0; j < V; ++j)
      ws.x[j] = narrow<W>(perturbed<variant, Wide<W>>(widen(ws.x[j]), widen(gs.x[j]), factor));
    store(w + i, ws, left, item.aligned);
  }
}

}  // namespace

int cuda_perturb(const PerturbBatch& batch, const double* coefficient, Types types, Variant variant, void* stream) {
  return with_types(types, [&](auto w, auto g) {
    return with_size(batch, [&](const auto& b) {
      using W = decltype(w);
      using G = decltype(g);
      using B = std::decay_t<decltype(b)>;
      const auto kernel =
          variant == kElementwise ? perturb_kernel<kElementwise, W, G, B> : perturb_kernel<kSam, W, G, B>;
      return launch(kernel, b.n_chunks, stream, b, coefficient);
    });
  });
}

}  // namespace mup2
