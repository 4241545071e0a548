// Attention over packed qkv on the CPU, for sequences short enough that a head stays in cache.
//
// One task is one head of one image: its q, k and v are read from (B, N, 3, H, D) as they lie, all
// products are made in cache, and the packed result or gradient is written once. The scores of a
// head are made transposed, a row for each key: what the softmax does to a query is then done to a
// vector of queries at once. They are never written to memory; the backward pass makes them again
// from lse.
#include "vector.h"

#include <cmath>

namespace {

using namespace fastmim;

// Products of matrices of floats.
template <int W>
struct Product {
  using V = Vector<W>;
  using Float = typename V::Float;

  // c (ROWS x VECTORS * W) = a (ROWS x depth, any strides) b (depth x VECTORS * W)
  template <int ROWS, int VECTORS>
  FASTMIM_INLINE static void tile(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                  int64_t b_row, int64_t depth, float* c, int64_t c_row) {
    Float sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Float right[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) right[j] = V::load(b + k * b_row + j * W);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        const Float left = V::all(a[i * a_row + k * a_depth]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sums[i][j] += left * right[j];
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) V::store(c + i * c_row + j * W, sums[i][j]);
  }

  template <int VECTORS>
  FASTMIM_INLINE static void panel(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                   int64_t b_row, int64_t rows, int64_t depth, float* c,
                                   int64_t c_row) {
    // Sums, a row of b and a value of a fill the registers: 32 with AVX-512, else 16.
    constexpr int ROWS = W < 16 ? 12 / VECTORS : VECTORS < 3 ? 12 : VECTORS == 3 ? 8 : 6;
    constexpr int FEWER = std::min(ROWS / 2, 4);
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      tile<ROWS, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i + FEWER <= rows; i += FEWER)
      tile<FEWER, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i < rows; ++i)
      tile<1, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
  }

  // Rows of b and c hold `columns` floats, a multiple of W.
  FASTMIM_INLINE static void run(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                 int64_t b_row, int64_t rows, int64_t depth, int64_t columns,
                                 float* c, int64_t c_row) {
    constexpr int MOST = W < 16 ? 2 : 4;
    int64_t j = 0;
    for (; j + MOST * W <= columns; j += MOST * W)
      panel<MOST>(a, a_row, a_depth, b + j, b_row, rows, depth, c + j, c_row);
    const int64_t left = (columns - j) / W;
    if constexpr (MOST == 4) {
      if (left == 3) panel<3>(a, a_row, a_depth, b + j, b_row, rows, depth, c + j, c_row);
      if (left == 2) panel<2>(a, a_row, a_depth, b + j, b_row, rows, depth, c + j, c_row);
    }
    if (left == 1) panel<1>(a, a_row, a_depth, b + j, b_row, rows, depth, c + j, c_row);
  }
};

// Rows of floats in a matrix, `stride` apart.
struct Rows {
  float* first;
  int64_t stride;
};

struct ConstRows {
  const float* first;
  int64_t stride;
};

// The `count` rows of a head as floats, behind them zeros to a whole vector: where they lie, or in
// scratch memory.
template <int W, typename T>
FASTMIM_INLINE ConstRows read_rows(const T* from, int64_t stride, int64_t count, int64_t width,
                                   float* scratch) {
  const int64_t padded = Vector<W>::padded(width);
  if constexpr (std::is_same_v<T, float>)
    if (padded == width) return {from, stride};
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t d = 0; d < width; ++d)
      scratch[n * padded + d] = static_cast<float>(from[n * stride + d]);
    for (int64_t d = width; d < padded; ++d) scratch[n * padded + d] = 0.0f;
  }
  return {scratch, padded};
}

