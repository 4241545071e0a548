// Attention over packed qkv on the CPU, for sequences short enough that a head stays in cache.
//
// One task is one head of one image: its q, k and v are read once from (B, N, 3, H, D), all products
// are made in cache, and the packed result or gradient is written once. The scores of a head, N * N
// floats, are never written to memory; the backward pass makes them again from lse.
#include "vector.h"

#include <cmath>

namespace {

using namespace fastmim;

// Products of matrices of floats that lie in scratch memory, rows padded to whole vectors.
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
    constexpr int ROWS = VECTORS < 3 ? 12 : VECTORS == 3 ? 8 : 6;  // 12 to 24 sums in registers
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      tile<ROWS, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i + 4 <= rows; i += 4)
      tile<4, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i < rows; ++i)
      tile<1, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
  }

  // Row-major b and c of `columns` floats, a multiple of W.
  FASTMIM_INLINE static void run(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                 int64_t rows, int64_t depth, int64_t columns, float* c) {
    int64_t j = 0;
    for (; j + 4 * W <= columns; j += 4 * W)
      panel<4>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
    const int64_t left = (columns - j) / W;
    if (left == 3) panel<3>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
    if (left == 2) panel<2>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
    if (left == 1) panel<1>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
  }
};

struct Shape {
  int64_t images, tokens, heads, width;

  int64_t padded_width() const { return Scratch::round(width); }
  int64_t padded_tokens() const { return Scratch::round(tokens); }
  int64_t row(int64_t packed) const { return packed * heads * width; }
};

// Rows of a head to scratch memory: (tokens, padded width), zeros behind the width.
template <typename T>
FASTMIM_INLINE void read_rows(const T* from, int64_t stride, const Shape& shape, float factor,
                              float* to) {
  const int64_t padded = shape.padded_width();
  for (int64_t n = 0; n < shape.tokens; ++n) {
    for (int64_t d = 0; d < shape.width; ++d)
      to[n * padded + d] = static_cast<float>(from[n * stride + d]) * factor;
    for (int64_t d = shape.width; d < padded; ++d) to[n * padded + d] = 0.0f;
  }
}

// The same transposed: (width, padded tokens), zeros behind the tokens.
template <typename T>
FASTMIM_INLINE void read_columns(const T* from, int64_t stride, const Shape& shape, float* to) {
  const int64_t padded = shape.padded_tokens();
  for (int64_t d = 0; d < shape.width; ++d) {
    for (int64_t n = 0; n < shape.tokens; ++n)
      to[d * padded + n] = static_cast<float>(from[n * stride + d]);
    for (int64_t n = shape.tokens; n < padded; ++n) to[d * padded + n] = 0.0f;
  }
}

template <typename T>
FASTMIM_INLINE void write_rows(const float* from, const Shape& shape, float factor, T* to,
                               int64_t stride) {
  for (int64_t n = 0; n < shape.tokens; ++n)
    for (int64_t d = 0; d < shape.width; ++d)
      to[n * stride + d] = static_cast<T>(from[n * shape.padded_width() + d] * factor);
}

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
  const T *grad, *qkv, *out;
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
      using Float = typename V::Float;
      const Shape& s = args.shape;
      const int64_t n = s.tokens, columns = s.padded_tokens(), width = s.padded_width();
      Scratch scratch(3 * n * width + s.width * columns + n * columns);
      float* const q = scratch.take(n * width);
      float* const keys = scratch.take(s.width * columns);
      float* const v = scratch.take(n * width);
      float* const scores = scratch.take(n * columns);
      float* const mixed = scratch.take(n * width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / s.heads, head = task % s.heads;
        const T* const qkv = args.qkv + image * n * s.row(3) + head * s.width;
        read_rows(qkv, s.row(3), s, args.scale, q);
        read_columns(qkv + s.row(1), s.row(3), s, keys);
        read_rows(qkv + s.row(2), s.row(3), s, 1.0f, v);
        Product<W>::run(q, width, 1, keys, n, s.width, columns, scores);
        for (int64_t i = 0; i < n; ++i) {
          float* const row = scores + i * columns;
          for (int64_t j = n; j < columns; ++j) row[j] = -INFINITY;
          Float top = V::load(row);
          for (int64_t j = W; j < columns; j += W) top = V::max(V::load(row + j), top);
          const float highest = V::largest(top);
          Float total{};
          for (int64_t j = 0; j < columns; j += W) {
            const Float p = V::exp(V::load(row + j) - highest);
            total += p;
            V::store(row + j, p);
          }
          const float whole = V::sum(total), inverse = 1.0f / whole;
          for (int64_t j = 0; j < columns; j += W) V::store(row + j, V::load(row + j) * inverse);
          args.lse[task * n + i] = highest + std::log(whole);
        }
        Product<W>::run(scores, columns, 1, v, n, n, width, mixed);
        write_rows(mixed, s, 1.0f, args.out + (image * n * s.heads + head) * s.width, s.row(1));
      }
    }
  };
};

