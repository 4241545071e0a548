// Attention on the CPU over projections as they are written, packed, for sequences short enough that
// a head stays in cache.
//
// One task is one head of one sequence: its q, k and v are read as they lie, all products are made
// in cache, and the result or the gradient, packed like the projection, is written once. The scores of a
// head are made transposed, a row for each key: what the softmax does to a query is then done to a
// vector of queries at once. They are never written to memory; the backward pass makes them again
// from lse.
#include "vector.h"

#include <cmath>

namespace {

using namespace fastmim;

// Keys that are summed before their sum is added to the others': the error grows with GROUP + keys /
// GROUP, not with the keys.
constexpr int64_t GROUP = 8;

// c (rows x columns) = a (rows x depth, any strides) b (depth x columns), all floats. Rows of b and c
// hold whole vectors.
struct Matrices {
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_row, rows, depth, columns;
  float* c;
  int64_t c_row;
};

template <int W>
struct Product {
  using V = Vector<W>;
  using Float = typename V::Float;

  // ROWS from `row` on, VECTORS from `column` on
  template <int ROWS, int VECTORS>
  FASTMIM_INLINE static void tile(const Matrices& m, int64_t row, int64_t column) {
    const float *a = m.a + row * m.a_row, *b = m.b + column;
    Float sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < m.depth; ++k, a += m.a_depth, b += m.b_row) {
      Float right[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) right[j] = V::load(b + j * W);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
        const Float left = V::all(a[i * m.a_row]);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sums[i][j] += left * right[j];
      }
    }
    float* const c = m.c + row * m.c_row + column;
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) V::store(c + i * m.c_row + j * W, sums[i][j]);
  }

  // Sums, a row of b and a value of a fill the registers: 32 with AVX-512, else 16.
  template <int VECTORS>
  static constexpr int MOST = W < 16 ? 12 / VECTORS : VECTORS < 3 ? 12 : VECTORS == 3 ? 8 : 6;

  // `count` tiles of `size` rows from `row` on, of at most ROWS; those of a few rows one by one.
  template <int VECTORS, int ROWS>
  FASTMIM_INLINE static void tiles(const Matrices& m, int64_t row, int64_t count, int64_t size,
                                   int64_t column) {
    if (size == ROWS) {
      for (; count > 0; --count, row += ROWS) tile<ROWS, VECTORS>(m, row, column);
    } else if constexpr (ROWS > std::min(MOST<VECTORS> / 2, 4)) {
      tiles<VECTORS, ROWS - 1>(m, row, count, size, column);
    } else {
      for (const int64_t end = row + count * size; row < end; ++row)
        tile<1, VECTORS>(m, row, column);
    }
  }

  // In as few tiles as can be, of nearly the same size: those of one or two rows would spend their
  // time waiting for their sums.
  template <int VECTORS>
  FASTMIM_INLINE static void panel(const Matrices& m, int64_t column) {
    const int64_t count = (m.rows + MOST<VECTORS> - 1) / MOST<VECTORS>;
    if (count == 0) return;
    const int64_t size = m.rows / count, longer = m.rows % count;
    // A loop, so that the tiles are compiled once.
    for (const bool one_more : {true, false})
      tiles<VECTORS, MOST<VECTORS>>(m, one_more ? 0 : longer * (size + 1),
                                    one_more ? longer : count - longer, size + one_more, column);
  }

  FASTMIM_INLINE static void run(const Matrices& m) {
    constexpr int VECTORS = W < 16 ? 2 : 4;
    int64_t column = 0;
    for (; column + VECTORS * W <= m.columns; column += VECTORS * W) panel<VECTORS>(m, column);
    const int64_t left = (m.columns - column) / W;
    if constexpr (VECTORS == 4) {
      if (left == 3) panel<3>(m, column);
      if (left == 2) panel<2>(m, column);
    }
    if (left == 1) panel<1>(m, column);
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

// Queries (M) and keys (N) of all sequences, and how they lie.
struct Shape {
  int64_t sequences, queries, keys, heads, width;  // queries and keys of a sequence, at most
  bool packed;                                     // q, k and v in one row of memory
  const int32_t* starts;  // first rows of the sequences and the end of the last; or all alike
  int64_t rows;           // of all sequences, if they have starts

  int64_t tasks() const { return sequences * heads; }
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
  const T *grad, *q, *kv;
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
      const Shape& s = args.shape;
      const int64_t most = V::padded(s.queries), width = V::padded(s.width);
      Scratch scratch(Scratch::round(s.width * most) + Scratch::round(s.keys * most) +
                      2 * Scratch::round(s.keys * width) + Scratch::round(most * width) +
                      2 * Scratch::round(most));
      float* const q = scratch.take(s.width * most);
      float* const scores = scratch.take(s.keys * most);
      float* const k_scratch = scratch.take(s.keys * width);
      float* const v_scratch = scratch.take(s.keys * width);
      float* const out_scratch = scratch.take(most * width);
      float* const highest = scratch.take(most);
      float* const whole = scratch.take(most);
      for (int64_t task = begin; task < end; ++task) {
        const Head head(s, task);
        const int64_t m = head.queries, n = head.keys, queries = V::padded(m);
        read_columns<W>(args.q + head.q, s.q_row(), m, s.width, args.scale, q);
        const ConstRows k = read_rows<W>(args.kv + head.k, s.kv_row(), n, s.width, k_scratch);
        call<Product, W>(
            Matrices{k.first, k.stride, 1, q, queries, n, s.width, queries, scores, queries});
        float* const lse = args.lse + head.lse;
        int64_t i = 0;
        for (; i + 2 * W <= queries; i += 2 * W)
          softmax<V, Pair<typename V::Float>>(scores + i, n, queries, highest + i, whole + i);
        if (i < queries)
          softmax<V, typename V::Float>(scores + i, n, queries, highest + i, whole + i);
        for (i = 0; i < m; ++i) lse[i] = highest[i] + std::log(whole[i]);
        const ConstRows v = read_rows<W>(args.kv + head.v, s.kv_row(), n, s.width, v_scratch);
        T* const to = args.out + head.out;
        const Rows out = begin_rows<W>(to, s.row(1), s.width, out_scratch);
        call<Product, W>(
            Matrices{scores, 1, queries, v.first, v.stride, m, n, width, out.first, out.stride});
        finish_rows(out, m, s.width, to, s.row(1));
      }
    }
  };

  // Scores of a vector or a pair of queries, one column each, to probabilities. Writes the highest
  // scores and the sums of the exponentials.
  template <typename V, typename X>
  static FASTMIM_INLINE void softmax(float* scores, int64_t keys, int64_t stride, float* top,
                                     float* whole) {
    X highest = V::template load_as<X>(scores);
    for (int64_t j = 1; j < keys; ++j)
      highest = V::max(V::template load_as<X>(scores + j * stride), highest);
    X sum{};
    for (int64_t first = 0; first < keys; first += GROUP) {
      X part{};
      for (int64_t j = first; j < std::min(keys, first + GROUP); ++j) {
        const X p = V::exp(V::template load_as<X>(scores + j * stride) - highest);
        part = part + p;
        V::store(scores + j * stride, p);
      }
      sum = sum + part;
    }
    V::store(top, highest);
    V::store(whole, sum);
    const X inverse = 1.0f / sum;
    for (int64_t j = 0; j < keys; ++j)
      V::store(scores + j * stride, V::template load_as<X>(scores + j * stride) * inverse);
  }
};

