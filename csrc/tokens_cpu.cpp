// Token gathers and the decoder's input on the CPU: rows are copied, or added to once.
//
// Bound by memory. Every row of a result is written once, by one thread; sums are taken over fixed
// groups of rows, so results do not depend on the number of threads.
#include "cpu.h"

#include <cstring>
#include <tuple>

namespace {

using namespace fastmim;

constexpr int64_t SUMMED_ROWS = 64;  // rows that one partial sum covers

// (B, N, D) with the values of a token side by side.
class Tokens {
 public:
  explicit Tokens(const Tensor& x)
      : x_(x.stride(2) == 1 || x.size(2) <= 1 ? x : packed(x)),
        data_(static_cast<const char*>(x_.const_data_ptr())),
        image_stride_(x_.stride(0) * itemsize()),
        token_stride_(x_.stride(1) * itemsize()) {}

  const char* at(int64_t b, int64_t n) const {
    return data_ + b * image_stride_ + n * token_stride_;
  }

  int64_t width() const { return x_.size(2); }
  int64_t itemsize() const { return static_cast<int64_t>(x_.element_size()); }
  int64_t bytes() const { return width() * itemsize(); }

 private:
  Tensor x_;  // keeps a copy alive
  const char* data_;
  int64_t image_stride_;
  int64_t token_stride_;
};

void copy(char* to, const char* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

Tensor gather_tokens_cpu(Tensor x, Tensor ids) {
  check_gather_tokens(x, ids, "cpu");
  const Ids positions("gather_tokens", "ids", ids, x.size(1));
  const Tokens tokens(x);
  const int64_t kept = ids.size(1), bytes = tokens.bytes();
  const Tensor out = new_tensor(x, {x.size(0), kept, x.size(2)});
  char* const rows = mutable_data<char>(out);
  in_parallel(x.size(0) * kept, tokens.width(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      copy(rows + i * bytes, tokens.at(i / kept, positions.at(i)), bytes);
  });
  return out;
}

Tensor scatter_tokens_cpu(Tensor x, Tensor ids, int64_t num_tokens) {
  check_scatter_tokens(x, ids, num_tokens, "cpu");
  const Ids positions("scatter_tokens", "ids", ids, num_tokens);
  const Tokens tokens(x);
  const int64_t images = x.size(0), kept = ids.size(1), bytes = tokens.bytes();
  const Tensor out = new_tensor(x, {images, num_tokens, x.size(2)});
  char* const rows = mutable_data<char>(out);
  std::fill_n(rows, images * num_tokens * bytes, '\0');
  in_parallel(images, kept * tokens.width(), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t k = 0; k < kept; ++k)
        copy(rows + (b * num_tokens + positions.at(b, k)) * bytes, tokens.at(b, k), bytes);
  });
  return out;
}

template <typename X, typename P>
using Promoted = std::conditional_t<std::is_same_v<X, P>, X, Wide<X>>;

template <typename X, typename P>
FASTMIM_INLINE void add(const X* __restrict__ x, const P* __restrict__ pos, int64_t width,
                        Promoted<X, P>* __restrict__ out) {
  for (int64_t d = 0; d < width; ++d)
    out[d] = static_cast<Promoted<X, P>>(static_cast<Wide<X>>(x[d]) + static_cast<Wide<X>>(pos[d]));
}

// With x (B, K + 1, D): the cls token, then the token of rank r at x[b, 1 + r]; ranks from K on
// are masked.
template <typename X, typename P>
Tensor restore(const Tensor& x, const Tensor& mask_token, const Ids& ranks, const Tensor& pos_embed,
               int64_t num_tokens) {
  using Out = Promoted<X, P>;
  const Tokens tokens(x);
  const int64_t width = tokens.width(), present = x.size(1);
  const Tensor out = new_tensor(
      x, {x.size(0), num_tokens, width}, torch::headeronly::CppTypeToScalarType<Out>::value);
  const Tensor mask = of_dtype(mask_token, x.scalar_type());
  const Tensor positions = packed(pos_embed);
  const X* const masked = data<X>(mask);
  const P* const pos = data<P>(positions);
  Out* const rows = mutable_data<Out>(out);
  const auto add_row = simd<add<X, P>>();
  in_parallel(x.size(0) * num_tokens, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / num_tokens, n = i % num_tokens;
      const int64_t source = n == 0 ? 0 : 1 + ranks.at(b, n - 1);
      const X* const token =
          source < present ? reinterpret_cast<const X*>(tokens.at(b, source)) : masked;
      add_row(token, pos + n * width, width, rows + i * width);
    }
  });
  return out;
}

