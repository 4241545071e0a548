// The instruction sets the CPU kernels are compiled for, and the choice among them.
#pragma once

#include "inline.h"

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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  int variant = avx512 ? 2 : avx2 ? 1 : 0;
  if (const char* wanted = std::getenv("ATEN_CPU_CAPABILITY"))
    for (int lower = 0; lower < variant; ++lower)
      if (std::strcmp(wanted, SIMD_VARIANTS[lower]) == 0) variant = lower;
  return variant;
#else
  return 0;
#endif
}

// `loop`, a FASTMIM_INLINE function, compiled once for each instruction set. Nothing in it may fuse
// a product and a sum or reorder a sum: then all give the same bits.
template <auto loop>
struct Compiled;

template <typename... Args, void (*loop)(Args...)>
struct Compiled<loop> {
  using Function = void (*)(Args...);

  static void baseline(Args... args) { loop(args...); }
#if defined(__x86_64__)
  __attribute__((target("avx2"))) static void avx2(Args... args) { loop(args...); }
  __attribute__((target("avx512f,avx512bw,prefer-vector-width=512"))) static void avx512(Args... args) {
    loop(args...);
  }
  static constexpr Function VARIANTS[] = {baseline, avx2, avx512};
#else
  static constexpr Function VARIANTS[] = {baseline};
#endif
};

// The variant of `loop` for this machine.
template <auto loop>
typename Compiled<loop>::Function simd() {
  static const int variant = simd_variant();
  return Compiled<loop>::VARIANTS[variant];
}

}  // namespace fastmim
