// The kernels as bindings.cpp sees them. Each takes one launch's worth of tensors of one device and pair of types.
#pragma once
#include "mup2_math.h"

namespace mup2 {

// Each function does chunks [begin, end) of a batch on the calling thread. streaming: write what is not read again past
// the caches.
struct CpuKernels {
  const char* name;
  void (*norm)(const NormBatch&, const NormState&, Types, Variant, int64_t begin, int64_t end);
  void (*perturb)(const PerturbBatch&, const double* coefficient, Types, Variant, bool streaming, int64_t begin, int64_t end);
  void (*sgd)(const UpdateBatch<Sgd>&, const Control&, Types, bool streaming, int64_t begin, int64_t end);
  void (*adam)(const UpdateBatch<Adam>&, const Control&, Types, bool streaming, int64_t begin, int64_t end);
};
extern const CpuKernels kCpuBaseline;
#ifdef __x86_64__
extern const CpuKernels kCpuAvx2, kCpuAvx512;
#endif

// CUDA: asynchronous, on a cudaStream_t; return 0 or a cudaError_t. norm() finishes norm and coefficients by itself
// when the last of all its state's tensors is done; from_sums() does that once more from those in its state, which have been
// added up over shards, and combine() from another square of the norm.
int cuda_norm(const NormBatch&, const NormState&, Types, Variant, void* stream);
int cuda_from_sums(const NormState&, bool layerwise, void* stream);
int cuda_combine(const NormState&, const double* square, void* stream);
int cuda_perturb(const PerturbBatch&, const double* coefficient, Types, Variant, void* stream);
int cuda_update(const UpdateBatch<Sgd>&, const Control&, Types, void* stream);
int cuda_update(const UpdateBatch<Adam>&, const Control&, Types, void* stream);
const char* cuda_error(int);

}  // namespace mup2
