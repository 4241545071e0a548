// Residual add and LayerNorm on the CPU, forward and backward, in one pass over the rows each.
//
// A row stays in cache between the add, the statistics and the result: 4 (r) + 4 (w) + 4 (w) bytes a
// value in float32, and the branch's 4 if there is one. The sums over rows for the parameters are
// made in fixed ranges: the result does not depend on the number of threads.
#include "rows.h"

#include <cmath>
#include <optional>

namespace {

using namespace fastmim;

struct Forward {
  Source x;
  const Source* branch;
  const float *weight, *bias;
  double eps;
  Target out;
  Target total;  // with a branch only
  float *mean, *rstd;
};

struct Backward {
  Source grad;
  const Source* grad_total;
  Source total;
  const float *mean, *rstd, *weight;
  Target grad_x;
};

template <int W>
struct NormRows {
  static FASTMIM_INLINE void run(const Forward& args, int64_t begin, int64_t end) {
    using V = Vector<W>;
    using Float = typename V::Float;
    const int64_t width = args.x.width, whole = width / W * W;
    Scratch scratch(3 * Scratch::round(width));
    float* const x_scratch = scratch.take(width);
    float* const branch_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* row = read_row(args.x, i, x_scratch);
      if (args.branch != nullptr) {
        const float* const branch = read_row(*args.branch, i, branch_scratch);
        float* const total = begin_row(args.total, i, x_scratch);
        for (int64_t d = 0; d < width; ++d) total[d] = row[d] + branch[d];
        finish_row(args.total, i, total);
        // the statistics are those of the stored values
        row = read_row({args.total.data, args.total.dtype, width}, i, x_scratch);
      }
      Float sums{};
      float rest = 0.0f;
      for (int64_t d = 0; d < whole; d += W) sums += V::load(row + d);
      for (int64_t d = whole; d < width; ++d) rest += row[d];
      const float mean = (V::sum(sums) + rest) / static_cast<float>(width);
      sums = Float{}, rest = 0.0f;
      for (int64_t d = 0; d < whole; d += W) {
        const Float centred = V::load(row + d) - mean;
        sums += centred * centred;
      }
      for (int64_t d = whole; d < width; ++d) rest += (row[d] - mean) * (row[d] - mean);
      const float variance = (V::sum(sums) + rest) / static_cast<float>(width);
      const float rstd = 1.0f / std::sqrt(variance + static_cast<float>(args.eps));
      float* const out = begin_row(args.out, i, out_scratch);
      for (int64_t d = 0; d < width; ++d)
        out[d] = (row[d] - mean) * rstd * args.weight[d] + args.bias[d];
      finish_row(args.out, i, out);
      args.mean[i] = mean;
      args.rstd[i] = rstd;
    }
  }
};

// sums: (2, width), of the weight's and the bias's gradient.
template <int W>
struct NormBackwardRows {
  static FASTMIM_INLINE void run(const Backward& args, int64_t begin, int64_t end, float* sums) {
    using V = Vector<W>;
    using Float = typename V::Float;
    const int64_t width = args.total.width, whole = width / W * W;
    Scratch scratch(4 * Scratch::round(width));
    float* const grad_scratch = scratch.take(width);
    float* const total_scratch = scratch.take(width);
    float* const grad_total_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    float *const weight_sums = sums, *const bias_sums = sums + width;
    for (int64_t i = begin; i < end; ++i) {
      const float* const grad = read_row(args.grad, i, grad_scratch);
      const float* const row = read_row(args.total, i, total_scratch);
      const float mean = args.mean[i], rstd = args.rstd[i];
      float* const out = begin_row(args.grad_x, i, out_scratch);
      Float sum{}, along{};
      float sum_rest = 0.0f, along_rest = 0.0f;
      for (int64_t d = 0; d < whole; d += W) {
        const Float unit = (V::load(row + d) - mean) * rstd;
        const Float g = V::load(grad + d);
        const Float scaled = g * V::load(args.weight + d);
        sum += scaled;
        along += scaled * unit;
        V::store(out + d, scaled);
        V::store(weight_sums + d, V::load(weight_sums + d) + g * unit);
        V::store(bias_sums + d, V::load(bias_sums + d) + g);
      }
      for (int64_t d = whole; d < width; ++d) {
        const float unit = (row[d] - mean) * rstd;
        out[d] = grad[d] * args.weight[d];
        sum_rest += out[d];
        along_rest += out[d] * unit;
        weight_sums[d] += grad[d] * unit;
        bias_sums[d] += grad[d];
      }
      const float mean_sum = (V::sum(sum) + sum_rest) / static_cast<float>(width);
      const float mean_along = (V::sum(along) + along_rest) / static_cast<float>(width);
      for (int64_t d = 0; d < width; ++d) {
        const float unit = (row[d] - mean) * rstd;
        out[d] = (out[d] - mean_sum - unit * mean_along) * rstd;
      }
      if (args.grad_total != nullptr) {
        const float* const direct = read_row(*args.grad_total, i, grad_total_scratch);
        for (int64_t d = 0; d < width; ++d) out[d] += direct[d];
      }
      finish_row(args.grad_x, i, out);
    }
  }
};