// The same transposed and multiplied: (width, count), zeros behind the count.
template <int W, typename T>
FASTMIM_INLINE void read_columns(const T* from, int64_t stride, int64_t count, int64_t width,
                                 float factor, float* to) {
  const int64_t padded = Vector<W>::padded(count);
  int64_t d = 0;
  for (; d + 4 <= width; d += 4) {
    float* const row = to + d * padded;
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
      typename Lanes<4>::Float block[4];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          block[i][j] = static_cast<float>(from[(n + i) * stride + d + j]);
      transpose(block);
      for (int i = 0; i < 4; ++i) Vector<4>::store(row + i * padded + n, block[i] * factor);
    }
    for (; n < count; ++n)
      for (int i = 0; i < 4; ++i)
        row[i * padded + n] = static_cast<float>(from[n * stride + d + i]) * factor;
  }
  for (; d < width; ++d)
    for (int64_t n = 0; n < count; ++n)
      to[d * padded + n] = static_cast<float>(from[n * stride + d]) * factor;
  for (d = 0; d < width; ++d)
    for (int64_t n = count; n < padded; ++n) to[d * padded + n] = 0.0f;
}

// Where the rows of a result are made: where they are to lie, or in scratch memory.
template <int W, typename T>
FASTMIM_INLINE Rows begin_rows(T* to, int64_t stride, int64_t width, float* scratch) {
  const int64_t padded = Vector<W>::padded(width);
  if constexpr (std::is_same_v<T, float>)
    if (padded == width) return {to, stride};
  return {scratch, padded};
}

// Brings rows made in scratch memory to where they are to lie.
template <typename T>
FASTMIM_INLINE void finish_rows(const Rows& rows, int64_t count, int64_t width, T* to,
                                int64_t stride) {
  if constexpr (std::is_same_v<T, float>)
    if (rows.first == to) return;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t d = 0; d < width; ++d)
      to[n * stride + d] = static_cast<T>(rows.first[n * rows.stride + d]);
}

struct Shape {
  int64_t images, tokens, heads, width;

  int64_t row(int64_t packed) const { return packed * heads * width; }
};

template <typename T>
struct Forward {
  const T* qkv;
  float scale;
  T* out;
  float* lse;
  Shape shape;
};

template <typename T>
struct Backward {
  const T *grad, *qkv;
  const float* lse;
  float scale;
  T* grad_qkv;
  Shape shape;
};

// The heads begin to end, counted over the images.
template <typename T>
struct ForwardHeads {
  template <int W>
  struct Kernel {
    static FASTMIM_INLINE void run(const Forward<T>& args, int64_t begin, int64_t end) {
      using V = Vector<W>;
      const Shape& s = args.shape;
      const int64_t n = s.tokens, queries = V::padded(n), width = V::padded(s.width);
      Scratch scratch(Scratch::round(s.width * queries) + Scratch::round(n * queries) +
                      3 * Scratch::round(n * width) + Scratch::round(queries));
      float* const q = scratch.take(s.width * queries);
      float* const scores = scratch.take(n * queries);
      float* const k_scratch = scratch.take(n * width);
      float* const v_scratch = scratch.take(n * width);
      float* const out_scratch = scratch.take(n * width);
      float* const whole = scratch.take(queries);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / s.heads, head = task % s.heads;
        const T* const qkv = args.qkv + image * n * s.row(3) + head * s.width;
        read_columns<W>(qkv, s.row(3), n, s.width, args.scale, q);
        const ConstRows k = read_rows<W>(qkv + s.row(1), s.row(3), n, s.width, k_scratch);
        Product<W>::run(k.first, k.stride, 1, q, queries, n, s.width, queries, scores, queries);
        float* const lse = args.lse + task * n;
        for (int64_t i = 0; i < queries; i += W) {
          const auto highest = softmax<W>(scores + i, n, queries, whole + i);
          for (int64_t lane = 0; lane < std::min<int64_t>(W, n - i); ++lane)
            lse[i + lane] = highest[lane] + std::log(whole[i + lane]);
        }
        const ConstRows v = read_rows<W>(qkv + s.row(2), s.row(3), n, s.width, v_scratch);
        T* const to = args.out + (image * n * s.heads + head) * s.width;
        const Rows out = begin_rows<W>(to, s.row(1), s.width, out_scratch);
        Product<W>::run(scores, 1, queries, v.first, v.stride, n, n, width, out.first, out.stride);
        finish_rows(out, n, s.width, to, s.row(1));
      }
    }
  };

  // Scores of W queries, one column each, to probabilities. Writes the sums of their exponentials
  // and returns the highest scores.
  template <int W>
  static FASTMIM_INLINE typename Vector<W>::Float softmax(float* scores, int64_t keys,
                                                          int64_t stride, float* whole) {
    using V = Vector<W>;
    using Float = typename V::Float;
    Float highest = V::load(scores);
    for (int64_t j = 1; j < keys; ++j) highest = V::max(V::load(scores + j * stride), highest);
    Float sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const Float p = V::exp(V::load(scores + j * stride) - highest);
      sum += p;
      V::store(scores + j * stride, p);
    }
    V::store(whole, sum);
    const Float inverse = 1.0f / sum;
    for (int64_t j = 0; j < keys; ++j)
      V::store(scores + j * stride, V::load(scores + j * stride) * inverse);
    return highest;
  }
};

