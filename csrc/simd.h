// The instruction sets the CPU kernels are compiled for, and the choice among them.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fastmim {

#if defined(__x86_64__)
constexpr const char* SIMD_VARIANTS[] = {"default", "avx2", "avx512"};
#else
constexpr const char* SIMD_VARIANTS[] = {"default"};
#endif

// An index into SIMD_VARIANTS. ATEN_CPU_CAPABILITY, PyTorch's own variable, can lower it. Chosen
// here and not by target_clones: its ifunc resolvers run before AddressSanitizer starts and crash
// under it.
inline int simd_variant() {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  int variant = avx512 ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
  if (const char* wanted = std::getenv("ATEN_CPU_CAPABILITY"))
    for (int lower = 0; lower < variant; ++lower)
      if (std::strcmp(wanted, SIMD_VARIANTS[lower]) == 0) variant = lower;
  return variant;
#else
  return 0;
#endif
}

}  // namespace fastmim
