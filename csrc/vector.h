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
#include <type_traits>
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

// Two values computed side by side. A chain of dependent operations leaves the arithmetic units
// waiting, and the next vector's chain is further ahead than a processor looks.
template <typename T>
struct Pair {
  T first, second;
};
template <typename T>
FASTMIM_INLINE Pair<T> operator+(Pair<T> a, Pair<T> b) {
  return {a.first + b.first, a.second + b.second};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator-(Pair<T> a, Pair<T> b) {
  return {a.first - b.first, a.second - b.second};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator*(Pair<T> a, Pair<T> b) {
  return {a.first * b.first, a.second * b.second};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator/(Pair<T> a, Pair<T> b) {
  return {a.first / b.first, a.second / b.second};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator+(Pair<T> a, float b) {
  return {a.first + b, a.second + b};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator-(Pair<T> a, float b) {
  return {a.first - b, a.second - b};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator-(float a, Pair<T> b) {
  return {a - b.first, a - b.second};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator*(Pair<T> a, float b) {
  return {a.first * b, a.second * b};
}
template <typename T>
FASTMIM_INLINE Pair<T> operator/(float a, Pair<T> b) {
  return {a / b.first, a / b.second};
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

  FASTMIM_INLINE static Pair<Float> load_pair(const float* p) { return {load(p), load(p + W)}; }

  // A vector or a pair.
  template <typename X>
  FASTMIM_INLINE static X load_as(const float* p) {
    if constexpr (std::is_same_v<X, Float>)
      return load(p);
    else
      return load_pair(p);
  }

  FASTMIM_INLINE static void store(float* p, Pair<Float> x) {
    store(p, x.first);
    store(p + W, x.second);
  }

  FASTMIM_INLINE static Float all(float x) { return all(x, std::make_integer_sequence<int, W>()); }

  FASTMIM_INLINE static Float max(Float a, Float b) { return a > b ? a : b; }

  template <typename T>
  FASTMIM_INLINE static Pair<T> max(Pair<T> a, Pair<T> b) {
    return {max(a.first, b.first), max(a.second, b.second)};
  }

  FASTMIM_INLINE static float sum(Float x) {
    if constexpr (W == 4) {
      return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
      typename Lanes<W / 2>::Float halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return Vector<W / 2>::sum(halves[0] + halves[1]);
    }
  }

  // `yes` where x is below `bound`, else `no`; `no` for NaN.
  FASTMIM_INLINE static Float where_below(Float x, float bound, Float yes, Float no) {
    return x < bound ? yes : no;
  }

  FASTMIM_INLINE static Float where_below(Float x, float bound, float yes, Float no) {
    return x < bound ? all(yes) : no;
  }

  template <typename T>
  FASTMIM_INLINE static Pair<T> where_below(Pair<T> x, float bound, Pair<T> yes, Pair<T> no) {
    return {where_below(x.first, bound, yes.first, no.first),
            where_below(x.second, bound, yes.second, no.second)};
  }

  template <typename T>
  FASTMIM_INLINE static Pair<T> where_below(Pair<T> x, float bound, float yes, Pair<T> no) {
    return {where_below(x.first, bound, yes, no.first),
            where_below(x.second, bound, yes, no.second)};
  }

  // e^x to 2 ulp for x up to 88; 0 below -87, where e^x becomes denormal. Of a vector or a pair.
  template <typename X>
  FASTMIM_INLINE static X exp(X x) {
    const X shifted = x * 1.44269504f + ROUND;
    const X n = shifted - ROUND;
    const X r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n ln 2, within +-0.35
    // (e^r - 1 - r) / r^2, fitted: relative error 4e-9
    constexpr float p[] = {0.50000001f, 0.16666513f, 0.0416661875f, 0.00836959015f, 0.00139517053f};
    return where_below(x, -87.0f, 0.0f, (polynomial(p, r) * (r * r) + r + 1.0f) * power(shifted));
  }

  // coefficients[0] + coefficients[1] x + ...
  template <size_t COUNT, typename X>
  FASTMIM_INLINE static X polynomial(const float (&coefficients)[COUNT], X x) {
    X sum = x * coefficients[COUNT - 1] + coefficients[COUNT - 2];
#pragma GCC unroll 16
    for (size_t i = COUNT - 2; i > 0; --i) sum = sum * x + coefficients[i - 1];
    return sum;
  }

 private:
  static constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer

  // 2^n from n + ROUND, of n from -126 to 127.
  FASTMIM_INLINE static Float power(Float shifted) {
    constexpr uint32_t OFFSET = std::bit_cast<uint32_t>(ROUND) - 127;
    return std::bit_cast<Float>((std::bit_cast<Bits>(shifted) - OFFSET) << 23);
  }

  template <typename T>
  FASTMIM_INLINE static Pair<T> power(Pair<T> shifted) {
    return {power(shifted.first), power(shifted.second)};
  }

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