// ids_shuffle is what the gradient needs; the operator takes it for that.
Tensor restore_tokens_cpu(Tensor x, Tensor mask_token, Tensor /*ids_shuffle*/, Tensor ids_restore,
                          Tensor pos_embed) {
  check_restore_tokens(x, mask_token, ids_restore, pos_embed, "cpu");
  const int64_t n = ids_restore.size(1);
  const Ids ranks("restore_tokens", "ids_restore", ids_restore, n);
  return for_floating(x.scalar_type(), [&](auto x_type) {
    return for_floating(pos_embed.scalar_type(), [&](auto pos_type) {
      using X = typename decltype(x_type)::type;
      using P = typename decltype(pos_type)::type;
      if constexpr (std::is_same_v<Wide<X>, Wide<P>>)
        return restore<X, P>(x, mask_token, ranks, pos_embed, n + 1);
      else
        return Tensor();  // refused by the checks
    });
  });
}

// Adds four rows to `sums`: in pairs first, which halves the additions in double.
template <typename T>
FASTMIM_INLINE void add_four(const T* __restrict__ a, const T* __restrict__ b,
                             const T* __restrict__ c, const T* __restrict__ d, int64_t width,
                             double* __restrict__ sums) {
  using W = Wide<T>;
  for (int64_t i = 0; i < width; ++i)
    sums[i] += (static_cast<W>(a[i]) + static_cast<W>(b[i])) +
               (static_cast<W>(c[i]) + static_cast<W>(d[i]));
}

template <typename T>
FASTMIM_INLINE void add_one(const T* __restrict__ row, int64_t width, double* __restrict__ sums) {
  for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<Wide<T>>(row[i]);
}

// Sum of grad over the masked tokens: partial sums of SUMMED_ROWS rows each, added in their order.
template <typename T>
void sum_masked(const Tokens& grad, const Ids& ids_shuffle, int64_t images, int64_t num_visible,
                int64_t num_masked, T* out) {
  const int64_t width = grad.width(), rows = images * num_masked;
  const int64_t groups = (rows + SUMMED_ROWS - 1) / SUMMED_ROWS;
  std::vector<double> partial(static_cast<size_t>(groups * width));
  const auto row = [&](int64_t i) {
    const int64_t b = i / num_masked;
    return reinterpret_cast<const T*>(
        grad.at(b, 1 + ids_shuffle.at(b, num_visible + i % num_masked)));
  };
  const auto four = simd<add_four<T>>();
  const auto one = simd<add_one<T>>();
  in_parallel(groups, SUMMED_ROWS * width, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      double* const sums = partial.data() + group * width;
      const int64_t last = std::min(rows, (group + 1) * SUMMED_ROWS);
      int64_t i = group * SUMMED_ROWS;
      for (; i + 4 <= last; i += 4) four(row(i), row(i + 1), row(i + 2), row(i + 3), width, sums);
      for (; i < last; ++i) one(row(i), width, sums);
    }
  });
  std::vector<double> total(static_cast<size_t>(width));
  const auto add_partial = simd<add_one<double>>();
  for (int64_t group = 0; group < groups; ++group)
    add_partial(partial.data() + group * width, width, total.data());
  std::transform(total.begin(), total.end(), out,
                 [](double sum) { return static_cast<T>(static_cast<Wide<T>>(sum)); });
}

std::tuple<Tensor, Tensor> restore_tokens_backward_cpu(Tensor grad, Tensor ids_shuffle,
                                                       int64_t num_visible) {
  check_restore_tokens_backward(grad, ids_shuffle, num_visible, "cpu");
  const int64_t images = grad.size(0), n = ids_shuffle.size(1), width = grad.size(2);
  const Ids positions("restore_tokens_backward", "ids_shuffle", ids_shuffle, n);
  const Tokens tokens(grad);
  const int64_t present = num_visible + 1, bytes = tokens.bytes();
  const Tensor grad_x = new_tensor(grad, {images, present, width});
  const Tensor grad_mask = new_tensor(grad, {1, 1, width});
  char* const rows = mutable_data<char>(grad_x);
  in_parallel(images * present, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / present, k = i % present;
      copy(rows + i * bytes, tokens.at(b, k == 0 ? 0 : 1 + positions.at(b, k - 1)), bytes);
    }
  });
  for_floating(grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    sum_masked<T>(tokens, positions, images, num_visible, n - num_visible,
                  mutable_data<T>(grad_mask));
  });
  return {grad_x, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens_cpu));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens_cpu));
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens_cpu));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward_cpu));
}
