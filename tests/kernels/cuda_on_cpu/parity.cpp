// Compares the CUDA kernels, which run on the CPU here, with the CPU kernels. The norms must agree to 1e-13. From equal
// norms on, every byte that they write must be equal.
//
//   parity [quick]     quick: one third of the cases, with fewer tensors
//
// Exits with 1 after printing where they differ. Each tensor has an allocation of exactly its size, so that
// AddressSanitizer sees every access beyond a tensor.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>

#include "core/packing.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

using namespace mup2;

namespace {

std::mt19937 random_bits(0);
int differences = 0, cases = 0;
#ifdef MUP2_FMA
const CpuKernels& cpu = kCpuAvx2;
#else
const CpuKernels& cpu = kCpuBaseline;
#endif

// A tensor, `shift` elements off its alignment, with random values.
struct Memory {
  std::vector<unsigned char> bytes;
  void* data;
  Memory(int64_t numel, Type type, int shift, bool positive) {
    const size_t size = type == kF64 ? 8 : type == kF32 ? 4 : 2;
    bytes.resize((numel + shift) * size);
    data = bytes.data() + shift * size;
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < numel; ++i) {
      const double x = positive ? normal(random_bits) * normal(random_bits) + 4 : normal(random_bits);
      if (type == kF64) ((double*)data)[i] = x;
      if (type == kF32) ((float*)data)[i] = x;
      if (type == kBF16) ((BFloat16*)data)[i] = narrow<BFloat16>(x);
      if (type == kF16) ((Half*)data)[i] = narrow<Half>(x);
    }
  }
};

// All memory of one optimizer, for one of the two kinds of kernels. Both sides start from the same values.
struct Side {
  std::vector<Memory> memories;
  std::vector<Entry> entries;
  std::vector<float> steps;
  std::vector<double> sums;  // over the chunks of all first moments
  std::vector<double> results[6];  // the first five arrays of a NormState, and its partial sums
  std::vector<Radius> radii;
  std::vector<uint32_t> counters;
  int32_t nonfinite = 0;
  uint32_t counter = 0;
  int64_t skipped = 0;

  NormState state(bool layerwise) {
    int64_t chunks = 0;
    for (const Entry& e : entries) chunks += chunks_of(e.numel);
    const size_t n = entries.size(), sizes[] = {2, n, n, n, 2 * n, chunks * (1 + size_t(layerwise))};
    for (int i = 0; i < 6; ++i) results[i].resize(sizes[i]);
    radii.resize(n), counters.resize(n + 1);
    auto& [norm, contribution, numerator, coefficient, sums, partials] = results;
    return {norm.data(), contribution.data(), numerator.data(), coefficient.data(), (double(*)[2])sums.data(),
            radii.data(), partials.data(), &nonfinite, counters.data(), int32_t(n), chunks};
  }
};

struct Case {
  std::string name;
  Types types = {kF32, kF32};
  Variant variant = kSam;
  std::vector<int64_t> sizes;
  int shift = 0;        // of every second tensor, in elements
  bool adam = false;    // otherwise SGD
  bool moments = true;  // false: SGD without momentum
  double bad = 0;       // the last gradient of the first tensor: too large for float32 squares, or not a number
  bool sums = false;    // the update sums the squares of the moments
  bool scale = false;   // gradients that are to be divided by the scale of the loss
  bool without_gradient = false;  // in the update, for every second tensor
  int n_groups = 2;
};

Side make(const Case& c) {
  random_bits.seed(1);
  Side side;
  side.steps.reserve(c.sizes.size());
  for (size_t i = 0; i < c.sizes.size(); ++i) {
    Entry e;
    e.numel = c.sizes[i], e.group = i % c.n_groups, e.types = c.types;
    for (int which : {kW, kG, kBackup, kM, kV}) {
      if (which == kV && !c.adam) continue;
      const Type type = which == kG ? c.types.g : c.types.w;
      side.memories.emplace_back(e.numel, type, i % 2 ? c.shift : 0, which == kV);
      if (which < kM || c.moments) e.ptr[which] = side.memories.back().data;
    }
    side.steps.push_back(i % 3);
    if (c.adam) e.ptr[kSteps] = &side.steps.back();
    side.entries.push_back(e);
  }
  if (c.bad != 0) ((float*)side.entries[0].ptr[kG])[c.sizes[0] - 1] = c.bad;
  return side;
}

