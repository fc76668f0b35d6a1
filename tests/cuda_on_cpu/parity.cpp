// The CUDA kernels, run on the CPU, against the CPU kernels: the norm to 1e-13; with equal norms every byte
// that either writes must be equal.
//
//   parity [small | one]     exits with 1 and says where they differ. small: fewer and shorter tensors; one: a single case
//
// Tensors lie in allocations of their own, exactly as long as they are, so that AddressSanitizer sees every step beyond.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "batches.h"
#include "kernels.h"

using namespace mup2;

namespace {

std::mt19937 random_bits(0);
int differences = 0, cases = 0;
#ifdef MUP2_FMA
const CpuKernels& cpu = kCpuAvx2;
#else
const CpuKernels& cpu = kCpuBaseline;
#endif

size_t bytes_of(Type t) { return t == kF64 ? 8 : t == kF32 ? 4 : 2; }

// A tensor, `shift` elements off its alignment.
struct Memory {
  std::vector<unsigned char> bytes;
  size_t shift;
  Memory(int64_t numel, Type type, int shift) : bytes((numel + shift) * bytes_of(type)), shift(shift * bytes_of(type)) {}
  void* data() { return bytes.data() + shift; }
};

void fill(Memory& memory, int64_t numel, Type type, bool positive) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < numel; ++i) {
    const double x = positive ? normal(random_bits) * normal(random_bits) + 4 : normal(random_bits);
    if (type == kF64) ((double*)memory.data())[i] = x;
    if (type == kF32) ((float*)memory.data())[i] = x;
    if (type == kBF16) ((BFloat16*)memory.data())[i] = narrow<BFloat16>(x);
    if (type == kF16) ((Half*)memory.data())[i] = narrow<Half>(x);
  }
}

// All memory of one optimizer on one side; both sides start from the same values.
struct Side {
  std::vector<Memory> memories;
  std::vector<Entry> entries;
  std::vector<float> steps;
  std::vector<double> partials, contribution, numerator, coefficient, norm, sums;
  std::vector<Radius> radii;
  std::vector<uint32_t> counters;
  int32_t nonfinite = 0, none = 0;
  uint32_t counter = 0;
  int64_t skipped = 0;

  NormState state(bool layerwise) {
    int64_t chunks = 0;
    for (const Entry& e : entries) chunks += chunks_of(e.numel);
    const size_t n = entries.size();
    partials.resize(chunks * (1 + layerwise)), contribution.resize(n), numerator.resize(n), coefficient.resize(n);
    norm.resize(2), counters.resize(n + 1), sums.resize(2 * n), radii.resize(n);
    return {partials.data(), contribution.data(), numerator.data(), coefficient.data(), (double(*)[2])sums.data(),
            radii.data(), norm.data(), &nonfinite, counters.data(), int32_t(n), chunks};
  }
};

struct Case {
  std::string name;
  Types types;
  Variant variant;
  std::vector<int64_t> sizes;
  int shift;         // of every second tensor, in elements
  bool adam, moments = true, overflow = false, nan = false, scale = false, without_gradient = false;
  int n_groups = 2;
};

Side make(const Case& c) {
  random_bits.seed(1);
  Side side;
  side.steps.reserve(c.sizes.size());
  for (size_t i = 0; i < c.sizes.size(); ++i) {
    Entry e;
    e.numel = c.sizes[i], e.group = i % c.n_groups, e.types = c.types;
    for (int which = 0; which < (c.adam ? 5 : 4); ++which) {
      const Type type = which == kG ? c.types.g : c.types.w;
      side.memories.emplace_back(e.numel, type, i % 2 ? c.shift : 0);
      fill(side.memories.back(), e.numel, type, which == kV);
      if (which < kM || c.moments) e.ptr[which] = side.memories.back().data();
    }
    side.steps.push_back(i % 3);
    if (c.adam) e.ptr[kSteps] = &side.steps.back();
    side.entries.push_back(e);
  }
  if (c.overflow) ((float*)side.entries[0].ptr[kG])[c.sizes[0] - 1] = 1e30f;
  if (c.nan) ((float*)side.entries.back().ptr[kG])[c.sizes.back() - 1] = NAN;
  return side;
}

