// Chooses the CPU kernels for the processor that this process runs on.
#include <stdlib.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

static const mup2::CpuKernels& choose() {
  const char* wish = getenv("MUP2_CPU");
  const std::string name = wish ? wish : "";
  if (!name.empty() && name != "baseline" && name != "avx2" && name != "avx512")
    throw std::runtime_error("MUP2_CPU is baseline, avx2 or avx512, not " + name);
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name.empty() || name == "avx512")) return mup2::kCpuAvx512;
  if (avx2 && name != "baseline") return mup2::kCpuAvx2;
#endif
  return mup2::kCpuBaseline;
}

const mup2::CpuKernels& mup2::cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}
