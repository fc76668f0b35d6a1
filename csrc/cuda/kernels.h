// The CUDA kernels as the host starts them. Each function takes one batch of tensors of one device and works on a
// cudaStream_t, without waiting for it. It returns 0 or a cudaError_t.
#pragma once
#include "core/sam.h"
#include "core/updates.h"

namespace mup2 {

// The last batch of a call also computes the norm and the coefficients.
int cuda_norm(const NormBatch&, const NormState&, Types, Variant, void* stream);
// The same for kSam, from sums over the chunks that an update has left behind.
int cuda_norm_of_sums(const SumsBatch&, const NormState&, void* stream);
// Norm and coefficients once more, from sums in the state that have been added up over processes.
int cuda_from_sums(const NormState&, bool layerwise, void* stream);
// Norm and coefficients once more, from the square of a norm over the tensors of several devices.
int cuda_combine(const NormState&, const double* square, void* stream);
int cuda_perturb(const PerturbBatch&, const double* coefficient, Types, Variant, void* stream);
template <class Method> int cuda_update(const UpdateBatch<Method>&, const Control&, Types, void* stream);

}  // namespace mup2
