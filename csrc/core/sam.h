// The formulas of SAM. Symbols as in mup2_ref.py: w weight, g gradient, T normalizer, c = rho / (norm + eps).
#pragma once
#include "core/batches.h"

namespace mup2 {

constexpr double kEps = 1e-12;

enum Variant { kSam, kElementwise, kLayerwise };  // T = 1, |w|, ||w||_F

struct Radius { double rho, gradnorm_scaling; };  // of one tensor

using PerturbBatch = Batch<3, None, capacity<3, None>()>;

// T g. For kLayerwise T is a number per tensor: it is left out here, and contribution() has it.
template <int variant, class R> MUP2_FN R term(R w, R g) { return variant == kElementwise ? g * magnitude(w) : g; }

// (gradnorm_scaling ||T g||)², from the sum over (T g)² of term() and from the T that was left out there.
MUP2_FN double contribution(const Radius& r, double sum, double T) {
  return r.gradnorm_scaling * r.gradnorm_scaling * sum * T * T;
}

// The climb to w + c T² g. For kLayerwise c includes T². c = 0 leaves w alone, even where g is NaN.
template <int variant, class R> MUP2_FN R perturbed(R w, R g, R c) {
  return c == 0 ? w : w + g * (variant == kElementwise ? magnitude(w) * magnitude(w) * c : c);
}

}  // namespace mup2
