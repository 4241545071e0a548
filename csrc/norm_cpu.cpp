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

// The sum over a row of its differences from `mean`, or of their squares; in four sums side by side,
// so that none waits for the one before.
template <int W, bool SQUARED>
FASTMIM_INLINE float sum_row(const float* row, int64_t width, float mean) {
  using V = Vector<W>;
  typename V::Float sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * W <= width; d += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto x = V::load(row + d + j * W) - mean;
      sums[j] += SQUARED ? x * x : x;
    }
  for (; d + W <= width; d += W) {
    const auto x = V::load(row + d) - mean;
    sums[0] += SQUARED ? x * x : x;
  }
  float rest = 0.0f;
  for (; d < width; ++d) rest += SQUARED ? (row[d] - mean) * (row[d] - mean) : row[d] - mean;
  return V::sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <int W>
struct NormRows {
  static FASTMIM_INLINE void run(const Forward& args, int64_t begin, int64_t end) {
    using V = Vector<W>;
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
        for (int64_t d = 0; d < whole; d += W)
          V::store(total + d, V::load(row + d) + V::load(branch + d));
        for (int64_t d = whole; d < width; ++d) total[d] = row[d] + branch[d];
        finish_row(args.total, i, total);
        // the statistics are those of the stored values
        row = read_row({args.total.data, args.total.dtype, width}, i, x_scratch);
      }
      const float count = static_cast<float>(width);
      const float mean = sum_row<W, false>(row, width, 0.0f) / count;
      const float variance = sum_row<W, true>(row, width, mean) / count;
      const float rstd = 1.0f / std::sqrt(variance + static_cast<float>(args.eps));
      float* const out = begin_row(args.out, i, out_scratch);
      for (int64_t d = 0; d < whole; d += W)
        V::store(out + d, (V::load(row + d) - mean) * rstd * V::load(args.weight + d) +
                              V::load(args.bias + d));
      for (int64_t d = whole; d < width; ++d)
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
  using V = Vector<W>;
  using Float = typename V::Float;

  static FASTMIM_INLINE void run(const Backward& args, int64_t begin, int64_t end, float* sums) {
    constexpr int ROWS = W == 16 ? 4 : 2;  // as many as the registers hold
    const int64_t width = args.total.width;
    Scratch scratch((3 * ROWS + 1) * Scratch::round(width));
    Buffers<ROWS> buffers;
    for (int r = 0; r < ROWS; ++r) {
      buffers.grad[r] = scratch.take(width);
      buffers.total[r] = scratch.take(width);
      buffers.out[r] = scratch.take(width);
    }
    buffers.grad_total = scratch.take(width);
    for (; begin + ROWS <= end; begin += ROWS) rows<ROWS>(args, begin, buffers, sums);
    for (; begin < end; ++begin) rows<1>(args, begin, buffers, sums);
  }

  // Scratch memory for rows that are not float.
  template <int ROWS>
  struct Buffers {
    float *grad[ROWS], *total[ROWS], *out[ROWS], *grad_total;
  };

  // ROWS rows from `first` on: once for their sums and those over rows, once more for the result.
  template <int ROWS, typename Scratches>
  static FASTMIM_INLINE void rows(const Backward& args, int64_t first, const Scratches& buffers,
                                  float* weight_sums) {
    const int64_t width = args.total.width, whole = width / W * W;
    float* const bias_sums = weight_sums + width;
    const float *grad[ROWS], *row[ROWS];
    float* out[ROWS];
    float mean[ROWS], rstd[ROWS], rest[ROWS] = {}, rest_along[ROWS] = {};
    for (int r = 0; r < ROWS; ++r) {
      grad[r] = read_row(args.grad, first + r, buffers.grad[r]);
      row[r] = read_row(args.total, first + r, buffers.total[r]);
      out[r] = begin_row(args.grad_x, first + r, buffers.out[r]);
      mean[r] = args.mean[first + r], rstd[r] = args.rstd[first + r];
    }
    Float sum[ROWS] = {}, along[ROWS] = {};
    for (int64_t d = 0; d < whole; d += W) {
      const Float weight = V::load(args.weight + d);
      Float for_weight = V::load(weight_sums + d), for_bias = V::load(bias_sums + d);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Float unit = (V::load(row[r] + d) - mean[r]) * rstd[r], g = V::load(grad[r] + d);
        const Float scaled = g * weight;
        sum[r] += scaled;
        along[r] += scaled * unit;
        V::store(out[r] + d, scaled);
        for_weight += g * unit;
        for_bias += g;
      }
      V::store(weight_sums + d, for_weight);
      V::store(bias_sums + d, for_bias);
    }
    for (int64_t d = whole; d < width; ++d)
      for (int r = 0; r < ROWS; ++r) {
        const float unit = (row[r][d] - mean[r]) * rstd[r], g = grad[r][d];
        out[r][d] = g * args.weight[d];
        rest[r] += out[r][d];
        rest_along[r] += out[r][d] * unit;
        weight_sums[d] += g * unit;
        bias_sums[d] += g;
      }
    for (int r = 0; r < ROWS; ++r) {
      const float mean_sum = (V::sum(sum[r]) + rest[r]) / static_cast<float>(width);
      const float mean_along = (V::sum(along[r]) + rest_along[r]) / static_cast<float>(width);
      for (int64_t d = 0; d < whole; d += W) {
        const Float unit = (V::load(row[r] + d) - mean[r]) * rstd[r];
        V::store(out[r] + d, (V::load(out[r] + d) - mean_sum - unit * mean_along) * rstd[r]);
      }
      for (int64_t d = whole; d < width; ++d) {
        const float unit = (row[r][d] - mean[r]) * rstd[r];
        out[r][d] = (out[r][d] - mean_sum - unit * mean_along) * rstd[r];
      }
      if (args.grad_total != nullptr) {
        const float* const direct = read_row(*args.grad_total, first + r, buffers.grad_total);
        for (int64_t d = 0; d < whole; d += W)
          V::store(out[r] + d, V::load(out[r] + d) + V::load(direct + d));
        for (int64_t d = whole; d < width; ++d) out[r][d] += direct[d];
      }
      finish_row(args.grad_x, first + r, out[r]);
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
  Tensor out = new_tensor(x, x.sizes(), dtype);
  Tensor total = branch ? new_like(x) : new_tensor(x, {0});
  Tensor mean = new_tensor(x, leading(x), ScalarType::Float);
  Tensor rstd = new_like(mean);
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
  Tensor grad_x = new_like(total);
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
