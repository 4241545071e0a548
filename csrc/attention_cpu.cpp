// Attention on the CPU over projections as they are written, packed, for sequences short enough that
// a head stays in cache.
//
// One task is one head of one sequence: its q, k and v are read once, all products are made in
// cache, and the result or the gradient, packed like the projection, is written once. The scores of
// a head, M * N floats, are never written to memory; the backward pass makes them again from lse.
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
    // 12 to 24 sums in 32 registers; in 16 of them 12, with 2 of the right operand and 1 of the left.
    constexpr int ROWS = W < 16 ? 12 / VECTORS : VECTORS < 3 ? 12 : VECTORS == 3 ? 8 : 6;
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      tile<ROWS, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i + 4 <= rows; i += 4)
      tile<4, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i + 2 <= rows; i += 2)
      tile<2, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
    for (; i < rows; ++i)
      tile<1, VECTORS>(a + i * a_row, a_row, a_depth, b, b_row, depth, c + i * c_row, c_row);
  }

  // Row-major b and c of `columns` floats, a multiple of W.
  FASTMIM_INLINE static void run(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                 int64_t rows, int64_t depth, int64_t columns, float* c) {
    int64_t j = 0;
    constexpr int WIDEST = W < 16 ? 2 : 4;
    for (; j + WIDEST * W <= columns; j += WIDEST * W)
      panel<WIDEST>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
    const int64_t left = (columns - j) / W;
    if constexpr (WIDEST > 3)
      if (left == 3) panel<3>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
    if (left == 2) panel<2>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
    if (left == 1) panel<1>(a, a_row, a_depth, b + j, columns, rows, depth, c + j, columns);
  }
};

// Queries (M) and keys (N) of all sequences, and how they lie.
struct Shape {
  int64_t sequences, queries, keys, heads, width;  // queries and keys of a sequence, at most
  bool packed;                                     // q, k and v in one row of memory
  const int32_t* starts;  // first rows of the sequences and the end of the last; or all alike
  int64_t rows;           // of all sequences, if they have starts

  int64_t tasks() const { return sequences * heads; }
  int64_t padded_width() const { return Scratch::round(width); }
  int64_t row(int64_t parts) const { return parts * heads * width; }
  int64_t q_row() const { return row(packed ? 3 : 1); }
  int64_t kv_row() const { return row(packed ? 3 : 2); }
};

// One head of one sequence: its rows, and where they begin in every tensor.
struct Head {
  int64_t queries, keys, q, k, v, out, lse;

  Head(const Shape& s, int64_t task) {
    const int64_t sequence = task / s.heads, head = task % s.heads, at = head * s.width;
    int64_t query = sequence * s.queries, key = sequence * s.keys;
    queries = s.queries, keys = s.keys, lse = task * s.queries;
    if (s.starts != nullptr) {
      query = key = s.starts[sequence];
      queries = keys = s.starts[sequence + 1] - query;
      lse = head * s.rows + query;
    }
    q = query * s.q_row() + at;
    k = key * s.kv_row() + (s.packed ? s.row(1) : 0) + at;
    v = k + s.row(1);
    out = query * s.row(1) + at;
  }
};

// Rows of a head to scratch memory: (rows, padded width), zeros behind the width.
template <typename T>
FASTMIM_INLINE void read_rows(const T* from, int64_t stride, int64_t rows, const Shape& shape,
                              float factor, float* to) {
  const int64_t padded = shape.padded_width();
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t d = 0; d < shape.width; ++d)
      to[n * padded + d] = static_cast<float>(from[n * stride + d]) * factor;
    for (int64_t d = shape.width; d < padded; ++d) to[n * padded + d] = 0.0f;
  }
}

// The same transposed: (width, padded rows), zeros behind the rows.
template <typename T>
FASTMIM_INLINE void read_columns(const T* from, int64_t stride, int64_t rows, const Shape& shape,
                                 float* to) {
  const int64_t padded = Scratch::round(rows);
  for (int64_t d = 0; d < shape.width; ++d) {
    for (int64_t n = 0; n < rows; ++n)
      to[d * padded + n] = static_cast<float>(from[n * stride + d]);
    for (int64_t n = rows; n < padded; ++n) to[d * padded + n] = 0.0f;
  }
}