void expect(bool equal, const Case& c, const char* what) {
  if (!equal && ++differences < 20) printf("%s: %s differs\n", c.name.c_str(), what);
}
template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}
void compare(const Case& c, Side& a, Side& b, const char* after) {
  static const char* names[] = {"w", "g", "backup", "m", "v"};
  for (size_t i = 0; i < a.memories.size(); ++i) {
    const int per_tensor = c.adam ? 5 : 4;
    const std::string what = std::string(names[i % per_tensor]) + " of tensor " + std::to_string(i / per_tensor) + " after " + after;
    expect(a.memories[i].bytes == b.memories[i].bytes, c, what.c_str());
  }
  expect(same(a.partials, b.partials), c, "partial sums");
  expect(same(a.contribution, b.contribution) && same(a.norm, b.norm) && same(a.sums, b.sums), c, "norm");
  expect(same(a.coefficient, b.coefficient), c, "coefficient");
  expect(same(a.steps, b.steps), c, "step count");
  expect(a.nonfinite == b.nonfinite && a.skipped == b.skipped, c, "flag or count of skipped steps");
  expect(same(b.counters, std::vector<uint32_t>(b.counters.size())) && b.counter == 0, c, "a counter that should be 0");
}

// The CPU sums in float64, CUDA in pairs of float32, in another order. With equal sums all else must be equal to the bit.
void settle(const Case& c, Side& cpu_side, Side& cuda_side) {
  for (auto member : {&Side::partials, &Side::contribution, &Side::sums, &Side::norm, &Side::numerator, &Side::coefficient}) {
    const auto &a = cpu_side.*member, &b = cuda_side.*member;
    bool close = a.size() == b.size();
    for (size_t i = 0; close && i < a.size(); ++i)
      close = !memcmp(&a[i], &b[i], sizeof a[i]) || (std::isfinite(a[i]) && fabs(a[i] - b[i]) <= 1e-13 * fabs(a[i])) || (a[i] != a[i] && b[i] != b[i]);
    expect(close, c, "norm");
    cuda_side.*member = a;
  }
}

template <class Method> void update(const Case& c, Side& cpu_side, Side& cuda_side) {
  std::vector<typename Method::Hyper> hypers(c.n_groups);
  memset(hypers.data(), 0, hypers.size() * sizeof hypers[0]);
  for (int i = 0; i < c.n_groups; ++i) {
    if constexpr (std::is_same_v<Method, Sgd>)
      hypers[i] = {0.1 + 0.01 * i, i % 2 * 0.05, 0.9, i % 2 * 0.3, nullptr, i % 4 == 0, i % 3 == 1, i % 5 == 1};
    else
      hypers[i] = {0.1 + 0.01 * i, 0.05, 0.9, 0.999, 1e-8, nullptr, i % 2 == 0, i % 3 == 1};
  }
  const float scale = 8, *scale_pointer = c.scale ? &scale : nullptr;
  if (c.without_gradient)
    for (Side* side : {&cpu_side, &cuda_side})
      for (size_t i = 0; i < side->entries.size(); i += 2) side->entries[i].ptr[kG] = nullptr;
  for (Side* side : {&cpu_side, &cuda_side}) {
    Control control = {&side->nonfinite, nullptr, nullptr, scale_pointer, &side->skipped, &side->counter};
    in_batches<UpdateBatch<Method>>(side->entries.data(), side->entries.data() + side->entries.size(), hypers,
                                    [&](const UpdateBatch<Method>& batch, Types types) {
      if (side == &cuda_side) {
        cuda_update(batch, control, types, nullptr);
      } else {
        if constexpr (std::is_same_v<Method, Sgd>)
          cpu.sgd(batch, control, types, true, 0, batch.n_chunks);
        else
          cpu.adam(batch, control, types, true, 0, batch.n_chunks);
        for (uint32_t i = 0; i < batch.n_items; ++i) count_step(batch.items[i], skips(control));
        if (control.skipped) *control.skipped += skips(control);
      }
      control.skipped = nullptr;
    });
  }
  compare(c, cpu_side, cuda_side, "update");
}

