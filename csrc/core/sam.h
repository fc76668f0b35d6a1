// The formulas of SAM: the joint norm over all tensors, each tensor's coefficient, and the climb. Symbols as in
// mup2_ref.py: w weight, g gradient, T normalizer, c = rho / (norm + eps).
//
// The order of every sum is fixed: over each chunk, over the chunks of a tensor, over the tensors. So the bits of the
// norm do not depend on the number of threads, nor on which CPU runs it. GPUs sum each chunk in another type.
#pragma once
#include "core/batches.h"

namespace mup2 {

constexpr double kEps = 1e-12;

enum Variant { kSam, kElementwise, kLayerwise };  // T = 1, |w|, ||w||_F
struct Radius { double rho, gradnorm_scaling; };  // of one tensor

using NormBatch = Batch<2, Radius>;
using SumsBatch = Batch<kSums + 1, Radius>;  // of tensors whose sums over chunks are known already
using PerturbBatch = Batch<3, None>;

// Results of the norm, in memory of the device. Arrays have one value per tensor.
struct NormState {
  double* norm;          // [0] the joint norm, [1] its square
  double* contribution;  // (gradnorm_scaling ||T g||)²: mup2_ref's contribution, squared
  double* numerator;     // rho T²; rho for kElementwise
  double* coefficient;   // numerator / (norm + eps), or 0 if the norm is not finite
  double (*sums)[2];     // sum of (T g)², and for kLayerwise the sum of w²
  Radius* radii;
  double* partials;    // per chunk: sum of (T g)²; for kLayerwise followed by the sums of w² of all chunks
  int32_t* nonfinite;  // 1: the norm is not finite, so nothing is perturbed and the update is skipped
  uint32_t* counters;  // CUDA: blocks that are done, per tensor; [n_tensors]: tensors that are done; 0 between launches
  int32_t n_tensors;
  int64_t n_partials;  // the number of chunks
};

// T g. For kLayerwise T is a number per tensor: contribute() multiplies by it, and the loops are those of kSam.
template <int variant, class R> MUP2_FN R term(R w, R g) { return variant == kElementwise ? g * magnitude(w) : g; }

// The climb to w + c T² g. For kLayerwise c includes T². c = 0 leaves w alone, even where g is NaN.
template <int variant, class R> MUP2_FN R perturbed(R w, R g, R c) {
  return c == 0 ? w : w + g * (variant == kElementwise ? magnitude(w) * magnitude(w) * c : c);
}

// Sum of n = 2^k values: the upper half is added to the lower half until one value is left. Overwrites them.
template <int n> MUP2_FN double fold(double* x) {
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Sum of kThreads columns of which the first n are given: within each warp by fold(), then over the warps. The columns
// beyond are 0; adding them would change no bit.
MUP2_FN double tree(double* x, int n = kThreads) {
  const int used = (n + kWarp - 1) / kWarp;
  for (int i = n; i < used * kWarp; ++i) x[i] = 0;
  double warps[kThreads / kWarp] = {};
  for (int i = 0; i < used; ++i) warps[i] = fold<kWarp>(x + i * kWarp);
  return fold<kThreads / kWarp>(warps);
}

// Sum of x[0], ..., x[n - 1] in an order that depends on n only: every kThreads-th value into one column, then tree().
MUP2_FN double ordered_sum(const double* x, int64_t n) {
  if (n == 1) return x[0];
  double columns[kThreads];
  const int used = n < kThreads ? n : kThreads;
  for (int i = 0; i < used; ++i) columns[i] = x[i];
  for (int64_t i = kThreads; i < n; ++i) columns[i % kThreads] += x[i];
  return tree(columns, used);
}

// One tensor's contribution and numerator, from the sums in s.sums and the radius in s.radii.
MUP2_FN void contribute(const NormState& s, int tensor, bool layerwise) {
  const auto& [rho, scaling] = s.radii[tensor];
  const double T = layerwise ? root(s.sums[tensor][1]) : 1;
  s.contribution[tensor] = scaling * scaling * s.sums[tensor][0] * T * T;
  s.numerator[tensor] = rho * T * T;
}
MUP2_FN void finish_norm(const NormState& s, double square) {
  s.norm[0] = root(square);
  s.norm[1] = square;
  *s.nonfinite = !is_finite(square);
}
MUP2_FN void finish_coefficient(const NormState& s, int tensor) {
  s.coefficient[tensor] = *s.nonfinite ? 0 : s.numerator[tensor] / (s.norm[0] + kEps);
}

// The end of the norm on the CPU, from the sums over each chunk of a tensor. On CUDA the last block of each tensor, and
// then of all tensors, does the same.
template <class B>
MUP2_FN void finish_tensor(const B& batch, uint32_t i, const double* partials, const NormState& s, bool layerwise) {
  const int tensor = batch.first_tensor + i;
  const int64_t n = chunk_of(batch, i, batch.items[i].first_chunk).chunks;
  s.radii[tensor] = batch.groups[batch.items[i].group];
  s.sums[tensor][0] = ordered_sum(partials, n);
  s.sums[tensor][1] = layerwise ? ordered_sum(partials + s.n_partials, n) : 0;
  contribute(s, tensor, layerwise);
}
MUP2_FN void finish_all(const NormState& s, double square) {
  finish_norm(s, square);
  for (int i = 0; i < s.n_tensors; ++i) finish_coefficient(s, i);
}
MUP2_FN void finish_from_sums(const NormState& s, bool layerwise) {
  for (int i = 0; i < s.n_tensors; ++i) contribute(s, i, layerwise);
  finish_all(s, ordered_sum(s.contribution, s.n_tensors));
}

}  // namespace mup2
