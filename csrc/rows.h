// What the CPU kernels over rows share: rows of any floating-point type as floats, and sums over
// rows that do not depend on the number of threads.
#pragma once

#include "vector.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastmim {

// Rows of `width` values in a contiguous tensor.
template <typename Pointer>
struct Rows {
  Pointer data;
  ScalarType dtype;
  int64_t width;
};
using Source = Rows<const void*>;
using Target = Rows<void*>;

inline Source source(const Tensor& x) { return {x.const_data_ptr(), x.scalar_type(), x.size(-1)}; }
inline Target target(Tensor& x) { return {x.mutable_data_ptr(), x.scalar_type(), x.size(-1)}; }

inline int64_t rows_of(const Tensor& x) { return x.numel() / x.size(-1); }

inline bool is_row_type(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_row_type(const Checks& check, const char* name, const Tensor& x) {
  check.dtype(name, x.scalar_type(), is_row_type(x.scalar_type()));
}

inline void check_width(const Checks& check, const char* name, const Tensor& x) {
  if (x.dim() == 0 || x.size(-1) == 0)
    refuse(check.op, ": expected ", name, " (..., D) with D of at least 1, got ", shape_of(x));
}

// Row `i` as floats: the memory itself, or `scratch` with the values converted.
FASTMIM_INLINE const float* read_row(const Source& rows, int64_t i, float* scratch) {
  const int64_t first = i * rows.width;
  if (rows.dtype == ScalarType::Float) return static_cast<const float*>(rows.data) + first;
  if (rows.dtype == ScalarType::BFloat16) {
    const auto* const from = static_cast<const uint16_t*>(rows.data) + first;
    for (int64_t d = 0; d < rows.width; ++d)
      scratch[d] = std::bit_cast<float>(uint32_t{from[d]} << 16);
  } else {
    const auto* const from = static_cast<const Half*>(rows.data) + first;
    for (int64_t d = 0; d < rows.width; ++d) scratch[d] = static_cast<float>(from[d]);
  }
  return scratch;
}

// Where row `i` is to be computed: in place, or in `scratch`, from which finish_row() converts it.
FASTMIM_INLINE float* begin_row(const Target& rows, int64_t i, float* scratch) {
  return rows.dtype == ScalarType::Float ? static_cast<float*>(rows.data) + i * rows.width
                                         : scratch;
}

FASTMIM_INLINE void finish_row(const Target& rows, int64_t i, const float* values) {
  const int64_t first = i * rows.width;
  if (rows.dtype == ScalarType::BFloat16) {
    auto* const to = static_cast<uint16_t*>(rows.data) + first;
    for (int64_t d = 0; d < rows.width; ++d) {
      const auto bits = std::bit_cast<uint32_t>(values[d]);
      const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest even
      to[d] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0u : rounded);
    }
  } else if (rows.dtype == ScalarType::Half) {
    auto* const to = static_cast<Half*>(rows.data) + first;
    for (int64_t d = 0; d < rows.width; ++d) to[d] = static_cast<Half>(values[d]);
  }
}

// f(begin, end, sums) adds rows begin to end into `sums`, `count` floats that are zero before;
// returns the totals. The rows are cut into the same ranges whatever the number of threads, and
// summed in float for 64 rows at most: the error does not grow with their number.
template <typename F>
std::vector<float> sum_over_rows(int64_t rows, int64_t count, int64_t cost, const F& f) {
  constexpr int64_t RANGES = 32, GROUP = 64;
  const int64_t size = std::max<int64_t>((rows + RANGES - 1) / RANGES, 1);
  const int64_t ranges = (rows + size - 1) / size;
  const auto columns = static_cast<size_t>(count);
  std::vector<double> partial(static_cast<size_t>(ranges) * columns);
  in_parallel(ranges, size * cost, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(columns);
    for (int64_t r = begin; r < end; ++r) {
      double* const total = partial.data() + static_cast<size_t>(r) * columns;
      const int64_t last = std::min(rows, (r + 1) * size);
      for (int64_t first = r * size; first < last; first += GROUP) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        f(first, std::min(last, first + GROUP), sums.data());
        for (size_t i = 0; i < columns; ++i) total[i] += sums[i];
      }
    }
  });
  std::vector<double> totals(columns);
  for (size_t r = 0; r < static_cast<size_t>(ranges); ++r)
    for (size_t i = 0; i < columns; ++i) totals[i] += partial[r * columns + i];
  return {totals.begin(), totals.end()};
}

// A (width) tensor like `like` from floats.
inline Tensor vector_like(const Tensor& like, const float* values) {
  Tensor out = new_like(like);
  const Target to = target(out);
  std::copy_n(values, to.width, begin_row(to, 0, const_cast<float*>(values)));
  finish_row(to, 0, values);
  return out;
}

}  // namespace fastmim
