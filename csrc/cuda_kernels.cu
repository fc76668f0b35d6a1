// The CUDA kernels. One block per chunk; a thread takes kVectorBytes of w (the norm: of g) at a time. Without torch, and
// started through cudaLaunchKernelEx, so that tests compile this very file for the CPU too.
#include <cuda_runtime.h>

#include "kernels.h"

#ifndef MUP2_SHARED
#define MUP2_SHARED(type, name) __shared__ type name
#endif

namespace mup2 {
namespace {

template <class T, int n> struct alignas(sizeof(T) * n < kVectorBytes ? sizeof(T) * n : kVectorBytes) Pack { T x[n]; };

// n elements, of which `left` exist; what does not exist reads as 0.
template <class T, int n> __device__ Pack<T, n> load(const T* from, int left, bool aligned) {
  if (aligned && left >= n) return *(const Pack<T, n>*)from;
  Pack<T, n> pack;
#pragma unroll
  for (int j = 0; j < n; ++j) pack.x[j] = j < left ? from[j] : T{};
  return pack;
}
template <class T, int n> __device__ void store(T* to, const Pack<T, n>& pack, int left, bool aligned) {
  if (aligned && left >= n) {
    *(Pack<T, n>*)to = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (j < left) to[j] = pack.x[j];
}

// ---------------------------------------------------------------------------------------------- reductions

struct Scratch {
  double warps[kThreads / kWarp];
  bool last;
};

// Sum over the threads of a block, for all of them, in the order of tree().
__device__ double block_sum(double x, Scratch& scratch) {
  for (int half = kWarp / 2; half > 0; half /= 2) x += __shfl_down_sync(0xffffffffu, x, half);
  if (threadIdx.x % kWarp == 0) scratch.warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double warps[kThreads / kWarp];
  for (int i = 0; i < kThreads / kWarp; ++i) warps[i] = scratch.warps[i];
  __syncthreads();  // the next sum overwrites the scratch
  return fold<kThreads / kWarp>(warps);
}

// As mup2::ordered_sum.
__device__ double ordered_block_sum(const double* x, int64_t n, Scratch& scratch) {
  double column = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) column += x[i];
  return block_sum(column, scratch);
}

// True in the last of `expected` blocks to come here, which then sees what thread 0 of all of them wrote before.
__device__ bool last_to_arrive(uint32_t* counter, uint32_t expected, Scratch& scratch) {
  if (threadIdx.x == 0) {
    __threadfence();
    scratch.last = atomicAdd(counter, 1u) == expected - 1;
    if (scratch.last) atomicExch(counter, 0u);  // ready for the next launch
    __threadfence();
  }
  __syncthreads();
  return scratch.last;
}

// A sum of squares as an unevaluated hi + lo: some 45 bits from float32 operations, as a GPU's float64 units may be too
// slow (A10G: 1/64 of the rate). Knuth's TwoSum, and the exact error of the square.
template <class R> struct Sum { R hi, lo; };
MUP2_FN float square_error(float x, float square) {
#ifdef MUP2_FMA
  return fmaf(x, x, -square);
#else
  return float(double(x) * double(x) - double(square));  // 48 bits: exact, and so is the rest
#endif
}
template <bool exact> MUP2_FN void add_square(Sum<float>& s, float x) {  // exact: x² is a float, as of 16-bit numbers
  const float square = x * x, hi = s.hi + square, t = hi - s.hi;
  s.lo += ((s.hi - (hi - t)) + (square - t)) + (exact ? 0 : square_error(x, square));
  s.hi = hi;
}
template <bool> MUP2_FN void add_square(Sum<double>& s, double x) { s.hi += x * x; }

template <class A, int variant, class W, class G>
__device__ double sum_squares(const W* w, const G* g, int n, bool aligned, Scratch& scratch) {
  constexpr int V = kVector<G>;
  constexpr bool exact = sizeof(G) == 2 && variant != kElementwise;
  Sum<A> sums[V] = {};
  for (int i = threadIdx.x * V; i < n; i += kThreads * V) {
    const auto gs = load<G, V>(g + i, n - i, aligned);
    Pack<W, V> ws = {};
    if (variant == kElementwise) ws = load<W, V>(w + i, n - i, aligned);
#pragma unroll
    for (int j = 0; j < V; ++j) add_square<exact>(sums[j], A(term<variant, Wide<W>>(widen(ws.x[j]), widen(gs.x[j]))));
  }
  double x[V];
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = double(sums[j].hi) + double(sums[j].lo);
  return block_sum(fold<V>(x), scratch);
}

// float32 sums leave their range beyond gradients of 1e19: such a chunk is summed again in float64.
template <int variant, class W, class G>
__device__ double chunk_sum(const W* w, const G* g, int n, bool aligned, Scratch& scratch) {
  const double sum = sum_squares<Wide<W>, variant>(w, g, n, aligned, scratch);
  return is_finite(sum) ? sum : sum_squares<double, variant>(w, g, n, aligned, scratch);
}

// ---------------------------------------------------------------------------------------------- kernels

__device__ void finish(const NormState& s, double square) {
  if (threadIdx.x == 0) finish_norm(s, square);
  __syncthreads();
  for (int i = threadIdx.x; i < s.n_tensors; i += kThreads) finish_coefficient(s, i);
}

template <int variant, class W, class G, class B>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ B batch, const NormState s) {
  MUP2_SHARED(Scratch, scratch);
  const Chunk c = locate(batch, blockIdx.x);
  const Item<2>& item = batch.items[c.item];
  const W* w = (const W*)item.ptr[kW] + c.begin;
  const G* g = (const G*)item.ptr[kG] + c.begin;
  constexpr bool layerwise = variant == kLayerwise;
  const double g2 = chunk_sum<layerwise ? kSam : variant>(w, g, c.count, item.aligned, scratch);
  const double w2 = layerwise ? chunk_sum<kSam>(w, w, c.count, item.aligned, scratch) : 0;
  double* partials = s.partials + batch.first_partial;
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = g2;
    if (layerwise) partials[s.n_partials + blockIdx.x] = w2;
  }
  const int tensor = batch.first_tensor + c.item;
  if (!last_to_arrive(&s.counters[tensor], c.chunks, scratch)) return;
  partials += item.first_chunk;
  const double gradient = ordered_block_sum(partials, c.chunks, scratch);
  const double weight = layerwise ? ordered_block_sum(partials + s.n_partials, c.chunks, scratch) : 0;
  if (threadIdx.x == 0) contribute(s, tensor, batch.groups[item.group], layerwise, gradient, weight);
  if (!last_to_arrive(&s.counters[s.n_tensors], s.n_tensors, scratch)) return;
  finish(s, ordered_block_sum(s.contribution, s.n_tensors, scratch));
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const NormState s, const double* square) { finish(s, *square); }

