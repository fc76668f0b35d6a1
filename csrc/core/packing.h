// Any number of tensors, packed into as few batches as can hold them. For the host only.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "core/batches.h"

namespace mup2 {

// One tensor of a call: pointers as in Item, and the position of its hyper-parameters in the caller's table of groups.
struct Entry {
  void* ptr[kSums + 1] = {};
  int64_t numel = 0;
  int group = 0;
  Types types = {kF32, kF32};
};

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The position of a group in the batch, to which it is added if it is not there yet; -1 if there is no room for it.
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
    if (i < kSteps) address_bits |= uintptr_t(e.ptr[i]);
  }
  item.aligned = address_bits % kVectorBytes == 0;
  batch.n_chunks += chunks_of(e.numel);
}

// Calls launch(batch, types) until all entries have been in a batch, in order. The entries belong to one device. Those
// of one batch have the same types.
template <class B, class List, class Launch>
void in_batches(const List& entries, const std::vector<typename B::GroupType>& groups, Launch launch) {
  static thread_local B batch;
  int64_t partials = 0;
  for (auto e = entries.begin(); e != entries.end();) {
    const Types types = e->types;
    batch.n_items = batch.n_groups = batch.n_chunks = 0;
    batch.first_tensor = e - entries.begin(), batch.first_partial = partials;
    int group = 0, last = -1;  // position in the batch, and in the caller's table, of the group of the last entry
    for (; e != entries.end() && batch.n_items < B::kCapacity && e->types == types; ++e) {
      if (batch.n_chunks && batch.n_chunks + chunks_of(e->numel) > INT32_MAX) break;  // a grid has no more blocks
      if constexpr (!std::is_same_v<typename B::GroupType, None>)
        if (e->group != last && (group = group_in(batch, groups.at(last = e->group))) < 0) break;
      append(batch, *e, group);
    }
    partials += batch.n_chunks;
    launch(batch, types);
  }
}

}  // namespace mup2
