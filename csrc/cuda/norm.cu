// The joint norm and the coefficients of the perturbation, in one launch. See core/sam.h.
#include "cuda/device.h"

namespace mup2 {
namespace {

// A sum of squares as two numbers hi + lo, which in float32 hold some 45 bits. Float64 would be too slow on some GPUs
// (A10G: 1/64 of the rate of float32). add_square() is Knuth's TwoSum together with the exact error of the square.
template <class R> struct Sum { R hi, lo; };
MUP2_FN float square_error(float x, float square) {
#ifdef MUP2_FMA
  return fmaf(x, x, -square);
#else
  return float(double(x) * double(x) - double(square));  // 48 bits: exact, and so is the rest
#endif
}
// exact: x² is a float32 number, as it is for x of 16 bits.
template <bool exact> MUP2_FN void add_square(Sum<float>& s, float x) {
  const float square = x * x, hi = s.hi + square, t = hi - s.hi;
  s.lo += ((s.hi - (hi - t)) + (square - t)) + (exact ? 0 : square_error(x, square));
  s.hi = hi;
}
template <bool> MUP2_FN void add_square(Sum<double>& s, double x) { s.hi += x * x; }

// Sum of squares of T g over one chunk, added up in type A.
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
    for (int j = 0; j < V; ++j)
      add_square<exact>(sums[j], A(term<variant, Wide<W>>(widen(ws.x[j]), widen(gs.x[j]))));
  }
  double x[V];
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = double(sums[j].hi) + double(sums[j].lo);
  return block_sum(fold<V>(x), scratch);
}

// The same. In float32, squares of gradients beyond 1e19 overflow: such a chunk is summed again in float64.
template <int variant, class W, class G>
__device__ double chunk_sum(const W* w, const G* g, int n, bool aligned, Scratch& scratch) {
  const double sum = sum_squares<Wide<W>, variant>(w, g, n, aligned, scratch);
  return is_finite(sum) ? sum : sum_squares<double, variant>(w, g, n, aligned, scratch);
}

// Norm and coefficients from the square of the norm, by one block.
__device__ void finish(const NormState& s, double square) {
  if (threadIdx.x == 0) finish_norm(s, square);
  __syncthreads();
  for (int i = threadIdx.x; i < s.n_tensors; i += kThreads) finish_coefficient(s, i);
}

// Each block makes the partial sum of a chunk. The last block of a tensor adds them up, and the last block of all
// tensors computes the norm and the coefficients.
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
  if (threadIdx.x == 0) {
    s.radii[tensor] = batch.groups[item.group], s.sums[tensor][0] = gradient, s.sums[tensor][1] = weight;
    contribute(s, tensor, layerwise);
  }
  if (!last_to_arrive(&s.counters[s.n_tensors], s.n_tensors, scratch)) return;
  finish(s, ordered_block_sum(s.contribution, s.n_tensors, scratch));
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const NormState s, const double* square) {
  finish(s, *square);
}

__global__ void __launch_bounds__(kThreads) from_sums_kernel(const NormState s, bool layerwise) {
  MUP2_SHARED(Scratch, scratch);
  for (int i = threadIdx.x; i < s.n_tensors; i += kThreads) contribute(s, i, layerwise);
  __syncthreads();
  finish(s, ordered_block_sum(s.contribution, s.n_tensors, scratch));
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

int cuda_from_sums(const NormState& state, bool layerwise, void* stream) {
  return launch(from_sums_kernel, 1, stream, state, layerwise);
}

}  // namespace mup2
