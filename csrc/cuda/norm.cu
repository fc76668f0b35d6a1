// The joint norm and the coefficients of the perturbation, in one launch. See core/sam.h.
#include "cuda/sums.h"

namespace mup2 {
namespace {

// Norm and coefficients from the square of the norm, by one block.
__device__ void finish(const NormState& s, double square) {
  if (threadIdx.x == 0) finish_norm(s, square);
  __syncthreads();
  for (int i = threadIdx.x; i < s.n_tensors; i += kThreads) finish_coefficient(s, i);
}

// The sums of one tensor, to which the chunk c belongs, from the sums over its chunks. The block that does this for the
// last tensor computes the norm and the coefficients.
template <class B>
__device__ void finish_tensor(const B& batch, const Chunk& c, const double* partials, const NormState& s,
                              bool layerwise, Scratch& scratch) {
  const int tensor = batch.first_tensor + c.item;
  const double gradient = ordered_block_sum(partials, c.chunks, scratch);
  const double weight = layerwise ? ordered_block_sum(partials + s.n_partials, c.chunks, scratch) : 0;
  if (threadIdx.x == 0) {
    s.radii[tensor] = batch.groups[batch.items[c.item].group];
    s.sums[tensor][0] = gradient, s.sums[tensor][1] = weight;
    contribute(s, tensor, layerwise);
  }
  if (!last_to_arrive(&s.counters[s.n_tensors], s.n_tensors, scratch)) return;
  finish(s, ordered_block_sum(s.contribution, s.n_tensors, scratch));
}

// Each block makes the partial sum of a chunk. The last block of a tensor adds them up, and the last block of all
// tensors computes the norm and the coefficients.
template <int variant, class W, class G, class B>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ B batch, const NormState s) {
  MUP2_SHARED(Scratch, scratch);
  const Chunk c = locate(batch, blockIdx.x);
  const Item<2>& item = batch.items[c.item];
  const W* w = (const W*)item.ptr[kW] + c.begin;
  const G* g = (const G*)item.ptr[kG] + c.begin;
  constexpr bool layerwise = variant == kLayerwise;
  const double g2 = chunk_sum<layerwise ? kSam : variant>(w, g, c.count, item.aligned, scratch);
  const double w2 = layerwise ? chunk_sum<kSam>(w, w, c.count, item.aligned, scratch) : 0;
  double* partials = s.partials + batch.first_partial;
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = g2;
    if (layerwise) partials[s.n_partials + blockIdx.x] = w2;
  }
  if (last_to_arrive(&s.counters[batch.first_tensor + c.item], c.chunks, scratch))
    finish_tensor(batch, c, partials + item.first_chunk, s, layerwise, scratch);
}

// The same from known sums over chunks, by one block per tensor.
template <class B>
__global__ void __launch_bounds__(kThreads) norm_of_sums_kernel(const __grid_constant__ B batch, const NormState s) {
  MUP2_SHARED(Scratch, scratch);
  const auto& item = batch.items[blockIdx.x];
  finish_tensor(batch, chunk_of(batch, blockIdx.x, item.first_chunk), (const double*)item.ptr[kSums], s, false, scratch);
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const NormState s, const double* square) {
  finish(s, *square);
}

__global__ void __launch_bounds__(kThreads) from_sums_kernel(const NormState s, bool layerwise) {
  MUP2_SHARED(Scratch, scratch);
  for (int i = threadIdx.x; i < s.n_tensors; i += kThreads) contribute(s, i, layerwise);
  __syncthreads();
  finish(s, ordered_block_sum(s.contribution, s.n_tensors, scratch));
}

}  // namespace

int cuda_norm(const NormBatch& batch, const NormState& state, Types types, Variant variant, void* stream) {
  return with_types(types, [&](auto w, auto g) {
    return with_size(batch, [&](const auto& b) {
      using W = decltype(w);
      using G = decltype(g);
      using B = std::decay_t<decltype(b)>;
      const auto kernel = variant == kSam           ? norm_kernel<kSam, W, G, B>
                          : variant == kElementwise ? norm_kernel<kElementwise, W, G, B>
                                                    : norm_kernel<kLayerwise, W, G, B>;
      return launch(kernel, b.n_chunks, stream, b, state);
    });
  });
}

int cuda_norm_of_sums(const SumsBatch& batch, const NormState& state, void* stream) {
  return with_size(batch, [&](const auto& b) {
    return launch(norm_of_sums_kernel<std::decay_t<decltype(b)>>, b.n_items, stream, b, state);
  });
}

int cuda_combine(const NormState& state, const double* square, void* stream) {
  return launch(combine_kernel, 1, stream, state, square);
}

int cuda_from_sums(const NormState& state, bool layerwise, void* stream) {
  return launch(from_sums_kernel, 1, stream, state, layerwise);
}

}  // namespace mup2
