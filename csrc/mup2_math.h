// The arithmetic of the fused kernels and their walk over memory, for the CPU compiler and for nvcc alike.
//
// Symbols as in mup2_ref.py: w weight, g gradient, T normalizer, c = rho / (norm + eps), m and v moments. Everything is
// computed in R, float or (for double weights) double, one rounding per operation that mup2_ref.py rounds, in its order:
// no compiler may contract a * b + c here (-ffp-contract=off, -fmad=false); where torch's own kernels contract, fused()
// says so. Every function is static: files compiled for different instruction sets must not share one.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MUP2_FN static __host__ __device__ __forceinline__
#else
#define MUP2_FN static inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__) || defined(__FMA__)
#define MUP2_FMA  // fma() is one instruction; files with a target pragma say so themselves, as g++ reads it too late
#endif

namespace mup2 {

constexpr double kEps = 1e-12;
#ifndef MUP2_THREADS
#define MUP2_THREADS 256  // sanitizers take fewer
#endif
constexpr int kThreads = MUP2_THREADS;  // of a CUDA block; columns of sums over chunks
constexpr int kWarp = 32;
constexpr int kChunk = 8192;            // elements per block: ResNet-18 already gives an H100 1,400 of them
constexpr int kVectorBytes = 16;        // one memory access of a CUDA thread
constexpr int kMaxItems = 1000;         // tensors per launch, at most; less where parameters of a kernel end at 32,764 bytes
constexpr int kMaxGroups = 32;          // distinct hyper-parameters per launch
enum Variant { kSam, kElementwise, kLayerwise };
enum Type : uint8_t { kF32, kF64, kBF16, kF16 };

// ------------------------------------------------------------------------------------------------ storage types

enum class BFloat16 : uint16_t {};  // enumerations, not structs: g++ vectorizes loops over them
enum class Half : uint16_t {};

template <class T> struct WideOf { using type = float; };
template <> struct WideOf<double> { using type = double; };
template <class T> using Wide = typename WideOf<T>::type;
template <class T> constexpr int kVector = kVectorBytes / sizeof(T);

MUP2_FN float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
MUP2_FN uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

MUP2_FN float widen(float x) { return x; }
MUP2_FN double widen(double x) { return x; }
MUP2_FN float widen(BFloat16 x) { return from_bits(uint32_t(x) << 16); }
MUP2_FN float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(uint16_t(x)));
#else
  // Without branches, so that it vectorizes: shift exponent and mantissa into place and rescale by 2^(127 - 15), exact
  // for subnormal numbers too; infinities and NaNs get the exponent that they would miss.
  const uint32_t magnitude = (uint32_t(x) & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return from_bits(to_bits(from_bits(magnitude) * 0x1p112f) | special | (uint32_t(x) & 0x8000u) << 16);
#endif
}

