// The updates of torch.optim.SGD, Adam and AdamW, in the order of operations of torch's own kernels.
#pragma once
#include "core/batches.h"

namespace mup2 {

// A template argument, because g++ vectorizes a loop only if it knows the kind of momentum when it compiles.
enum Momentum { kNoMomentum, kMomentum, kNesterov };

// A method has: Hyper, the hyper-parameters of a group as a user gives them; Rule, what its formula needs of them,
// rounded to the type R that is computed in; prepare(), which makes the rule; apply(), which returns the new weight and
// changes the moments m and v.

// torch.optim.SGD
struct Sgd {
  static constexpr int kMoments = 1, kPointers = 4;
  struct Hyper {
    double lr, weight_decay, momentum, dampening;
    const float* lr_tensor;              // learning rate in memory of the device; null: lr holds it
    int32_t nesterov, maximize, first;  // first: the momentum is new and becomes the gradient, without dampening
  };
  template <class R> struct Rule {
    R lr, weight_decay, momentum, decay, keep, sign;
    bool nesterov;
  };

  template <class R> MUP2_FN Rule<R> prepare(const Hyper& h, const float*) {
    const double lr = h.lr_tensor ? *h.lr_tensor : h.lr;
    return {R(lr), R(h.weight_decay), R(h.momentum), R(h.first ? 0 : h.momentum), R(h.first ? 1 : 1 - h.dampening),
            R(h.maximize ? -1 : 1), h.nesterov != 0};
  }
  template <Momentum momentum, class R> MUP2_FN R apply(const Rule<R>& r, R w, R g, R& m, R&) {
    g = r.sign * g;
    g = r.weight_decay != 0 ? fused(r.weight_decay, w, g) : g;
    if (momentum != kNoMomentum) m = fused(r.keep, g, m * r.decay);
    g = momentum == kNesterov ? fused(r.momentum, m, g) : momentum == kMomentum ? m : g;
    return fused(-r.lr, g, w);
  }
};

// torch.optim.Adam and AdamW, without amsgrad
struct Adam {
  static constexpr int kMoments = 2, kPointers = 6;
  struct Hyper {
    double lr, weight_decay, beta1, beta2, eps;
    const float* lr_tensor;
    int32_t decoupled, maximize;  // decoupled: weight decay of AdamW
  };
  template <class R> struct Rule {
    R shrink, weight_decay, keep1, beta2, keep2, correction2, eps, step_size, sign;
    static constexpr bool nesterov = false;
  };

  // steps: the number of updates before this one
  template <class R> MUP2_FN Rule<R> prepare(const Hyper& h, const float* steps) {
    const double lr = h.lr_tensor ? *h.lr_tensor : h.lr;
    const int64_t t = int64_t(*steps) + 1;
    return {R(h.decoupled ? 1 - lr * h.weight_decay : 1), R(h.decoupled ? 0 : h.weight_decay),
            R(1 - h.beta1), R(h.beta2), R(1 - h.beta2), R(root(1 - power(h.beta2, t))), R(h.eps),
            R(lr / (1 - power(h.beta1, t))), R(h.maximize ? -1 : 1)};
  }
  template <Momentum, class R> MUP2_FN R apply(const Rule<R>& r, R w, R g, R& m, R& v) {
    g = r.sign * g;
    w = w * r.shrink;
    g = r.weight_decay != 0 ? fused(r.weight_decay, w, g) : g;
    m = r.keep1 < R(0.5) ? fused(r.keep1, g - m, m) : g - (g - m) * (1 - r.keep1);
    v = fused(r.keep2 * g, g, v * r.beta2);
    return w + -r.step_size * m / (root(v) / r.correction2 + r.eps);
  }
};

template <class Method> using UpdateBatch = Batch<Method::kPointers, typename Method::Hyper>;

// Numbers in memory of the device that decide whether an update happens. Only nonfinite and counter must not be null.
struct Control {
  const int32_t* nonfinite;             // flag of the first gradient; see NormState
  const int32_t* nonfinite_second;      // flag of the second gradient
  const float *found_inf, *grad_scale;  // of torch.amp.GradScaler
  double* sums;                         // one per chunk: the sum of squares of its first moment; or null
  int64_t* skipped;                     // number of skipped steps; null in all but one launch of a step
  uint32_t* counter;                    // CUDA: blocks that are done; 0 between launches
};
MUP2_FN bool skips(const Control& c) {
  return *c.nonfinite || (c.nonfinite_second && *c.nonfinite_second) || (c.found_inf && *c.found_inf > 0);
}
// Adds 1 to the step count of a tensor, if the method has one and the tensor is updated.
template <int P> MUP2_FN void count_step(const Item<P>& item, bool skip) {
  if constexpr (P > kSteps)
    if (item.ptr[kG] && !skip) *(float*)item.ptr[kSteps] += 1;
}

}  // namespace mup2
