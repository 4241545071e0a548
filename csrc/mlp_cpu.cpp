// Bias and exact GELU on the CPU, forward and backward, in one pass over the rows each.
//
// The bias's gradient is summed in fixed ranges of rows: the result does not depend on the number of
// threads.
#include "rows.h"

namespace {

using namespace fastmim;

constexpr float INVERSE_SQRT_2PI = 0.398942280f;

// The normal distribution at z, a vector or a pair: 1/2 + z p(z^2) / q(z^2), fitted for |z| <= 5.5 to
// 7e-9. Rounded it is off by 1e-7, also where it is small: as good as 1/2 + erf / 2.
template <typename V, typename X>
FASTMIM_INLINE X cumulative(X z) {
  constexpr float p[] = {0.398942232f,   0.0338526182f,   0.0046772575f,
                         0.00016882518f, 6.35209699e-06f, 2.27493242e-08f};
  constexpr float q[] = {1.0f,           0.251521856f,  0.0286458507f,
                         0.00188444217f, 7.3647243e-05f, 1.19750121e-06f};
  const X square = z * z;
  const X inside = z * V::polynomial(p, square) / V::polynomial(q, square) + 0.5f;
  return V::where_below(z, -5.5f, 0.0f, V::where_below(z * -1.0f, -5.5f, 1.0f, inside));
}

template <typename X>
struct Normal {
  X cumulative, bell;  // bell: e^(-z^2 / 2)
};

// The same to 1e-7 of its value, for a slope that is the difference of small numbers:
// e^(t^2) erfc(t) is a polynomial in 1 / (1 + 0.4 t), fitted on 0 <= t <= 4.5 with an error below
// 3e-10 of erfc.
template <typename V, typename X>
FASTMIM_INLINE Normal<X> normal(X z) {
  constexpr float p[] = {-0.000746906933f, 0.233472283f, 0.195147543f,  0.250654596f, 0.22791752f,
                         -0.191475656f,    0.573580587f, -0.357841273f, 0.0692913069f};
  const X bell = V::exp(z * z * -0.5f);
  const X t = V::where_below(z, 0.0f, z * -1.0f, z) * 0.707106781f;
  const X tail = bell * V::polynomial(p, 1.0f / (t * 0.4f + 1.0f)) * 0.5f;
  return {V::where_below(z, 0.0f, tail, 1.0f - tail), bell};
}

struct Arguments {
  Source x;
  const float* bias;
  Target out;
  Source grad;  // in the backward pass
};

// f(z) for every value of a row, W at a time; the last ones through a buffer.
template <int W>
struct GeluRows {
  using V = Vector<W>;

  template <typename X>
  static FASTMIM_INLINE X gelu(X z) {
    return z * cumulative<V>(z);
  }

  static FASTMIM_INLINE void run(const Arguments& args, int64_t begin, int64_t end) {
    const int64_t width = args.x.width, whole = width / W * W;
    Scratch scratch(2 * Scratch::round(width));
    float* const x_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* const x = read_row(args.x, i, x_scratch);
      float* const out = begin_row(args.out, i, out_scratch);
      int64_t d = 0;
      for (; d + 2 * W <= width; d += 2 * W)
        V::store(out + d, gelu(V::load_pair(x + d) + V::load_pair(args.bias + d)));
      for (; d < whole; d += W)
        V::store(out + d, gelu(V::load(x + d) + V::load(args.bias + d)));
      for (; d < width; ++d) out[d] = gelu(V::all(x[d] + args.bias[d]))[0];
      finish_row(args.out, i, out);
    }
  }
};

template <int W>
struct GeluBackwardRows {
  using V = Vector<W>;

  template <typename X>
  static FASTMIM_INLINE X slope(X z) {
    const auto [cumulative, bell] = normal<V>(z);
    return cumulative + z * bell * INVERSE_SQRT_2PI;
  }

  static FASTMIM_INLINE void run(const Arguments& args, int64_t begin, int64_t end, float* sums) {
    const int64_t width = args.x.width, whole = width / W * W;
    Scratch scratch(3 * Scratch::round(width));
    float* const x_scratch = scratch.take(width);
    float* const grad_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* const x = read_row(args.x, i, x_scratch);
      const float* const grad = read_row(args.grad, i, grad_scratch);
      float* const out = begin_row(args.out, i, out_scratch);
      int64_t d = 0;
      for (; d + 2 * W <= width; d += 2 * W) {
        const auto z = V::load_pair(x + d) + V::load_pair(args.bias + d);
        const auto g = V::load_pair(grad + d) * slope(z);
        V::store(out + d, g);
        V::store(sums + d, V::load_pair(sums + d) + g);
      }
      for (; d < whole; d += W) {
        const auto g = V::load(grad + d) * slope(V::load(x + d) + V::load(args.bias + d));
        V::store(out + d, g);
        V::store(sums + d, V::load(sums + d) + g);
      }
      for (; d < width; ++d) {
        out[d] = grad[d] * slope(V::all(x[d] + args.bias[d]))[0];
        sums[d] += out[d];
      }
      finish_row(args.out, i, out);
    }
  }
};

void check_input(const Checks& check, const Tensor& x, const Tensor& bias) {
  check_width(check, "x", x);
  check_row_type(check, "x", x);
  check_row_type(check, "bias", bias);
  check.placed("x", -1, x);
  check.shape("bias", bias, {x.size(-1)});
}

Tensor bias_gelu_cpu(Tensor x, Tensor bias) {
  check_input({"bias_gelu", "cpu"}, x, bias);
  x = packed(x), bias = of_dtype(bias, ScalarType::Float);
  Tensor out = new_like(x);
  const Arguments args{source(x), data<float>(bias), target(out), {}};
  in_parallel(rows_of(x), 4 * x.size(-1),
              [&](int64_t begin, int64_t end) { wide<GeluRows>(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(Tensor grad, Tensor x, Tensor bias) {
  const Checks check{"bias_gelu_backward", "cpu"};
  check_input(check, x, bias);
  check_row_type(check, "grad", grad);
  if (!same_shape(grad, x))
    refuse(check.op, ": expected grad ", shape_of(x), ", got ", shape_of(grad));
  check.placed("grad", -1, grad);
  grad = packed(grad), x = packed(x);
  const Tensor wide_bias = of_dtype(bias, ScalarType::Float);
  Tensor grad_x = new_like(x);
  const Arguments args{source(x), data<float>(wide_bias), target(grad_x), source(grad)};
  const std::vector<float> sums =
      sum_over_rows(rows_of(x), x.size(-1), 4 * x.size(-1),
                    [&](int64_t begin, int64_t end, float* partial) {
                      wide<GeluBackwardRows>(args, begin, end, partial);
                    });
  return {grad_x, vector_like(bias, sums.data())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cpu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cpu));
}