void check_rows(const Checks& check, const char* name, const Tensor& x, const Tensor& like) {
  check_row_type(check, name, x);
  if (!same_shape(x, like))
    refuse(check.op, ": expected ", name, " to have shape ", shape_of(like), ", got ", shape_of(x));
  check.placed(name, -1, x);
}

std::vector<int64_t> leading(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_cpu(Tensor x, std::optional<Tensor> branch,
                                                    Tensor weight, Tensor bias, double eps,
                                                    ScalarType dtype) {
  const Checks check{"norm", "cpu"};
  check_width(check, "x", x);
  check_rows(check, "x", x, x);
  if (branch) check_rows(check, "branch", *branch, x);
  check.dtype("the result", dtype, is_row_type(dtype));
  check_row_type(check, "weight", weight);
  check_row_type(check, "bias", bias);
  check.shape("weight", weight, {x.size(-1)});
  check.shape("bias", bias, {x.size(-1)});
  x = packed(x);
  weight = of_dtype(weight, ScalarType::Float), bias = of_dtype(bias, ScalarType::Float);
  Source branch_rows{};
  if (branch) branch_rows = source(*(branch = packed(*branch)));
  Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor total = branch ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, leading(x), ScalarType::Float);
  Tensor rstd = torch::stable::empty_like(mean);
  const Forward args{source(x),
                     branch ? &branch_rows : nullptr,
                     data<float>(weight),
                     data<float>(bias),
                     eps,
                     target(out),
                     {total.mutable_data_ptr(), total.scalar_type(), x.size(-1)},
                     mutable_data<float>(mean),
                     mutable_data<float>(rstd)};
  in_parallel(rows_of(x), 2 * x.size(-1),
              [&](int64_t begin, int64_t end) { wide<NormRows>(args, begin, end); });
  return {out, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_cpu(Tensor grad, std::optional<Tensor> grad_total,
                                                     Tensor total, Tensor mean, Tensor rstd,
                                                     Tensor weight) {
  const Checks check{"norm_backward", "cpu"};
  check_width(check, "total", total);
  const int64_t width = total.size(-1);
  check_rows(check, "total", total, total);
  check_rows(check, "grad", grad, total);
  if (grad_total) check_rows(check, "grad_total", *grad_total, total);
  check_row_type(check, "weight", weight);
  check.shape("weight", weight, {width});
  for (const auto& [name, x] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    check.dtype(name, x->scalar_type(), x->scalar_type() == ScalarType::Float);
    check.placed(name, -1, *x);
    if (x->numel() != rows_of(total))
      refuse("norm_backward: expected ", name, " of one value a row, got ", shape_of(*x));
  }
  grad = packed(grad), total = packed(total);
  mean = packed(mean), rstd = packed(rstd);
  const Tensor scale = of_dtype(weight, ScalarType::Float);
  Source direct{};
  if (grad_total) direct = source(*(grad_total = packed(*grad_total)));
  Tensor grad_x = torch::stable::empty_like(total);
  const Backward args{source(grad),       grad_total ? &direct : nullptr, source(total),
                      data<float>(mean),  data<float>(rstd),              data<float>(scale),
                      target(grad_x)};
  const std::vector<float> sums =
      sum_over_rows(rows_of(total), 2 * width, 4 * width,
                    [&](int64_t begin, int64_t end, float* partial) {
                      wide<NormBackwardRows>(args, begin, end, partial);
                    });
  return {grad_x, vector_like(weight, sums.data()), vector_like(weight, sums.data() + width)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm_cpu));
  m.impl("norm_backward", TORCH_BOX(&norm_backward_cpu));
}