template <typename T>
FASTMIM_INLINE void write_rows(const float* from, int64_t rows, const Shape& shape, float factor,
                               T* to, int64_t stride) {
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t d = 0; d < shape.width; ++d)
      to[n * stride + d] = static_cast<T>(from[n * shape.padded_width() + d] * factor);
}

template <typename T>
struct Forward {
  const T *q, *kv;
  float scale;
  T* out;
  float* lse;
  Shape shape;
};

template <typename T>
struct Backward {
  const T *grad, *q, *kv, *out;
  const float* lse;
  float scale;
  T *grad_q, *grad_kv;
  Shape shape;
};

// The heads begin to end, counted over the sequences.
template <typename T>
struct ForwardHeads {
  template <int W>
  struct Kernel {
    static FASTMIM_INLINE void run(const Forward<T>& args, int64_t begin, int64_t end) {
      using V = Vector<W>;
      using Float = typename V::Float;
      const Shape& s = args.shape;
      const int64_t most = Scratch::round(s.keys), width = s.padded_width();
      Scratch scratch(2 * s.queries * width + s.keys * width + s.width * most + s.queries * most);
      float* const q = scratch.take(s.queries * width);
      float* const keys = scratch.take(s.width * most);
      float* const v = scratch.take(s.keys * width);
      float* const scores = scratch.take(s.queries * most);
      float* const mixed = scratch.take(s.queries * width);
      for (int64_t task = begin; task < end; ++task) {
        const Head head(s, task);
        const int64_t m = head.queries, n = head.keys, columns = Scratch::round(n);
        read_rows(args.q + head.q, s.q_row(), m, s, args.scale, q);
        read_columns(args.kv + head.k, s.kv_row(), n, s, keys);
        read_rows(args.kv + head.v, s.kv_row(), n, s, 1.0f, v);
        Product<W>::run(q, width, 1, keys, m, s.width, columns, scores);
        for (int64_t i = 0; i < m; ++i) {
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
          args.lse[head.lse + i] = highest + std::log(whole);
        }
        Product<W>::run(scores, columns, 1, v, m, n, width, mixed);
        write_rows(mixed, m, s, 1.0f, args.out + head.out, s.row(1));
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
      const int64_t most = Scratch::round(s.keys), width = s.padded_width();
      const int64_t rows = std::max(s.queries, s.keys);
      Scratch scratch((2 * s.queries + s.keys + rows) * width + 2 * s.width * most +
                      2 * s.queries * most);
      float* const q = scratch.take(s.queries * width);
      float* const k = scratch.take(s.keys * width);
      float* const grad = scratch.take(s.queries * width);
      float* const result = scratch.take(rows * width);
      float* const keys = scratch.take(s.width * most);
      float* const values = scratch.take(s.width * most);
      float* const p = scratch.take(s.queries * most);
      float* const grad_p = scratch.take(s.queries * most);
      for (int64_t task = begin; task < end; ++task) {
        const Head head(s, task);
        const int64_t m = head.queries, n = head.keys, columns = Scratch::round(n);
        read_rows(args.q + head.q, s.q_row(), m, s, args.scale, q);
        read_rows(args.kv + head.k, s.kv_row(), n, s, 1.0f, k);
        read_columns(args.kv + head.k, s.kv_row(), n, s, keys);
        read_columns(args.kv + head.v, s.kv_row(), n, s, values);
        read_rows(args.grad + head.out, s.row(1), m, s, 1.0f, grad);
        Product<W>::run(q, width, 1, keys, m, s.width, columns, p);
        Product<W>::run(grad, width, 1, values, m, s.width, columns, grad_p);
        for (int64_t i = 0; i < m; ++i) {
          const T* const out = args.out + head.out + i * s.row(1);
          float delta = 0.0f;
          for (int64_t d = 0; d < s.width; ++d)
            delta += grad[i * width + d] * static_cast<float>(out[d]);
          const float lse = args.lse[head.lse + i];
          float *const row = p + i * columns, *const grad_row = grad_p + i * columns;
          for (int64_t j = 0; j < columns; j += W) {
            const Float probability = V::exp(V::load(row + j) - lse);
            V::store(row + j, probability);
            V::store(grad_row + j, probability * (V::load(grad_row + j) - delta));
          }
        }
        Product<W>::run(grad_p, columns, 1, k, m, n, width, result);
        write_rows(result, m, s, args.scale, args.grad_q + head.q, s.q_row());
        Product<W>::run(grad_p, 1, columns, q, n, m, width, result);
        write_rows(result, n, s, 1.0f, args.grad_kv + head.k, s.kv_row());
        Product<W>::run(p, 1, columns, grad, n, m, width, result);
        write_rows(result, n, s, 1.0f, args.grad_kv + head.v, s.kv_row());
      }
    }
  };
};

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

// Out and lse of `shape`, which have `sizes` and `lse_sizes`; q and kv are contiguous.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& kv, double scale,
                                   const Shape& shape, std::initializer_list<int64_t> sizes,
                                   std::initializer_list<int64_t> lse_sizes) {
  Tensor out = torch::stable::new_empty(q, sizes);
  Tensor lse = torch::stable::new_empty(q, lse_sizes, ScalarType::Float);
  for_element(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Forward<T> args{data<T>(q),           data<T>(kv), static_cast<float>(scale),
                          mutable_data<T>(out), mutable_data<float>(lse), shape};
    in_parallel(shape.tasks(), shape.queries * shape.keys, [&](int64_t begin, int64_t end) {
      wide<ForwardHeads<T>::template Kernel>(args, begin, end);
    });
  });
  return {out, lse};
}

