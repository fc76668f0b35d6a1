// The CPU kernels for x86-64 with AVX2 and FMA.
#ifdef __x86_64__
// System headers come first: the target pragma must not reach their functions, which other object files share.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#pragma GCC target("avx2,fma")
#define MUP2_FMA
#include "cpu/kernels.h"
#define MUP2_VECTOR __m256i
#define MUP2_STREAM _mm256_stream_si256
#include "cpu/loops.h"

const mup2::CpuKernels mup2::kCpuAvx2 = {"avx2", norm, perturb, update<Sgd>, update<Adam>};
#endif
