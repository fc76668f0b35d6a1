// The joint norm over all tensors, and from it the coefficient of each tensor's perturbation.
//
// Sums have a fixed order: each chunk has one partial sum, partial sums are added tensor by tensor, and tensors in
// their order. So the bits of the norm depend neither on the number of threads nor on the processor.
#pragma once
#include "core/sam.h"

namespace mup2 {

using NormBatch = Batch<2, Radius, capacity<2, Radius>()>;

// Results of the norm, in memory of the device. Arrays have one value per tensor.
struct NormState {
  double* partials;      // per chunk: sum of (T g)²; for kLayerwise followed by the sums of w² of all chunks
  double* contribution;  // (gradnorm_scaling ||T g||)²
  double* numerator;     // rho T²; rho for kElementwise
  double* coefficient;   // numerator / (norm + eps), or 0 if the norm is not finite
  double (*sums)[2];     // sum of (T g)², and for kLayerwise the sum of w²
  Radius* radii;
  double* norm;        // [0] the joint norm, [1] its square
  int32_t* nonfinite;  // 1: the norm is not finite, so nothing is perturbed and the update is skipped
  uint32_t* counters;  // CUDA: blocks that are done, per tensor; [n_tensors]: tensors that are done; 0 between launches
  int32_t n_tensors;
  int64_t n_partials;  // the number of chunks
};

// ------------------------------------------------------------------------------------------------ ordered sums

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

// ---------------------------------------------------------------------------------------- from sums to coefficients

// One tensor's contribution and numerator, from its sums of (T g)² and of w².
MUP2_FN void contribute(const NormState& s, int tensor, const Radius& r, bool layerwise, double gradient,
                        double weight) {
  const double T = layerwise ? root(weight) : 1;
  s.sums[tensor][0] = gradient, s.sums[tensor][1] = weight, s.radii[tensor] = r;
  s.contribution[tensor] = contribution(r, gradient, T);
  s.numerator[tensor] = r.rho * T * T;
}
// The same once more, after sums have been added up over the processes that hold parts of the tensor.
MUP2_FN void contribute_from_sums(const NormState& s, int tensor, bool layerwise) {
  contribute(s, tensor, s.radii[tensor], layerwise, s.sums[tensor][0], s.sums[tensor][1]);
}
MUP2_FN void finish_norm(const NormState& s, double square) {
  s.norm[0] = root(square);
  s.norm[1] = square;
  *s.nonfinite = !is_finite(square);
}
MUP2_FN void finish_coefficient(const NormState& s, int tensor) {
  s.coefficient[tensor] = *s.nonfinite ? 0 : s.numerator[tensor] / (s.norm[0] + kEps);
}

// The last part of the norm on the CPU. The CUDA kernel of the norm does the same in its last block.
MUP2_FN void finish_tensor(const NormBatch& batch, uint32_t i, const NormState& s, bool layerwise) {
  const int64_t first = batch.first_partial + batch.items[i].first_chunk;
  const int64_t n = chunk_of(batch, i, batch.items[i].first_chunk).chunks;
  const double gradient = ordered_sum(s.partials + first, n);
  const double weight = layerwise ? ordered_sum(s.partials + s.n_partials + first, n) : 0;
  contribute(s, batch.first_tensor + i, batch.groups[batch.items[i].group], layerwise, gradient, weight);
}
MUP2_FN void finish_all(const NormState& s, double square) {
  finish_norm(s, square);
  for (int i = 0; i < s.n_tensors; ++i) finish_coefficient(s, i);
}
MUP2_FN void finish_from_sums(const NormState& s, bool layerwise) {
  for (int i = 0; i < s.n_tensors; ++i) contribute_from_sums(s, i, layerwise);
  finish_all(s, ordered_sum(s.contribution, s.n_tensors));
}

}  // namespace mup2
