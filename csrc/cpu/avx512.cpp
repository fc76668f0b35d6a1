// The CPU kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
#ifdef __x86_64__
// System headers come first: the target pragma must not reach their functions, which other object files share.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define MUP2_FMA
#include "cpu/kernels.h"
#define MUP2_VECTOR __m512i
#define MUP2_STREAM _mm512_stream_si512
#include "cpu/loops.h"

const mup2::CpuKernels mup2::kCpuAvx512 = {"avx512", norm, perturb, update<Sgd>, update<Adam>};
#endif