template <typename T>
struct BackwardHeads {
  template <int W>
  struct Kernel {
    static FASTMIM_INLINE void run(const Backward<T>& args, int64_t begin, int64_t end) {
      using V = Vector<W>;
      const Shape& s = args.shape;
      const int64_t most = V::padded(s.queries), width = V::padded(s.width);
      const int64_t rows = std::max(s.queries, s.keys);
      Scratch scratch(2 * Scratch::round(s.width * most) + 2 * Scratch::round(s.keys * most) +
                      5 * Scratch::round(rows * width) + Scratch::round(most));
      float* const q_columns = scratch.take(s.width * most);
      float* const grad_columns = scratch.take(s.width * most);
      float* const p = scratch.take(s.keys * most);
      float* const grad_p = scratch.take(s.keys * most);
      float* const q_scratch = scratch.take(rows * width);
      float* const k_scratch = scratch.take(rows * width);
      float* const v_scratch = scratch.take(rows * width);
      float* const grad_scratch = scratch.take(rows * width);
      float* const result = scratch.take(rows * width);
      float* const lse = scratch.take(most);
      for (int64_t task = begin; task < end; ++task) {
        const Head head(s, task);
        const int64_t m = head.queries, n = head.keys, queries = V::padded(m);
        const T *const q_from = args.q + head.q, *const grad_from = args.grad + head.out;
        const ConstRows q = read_rows<W>(q_from, s.q_row(), m, s.width, q_scratch);
        const ConstRows k = read_rows<W>(args.kv + head.k, s.kv_row(), n, s.width, k_scratch);
        const ConstRows v = read_rows<W>(args.kv + head.v, s.kv_row(), n, s.width, v_scratch);
        const ConstRows grad = read_rows<W>(grad_from, s.row(1), m, s.width, grad_scratch);
        read_columns<W>(q_from, s.q_row(), m, s.width, args.scale, q_columns);
        read_columns<W>(grad_from, s.row(1), m, s.width, 1.0f, grad_columns);
        call<Product, W>(
            Matrices{k.first, k.stride, 1, q_columns, queries, n, s.width, queries, p, queries});
        call<Product, W>(Matrices{v.first, v.stride, 1, grad_columns, queries, n, s.width, queries,
                                  grad_p, queries});
        std::copy(args.lse + head.lse, args.lse + head.lse + m, lse);
        std::fill(lse + m, lse + queries, 0.0f);
        int64_t i = 0;
        for (; i + 2 * W <= queries; i += 2 * W)
          softmax<V, Pair<typename V::Float>>(p + i, grad_p + i, n, queries, lse + i, args.scale);
        if (i < queries)
          softmax<V, typename V::Float>(p + i, grad_p + i, n, queries, lse + i, args.scale);
        const int64_t q_row = s.q_row(), kv_row = s.kv_row();
        write<W>(s, m, n, grad_p, 1, queries, k, result, args.grad_q + head.q, q_row);
        write<W>(s, n, m, grad_p, queries, 1, q, result, args.grad_kv + head.k, kv_row);
        write<W>(s, n, m, p, queries, 1, grad, result, args.grad_kv + head.v, kv_row);
      }
    }
  };