// Writes grad_q and grad_kv, which may be one packed tensor.
void backward(const Checks& checks, Tensor grad, const Tensor& q, const Tensor& kv, Tensor out,
              Tensor lse, double scale, const Shape& shape, std::initializer_list<int64_t> sizes,
              std::initializer_list<int64_t> lse_sizes, Tensor& grad_q, Tensor& grad_kv) {
  checks.shape("grad", grad, sizes);
  checks.shape("out", out, sizes);
  checks.shape("lse", lse, lse_sizes);
  checks.dtype("grad", grad.scalar_type(), grad.scalar_type() == q.scalar_type());
  checks.dtype("out", out.scalar_type(), out.scalar_type() == q.scalar_type());
  checks.dtype("lse", lse.scalar_type(), lse.scalar_type() == ScalarType::Float);
  grad = packed(grad), out = packed(out), lse = packed(lse);
  for_element(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Backward<T> args{data<T>(grad),
                           data<T>(q),
                           data<T>(kv),
                           data<T>(out),
                           data<float>(lse),
                           static_cast<float>(scale),
                           mutable_data<T>(grad_q),
                           mutable_data<T>(grad_kv),
                           shape};
    in_parallel(shape.tasks(), shape.queries * shape.keys, [&](int64_t begin, int64_t end) {
      wide<BackwardHeads<T>::template Kernel>(args, begin, end);
    });
  });
}

void check_dtype(const Checks& checks, const char* name, const Tensor& x) {
  checks.dtype(name, x.scalar_type(),
               is_floating(x.scalar_type()) && x.scalar_type() != ScalarType::Double);
}

Shape check_packed(const Checks& checks, const Tensor& qkv) {
  checks.dimensions("qkv", qkv, 5);
  check_dtype(checks, "qkv", qkv);
  if (qkv.size(2) != 3)
    refuse(checks.op, ": expected qkv (B, N, 3, H, D), got ", shape_of(qkv));
  const int64_t tokens = qkv.size(1);
  return {qkv.size(0), tokens, tokens, qkv.size(3), qkv.size(4), true, nullptr, 0};
}

std::tuple<Tensor, Tensor> attention_cpu(Tensor qkv, double scale) {
  const Shape s = check_packed({"attention", "cpu"}, qkv);
  qkv = packed(qkv);
  return forward(qkv, qkv, scale, s, {s.sequences, s.queries, s.heads, s.width},
                 {s.sequences, s.heads, s.queries});
}

Tensor attention_backward_cpu(Tensor grad, Tensor qkv, Tensor out, Tensor lse, double scale) {
  const Checks checks{"attention_backward", "cpu"};
  const Shape s = check_packed(checks, qkv);
  qkv = packed(qkv);
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  backward(checks, grad, qkv, qkv, out, lse, scale, s, {s.sequences, s.queries, s.heads, s.width},
           {s.sequences, s.heads, s.queries}, grad_qkv, grad_qkv);
  return grad_qkv;
}

