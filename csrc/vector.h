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
  __attribute__((noinline)) static void baseline(Args&... args) {
    Kernel<4>::run(args...);
  }
#if defined(__x86_64__)
  template <typename... Args>
  __attribute__((noinline, target("avx2,fma"))) static void avx2(Args&... args) {
    Kernel<8>::run(args...);
  }
  template <typename... Args>
  __attribute__((noinline, target("avx512f,avx512bw,prefer-vector-width=512"))) static void avx512(
      Args&... args) {
    Kernel<16>::run(args...);
  }
#endif
};

// Kernel<W>::run(args...) as a function of its own, for kernels of W lanes that share it.
template <template <int> class Kernel, int W, typename... Args>
FASTMIM_INLINE void call(Args&&... args) {
#if defined(__x86_64__)
  if constexpr (W == 16) return ForEachWidth<Kernel>::avx512(args...);
  if constexpr (W == 8) return ForEachWidth<Kernel>::avx2(args...);
#endif
  return ForEachWidth<Kernel>::baseline(args...);
}

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

  // `floats` rounded up to whole vectors.
  static constexpr int64_t padded(int64_t floats) { return (floats + W - 1) / W * W; }

  FASTMIM_INLINE static Float load(const float* p) {
    Float x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }

  FASTMIM_INLINE static void store(float* p, Float x) { std::memcpy(p, &x, sizeof(x)); }

  FASTMIM_INLINE static Float all(float x) { return all(x, std::make_integer_sequence<int, W>()); }

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

  // coefficients[0] + coefficients[1] x + ...
  template <size_t COUNT>
  FASTMIM_INLINE static Float polynomial(const float (&coefficients)[COUNT], Float x) {
    Float sum = all(coefficients[COUNT - 1]);
#pragma GCC unroll 16
    for (size_t i = COUNT - 1; i > 0; --i) sum = sum * x + coefficients[i - 1];
    return sum;
  }

 private:
  // A shuffle: of anything else, GCC makes a chain of insertions for vectors wider than those of
  // the baseline.
  template <int... lane>
  FASTMIM_INLINE static Float all(float x, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
    const Lanes<4>::Float first{x};
    return __builtin_shufflevector(first, first, (lane * 0)...);
#else
    return Float{} + x;
#endif
  }
};

// Four rows of four to columns.
FASTMIM_INLINE void transpose(Lanes<4>::Float (&x)[4]) {
  using Float = Lanes<4>::Float;
#if defined(__clang__)
#define FASTMIM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTMIM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes<4>::Bits{__VA_ARGS__})
#endif
  const Float low_01 = FASTMIM_SHUFFLE(x[0], x[1], 0, 4, 1, 5);
  const Float low_23 = FASTMIM_SHUFFLE(x[2], x[3], 0, 4, 1, 5);
  const Float high_01 = FASTMIM_SHUFFLE(x[0], x[1], 2, 6, 3, 7);
  const Float high_23 = FASTMIM_SHUFFLE(x[2], x[3], 2, 6, 3, 7);
  x[0] = FASTMIM_SHUFFLE(low_01, low_23, 0, 1, 4, 5);
  x[1] = FASTMIM_SHUFFLE(low_01, low_23, 2, 3, 6, 7);
  x[2] = FASTMIM_SHUFFLE(high_01, high_23, 0, 1, 4, 5);
  x[3] = FASTMIM_SHUFFLE(high_01, high_23, 2, 3, 6, 7);
#undef FASTMIM_SHUFFLE
}

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