void run(const Case& c) {
  ++cases;
  Side cpu_side = make(c), cuda_side = make(c);
  std::vector<Radius> radii;
  for (int i = 0; i < c.n_groups; ++i) radii.push_back({0.1 * (i + 1), 1.0 / (i + 1)});
  for (Side* side : {&cpu_side, &cuda_side}) {
    const Entry *begin = side->entries.data(), *end = begin + side->entries.size();
    const NormState state = side->state(c.variant == kLayerwise);
    in_batches<NormBatch>(begin, end, radii, [&](const NormBatch& batch, Types types) {
      if (side == &cuda_side) {
        cuda_norm(batch, state, types, c.variant, nullptr);
        return;
      }
      cpu.norm(batch, state, types, c.variant, 0, batch.n_chunks);
      for (uint32_t i = 0; i < batch.n_items; ++i) finish_tensor(batch, i, state, c.variant == kLayerwise);
    });
    side == &cpu_side ? finish_all(state, ordered_sum(state.contribution, state.n_tensors)) : settle(c, cpu_side, cuda_side);
    in_batches<PerturbBatch>(begin, end, {}, [&](const PerturbBatch& batch, Types types) {
      side == &cuda_side ? void(cuda_perturb(batch, state.coefficient, types, c.variant, nullptr))
                         : cpu.perturb(batch, state.coefficient, types, c.variant, true, 0, batch.n_chunks);
    });
  }
  compare(c, cpu_side, cuda_side, "perturb");
  c.adam ? update<Adam>(c, cpu_side, cuda_side) : update<Sgd>(c, cpu_side, cuda_side);

  const double square = 4;  // another device's share included
  const NormState a = cpu_side.state(c.variant == kLayerwise), b = cuda_side.state(c.variant == kLayerwise);
  finish_all(a, square);
  cuda_combine(b, &square, nullptr);
  compare(c, cpu_side, cuda_side, "combine");
  for (Side* side : {&cpu_side, &cuda_side})
    for (double& sum : side->sums) sum *= 3;  // three shards
  finish_from_sums(a, c.variant == kLayerwise);
  cuda_from_sums(b, c.variant == kLayerwise, nullptr);
  compare(c, cpu_side, cuda_side, "from sums");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !strcmp(argv[1], "one")) {
    run({"one", {kF32, kF32}, kLayerwise, {3, 2 * kChunk + 1029, 5}, 0, true});
    return differences != 0;
  }
  const bool small = argc > 1 && !strcmp(argv[1], "small");
  const std::vector<Types> all = {{kF32, kF32}, {kBF16, kBF16}, {kBF16, kF32}, {kF16, kF16}, {kF16, kF32}, {kF64, kF64}, {kF64, kF32}};
  const std::vector<int64_t> edges = {1, 3, 4, 5, 7, 8, 9, kThreads, 4 * kThreads - 1, 4 * kThreads + 1, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 5};
  const std::vector<int64_t> some = {3, kChunk + 9, 2 * kChunk + 1030, 17};
  const std::vector<int64_t>& sizes = small ? some : edges;
  for (size_t t = 0; t < all.size(); t += small ? 3 : 1)
    for (int variant = kSam; variant <= kLayerwise; ++variant)
      for (int adam = 0; adam < 2; ++adam) {
        Case c = {"types " + std::to_string(t) + " variant " + std::to_string(variant) + (adam ? " adam" : " sgd"), all[t],
                  Variant(variant), t < 2 ? sizes : some, variant == 1 ? 1 : 0, adam != 0};
        run(c);
      }
  const Types f32 = {kF32, kF32};
  run({"unaligned", f32, kSam, sizes, 1, true});
  run({"no momentum", f32, kSam, some, 0, false, false});
  run({"overflowing squares", f32, kSam, some, 0, false, true, true});
  run({"nan", f32, kElementwise, some, 0, true, true, false, true});
  run({"loss scale", {kF16, kF16}, kSam, some, 1, false, true, false, false, true});
  run({"some without gradient", f32, kSam, some, 0, true, true, false, false, false, true});
  run({"many groups", f32, kSam, std::vector<int64_t>(small ? 9 : 70, 5), 0, false, true, false, false, false, false, small ? 9 : 70});
  if (!small) {
    run({"more tensors than a batch", f32, kSam, std::vector<int64_t>(1001, 3), 0, true});
    run({"more tensors than a small batch", f32, kSam, std::vector<int64_t>(130, 3), 0, false});
  }
  printf("%d cases, %d differences\n", cases, differences);
  return differences != 0;
}
