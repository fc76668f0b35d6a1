// The CPU kernels, once per instruction set.
#pragma once
#include "core/sam.h"
#include "core/updates.h"

namespace mup2 {

// Each function does the chunks [begin, end) of a batch on the calling thread. streaming: write what is not read again
// soon past the caches.
struct CpuKernels {
  const char* name;
  void (*norm)(const NormBatch&, const NormState&, Types, Variant, int64_t begin, int64_t end);
  void (*perturb)(const PerturbBatch&, const double* coefficient, Types, Variant, bool streaming, int64_t begin,
                  int64_t end);
  void (*sgd)(const UpdateBatch<Sgd>&, const Control&, Types, bool streaming, int64_t begin, int64_t end);
  void (*adam)(const UpdateBatch<Adam>&, const Control&, Types, bool streaming, int64_t begin, int64_t end);
};
extern const CpuKernels kCpuBaseline;
#ifdef __x86_64__
extern const CpuKernels kCpuAvx2, kCpuAvx512;
#endif

// The kernels for the best instruction set of this processor, or for the one that the environment variable MUP2_CPU
// names (baseline, avx2, avx512), as far as the processor has it. Throws std::runtime_error if MUP2_CPU names another.
const CpuKernels& cpu_kernels();

}  // namespace mup2