__global__ void __launch_bounds__(kThreads) from_sums_kernel(const NormState s, bool layerwise) {
  MUP2_SHARED(Scratch, scratch);
  for (int i = threadIdx.x; i < s.n_tensors; i += kThreads) contribute_from_sums(s, i, layerwise);
  __syncthreads();
  finish(s, ordered_block_sum(s.contribution, s.n_tensors, scratch));
}

template <int variant, class W, class G, class B>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ B batch, const double* coefficient) {
  constexpr int V = kVector<W>;
  const Chunk c = locate(batch, batch.n_chunks - 1 - blockIdx.x);  // the gradients that norm read last are still in L2
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
    for (int j = 0; j < V; ++j) ws.x[j] = narrow<W>(perturbed<variant, Wide<W>>(widen(ws.x[j]), widen(gs.x[j]), factor));
    store(w + i, ws, left, item.aligned);
  }
}

// Gradients, divided by the scale of the loss in memory too, if there is one.
template <class G, int n> __device__ Pack<G, n> load_gradients(G* g, const float* scale, int left, bool aligned) {
  auto gs = load<G, n>(g, left, aligned);
  if (scale) {
#pragma unroll
    for (int j = 0; j < n; ++j) gs.x[j] = narrow<G>(widen(gs.x[j]) / Wide<G>(*scale));
    store(g, gs, left, aligned);
  }
  return gs;
}

