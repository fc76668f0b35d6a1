// The CPU kernels: plain loops, which the compiler vectorizes. One file per instruction set sets the target of the
// compiler and then includes this header. A chunk fits into a core's caches, so the loops may read it more than once.
//
// MUP2_STREAM, if defined, writes one MUP2_VECTOR straight to memory, without going through the caches.
//
// The loops are not inlined: g++ would ignore __restrict or split them at arbitrary conditions.
#define MUP2_LOOP __attribute__((noinline))

namespace mup2 {
namespace {

constexpr int kBlock = 256;                                // elements that are copied or computed together
constexpr int kColumns = kThreads < 128 ? kThreads : 128;  // partial sums of the norm within a chunk
constexpr int kAhead = 8192;                               // prefetch this many bytes ahead

// memcpy. Streaming writes bypass the caches, which saves reading the memory that is about to be overwritten.
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

// While this object lives, an x86 processor computes with subnormal numbers, whatever torch.set_flush_denormal() says.
// widen() needs this for float16: a number below 2^-14 is subnormal in float32 until its exponent is right.
class SubnormalNumbers {
 public:
  explicit SubnormalNumbers([[maybe_unused]] bool needed) {
#ifdef __x86_64__
    if (needed) _mm_setcsr(before_ & ~0x8040u);  // flush to zero, denormals are zero
#endif
  }
#ifdef __x86_64__
  ~SubnormalNumbers() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// Calls f(W{}, G{}, i, chunk number i) for the chunks [begin, end) of a batch with weights W and gradients G.
template <class B, class F> void each_chunk(const B& batch, Types types, int64_t begin, int64_t end, F f) {
  if (begin == end) return;
  const SubnormalNumbers mode(types.w == kF16);
  with_types(types, [&](auto w, auto g) {
    uint32_t item = locate(batch, begin).item;
    for (int64_t i = begin; i < end; ++i) {
      while (item + 1 < batch.n_items && batch.items[item + 1].first_chunk <= i) ++item;
      f(w, g, i, chunk_of(batch, item, i));
    }
  });
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

void norm(const NormBatch& batch, const NormState& state, Types types, Variant variant, int64_t begin, int64_t end) {
  each_chunk(batch, types, begin, end, [&](auto w_type, auto g_type, int64_t i, const Chunk& c) {
    using W = decltype(w_type);
    using G = decltype(g_type);
    const W* w = pointer<W>(batch.items[c.item], kW, c.begin);
    const G* g = pointer<G>(batch.items[c.item], kG, c.begin);
    double* partial = state.partials + batch.first_partial + i;
    const auto sum = variant == kElementwise ? sum_squares<kElementwise, W, G> : sum_squares<kSam, W, G>;
    *partial = sum(w, g, c.count);
    if (variant == kLayerwise) partial[state.n_partials] = sum_squares<kSam>(w, w, c.count);
  });
}

template <int variant, class W, class G>
MUP2_LOOP void perturb_block(W* __restrict w, const G* __restrict g, Wide<W> c, int n) {
  for (int i = 0; i < n; ++i) w[i] = narrow<W>(perturbed<variant, Wide<W>>(widen(w[i]), widen(g[i]), c));
}

void perturb(const PerturbBatch& batch, const double* coefficient, Types types, Variant variant, bool streaming,
             int64_t begin, int64_t end) {
  each_chunk(batch, types, begin, end, [&](auto w_type, auto g_type, int64_t, const Chunk& c) {
    using W = decltype(w_type);
    using G = decltype(g_type);
    const auto& item = batch.items[c.item];
    W *w = pointer<W>(item, kW, c.begin), *backup = pointer<W>(item, kBackup, c.begin);
    const G* g = pointer<G>(item, kG, c.begin);
    const Wide<W> factor = coefficient[batch.first_tensor + c.item];
    const auto block = variant == kElementwise ? perturb_block<kElementwise, W, G> : perturb_block<kSam, W, G>;
    for (int start = 0; start < c.count; start += kBlock) {
      const int n = c.count - start < kBlock ? c.count - start : kBlock;
      copy(backup + start, w + start, n * sizeof(W), streaming);
      if (factor != 0) block(w + start, g + start, factor, n);
    }
  });
  drain(streaming);
}

// Writes n new weights to out, computed from `base`, the weights before the perturbation. Updates the moments m and v.
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
  W *w = pointer<W>(item, kW, c.begin), *backup = pointer<W>(item, kBackup, c.begin), *base = backup ? backup : w;
  W *m = pointer<W>(item, kM, c.begin), *v = pointer<W>(item, kV, c.begin);
  G* g = pointer<G>(item, kG, c.begin);
  if (g && control.grad_scale)
    for (int i = 0; i < c.count; ++i) g[i] = narrow<G>(widen(g[i]) / Wide<G>(*control.grad_scale));
  if (!g || skips(control)) {
    if (backup) copy(w, backup, c.count * sizeof(W), streaming);
    return;
  }
  const auto rule = Method::template prepare<Wide<W>>(batch.groups[item.group], pointer<float>(item, kSteps));
  const auto block = !m              ? update_block<Method, kNoMomentum, W, G, decltype(rule)>
                     : rule.nesterov ? update_block<Method, kNesterov, W, G, decltype(rule)>
                                     : update_block<Method, kMomentum, W, G, decltype(rule)>;
  for (int start = 0; start < c.count; start += kBlock) {
    const int n = c.count - start < kBlock ? c.count - start : kBlock;
    alignas(64) W out[kBlock];
    block(rule, base + start, g + start, m ? m + start : m, v ? v + start : v, out, n);
    copy(w + start, out, n * sizeof(W), streaming);
  }
}

template <class Method>
void update(const UpdateBatch<Method>& batch, const Control& control, Types types, bool streaming, int64_t begin,
            int64_t end) {
  each_chunk(batch, types, begin, end, [&](auto w, auto g, int64_t i, const Chunk& c) {
    using W = decltype(w);
    update_chunk<Method, W, decltype(g)>(batch, control, c, streaming);
    const auto& item = batch.items[c.item];
    if (!control.sums || !item.ptr[kM] || !item.ptr[kG]) return;
    const W* m = pointer<W>(item, kM, c.begin);  // the caches still have it
    control.sums[batch.first_partial + i] = sum_squares<kSam>(m, m, c.count);
  });
  drain(streaming);
}

}  // namespace
}  // namespace mup2
