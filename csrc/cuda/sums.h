// Sums of squares over a chunk, by the threads of a block.
#pragma once
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

template <class W, int V> MUP2_FN void add_squares(Sum<Wide<W>> (&sums)[V], const Pack<W, V>& xs) {
  for (int j = 0; j < V; ++j) add_square<sizeof(W) == 2>(sums[j], widen(xs.x[j]));
}

// The sum over the threads of a block, each of which has V sums. Every thread gets it.
template <int V, class R> __device__ double total(const Sum<R> (&sums)[V], Scratch& scratch) {
  double x[V];
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = double(sums[j].hi) + double(sums[j].lo);
  return block_sum(fold<V>(x), scratch);
}

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
  return total(sums, scratch);
}

// The same. In float32, squares of gradients beyond 1e19 overflow: such a chunk is summed again in float64.
template <int variant, class W, class G>
__device__ double chunk_sum(const W* w, const G* g, int n, bool aligned, Scratch& scratch) {
  const double sum = sum_squares<Wide<W>, variant>(w, g, n, aligned, scratch);
  return is_finite(sum) ? sum : sum_squares<double, variant>(w, g, n, aligned, scratch);
}

}  // namespace
}  // namespace mup2
