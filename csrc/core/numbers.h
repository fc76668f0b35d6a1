// Numbers in the kernels: how they are stored, how they are computed with, and how they are rounded.
//
// Weights are float32, float64, bfloat16 or float16. The kernels compute in float32, or in float64 for float64 weights,
// and round every operation in the order of mup2_ref.py. So no compiler may turn a * b + c into one operation
// (-ffp-contract=off, -fmad=false). Where torch's own kernels do that, fused() does it too.
//
// Functions are static because the CPU kernels are compiled once per instruction set: object files that are compiled
// for different instruction sets must not share a function.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MUP2_FN static __host__ __device__ __forceinline__
#else
#define MUP2_FN static inline __attribute__((always_inline))
#endif
// MUP2_FMA says that fma() is one instruction. A file with a target pragma must define it by itself, because the pragma
// comes too late for __FMA__.
#if defined(__CUDA_ARCH__) || defined(__FMA__)
#define MUP2_FMA
#endif

namespace mup2 {

enum Type : uint8_t { kF32, kF64, kBF16, kF16 };
enum class BFloat16 : uint16_t {};  // enumerations, not structs: g++ vectorizes loops over enumerations
enum class Half : uint16_t {};

// The type that numbers stored as T are computed in.
template <class T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

MUP2_FN float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
MUP2_FN uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MUP2_FN float widen(float x) { return x; }
MUP2_FN double widen(double x) { return x; }
MUP2_FN float widen(BFloat16 x) { return from_bits(uint32_t(x) << 16); }
MUP2_FN float widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(uint16_t(x)));
#else
  // Without branches, so that g++ vectorizes it. Exponent and mantissa are shifted into place. Multiplying by
  // 2^(127 - 15) corrects the exponent, exactly and for subnormal numbers too; infinities and NaNs get the largest one.
  const uint32_t magnitude = (uint32_t(x) & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return from_bits(to_bits(from_bits(magnitude) * 0x1p112f) | special | (uint32_t(x) & 0x8000u) << 16);
#endif
}

// Rounds x to the nearest number of the type of `to`, ties to even.
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
template <class T> MUP2_FN T narrow(Wide<T> x) {
  T y;
  round_to(y, x);
  return y;
}

// Storage types of a weight and its gradient. A gradient has the type of its weight, or float32.
struct Types {
  Type w, g;
  bool operator==(const Types& other) const { return w == other.w && g == other.g; }
};

// Calls f(W{}, G{}) with the C++ types that these stand for.
template <class F> static inline auto with_types(Types t, F f) {
  const bool wide_gradient = t.g == kF32;
  switch (t.w) {
    case kF32: return f(float{}, float{});
    case kF64: return wide_gradient ? f(double{}, float{}) : f(double{}, double{});
    case kBF16: return wide_gradient ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    default: return wide_gradient ? f(Half{}, float{}) : f(Half{}, Half{});
  }
}

MUP2_FN float magnitude(float x) { return fabsf(x); }
MUP2_FN double magnitude(double x) { return fabs(x); }
MUP2_FN float root(float x) { return sqrtf(x); }
MUP2_FN double root(double x) { return sqrt(x); }
MUP2_FN bool is_finite(double x) { return x - x == 0; }

// a * b + c, rounded once where the processor can. torch's own kernels compute these terms like this.
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

// x^n by repeated squaring. Its bits are the same on every machine; pow() does not promise that.
MUP2_FN double power(double x, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1, x *= x)
    if (n & 1) result *= x;
  return result;
}

}  // namespace mup2