void expect(bool equal, const Case& c, const std::string& what) {
  if (!equal && ++differences < 20) printf("%s: %s differs\n", c.name.c_str(), what.c_str());
}
template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}
void compare(const Case& c, Side& a, Side& b, const std::string& after) {
  static const char* names[] = {"w", "g", "backup", "m", "v"};
  const int per_tensor = c.adam ? 5 : 4;
  for (size_t i = 0; i < a.memories.size(); ++i)
    expect(a.memories[i].bytes == b.memories[i].bytes, c,
           names[i % per_tensor] + (" of tensor " + std::to_string(i / per_tensor)) + " after " + after);
  for (int i = 0; i < 6; ++i) expect(same(a.results[i], b.results[i]), c, "norm");
  expect(same(a.steps, b.steps), c, "step count");
  expect(a.nonfinite == b.nonfinite && a.skipped == b.skipped, c, "flag or count of skipped steps");
  expect(same(b.counters, std::vector<uint32_t>(b.counters.size())) && b.counter == 0, c, "a counter that should be 0");
}

// The CPU adds in float64, CUDA in pairs of float32 and in another order, so norms differ a little. They are compared,
// and then CUDA gets the results of the CPU: from there on all bits must be equal.
void settle(const Case& c, Side& cpu_side, Side& cuda_side) {
  const auto close = [](double x, double y) {
    return !memcmp(&x, &y, sizeof x) || (std::isnan(x) && std::isnan(y)) ||
           (std::isfinite(x) && fabs(x - y) <= 1e-13 * fabs(x));
  };
  for (int i = 0; i < 6; ++i) {
    const auto &a = cpu_side.results[i], &b = cuda_side.results[i];
    expect(std::equal(a.begin(), a.end(), b.begin(), b.end(), close), c, "norm");
    cuda_side.results[i] = a;
  }
}

