// The CPU kernels for x86-64 with AVX2 and FMA.
#ifdef __x86_64__
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#pragma GCC target("avx2,fma")
#define MUP2_FMA
#include "kernels.h"
#define MUP2_VECTOR __m256i
#define MUP2_STREAM _mm256_stream_si256
#include "cpu_kernels.h"

const mup2::CpuKernels mup2::kCpuAvx2 = {"avx2", norm, perturb, update<Sgd>, update<Adam>};
#endif
