// A CUDA runtime for tests that runs kernels on the CPU: put this folder before the toolkit's on the include path and
// compile a .cu file with g++ -std=c++20 -x c++. Each CUDA thread is a std::thread, so sanitizers see what the threads
// of a block, and of blocks that run at the same time, do to each other.
//
// A few blocks run at a time, in shuffled order, each on threads of its own that later blocks use again. Blocks are
// ordered by atomics and fences only. ThreadSanitizer is told that atomics alone order nothing, so a missing fence is a
// data race. Shared memory is filled with ones at the start of a block, so that nobody can rely on zeros.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define MUP2_SHARED(type, name) auto& name = cuda_on_cpu::shared<type>()

struct dim3 { unsigned x = 1; };
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32, kConcurrentBlocks = 3, kSharedBytes = 48 << 10, kParameterBytes = 32764;
inline std::mt19937_64 shuffling;  // of the order of blocks

// Not a std::barrier: its waiters share a table, which would order the threads of different blocks too.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  void arrive_and_wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    }
  }

 private:
  const unsigned threads_;
  std::atomic<unsigned> arrived_ = 0, phase_ = 0;
};

struct Block {
  explicit Block(unsigned threads) : all(threads), exchange(threads) {
    for (unsigned i = 0; i < threads; i += kWarpSize)
      warps.push_back(std::make_unique<Barrier>(std::min(kWarpSize, threads - i)));
  }
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<double> exchange;
  alignas(16) unsigned char memory[kSharedBytes];
};
inline thread_local Block* block;

template <class T> T& shared() {
  static_assert(sizeof(T) <= kSharedBytes);
  return *reinterpret_cast<T*>(block->memory);
}

}  // namespace cuda_on_cpu

inline thread_local dim3 threadIdx, blockIdx;

// Fences with relaxed atomics, as C++ defines them. ThreadSanitizer must be told the rule: if thread A writes memory,
// then passes a fence, then writes an atomic, and thread B reads that atomic and then passes a fence, then B sees the
// memory.
#if defined(__SANITIZE_THREAD__)
inline thread_local bool fenced = false;  // there was a fence, and no barrier since: all writes are before the fence
inline thread_local unsigned* observed = nullptr;
inline void before_atomic(unsigned* p) {
  if (fenced) __tsan_release(p);
  observed = p;
}
inline void __threadfence() {
  fenced = true;
  if (observed) __tsan_acquire(observed);
}
#else
inline thread_local bool fenced;
inline void before_atomic(unsigned*) {}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
#endif

inline void __syncthreads() {
  fenced = false;
  cuda_on_cpu::block->all.arrive_and_wait();
}

inline double __shfl_down_sync(unsigned, double x, unsigned distance) {
  auto& b = *cuda_on_cpu::block;
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarpSize;
  auto& warp = *b.warps[threadIdx.x / cuda_on_cpu::kWarpSize];
  b.exchange[threadIdx.x] = x;
  warp.arrive_and_wait();
  const double y = lane + distance < cuda_on_cpu::kWarpSize ? b.exchange[threadIdx.x + distance] : x;
  warp.arrive_and_wait();
  return y;
}

inline unsigned atomicAdd(unsigned* p, unsigned x) {
  before_atomic(p);
  return std::atomic_ref(*p).fetch_add(x, std::memory_order_relaxed);
}
inline unsigned atomicExch(unsigned* p, unsigned x) {
  before_atomic(p);
  return std::atomic_ref(*p).exchange(x, std::memory_order_relaxed);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterBytes, "too many bytes of kernel parameters");
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shuffling);

  std::vector<std::unique_ptr<Block>> slots;
  std::vector<std::thread> workers;
  for (unsigned slot = 0; slot < std::min(blocks, kConcurrentBlocks); ++slot) {
    slots.push_back(std::make_unique<Block>(threads));
    for (unsigned t = 0; t < threads; ++t)
      workers.emplace_back([&, slot, t, own = slots.back().get()] {
        block = own, threadIdx.x = t;
        for (unsigned i = slot; i < blocks; i += kConcurrentBlocks) {
          blockIdx.x = order[i];
          if (t == 0) memset(own->memory, 0xff, kSharedBytes);
          own->all.arrive_and_wait();
          kernel(static_cast<const Parameters&>(arguments)...);
          own->all.arrive_and_wait();
        }
      });
  }
  for (auto& worker : workers) worker.join();
  return cudaSuccess;
}