// V elements of one update; m and v may be 0.
template <class Method, class W, class G, class Rule>
__device__ void update_pack(Pack<W, kVector<W>>& ws, const Pack<G, kVector<W>>& gs, W* m, W* v, const Rule& rule, int left, bool aligned) {
  constexpr int V = kVector<W>;
  Pack<W, V> ms = {}, vs = {};
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

template <class Method, class W, class G, class B>
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
  const auto at = [&](int which, auto type) { return item.ptr[which] ? (decltype(type)*)item.ptr[which] + c.begin : nullptr; };
  W* w = at(kW, W{});
  const W* base = item.ptr[kBackup] ? at(kBackup, W{}) : w;
  if (updates || unscales || base != w)
    for (int i = threadIdx.x * V; i < c.count; i += kThreads * V) {
      const int left = c.count - i;
      auto ws = load<W, V>(base + i, left, item.aligned);
      Pack<G, V> gs = {};
      if (updates || unscales) gs = load_gradients<G, V>(at(kG, G{}) + i, control.grad_scale, left, item.aligned);
      if (updates) {
        W* m = item.ptr[kM] ? at(kM, W{}) + i : nullptr;
        W* v = Method::kMoments > 1 ? at(kV, W{}) + i : nullptr;
        update_pack<Method>(ws, gs, m, v, rule, left, item.aligned);
      }
      store(w + i, ws, left, item.aligned);
    }
  if (B::kPointers > kSteps && last_to_arrive(control.counter, batch.n_chunks, shared.scratch))
    for (uint32_t i = threadIdx.x; i < batch.n_items; i += kThreads) count_step(batch.items[i], shared.skip);
}

// ---------------------------------------------------------------------------------------------- launches

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), uint32_t blocks, void* stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads), config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launching copies all parameters of a kernel: most models need a quarter of them.
template <class B, class F> int with_size(const B& batch, F f) {
  using Small = Batch<B::kPointers, typename B::GroupType, 128, 8>;
  if (batch.n_items > Small::kCapacity || batch.n_groups > Small::kGroupCapacity) return f(batch);
  Small small;
  memcpy(small.items, batch.items, batch.n_items * sizeof batch.items[0]);
  memcpy(small.groups, batch.groups, batch.n_groups * sizeof batch.groups[0]);
  small.n_items = batch.n_items, small.n_groups = batch.n_groups, small.n_chunks = batch.n_chunks;
  small.first_tensor = batch.first_tensor, small.first_partial = batch.first_partial;
  return f(small);
}

template <class Method> int launch_update(const UpdateBatch<Method>& batch, const Control& control, Types types, void* stream) {
  return with_types(types, [&](auto w, auto g) {
    return with_size(batch, [&](const auto& b) {
      return launch(update_kernel<Method, decltype(w), decltype(g), std::decay_t<decltype(b)>>, b.n_chunks, stream, b, control);
    });
  });
}

}  // namespace

int cuda_norm(const NormBatch& batch, const NormState& state, Types types, Variant variant, void* stream) {
  return with_types(types, [&](auto w, auto g) {
    return with_size(batch, [&](const auto& b) {
      using W = decltype(w);
      using G = decltype(g);
      using B = std::decay_t<decltype(b)>;
      const auto kernel = variant == kSam           ? norm_kernel<kSam, W, G, B>
                          : variant == kElementwise ? norm_kernel<kElementwise, W, G, B>
                                                    : norm_kernel<kLayerwise, W, G, B>;
      return launch(kernel, b.n_chunks, stream, b, state);
    });
  });
}

int cuda_combine(const NormState& state, const double* square, void* stream) {
  return launch(combine_kernel, 1, stream, state, square);
}

int cuda_from_sums(const NormState& state, bool layerwise, void* stream) { return launch(from_sums_kernel, 1, stream, state, layerwise); }

int cuda_perturb(const PerturbBatch& batch, const double* coefficient, Types types, Variant variant, void* stream) {
  return with_types(types, [&](auto w, auto g) {
    return with_size(batch, [&](const auto& b) {
      using W = decltype(w);
      using G = decltype(g);
      using B = std::decay_t<decltype(b)>;
      const auto kernel = variant == kElementwise ? perturb_kernel<kElementwise, W, G, B> : perturb_kernel<kSam, W, G, B>;
      return launch(kernel, b.n_chunks, stream, b, coefficient);
    });
  });
}

int cuda_update(const UpdateBatch<Sgd>& batch, const Control& control, Types types, void* stream) {
  return launch_update<Sgd>(batch, control, types, stream);
}
int cuda_update(const UpdateBatch<Adam>& batch, const Control& control, Types types, void* stream) {
  return launch_update<Adam>(batch, control, types, stream);
}
const char* cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }

}  // namespace mup2
