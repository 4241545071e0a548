// Bias and exact GELU on the CPU, forward and backward, in one pass over the rows each.
//
// The bias's gradient is summed in fixed ranges of rows: the result does not depend on the number of
// threads.
#include "rows.h"

namespace {

using namespace fastmim;

constexpr float INVERSE_SQRT_2PI = 0.398942280f;

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

  static FASTMIM_INLINE typename V::Float gelu(typename V::Float z) {
    return z * V::normal(z).cumulative;
  }

  static FASTMIM_INLINE void run(const Arguments& args, int64_t begin, int64_t end) {
    const int64_t width = args.x.width, whole = width / W * W;
    Scratch scratch(2 * Scratch::round(width));
    float* const x_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* const x = read_row(args.x, i, x_scratch);
      float* const out = begin_row(args.out, i, out_scratch);
      for (int64_t d = 0; d < whole; d += W)
        V::store(out + d, gelu(V::load(x + d) + V::load(args.bias + d)));
      for (int64_t d = whole; d < width; ++d) out[d] = gelu(V::all(x[d] + args.bias[d]))[0];
      finish_row(args.out, i, out);
    }
  }
};

template <int W>
struct GeluBackwardRows {
  using V = Vector<W>;

  static FASTMIM_INLINE typename V::Float slope(typename V::Float z) {
    const auto normal = V::normal(z);
    return normal.cumulative + z * normal.bell * INVERSE_SQRT_2PI;
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
      for (int64_t d = 0; d < whole; d += W) {
        const auto g = V::load(grad + d) * slope(V::load(x + d) + V::load(args.bias + d));
        V::store(out + d, g);
        V::store(sums + d, V::load(sums + d) + g);
      }
      for (int64_t d = whole; d < width; ++d) {
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
  Tensor out = torch::stable::empty_like(x);
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
  Tensor grad_x = torch::stable::empty_like(x);
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
