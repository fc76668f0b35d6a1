// What the CUDA kernels share: access to memory, sums over a block, launches. A block of threads does one chunk.
//
// cuda_runtime.h is the only header here that needs CUDA. Tests put another one in its place and so run the kernels on
// the CPU.
#pragma once
#include <cuda_runtime.h>

#include "cuda/kernels.h"

#ifndef MUP2_SHARED
#define MUP2_SHARED(type, name) __shared__ type name
#endif

namespace mup2 {
namespace {

template <class T> constexpr int kVector = kVectorBytes / sizeof(T);  // elements of one memory access

// n elements that are read or written together.
template <class T, int n> struct alignas(sizeof(T) * n < kVectorBytes ? sizeof(T) * n : kVectorBytes) Pack {
  T x[n];
};

// n elements, of which the first `left` exist; the others read as 0 and are not written.
template <class T, int n> __device__ Pack<T, n> load(const T* from, int left, bool aligned) {
  if (aligned && left >= n) return *(const Pack<T, n>*)from;
  Pack<T, n> pack;
#pragma unroll
  for (int j = 0; j < n; ++j) pack.x[j] = j < left ? from[j] : T{};
  return pack;
}
template <class T, int n> __device__ void store(T* to, const Pack<T, n>& pack, int left, bool aligned) {
  if (aligned && left >= n) {
    *(Pack<T, n>*)to = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (j < left) to[j] = pack.x[j];
}

// Shared memory of a block.
struct Scratch {
  double warps[kThreads / kWarp];
  bool last;
};

// Sum of x over the threads of a block, in the order of tree(). Every thread gets it.
__device__ inline double block_sum(double x, Scratch& scratch) {
  for (int half = kWarp / 2; half > 0; half /= 2) x += __shfl_down_sync(0xffffffffu, x, half);
  if (threadIdx.x % kWarp == 0) scratch.warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double warps[kThreads / kWarp];
  for (int i = 0; i < kThreads / kWarp; ++i) warps[i] = scratch.warps[i];
  __syncthreads();  // the next sum overwrites the scratch
  return fold<kThreads / kWarp>(warps);
}

// Sum of x[0], ..., x[n - 1] with the bits of ordered_sum().
__device__ inline double ordered_block_sum(const double* x, int64_t n, Scratch& scratch) {
  double column = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) column += x[i];
  return block_sum(column, scratch);
}

// True in the last of `expected` blocks that call this. It sees what thread 0 of every other block wrote before.
__device__ inline bool last_to_arrive(uint32_t* counter, uint32_t expected, Scratch& scratch) {
  if (threadIdx.x == 0) {
    __threadfence();
    scratch.last = atomicAdd(counter, 1u) == expected - 1;
    if (scratch.last) atomicExch(counter, 0u);  // ready for the next launch
    __threadfence();
  }
  __syncthreads();
  return scratch.last;
}

// Starts a kernel with kThreads threads per block. Through cudaLaunchKernelEx, so that a test can supply its own.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), uint32_t blocks, void* stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads), config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls f with the batch, or with a copy of a smaller type if it fits: a launch copies all parameters of its kernel,
// and most models need a quarter of them.
template <class B, class F> int with_size(const B& batch, F f) {
  using Small = Batch<B::kPointers, typename B::GroupType, 128, 8>;
  if (batch.n_items > Small::kCapacity || batch.n_groups > Small::kGroupCapacity) return f(batch);
  Small small;
  memcpy(small.items, batch.items, batch.n_items * sizeof batch.items[0]);
  memcpy(small.groups, batch.groups, batch.n_groups * sizeof batch.groups[0]);
  small.n_items = batch.n_items, small.n_groups = batch.n_groups, small.n_chunks = batch.n_chunks;
  small.first_tensor = batch.first_tensor, small.first_partial = batch.first_partial;
  return f(small);
}

}  // namespace
}  // namespace mup2