  // a (rows x depth) b to a part of the packed gradient.
  template <int W>
  static FASTMIM_INLINE void write(const Shape& s, int64_t count, int64_t depth, const float* a,
                                   int64_t a_row, int64_t a_depth, const ConstRows& b,
                                   float* scratch, T* to, int64_t stride) {
    const Rows rows = begin_rows<W>(to, stride, s.width, scratch);
    call<Product, W>(Matrices{a, a_row, a_depth, b.first, b.stride, count, depth,
                              Vector<W>::padded(s.width), rows.first, rows.stride});
    finish_rows(rows, count, s.width, to, stride);
  }

  // Scores and the probabilities' gradients of a vector or a pair of queries, one column each, to
  // probabilities and `scale` times the scores' gradients.
  template <typename V, typename X>
  static FASTMIM_INLINE void softmax(float* scores, float* grads, int64_t keys, int64_t stride,
                                     const float* lse, float scale) {
    const X shift = V::template load_as<X>(lse);
    X delta{};
    for (int64_t first = 0; first < keys; first += GROUP) {
      X part{};
      for (int64_t j = first; j < std::min(keys, first + GROUP); ++j) {
        const X p = V::exp(V::template load_as<X>(scores + j * stride) - shift);
        part = part + p * V::template load_as<X>(grads + j * stride);
        V::store(scores + j * stride, p);
      }
      delta = delta + part;
    }
    for (int64_t j = 0; j < keys; ++j) {
      const X p = V::template load_as<X>(scores + j * stride) * scale;
      V::store(grads + j * stride, p * (V::template load_as<X>(grads + j * stride) - delta));
    }
  }
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
  Tensor out = new_tensor(q, sizes);
  Tensor lse = new_tensor(q, lse_sizes, ScalarType::Float);
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
void backward(const Checks& checks, Tensor grad, const Tensor& q, const Tensor& kv,
              const Tensor& out, Tensor lse, double scale, const Shape& shape,
              std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> lse_sizes,
              Tensor& grad_q, Tensor& grad_kv) {
  checks.shape("grad", grad, sizes);
  checks.shape("out", out, sizes);
  checks.shape("lse", lse, lse_sizes);
  checks.dtype("grad", grad.scalar_type(), grad.scalar_type() == q.scalar_type());
  checks.dtype("out", out.scalar_type(), out.scalar_type() == q.scalar_type());
  checks.dtype("lse", lse.scalar_type(), lse.scalar_type() == ScalarType::Float);
  grad = packed(grad), lse = packed(lse);
  for_element(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Backward<T> args{data<T>(grad),
                           data<T>(q),
                           data<T>(kv),
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
  Tensor grad_qkv = new_like(qkv);
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
  Tensor grad_q = new_like(q), grad_kv = new_like(kv);
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
  Tensor grad_qkv = new_like(qkv);
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
