// Restoring and updating in one pass: w <- backup + the update of SGD, Adam or AdamW.
#include "cuda/sums.h"

namespace mup2 {
namespace {

// n gradients. If the loss was scaled, they are divided by the scale, in memory too, as torch.amp.GradScaler does.
template <class G, int n> __device__ Pack<G, n> load_gradients(G* g, const float* scale, int left, bool aligned) {
  auto gs = load<G, n>(g, left, aligned);
  if (scale) {
#pragma unroll
    for (int j = 0; j < n; ++j) gs.x[j] = narrow<G>(widen(gs.x[j]) / Wide<G>(*scale));
    store(g, gs, left, aligned);
  }
  return gs;
}

// The update of kVector<W> elements. m and v are null where the method has no such moment. ms: the new m.
template <class Method, class W, class G, class Rule>
__device__ void update_pack(Pack<W, kVector<W>>& ws, const Pack<G, kVector<W>>& gs, Pack<W, kVector<W>>& ms, W* m,
                            W* v, const Rule& rule, int left, bool aligned) {
  constexpr int V = kVector<W>;
  Pack<W, V> vs = {};
  if (m) ms = load<W, V>(m, left, aligned);
  if (v) vs = load<W, V>(v, left, aligned);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    Wide<W> mj = widen(ms.x[j]), vj = widen(vs.x[j]);
    const Wide<W> wj = widen(ws.x[j]), gj = Wide<W>(widen(gs.x[j]));
    ws.x[j] = narrow<W>(!m              ? Method::template apply<kNoMomentum>(rule, wj, gj, mj, vj)
                        : rule.nesterov ? Method::template apply<kNesterov>(rule, wj, gj, mj, vj)
                                        : Method::template apply<kMomentum>(rule, wj, gj, mj, vj));
    ms.x[j] = narrow<W>(mj), vs.x[j] = narrow<W>(vj);
  }
  if (m) store(m, ms, left, aligned);
  if (v) store(v, vs, left, aligned);
}

template <class Rule> struct UpdateScratch {
  Scratch scratch;
  Rule rule;
  bool skip;
};

// Weights back from their backup and updated from there; weights that were not perturbed are updated where they are.
// Thread 0 computes the rule of the update for its block, as that takes float64. sums: control has them.
template <class Method, class W, class G, class B, bool sums>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ B batch, const Control control) {
  MUP2_SHARED(UpdateScratch<typename Method::template Rule<Wide<W>>>, shared);
  constexpr int V = kVector<W>;
  const Chunk c = locate(batch, blockIdx.x);
  const auto& item = batch.items[c.item];
  const float* steps = B::kPointers > kSteps ? (const float*)item.ptr[kSteps] : nullptr;
  if (threadIdx.x == 0) {
    shared.skip = skips(control);
    if (item.ptr[kG]) shared.rule = Method::template prepare<Wide<W>>(batch.groups[item.group], steps);
    if (blockIdx.x == 0 && control.skipped) *control.skipped += shared.skip;
  }
  __syncthreads();
  const bool updates = item.ptr[kG] && !shared.skip, unscales = item.ptr[kG] && control.grad_scale;
  const auto rule = shared.rule;
  const auto at = [&](int which, auto type) {
    return item.ptr[which] ? (decltype(type)*)item.ptr[which] + c.begin : nullptr;
  };
  W *w = at(kW, W{}), *m = item.ptr[kM] ? at(kM, W{}) : nullptr;
  const W* base = item.ptr[kBackup] ? at(kBackup, W{}) : w;
  // Squares of the new m. With the eight elements that a thread takes of 16-bit types, registers would be too few for
  // four blocks per multiprocessor; those moments are read again.
  constexpr bool adds = sums && sizeof(W) > 2;
  Sum<Wide<W>> squares[V] = {};
  if (updates || unscales || base != w)
    for (int i = threadIdx.x * V; i < c.count; i += kThreads * V) {
      const int left = c.count - i;
      auto ws = load<W, V>(base + i, left, item.aligned);
      Pack<G, V> gs = {};
      if (updates || unscales) gs = load_gradients<G, V>(at(kG, G{}) + i, control.grad_scale, left, item.aligned);
      if (updates) {
        W* v = Method::kMoments > 1 ? at(kV, W{}) + i : nullptr;
        Pack<W, V> ms = {};
        update_pack<Method>(ws, gs, ms, m ? m + i : nullptr, v, rule, left, item.aligned);
        if constexpr (adds) add_squares(squares, ms);
      }
      store(w + i, ws, left, item.aligned);
    }
  if (sums && m && item.ptr[kG]) {
    double sum = adds ? total(squares, shared.scratch) : 0;
    if (!adds || !updates || !is_finite(sum)) sum = chunk_sum<kSam>(m, m, c.count, item.aligned, shared.scratch);
    if (threadIdx.x == 0) control.sums[batch.first_partial + blockIdx.x] = sum;
  }
  if (B::kPointers > kSteps && last_to_arrive(control.counter, batch.n_chunks, shared.scratch))
    for (uint32_t i = threadIdx.x; i < batch.n_items; i += kThreads) count_step(batch.items[i], shared.skip);
}

}  // namespace

template <class Method>
int cuda_update(const UpdateBatch<Method>& batch, const Control& control, Types types, void* stream) {
  return with_types(types, [&](auto w, auto g) {
    return with_size(batch, [&](const auto& b) {
      using W = decltype(w);
      using G = decltype(g);
      using B = std::decay_t<decltype(b)>;
      const auto kernel = control.sums ? update_kernel<Method, W, G, B, true> : update_kernel<Method, W, G, B, false>;
      return launch(kernel, b.n_chunks, stream, b, control);
    });
  });
}

template int cuda_update<Sgd>(const UpdateBatch<Sgd>&, const Control&, Types, void*);
template int cuda_update<Adam>(const UpdateBatch<Adam>&, const Control&, Types, void*);

}  // namespace mup2