template <typename T>
struct BackwardHeads {
  template <int W>
  struct Kernel {
    static FASTMIM_INLINE void run(const Backward<T>& args, int64_t begin, int64_t end) {
      using V = Vector<W>;
      const Shape& s = args.shape;
      const int64_t n = s.tokens, queries = V::padded(n), width = V::padded(s.width);
      Scratch scratch(2 * Scratch::round(s.width * queries) + 2 * Scratch::round(n * queries) +
                      5 * Scratch::round(n * width) + Scratch::round(queries));
      float* const q_columns = scratch.take(s.width * queries);
      float* const grad_columns = scratch.take(s.width * queries);
      float* const p = scratch.take(n * queries);
      float* const grad_p = scratch.take(n * queries);
      float* const q_scratch = scratch.take(n * width);
      float* const k_scratch = scratch.take(n * width);
      float* const v_scratch = scratch.take(n * width);
      float* const grad_scratch = scratch.take(n * width);
      float* const result = scratch.take(n * width);
      float* const lse = scratch.take(queries);
      std::fill(lse + n, lse + queries, 0.0f);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / s.heads, head = task % s.heads;
        const T* const qkv = args.qkv + image * n * s.row(3) + head * s.width;
        const T* const grad_out = args.grad + (image * n * s.heads + head) * s.width;
        const ConstRows q = read_rows<W>(qkv, s.row(3), n, s.width, q_scratch);
        const ConstRows k = read_rows<W>(qkv + s.row(1), s.row(3), n, s.width, k_scratch);
        const ConstRows v = read_rows<W>(qkv + s.row(2), s.row(3), n, s.width, v_scratch);
        const ConstRows grad = read_rows<W>(grad_out, s.row(1), n, s.width, grad_scratch);
        read_columns<W>(qkv, s.row(3), n, s.width, args.scale, q_columns);
        read_columns<W>(grad_out, s.row(1), n, s.width, 1.0f, grad_columns);
        Product<W>::run(k.first, k.stride, 1, q_columns, queries, n, s.width, queries, p, queries);
        Product<W>::run(v.first, v.stride, 1, grad_columns, queries, n, s.width, queries, grad_p,
                        queries);
        std::copy(args.lse + task * n, args.lse + (task + 1) * n, lse);
        for (int64_t i = 0; i < queries; i += W)
          softmax<W>(p + i, grad_p + i, n, queries, V::load(lse + i), args.scale);
        T* const to = args.grad_qkv + image * n * s.row(3) + head * s.width;
        write<W>(s, grad_p, 1, queries, k, result, to);
        write<W>(s, grad_p, queries, 1, q, result, to + s.row(1));
        write<W>(s, p, queries, 1, grad, result, to + s.row(2));
      }
    }
  };

  // a (tokens x tokens) b to a part of the packed gradient.
  template <int W>
  static FASTMIM_INLINE void write(const Shape& s, const float* a, int64_t a_row, int64_t a_depth,
                                   const ConstRows& b, float* scratch, T* to) {
    const Rows rows = begin_rows<W>(to, s.row(3), s.width, scratch);
    Product<W>::run(a, a_row, a_depth, b.first, b.stride, s.tokens, s.tokens,
                    Vector<W>::padded(s.width), rows.first, rows.stride);
    finish_rows(rows, s.tokens, s.width, to, s.row(3));
  }

  // Scores and the probabilities' gradients of W queries, one column each, to probabilities and
  // `scale` times the scores' gradients.
  template <int W>
  static FASTMIM_INLINE void softmax(float* scores, float* grads, int64_t keys, int64_t stride,
                                     typename Vector<W>::Float lse, float scale) {
    using V = Vector<W>;
    using Float = typename V::Float;
    Float delta{};
    for (int64_t j = 0; j < keys; ++j) {
      const Float p = V::exp(V::load(scores + j * stride) - lse);
      delta += p * V::load(grads + j * stride);
      V::store(scores + j * stride, p);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const Float p = V::load(scores + j * stride) * scale;
      V::store(grads + j * stride, p * (V::load(grads + j * stride) - delta));
    }
  }
};