Shape check_apart(const Checks& checks, const Tensor& q, const Tensor& kv) {
  checks.dimensions("q", q, 4);
  check_dtype(checks, "q", q);
  checks.shape("kv", kv, {q.size(0), kv.dim() > 1 ? kv.size(1) : 0, 2, q.size(2), q.size(3)});
  checks.dtype("kv", kv.scalar_type(), kv.scalar_type() == q.scalar_type());
  if (kv.size(1) < 1) refuse(checks.op, ": expected at least one key, got kv ", shape_of(kv));
  return {q.size(0), q.size(1), kv.size(1), q.size(2), q.size(3), false, nullptr, 0};
}

std::tuple<Tensor, Tensor> attention_queries_cpu(Tensor q, Tensor kv, double scale) {
  const Shape s = check_apart({"attention_queries", "cpu"}, q, kv);
  return forward(packed(q), packed(kv), scale, s, {s.sequences, s.queries, s.heads, s.width},
                 {s.sequences, s.heads, s.queries});
}

std::tuple<Tensor, Tensor> attention_queries_backward_cpu(Tensor grad, Tensor q, Tensor kv,
                                                          Tensor out, Tensor lse, double scale) {
  const Checks checks{"attention_queries_backward", "cpu"};
  const Shape s = check_apart(checks, q, kv);
  q = packed(q), kv = packed(kv);
  Tensor grad_q = torch::stable::empty_like(q), grad_kv = torch::stable::empty_like(kv);
  backward(checks, grad, q, kv, out, lse, scale, s, {s.sequences, s.queries, s.heads, s.width},
           {s.sequences, s.heads, s.queries}, grad_q, grad_kv);
  return {grad_q, grad_kv};
}

// `starts` is contiguous; the shape points into it.
Shape check_varlen(const Checks& checks, const Tensor& qkv, const Tensor& starts, int64_t longest) {
  checks.dimensions("qkv", qkv, 4);
  check_dtype(checks, "qkv", qkv);
  if (qkv.size(1) != 3) refuse(checks.op, ": expected qkv (T, 3, H, D), got ", shape_of(qkv));
  checks.dimensions("cu_seqlens", starts, 1);
  checks.dtype("cu_seqlens", starts.scalar_type(), starts.scalar_type() == ScalarType::Int);
  const int64_t rows = qkv.size(0), sequences = starts.size(0) - 1;
  const int32_t* const first = data<int32_t>(starts);
  bool cut = sequences >= 0 && first[0] == 0 && first[sequences] == rows;
  for (int64_t i = 0; cut && i < sequences; ++i) {
    const int64_t length = int64_t{first[i + 1]} - first[i];
    cut = length >= 0 && length <= longest;
  }
  if (!cut)
    refuse(checks.op, ": expected cu_seqlens that rise from 0 to the number of rows, ", rows,
           ", by at most max_seqlen, ", longest, ", each");
  return {sequences, longest, longest, qkv.size(2), qkv.size(3), true, first, rows};
}

std::tuple<Tensor, Tensor> attention_varlen_cpu(Tensor qkv, Tensor starts, int64_t longest,
                                                double scale) {
  qkv = packed(qkv), starts = packed(starts);
  const Shape s = check_varlen({"attention_varlen", "cpu"}, qkv, starts, longest);
  return forward(qkv, qkv, scale, s, {s.rows, s.heads, s.width}, {s.heads, s.rows});
}

Tensor attention_varlen_backward_cpu(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor starts,
                                     int64_t longest, double scale) {
  const Checks checks{"attention_varlen_backward", "cpu"};
  qkv = packed(qkv), starts = packed(starts);
  const Shape s = check_varlen(checks, qkv, starts, longest);
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  backward(checks, grad, qkv, qkv, out, lse, scale, s, {s.rows, s.heads, s.width},
           {s.heads, s.rows}, grad_qkv, grad_qkv);
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
  m.impl("attention_queries", TORCH_BOX(&attention_queries_cpu));
  m.impl("attention_queries_backward", TORCH_BOX(&attention_queries_backward_cpu));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen_cpu));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward_cpu));
}
