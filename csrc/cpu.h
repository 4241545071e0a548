// What the CPU kernels share: element types, positions, the parallel loop.
#pragma once

#include "checks.h"
#include "simd.h"
#include "tensors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace fastmim {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <typename T>
struct Type {
  using type = T;
};

// What arithmetic on T is done in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(Type<T>()) for the floating-point type T of `dtype`, which the checks have let through.
template <typename F>
auto for_floating(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(Type<double>());
    case ScalarType::BFloat16:
      return f(Type<BFloat16>());
    case ScalarType::Half:
      return f(Type<Half>());
    default:
      return f(Type<float>());
  }
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Tensor packed(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Tensor of_dtype(const Tensor& x, ScalarType dtype) {
  return packed(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// f(begin, end) on ranges of 0..count, each on one thread. `cost`: elements that one of them
// touches; a few are not worth a thread, and none are no work.
template <typename F>
void in_parallel(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t THREAD = 1 << 15;
  if (count > 0 && cost > 0)
    torch::stable::parallel_for(0, count, std::max<int64_t>(THREAD / cost, 1), f);
}

// (B, K) positions, read once and found to lie in [0, limit): the kernels need not look again.
class Ids {
 public:
  Ids(const char* op, const char* name, const Tensor& ids, int64_t limit)
      : data_(data<int64_t>(ids)),
        columns_(ids.size(1)),
        row_stride_(ids.stride(0)),
        column_stride_(ids.stride(1)) {
    const auto bound = static_cast<uint64_t>(limit);
    for (int64_t b = 0; b < ids.size(0); ++b) {
      bool outside = false;
      for (int64_t k = 0; k < columns_; ++k) outside |= static_cast<uint64_t>(at(b, k)) >= bound;
      for (int64_t k = 0; outside && k < columns_; ++k)
        if (static_cast<uint64_t>(at(b, k)) >= bound)
          refuse(op, ": ", name, "[", b, ", ", k, "] is ", at(b, k), ", expected a value in [0, ",
                 limit, ")");
    }
  }

  int64_t at(int64_t b, int64_t k) const { return data_[b * row_stride_ + k * column_stride_]; }

  // The position in row `i` of the (B * K) rows.
  int64_t at(int64_t i) const { return at(i / columns_, i % columns_); }

 private:
  const int64_t* data_;
  int64_t columns_;
  int64_t row_stride_;
  int64_t column_stride_;
};

}  // namespace fastmim