template <typename T>
struct BackwardHeads {
  template <int W>
  struct Kernel {
    static FASTMIM_INLINE void run(const Backward<T>& args, int64_t begin, int64_t end) {
      using V = Vector<W>;
      using Float = typename V::Float;
      const Shape& s = args.shape;
      const int64_t n = s.tokens, columns = s.padded_tokens(), width = s.padded_width();
      Scratch scratch(4 * n * width + 2 * s.width * columns + 2 * n * columns);
      float* const q = scratch.take(n * width);
      float* const k = scratch.take(n * width);
      float* const grad = scratch.take(n * width);
      float* const result = scratch.take(n * width);
      float* const keys = scratch.take(s.width * columns);
      float* const values = scratch.take(s.width * columns);
      float* const p = scratch.take(n * columns);
      float* const grad_p = scratch.take(n * columns);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / s.heads, head = task % s.heads;
        const T* const qkv = args.qkv + image * n * s.row(3) + head * s.width;
        const int64_t first = (image * n * s.heads + head) * s.width;
        read_rows(qkv, s.row(3), s, args.scale, q);
        read_rows(qkv + s.row(1), s.row(3), s, 1.0f, k);
        read_columns(qkv + s.row(1), s.row(3), s, keys);
        read_columns(qkv + s.row(2), s.row(3), s, values);
        read_rows(args.grad + first, s.row(1), s, 1.0f, grad);
        Product<W>::run(q, width, 1, keys, n, s.width, columns, p);
        Product<W>::run(grad, width, 1, values, n, s.width, columns, grad_p);
        for (int64_t i = 0; i < n; ++i) {
          const T* const out = args.out + first + i * s.row(1);
          float delta = 0.0f;
          for (int64_t d = 0; d < s.width; ++d)
            delta += grad[i * width + d] * static_cast<float>(out[d]);
          const float lse = args.lse[task * n + i];
          float *const row = p + i * columns, *const grad_row = grad_p + i * columns;
          for (int64_t j = 0; j < columns; j += W) {
            const Float probability = V::exp(V::load(row + j) - lse);
            V::store(row + j, probability);
            V::store(grad_row + j, probability * (V::load(grad_row + j) - delta));
          }
        }
        T* const to = args.grad_qkv + image * n * s.row(3) + head * s.width;
        Product<W>::run(grad_p, columns, 1, k, n, n, width, result);
        write_rows(result, s, args.scale, to, s.row(3));
        Product<W>::run(grad_p, 1, columns, q, n, n, width, result);
        write_rows(result, s, 1.0f, to + s.row(1), s.row(3));
        Product<W>::run(p, 1, columns, grad, n, n, width, result);
        write_rows(result, s, 1.0f, to + s.row(2), s.row(3));
      }
    }
  };
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
  grad = packed(grad), qkv = packed(qkv), out = packed(out), lse = packed(lse);
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  for_element(qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Backward<T> args{data<T>(grad),  data<T>(qkv),
                           data<T>(out),   data<float>(lse),
                           static_cast<float>(scale), mutable_data<T>(grad_qkv), shape};
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
