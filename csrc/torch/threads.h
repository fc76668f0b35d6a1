// How the CPU kernels share a batch among threads, and when they write past the caches.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <fstream>

#include "torch/tensors.h"

namespace mup2 {

// Bytes of the last cache that this processor shares. sysconf() would add up the caches of all parts of an AMD
// processor, although a core reaches only one of them.
inline int64_t last_cache() {
  int64_t kilobytes = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;  // "32768K"
  return kilobytes > 0 ? kilobytes << 10 : 1 << 25;
}

// Whether weights, gradients and backups are more than the last cache holds. Then the kernels write past the caches.
inline bool streams(const DeviceEntry* begin, const DeviceEntry* end) {
  static const int64_t cache = last_cache();
  int64_t bytes = 0;
  for (const DeviceEntry* e = begin; e != end; ++e)
    bytes += e->numel * (e->types.w == kF64 ? 8 : e->types.w == kF32 ? 4 : 2);
  return 3 * bytes > cache;
}

constexpr int64_t kGrain = 1 << 14;      // elements; fewer are not worth another thread
constexpr int64_t kFull = kChunk + 128;  // cost of a full chunk in elements: every chunk costs 128 elements extra

template <class B> int64_t work_of(const B& batch, uint32_t item) {
  const Chunk first = chunk_of(batch, item, batch.items[item].first_chunk);
  return first.chunks * kFull + batch.items[item].tail - kChunk;
}

// The first chunk of a batch before which at least `target` work lies.
template <class B> int64_t chunk_at(const B& batch, int64_t target) {
  for (uint32_t i = 0; i < batch.n_items; ++i) {
    const int64_t work = work_of(batch, i);
    if (target < work) return batch.items[i].first_chunk + (target + kFull - 1) / kFull;
    target -= work;
  }
  return batch.n_chunks;
}

// Calls f(begin, end) for the chunks of a batch, on as many threads as pay. Threads get equal work, not equal numbers
// of chunks: a model may have one large tensor and a hundred tensors of one small chunk each.
template <class B, class F> void in_parallel(const B& batch, F f) {
  int64_t work = 0;
  for (uint32_t i = 0; i < batch.n_items; ++i) work += work_of(batch, i);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (work + kGrain - 1) / kGrain);
  if (threads < 2) return f(0, batch.n_chunks);
  at::parallel_for(0, threads, 1, [&](int64_t a, int64_t b) {
    f(chunk_at(batch, work * a / threads), chunk_at(batch, work * b / threads));
  });
}

}  // namespace mup2