// Memory for the sums, to which kSums of each entry then points.
double* place_sums(Side& side) {
  int64_t chunks = 0;
  for (const Entry& e : side.entries) chunks += chunks_of(e.numel);
  double* next = (side.sums = std::vector<double>(chunks, -1)).data();
  for (Entry& e : side.entries) e.ptr[kSums] = std::exchange(next, next + chunks_of(e.numel));
  return side.sums.data();
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
  const float scale = 8;
  for (Side* side : {&cpu_side, &cuda_side}) {
    for (size_t i = 0; i < side->entries.size() && c.without_gradient; i += 2) side->entries[i].ptr[kG] = nullptr;
    Control control = {};
    control.nonfinite = &side->nonfinite, control.skipped = &side->skipped, control.counter = &side->counter;
    control.grad_scale = c.scale ? &scale : nullptr, control.sums = c.sums ? place_sums(*side) : nullptr;
    in_batches<UpdateBatch<Method>>(side->entries, hypers, [&](const UpdateBatch<Method>& batch, Types types) {
      if (side == &cuda_side) {
        cuda_update<Method>(batch, control, types, nullptr);
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

void norm(Side& side, const std::vector<Radius>& radii, Variant variant, bool cuda) {
  const NormState state = side.state(variant == kLayerwise);
  in_batches<NormBatch>(side.entries, radii, [&](const NormBatch& batch, Types types) {
    if (cuda) {
      cuda_norm(batch, state, types, variant, nullptr);
      return;
    }
    cpu.norm(batch, state, types, variant, 0, batch.n_chunks);
    const double* partials = state.partials + batch.first_partial;
    for (uint32_t i = 0; i < batch.n_items; ++i)
      finish_tensor(batch, i, partials + batch.items[i].first_chunk, state, variant == kLayerwise);
  });
  if (!cuda) finish_all(state, ordered_sum(state.contribution, state.n_tensors));
}

// The sums that the update has left behind give the bits of the norm that a pass over the moments gives.
void norm_of_moments(const Case& c, Side side, const std::vector<Radius>& radii, bool cuda) {
  const NormState state = side.state(false);
  in_batches<SumsBatch>(side.entries, radii, [&](const SumsBatch& batch, Types) {
    if (cuda) {
      cuda_norm_of_sums(batch, state, nullptr);
      return;
    }
    for (uint32_t i = 0; i < batch.n_items; ++i)
      finish_tensor(batch, i, (const double*)batch.items[i].ptr[kSums], state, false);
  });
  if (!cuda) finish_all(state, ordered_sum(state.contribution, state.n_tensors));
  expect(same(side.counters, std::vector<uint32_t>(side.counters.size())), c, "a counter that should be 0");
  const std::vector<double> found[] = {side.results[0], side.results[1], side.results[2], side.results[3],
                                       side.results[4]};
  for (Entry& e : side.entries) e.ptr[kG] = e.ptr[kM], e.types.g = e.types.w;
  norm(side, radii, kSam, cuda);
  for (int i = 0; i < 5; ++i) expect(same(found[i], side.results[i]), c, "norm of the moments");
}

void run(const Case& c) {
  ++cases;
  Side cpu_side = make(c), cuda_side = make(c);
  std::vector<Radius> radii;
  for (int i = 0; i < c.n_groups; ++i) radii.push_back({0.1 * (i + 1), 1.0 / (i + 1)});
  for (Side* side : {&cpu_side, &cuda_side}) {
    const NormState state = side->state(c.variant == kLayerwise);
    norm(*side, radii, c.variant, side == &cuda_side);
    if (side == &cuda_side) settle(c, cpu_side, cuda_side);
    in_batches<PerturbBatch>(side->entries, {}, [&](const PerturbBatch& batch, Types types) {
      side == &cuda_side ? void(cuda_perturb(batch, state.coefficient, types, c.variant, nullptr))
                         : cpu.perturb(batch, state.coefficient, types, c.variant, true, 0, batch.n_chunks);
    });
  }
  compare(c, cpu_side, cuda_side, "perturb");
  c.adam ? update<Adam>(c, cpu_side, cuda_side) : update<Sgd>(c, cpu_side, cuda_side);
  for (Side* side : {&cpu_side, &cuda_side})
    if (c.sums) norm_of_moments(c, *side, radii, side == &cuda_side);

  const double square = 4;  // as if another device had tensors too
  const NormState a = cpu_side.state(c.variant == kLayerwise), b = cuda_side.state(c.variant == kLayerwise);
  finish_all(a, square);
  cuda_combine(b, &square, nullptr);
  compare(c, cpu_side, cuda_side, "combine");
  for (Side* side : {&cpu_side, &cuda_side})
    for (double& sum : side->results[4]) sum *= 3;  // as if three processes had equal parts
  finish_from_sums(a, c.variant == kLayerwise);
  cuda_from_sums(b, c.variant == kLayerwise, nullptr);
  compare(c, cpu_side, cuda_side, "from sums");
}

}  // namespace

int main(int argc, char**) {
  const bool quick = argc > 1;
  const std::vector<Types> all = {{kF32, kF32}, {kBF16, kBF16}, {kBF16, kF32}, {kF16, kF16},
                                  {kF16, kF32}, {kF64, kF64},   {kF64, kF32}};
  const std::vector<int64_t> some = {3, kChunk + 9, 2 * kChunk + 1030, 17};
  const std::vector<int64_t> edges = {1,        3, 4, 5, 7, 8, 9, kThreads, 4 * kThreads - 1, 4 * kThreads + 1,
                                      kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 5};
  const std::vector<int64_t>& sizes = quick ? some : edges;
  for (size_t t = 0; t < all.size(); t += quick ? 3 : 1)
    for (Variant variant : {kSam, kElementwise, kLayerwise})
      for (bool adam : {false, true})
        run({.name = "types " + std::to_string(t) + " variant " + std::to_string(variant) + (adam ? " adam" : " sgd"),
             .types = all[t], .variant = variant, .sizes = t < 2 ? sizes : some, .shift = variant == kElementwise,
             .adam = adam, .sums = variant == kSam});
  run({.name = "unaligned", .sizes = sizes, .shift = 1, .adam = true, .sums = true});
  run({.name = "no momentum", .sizes = some, .moments = false});
  run({.name = "overflowing squares", .sizes = some, .bad = 1e30, .sums = true});
  run({.name = "nan", .variant = kElementwise, .sizes = some, .adam = true, .bad = NAN, .sums = true});
  run({.name = "loss scale", .types = {kF16, kF16}, .sizes = some, .shift = 1, .scale = true});
  run({.name = "some without gradient", .sizes = some, .adam = true, .without_gradient = true});
  const int many = quick ? 9 : 70;  // more groups than a small batch has, and more than any batch has
  run({.name = "many groups", .sizes = std::vector<int64_t>(many, 5), .n_groups = many});
  if (!quick) {
    run({.name = "more tensors than a batch", .sizes = std::vector<int64_t>(1001, 3), .adam = true});
    run({.name = "more tensors than a small batch", .sizes = std::vector<int64_t>(130, 3)});
  }
  printf("%d cases, %d differences\n", cases, differences);
  return differences != 0;
}
