// The CPU kernels for any processor.
#include "cpu/kernels.h"
#ifdef __x86_64__
#include <immintrin.h>
#define MUP2_VECTOR __m128i
#define MUP2_STREAM _mm_stream_si128
#endif
#include "cpu/loops.h"

const mup2::CpuKernels mup2::kCpuBaseline = {"baseline", norm, perturb, update<Sgd>, update<Adam>};