MUP2_FN void round_to(float& to, float x) { to = x; }
MUP2_FN void round_to(double& to, double x) { to = x; }
MUP2_FN void round_to(BFloat16& to, float x) {
  const uint32_t bits = to_bits(x);
  to = BFloat16(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
MUP2_FN void round_to(Half& to, float x) {
#ifdef __CUDA_ARCH__
  to = Half(__half_as_ushort(__float2half_rn(x)));
#else
  // Adding 2^(e + 13), where 2^e is the magnitude of x (2^-14 at least), leaves the rounded mantissa in the last bits.
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t exponent = magnitude & 0x7f800000u, least = 0x38800000u;  // 2^-14
  const uint32_t e = (exponent > least ? exponent : least) + (13u << 23);
  const uint32_t rounded = to_bits(from_bits(magnitude) + from_bits(e)) - e + ((e - (126u << 23)) >> 13);
  const uint32_t finite = magnitude >= 0x477ff000u ? 0x7c00u : rounded;  // 65520 and more round to infinity
  to = Half((magnitude > 0x7f800000u ? 0x7e00u : finite) | (bits >> 16 & 0x8000u));
#endif
}
template <class T> MUP2_FN T narrow(Wide<T> x) { T y; round_to(y, x); return y; }  // to nearest, ties to even

struct Types { Type w, g; };  // g: that of w, or float

// f(W{}, G{}) with the storage types of weights and gradients.
template <class F> static inline auto with_types(Types t, F f) {
  const bool wide_gradient = t.g == kF32;
  switch (t.w) {
    case kF32: return f(float{}, float{});
    case kF64: return wide_gradient ? f(double{}, float{}) : f(double{}, double{});
    case kBF16: return wide_gradient ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    default: return wide_gradient ? f(Half{}, float{}) : f(Half{}, Half{});
  }
}

// ------------------------------------------------------------------------------------------------ arithmetic

MUP2_FN float magnitude(float x) { return fabsf(x); }
MUP2_FN double magnitude(double x) { return fabs(x); }
MUP2_FN float root(float x) { return sqrtf(x); }
MUP2_FN double root(double x) { return sqrt(x); }
MUP2_FN bool is_finite(double x) { return x - x == 0; }

// a * b + c rounded once, as torch's own kernels have it wherever the processor can.
MUP2_FN float fused(float a, float b, float c) {
#ifdef MUP2_FMA
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
MUP2_FN double fused(double a, double b, double c) {
#ifdef MUP2_FMA
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// x^n by repeated squaring: the same bits on every machine, which pow() does not promise.
MUP2_FN double power(double x, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1, x *= x)
    if (n & 1) result *= x;
  return result;
}

template <int variant, class R> MUP2_FN R term(R w, R g) { return variant == kElementwise ? g * magnitude(w) : g; }

// Climb to w + c T² g (equation in mup2_ref.perturb_); layerwise T² is in c already. c = 0 leaves NaN gradients out.
template <int variant, class R> MUP2_FN R perturbed(R w, R g, R c) {
  return c == 0 ? w : w + g * (variant == kElementwise ? magnitude(w) * magnitude(w) * c : c);
}

// ------------------------------------------------------------------------------------------------ updates

enum Momentum { kNoMomentum, kMomentum, kNesterov };  // known when compiling, or g++ does not vectorize

// torch.optim.SGD
struct Sgd {
  static constexpr int kMoments = 1, kPointers = 4;
  struct Hyper {
    double lr, weight_decay, momentum, dampening;
    const float* lr_tensor;  // on the device; then lr is not read
    int32_t nesterov, maximize, first;  // first: the momentum is new, and becomes the gradient
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
    int32_t decoupled, maximize;
  };
  template <class R> struct Rule {
    R shrink, weight_decay, keep1, beta2, keep2, correction2, eps, step_size, sign;
    static constexpr bool nesterov = false;
  };

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

// ------------------------------------------------------------------------------------------------ the walk

// What a launch knows of one tensor. ptr: w, g, backup, first moment, second moment, step count (float32), as far as P goes;
// g 0: no update; backup 0: not perturbed. All are dense and in one order of elements.
enum { kW, kG, kBackup, kM, kV, kSteps };
template <int P> struct Item {
  void* ptr[P];
  uint32_t first_chunk;  // of the launch
  uint16_t tail;         // elements of its last chunk
  uint8_t group;
  uint8_t aligned;       // every pointer to kVectorBytes
};

// The parameters of a launch, by value: gradients have new addresses in every step. Fits into the 32,764 bytes of a kernel.
template <int P, class Group, int kItems, int kGroups = kMaxGroups> struct Batch {
  using GroupType = Group;
  static constexpr int kPointers = P, kCapacity = kItems, kGroupCapacity = kGroups;
  Item<P> items[kItems];
  Group groups[kGroups];
  uint32_t n_items, n_groups, n_chunks;
  int32_t first_tensor;   // number of items[0] in the optimizer's order
  int64_t first_partial;  // number of its first chunk
};
constexpr int kParameterBytes = 32764 - 256;  // the rest is for the other arguments
template <int P, class Group> constexpr int capacity() {
  constexpr int n = (kParameterBytes - kMaxGroups * int(sizeof(Group))) / int(sizeof(Item<P>));
  return n < kMaxItems ? n : kMaxItems;
}
struct Radius { double rho, gradnorm_scaling; };
struct None {};
using NormBatch = Batch<2, Radius, capacity<2, Radius>()>;
using PerturbBatch = Batch<3, None, capacity<3, None>()>;
template <class Method>
using UpdateBatch = Batch<Method::kPointers, typename Method::Hyper, capacity<Method::kPointers, typename Method::Hyper>()>;

struct Chunk {
  uint32_t item, chunks;  // and how many chunks that has
  int64_t begin;          // first element
  int count;
};

// Chunk number `chunk` of a launch, which belongs to that item.
template <class B> MUP2_FN Chunk chunk_of(const B& batch, uint32_t item, uint32_t chunk) {
  const uint32_t first = batch.items[item].first_chunk;
  const uint32_t end = item + 1 < batch.n_items ? batch.items[item + 1].first_chunk : batch.n_chunks;
  return {item, end - first, int64_t(chunk - first) * kChunk, chunk + 1 == end ? batch.items[item].tail : kChunk};
}

// The same, found: the last item that starts at or before it.
template <class B> MUP2_FN Chunk locate(const B& batch, uint32_t chunk) {
  uint32_t low = 0, high = batch.n_items;  // items[low].first_chunk <= chunk < items[high].first_chunk
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (batch.items[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return chunk_of(batch, low, chunk);
}

// ------------------------------------------------------------------------------------------------ norm and phases

// Results of the norm, on the device. Per tensor: squared contribution (gradnorm_scaling ||T g||)², numerator rho T² and
// coefficient c of the perturbation; and what they come from, sum (T g)² and (layerwise) sum w² in one row of sums, and the
// radius. partials: per chunk sum (T g)², after those of all chunks the sums of w² (layerwise).
struct NormState {
  double *partials, *contribution, *numerator, *coefficient;
  double (*sums)[2];
  Radius* radii;
  double* norm;        // [0] the joint norm, [1] its square
  int32_t* nonfinite;  // 1: perturb nothing, update nothing
  uint32_t* counters;  // blocks done, per tensor, and at [n_tensors] the tensors done; 0 between launches
  int32_t n_tensors;
  int64_t n_partials;
};

// What decides on the device whether an update happens.
struct Control {
  const int32_t *nonfinite, *nonfinite_second;  // the latter may be 0
  const float *found_inf, *grad_scale;          // of torch.amp.GradScaler; may be 0
  int64_t* skipped;                             // counts; 0: another launch of this step counts
  uint32_t* counter;                            // blocks done; 0 between launches
};
MUP2_FN bool skips(const Control& c) {
  return *c.nonfinite || (c.nonfinite_second && *c.nonfinite_second) || (c.found_inf && *c.found_inf > 0);
}
// Counts the update of a tensor, where the method asks for it.
template <int P> MUP2_FN void count_step(const Item<P>& item, bool skip) {
  if constexpr (P > kSteps)
    if (item.ptr[kG] && !skip) *(float*)item.ptr[kSteps] += 1;
}

// Sum of n = 2^k values, halves onto halves; overwrites them.
template <int n> MUP2_FN double fold(double* x) {
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// x[0..n) summed in an order that depends on n only: columns i, i + kThreads, ..., then halves, first within a warp.
// Columns beyond the first n are 0 and not looked at: adding them changes no bit.
MUP2_FN double tree(double* x, int n = kThreads) {
  const int used = (n + kWarp - 1) / kWarp;
  for (int i = n; i < used * kWarp; ++i) x[i] = 0;
  double warps[kThreads / kWarp] = {};
  for (int i = 0; i < used; ++i) warps[i] = fold<kWarp>(x + i * kWarp);
  return fold<kThreads / kWarp>(warps);
}
MUP2_FN double ordered_sum(const double* x, int64_t n) {
  if (n == 1) return x[0];
  double columns[kThreads];
  const int used = n < kThreads ? n : kThreads;
  for (int i = 0; i < used; ++i) columns[i] = x[i];
  for (int64_t i = kThreads; i < n; ++i) columns[i % kThreads] += x[i];
  return tree(columns, used);
}

// One tensor's share, from its sums over chunks.
MUP2_FN void contribute(const NormState& s, int tensor, const Radius& r, bool layerwise, double gradient, double weight) {
  const double T = layerwise ? root(weight) : 1;
  s.sums[tensor][0] = gradient, s.sums[tensor][1] = weight, s.radii[tensor] = r;
  s.contribution[tensor] = r.gradnorm_scaling * r.gradnorm_scaling * gradient * T * T;
  s.numerator[tensor] = r.rho * T * T;
}
// Once more, from sums over all shards of it.
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

}  // namespace mup2
