// Vectors of floats for the CPU kernels that are bound by arithmetic.
//
// The vectors are the compiler's (GCC and Clang): one source for every instruction set and for
// machines other than x86. A kernel is a struct template over the lanes of a vector with a static
// `run`; wide<Kernel>() calls the instance made for this machine. Files that use it are compiled
// with contraction to FMA: the last bits of a result depend on the instruction set, never on the
// number of threads.
#pragma once

#include "cpu.h"

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace fastmim {

template <int W>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
};
template <>
struct Lanes<8> {
  typedef float Float __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
};
template <>
struct Lanes<16> {
  typedef float Float __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
};

// Kernel<W>::run(args...) with W lanes, compiled for the instruction set that has them.
template <template <int> class Kernel>
struct ForEachWidth {
  template <typename... Args>
  static void baseline(Args&... args) {
    Kernel<4>::run(args...);
  }
#if defined(__x86_64__)
  template <typename... Args>
  __attribute__((target("avx2,fma"))) static void avx2(Args&... args) {
    Kernel<8>::run(args...);
  }
  template <typename... Args>
  __attribute__((target("avx512f,avx512bw,prefer-vector-width=512"))) static void avx512(Args&... args) {
    Kernel<16>::run(args...);
  }
#endif
};

template <template <int> class Kernel, typename... Args>
void wide(Args&&... args) {
  static const int variant = simd_variant();
#if defined(__x86_64__)
  if (variant == 2) return ForEachWidth<Kernel>::avx512(args...);
  if (variant == 1) return ForEachWidth<Kernel>::avx2(args...);
#endif
  ForEachWidth<Kernel>::baseline(args...);
}

template <int W>
struct Vector {
  using Float = typename Lanes<W>::Float;
  using Bits = typename Lanes<W>::Bits;

  FASTMIM_INLINE static Float load(const float* p) {
    Float x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }

  FASTMIM_INLINE static void store(float* p, Float x) { std::memcpy(p, &x, sizeof(x)); }

  FASTMIM_INLINE static Float all(float x) { return Float{} + x; }

  FASTMIM_INLINE static Float max(Float a, Float b) { return a > b ? a : b; }

  FASTMIM_INLINE static float sum(Float x) {
    float lanes[W];
    store(lanes, x);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  FASTMIM_INLINE static float largest(Float x) {
    float lanes[W];
    store(lanes, x);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
    return lanes[0];
  }

  // e^x to 2 ulp for x up to 88; 0 below -87, where e^x becomes denormal.
  FASTMIM_INLINE static Float exp(Float x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
    const Float shifted = x * 1.44269504f + ROUND;
    const Float n = shifted - ROUND;
    const Float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n ln 2, within +-0.35
    Float p = all(0.00139517053f);  // (e^r - 1 - r) / r^2, fitted: relative error 4e-9
    p = p * r + 0.00836959015f;
    p = p * r + 0.0416661875f;
    p = p * r + 0.16666513f;
    p = p * r + 0.50000001f;
    p = p * (r * r) + r + 1.0f;
    const Bits exponent = (std::bit_cast<Bits>(shifted) - std::bit_cast<uint32_t>(ROUND)) << 23;
    const Float scaled = std::bit_cast<Float>(std::bit_cast<Bits>(p) + exponent);
    // The payload of a NaN would have become an exponent.
    return x != x ? x : x < -87.0f ? Float{} : scaled;
  }

  struct Normal {
    Float cumulative;
    Float bell;  // e^(-z^2 / 2)
  };

  // The normal distribution at z, to 1e-7: e^(t^2) erfc(t) is a polynomial in 1 / (1 + 0.4 t),
  // fitted on 0 <= t <= 4.5 with an error below 3e-10 of erfc.
  FASTMIM_INLINE static Normal normal(Float z) {
    const Float bell = exp(z * z * -0.5f);
    const Float t = (z < 0.0f ? -z : z) * 0.707106781f;
    const Float s = 1.0f / (t * 0.4f + 1.0f);
    Float p = all(0.0692913069f);
    p = p * s - 0.357841273f;
    p = p * s + 0.573580587f;
    p = p * s - 0.191475656f;
    p = p * s + 0.22791752f;
    p = p * s + 0.250654596f;
    p = p * s + 0.195147543f;
    p = p * s + 0.233472283f;
    p = p * s - 0.000746906933f;
    const Float tail = bell * p * 0.5f;
    return {z < 0.0f ? tail : 1.0f - tail, bell};
  }
};

// Scratch memory of one thread, 64-byte aligned: `floats` rounded up for each take().
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round(floats)) * 4))),
        next_(memory_.get()) {
    if (!memory_) throw std::bad_alloc();
  }

  static constexpr int64_t round(int64_t floats) { return (floats + 15) / 16 * 16; }

  float* take(int64_t floats) { return std::exchange(next_, next_ + round(floats)); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  float* next_;
};

}  // namespace fastmim
