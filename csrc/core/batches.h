// What one launch of a kernel knows: a batch of tensors, cut into chunks of equal size.
#pragma once
#include "core/numbers.h"

namespace mup2 {

#ifndef MUP2_THREADS
#define MUP2_THREADS 256  // tests with sanitizers set fewer
#endif
constexpr int kThreads = MUP2_THREADS;  // threads of a CUDA block
constexpr int kWarp = 32;
constexpr int kChunk = 8192;      // elements per block: ResNet-18 already gives an H100 1,400 blocks
constexpr int kVectorBytes = 16;  // bytes of one memory access of a CUDA thread
constexpr int kMaxItems = 1000;   // tensors per launch; fewer where the parameters of the kernel would not fit
constexpr int kMaxGroups = 32;    // different hyper-parameters per launch

// Positions in Item::ptr: weight, gradient, backup of the weight, first and second moment, step count (one float32),
// sums of squares over the chunks of the first moment (float64).
enum { kW, kG, kBackup, kM, kV, kSteps, kSums };

// One tensor of a launch, with the first P of the pointers above. The gradient may be null: the tensor is not updated.
// The backup may be null: the tensor was not perturbed. Elements are dense, and in the same order behind every pointer.
template <int P> struct Item {
  void* ptr[P];
  uint32_t first_chunk;  // number of its first chunk in the launch
  uint16_t tail;         // elements of its last chunk
  uint8_t group;         // position in Batch::groups
  uint8_t aligned;       // 1: every pointer to elements is a multiple of kVectorBytes
};

// How many items fit into the 32,764 bytes of parameters that a CUDA kernel may have; 256 are left for other arguments.
template <int P, class Group> constexpr int capacity() {
  constexpr int n = (32764 - 256 - kMaxGroups * int(sizeof(Group))) / int(sizeof(Item<P>));
  return n < kMaxItems ? n : kMaxItems;
}
struct None {};  // Group of a kernel without hyper-parameters

// The parameters of a launch. They are passed by value, because gradients have new addresses in every step.
template <int P, class Group, int kItems = capacity<P, Group>(), int kGroups = kMaxGroups> struct Batch {
  using GroupType = Group;
  static constexpr int kPointers = P, kCapacity = kItems, kGroupCapacity = kGroups;
  Item<P> items[kItems];
  Group groups[kGroups];
  uint32_t n_items, n_groups, n_chunks;
  int32_t first_tensor;   // position of items[0] among all tensors of the call
  int64_t first_partial;  // number of the first chunk among all chunks of the call
};

// A pointer of a tensor, moved by `begin` elements. Null if the tensor has no such pointer.
template <class T, int P> MUP2_FN T* pointer(const Item<P>& item, int which, int64_t begin = 0) {
  return which < P && item.ptr[which] ? (T*)item.ptr[which] + begin : nullptr;
}

struct Chunk {
  uint32_t item, chunks;  // position of its tensor in the batch, and the number of chunks of that tensor
  int64_t begin;          // its first element
  int count;              // its number of elements
};

// Chunk number `chunk` of a launch, which belongs to that item.
template <class B> MUP2_FN Chunk chunk_of(const B& batch, uint32_t item, uint32_t chunk) {
  const uint32_t first = batch.items[item].first_chunk;
  const uint32_t end = item + 1 < batch.n_items ? batch.items[item + 1].first_chunk : batch.n_chunks;
  return {item, end - first, int64_t(chunk - first) * kChunk, chunk + 1 == end ? batch.items[item].tail : kChunk};
}

// Chunk number `chunk` of a launch. Its item, the last one that starts at or before it, is found by bisection.
template <class B> MUP2_FN Chunk locate(const B& batch, uint32_t chunk) {
  uint32_t low = 0, high = batch.n_items;  // items[low].first_chunk <= chunk < items[high].first_chunk
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (batch.items[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return chunk_of(batch, low, chunk);
}

}  // namespace mup2