Shape check(const Checks& check, const Tensor& qkv) {
  check.dimensions("qkv", qkv, 5);
  check.dtype("qkv", qkv.scalar_type(),
              is_floating(qkv.scalar_type()) && qkv.scalar_type() != ScalarType::Double);
  if (qkv.size(2) != 3)
    refuse(check.op, ": expected qkv (B, N, 3, H, D), got ", shape_of(qkv));
  return {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
}

// f(Type<T>()) for the floating-point types that attention takes.
template <typename F>
auto for_element(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(Type<BFloat16>());
    case ScalarType::Half:
      return f(Type<Half>());
    default:
      return f(Type<float>());
  }
}

std::tuple<Tensor, Tensor> attention_cpu(Tensor qkv, double scale) {
  const Checks checks{"attention", "cpu"};
  const Shape shape = check(checks, qkv);
  qkv = packed(qkv);
  Tensor out = torch::stable::new_empty(qkv, {shape.images, shape.tokens, shape.heads, shape.width});
  Tensor lse = torch::stable::new_empty(qkv, {shape.images, shape.heads, shape.tokens},
                                        ScalarType::Float);
  for_element(qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> args{data<T>(qkv), static_cast<float>(scale), mutable_data<T>(out),
                          mutable_data<float>(lse), shape};
    in_parallel(shape.images * shape.heads, shape.tokens * shape.tokens,
                [&](int64_t begin, int64_t end) {
                  wide<ForwardHeads<T>::template Kernel>(args, begin, end);
                });
  });
  return {out, lse};
}

Tensor attention_backward_cpu(Tensor grad, Tensor qkv, Tensor out, Tensor lse, double scale) {
  const Checks checks{"attention_backward", "cpu"};
  const Shape shape = check(checks, qkv);
  checks.shape("grad", grad, {shape.images, shape.tokens, shape.heads, shape.width});
  checks.shape("out", out, {shape.images, shape.tokens, shape.heads, shape.width});
  checks.shape("lse", lse, {shape.images, shape.heads, shape.tokens});
  checks.dtype("grad", grad.scalar_type(), grad.scalar_type() == qkv.scalar_type());
  checks.dtype("out", out.scalar_type(), out.scalar_type() == qkv.scalar_type());
  checks.dtype("lse", lse.scalar_type(), lse.scalar_type() == ScalarType::Float);
  grad = packed(grad), qkv = packed(qkv), lse = packed(lse);
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  for_element(qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Backward<T> args{data<T>(grad), data<T>(qkv), data<float>(lse), static_cast<float>(scale),
                           mutable_data<T>(grad_qkv), shape};
    in_parallel(shape.images * shape.heads, shape.tokens * shape.tokens,
                [&](int64_t begin, int64_t end) {
                  wide<BackwardHeads<T>::template Kernel>(args, begin, end);
                });
  });
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
}
