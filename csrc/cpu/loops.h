// The CPU kernels: plain loops, which the compiler vectorizes. One file per instruction set sets the target of the
// compiler and then includes these. A chunk fits into the caches of a core, so the loops may read it more than once.
//
// MUP2_VECTOR and MUP2_STREAM, if defined: a vector type, and the instruction that writes one past the caches.
//
// If g++ inlines a loop, it ignores __restrict or splits the loop at arbitrary conditions.
#define MUP2_LOOP __attribute__((noinline))

namespace mup2 {
namespace {

constexpr int kBlock = 256;                                // elements that are copied or computed together
constexpr int kColumns = kThreads < 128 ? kThreads : 128;  // partial sums of the norm within a chunk
constexpr int kAhead = 8192;                               // bytes from reading to prefetching

// memcpy. With streaming it writes past the caches, which saves reading the memory that is about to be overwritten.
inline void copy(void* to, const void* from, size_t bytes, bool streaming) {
  size_t done = 0;
#ifdef MUP2_STREAM
  if (streaming && uintptr_t(to) % sizeof(MUP2_VECTOR) == 0)
    for (; done + sizeof(MUP2_VECTOR) <= bytes; done += sizeof(MUP2_VECTOR)) {
      MUP2_VECTOR x;
      memcpy(&x, (const char*)from + done, sizeof x);
      MUP2_STREAM((MUP2_VECTOR*)((char*)to + done), x);
    }
#endif
  if (done < bytes) memcpy((char*)to + done, (const char*)from + done, bytes - done);
}
// Makes streamed writes visible to other threads.
inline void drain(bool streaming) {
#ifdef MUP2_STREAM
  if (streaming) _mm_sfence();
#endif
}

// Calls f(i, chunk number i) for the chunks [begin, end) of a batch.
template <class B, class F> void each_chunk(const B& batch, int64_t begin, int64_t end, F f) {
  if (begin == end) return;
  uint32_t item = locate(batch, begin).item;
  for (int64_t i = begin; i < end; ++i) {
    while (item + 1 < batch.n_items && batch.items[item + 1].first_chunk <= i) ++item;
    f(i, chunk_of(batch, item, i));
  }
}

// Sum of squares of T g over one chunk, in an order that depends on n only. Float64 costs nothing, because the loop
// waits for memory. Prefetching by hand helps here, where one stream is read; with three or four it makes loops slower.
template <int variant, class W, class G>
MUP2_LOOP double sum_squares(const W* __restrict w, const G* __restrict g, int n) {
  double columns[kColumns] = {};
  const int used = n < kColumns ? n : kColumns;
  const auto add = [&](int width) {
    for (int i = 0; i < width; ++i) {
      const double x = term<variant, Wide<W>>(widen(w[i]), widen(g[i]));
      columns[i] += x * x;
    }
  };
  for (; n >= kColumns; n -= kColumns, w += kColumns, g += kColumns) {
    for (int i = 0; i < kColumns * int(sizeof(G)); i += 64) __builtin_prefetch((const char*)g + kAhead + i);
    add(kColumns);  // g++ makes better code for a constant
  }
  add(n);
  return tree(columns, used);
}

template <class W, class G>
void norm_chunk(const Item<2>& item, const Chunk& c, const NormState& state, int64_t partial, Variant variant) {
  const W* w = (const W*)item.ptr[kW] + c.begin;
  const G* g = (const G*)item.ptr[kG] + c.begin;
  const auto sum = variant == kElementwise ? sum_squares<kElementwise, W, G> : sum_squares<kSam, W, G>;
  state.partials[partial] = sum(w, g, c.count);
  if (variant == kLayerwise) state.partials[state.n_partials + partial] = sum_squares<kSam>(w, w, c.count);
}

void norm(const NormBatch& batch, const NormState& state, Types types, Variant variant, int64_t begin, int64_t end) {
  with_types(types, [&](auto w, auto g) {
    each_chunk(batch, begin, end, [&](int64_t i, const Chunk& c) {
      norm_chunk<decltype(w), decltype(g)>(batch.items[c.item], c, state, batch.first_partial + i, variant);
    });
  });
}

template <int variant, class W, class G>
MUP2_LOOP void perturb_block(W* __restrict w, const G* __restrict g, Wide<W> c, int n) {
  for (int i = 0; i < n; ++i) w[i] = narrow<W>(perturbed<variant, Wide<W>>(widen(w[i]), widen(g[i]), c));
}

void perturb(const PerturbBatch& batch, const double* coefficient, Types types, Variant variant, bool streaming,
             int64_t begin, int64_t end) {
  with_types(types, [&](auto w_type, auto g_type) {
    using W = decltype(w_type);
    using G = decltype(g_type);
    each_chunk(batch, begin, end, [&](int64_t, const Chunk& c) {
      const Item<3>& item = batch.items[c.item];
      W* w = (W*)item.ptr[kW] + c.begin;
      const G* g = (const G*)item.ptr[kG] + c.begin;
      const Wide<W> factor = coefficient[batch.first_tensor + c.item];
      W* backup = (W*)item.ptr[kBackup] + c.begin;
      const auto block = variant == kElementwise ? perturb_block<kElementwise, W, G> : perturb_block<kSam, W, G>;
      for (int start = 0; start < c.count; start += kBlock) {
        const int n = c.count - start < kBlock ? c.count - start : kBlock;
        copy(backup + start, w + start, n * sizeof(W), streaming);
        if (factor != 0) block(w + start, g + start, factor, n);
      }
    });
  });
  drain(streaming);
}

// New weights of n elements into out, from the weights `base` before the perturbation.
template <class Method, Momentum momentum, class W, class G, class Rule>
MUP2_LOOP void update_block(const Rule rule, const W* __restrict base, const G* __restrict g, W* __restrict m,
                            W* __restrict v, W* __restrict out, int n) {
  constexpr bool second = Method::kMoments > 1;
  for (int i = 0; i < n; ++i) {
    Wide<W> mi = momentum != kNoMomentum ? widen(m[i]) : 0, vi = second ? widen(v[i]) : 0;
    round_to(out[i], Method::template apply<momentum>(rule, widen(base[i]), Wide<W>(widen(g[i])), mi, vi));
    if (momentum != kNoMomentum) round_to(m[i], mi);
    if (second) round_to(v[i], vi);
  }
}

template <class Method, class W, class G>
void update_chunk(const UpdateBatch<Method>& batch, const Control& control, const Chunk& c, bool streaming) {
  const auto& item = batch.items[c.item];
  const auto at = [&](int which, auto type) {
    return item.ptr[which] ? (decltype(type)*)item.ptr[which] + c.begin : nullptr;
  };
  W *w = at(kW, W{}), *base = item.ptr[kBackup] ? at(kBackup, W{}) : w, *m = at(kM, W{}), *v = nullptr;
  if (Method::kMoments > 1) v = at(kV, W{});
  G* g = at(kG, G{});
  if (g && control.grad_scale)
    for (int i = 0; i < c.count; ++i) g[i] = narrow<G>(widen(g[i]) / Wide<G>(*control.grad_scale));
  if (!g || skips(control)) {
    if (base != w) copy(w, base, c.count * sizeof(W), streaming);
    return;
  }
  const float* steps = Method::kPointers > kSteps ? (const float*)item.ptr[kSteps] : nullptr;
  const auto rule = Method::template prepare<Wide<W>>(batch.groups[item.group], steps);
  for (int start = 0; start < c.count; start += kBlock) {
    const int n = c.count - start < kBlock ? c.count - start : kBlock;
    alignas(64) W out[kBlock];
    const auto block = !m              ? update_block<Method, kNoMomentum, W, G, decltype(rule)>
                       : rule.nesterov ? update_block<Method, kNesterov, W, G, decltype(rule)>
                                       : update_block<Method, kMomentum, W, G, decltype(rule)>;
    block(rule, base + start, g + start, m ? m + start : m, v ? v + start : v, out, n);
    copy(w + start, out, n * sizeof(W), streaming);
  }
}

template <class Method>
void update(const UpdateBatch<Method>& batch, const Control& control, Types types, bool streaming, int64_t begin,
            int64_t end) {
  with_types(types, [&](auto w, auto g) {
    each_chunk(batch, begin, end, [&](int64_t, const Chunk& c) {
      update_chunk<Method, decltype(w), decltype(g)>(batch, control, c, streaming);
    });
  });
  drain(streaming);
}

}  // namespace
}  // namespace mup2
