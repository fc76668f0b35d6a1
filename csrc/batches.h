// From any number of tensors to as few launches as batches hold them.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "mup2_math.h"

namespace mup2 {

// One tensor of a call: pointers as in Item, and its number in the table of groups.
struct Entry {
  void* ptr[6] = {};
  int64_t numel = 0;
  int group = 0;
  Types types = {kF32, kF32};
};

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The number in the batch of groups[group], which is added if need be; -1 if there is no room.
template <class B> int group_in(B& batch, const typename B::GroupType& group) {
  for (uint32_t i = 0; i < batch.n_groups; ++i)
    if (!memcmp(&batch.groups[i], &group, sizeof group)) return i;
  if (batch.n_groups == B::kGroupCapacity) return -1;
  batch.groups[batch.n_groups] = group;
  return batch.n_groups++;
}

template <class B> void append(B& batch, const Entry& e, int group) {
  auto& item = batch.items[batch.n_items++];
  item.group = group;
  item.first_chunk = batch.n_chunks;
  item.tail = e.numel - (chunks_of(e.numel) - 1) * kChunk;
  uintptr_t address_bits = 0;
  for (int i = 0; i < B::kPointers; ++i) {
    item.ptr[i] = e.ptr[i];
    if (i != kSteps) address_bits |= uintptr_t(e.ptr[i]);
  }
  item.aligned = address_bits % kVectorBytes == 0;
  batch.n_chunks += chunks_of(e.numel);
}

// Calls launch(batch, types) for the entries [begin, end) of one device; in each call those of one pair of types, in order.
template <class B, class E, class Launch>
void in_batches(const E* begin, const E* end, const std::vector<typename B::GroupType>& groups, Launch launch) {
  static thread_local B batch;
  int64_t partials = 0;
  for (const E* e = begin; e != end;) {
    const Types types = e->types;
    batch.n_items = batch.n_groups = batch.n_chunks = 0;
    batch.first_tensor = e - begin, batch.first_partial = partials;
    int group = 0, last = -1;  // the groups' number of the last entry
    for (; e != end && batch.n_items < B::kCapacity && e->types.w == types.w && e->types.g == types.g; ++e) {
      if (batch.n_chunks && batch.n_chunks + chunks_of(e->numel) > INT32_MAX) break;  // blocks of a grid
      if constexpr (!std::is_same_v<typename B::GroupType, None>)
        if (e->group != last && (group = group_in(batch, groups[last = e->group])) < 0) break;
      append(batch, *e, group);
    }
    partials += batch.n_chunks;
    launch(batch, types);
  }
}

// What the CUDA kernel of the norm does at its end, for the CPU: one tensor's share, then norm and coefficients.
inline void finish_tensor(const NormBatch& batch, uint32_t i, const NormState& s, bool layerwise) {
  const int64_t first = batch.first_partial + batch.items[i].first_chunk;
  const int64_t n = (i + 1 < batch.n_items ? batch.items[i + 1].first_chunk : batch.n_chunks) - batch.items[i].first_chunk;
  const double weight = layerwise ? ordered_sum(s.partials + s.n_partials + first, n) : 0;
  contribute(s, batch.first_tensor + i, batch.groups[batch.items[i].group], layerwise, ordered_sum(s.partials + first, n), weight);
}
inline void finish_all(const NormState& s, double square) {
  finish_norm(s, square);
  for (int i = 0; i < s.n_tensors; ++i) finish_coefficient(s, i);
}
inline void finish_from_sums(const NormState& s, bool layerwise) {
  for (int i = 0; i < s.n_tensors; ++i) contribute_from_sums(s, i, layerwise);
  finish_all(s, ordered_sum(s.contribution, s.n_tensors));
}

}  // namespace mup2
