// feature_loss on the CPU: a row of the teacher's features is normalised where it is read, and the
// direction of the gradient is written in the same pass.
//
// The loss is summed over fixed groups of rows, or images: it does not depend on the number of
// threads.
#include "rows.h"

#include <cmath>
#include <string>
#include <tuple>

namespace {

using namespace fastmim;

constexpr int64_t SUMMED_ROWS = 16;  // rows that one partial sum of the loss covers
constexpr float SMALLEST_NORM = 1e-8f;

struct Arguments {
  Source pred;    // (B M, D)
  Source target;  // (B N, D)
  const Ids* ids;  // null: row by row
  int64_t tokens, target_tokens;
  bool normalize;
  const float* weight;
  const float* bias;
  Target direction;
  float beta;

  int64_t target_row(int64_t row) const {
    return ids == nullptr ? row : row / tokens * target_tokens + ids->at(row);
  }
};

// A row of the target and what normalises it.
struct Features {
  const float* values;
  float mean, factor;
};

template <int W>
struct Rowwise {
  using V = Vector<W>;
  using Float = typename V::Float;

  static FASTMIM_INLINE float mean_of(const float* x, int64_t width) {
    Float first{}, second{};
    int64_t d = 0;
    for (; d + 2 * W <= width; d += 2 * W) first += V::load(x + d), second += V::load(x + d + W);
    float sum = V::sum(first + second);
    for (; d < width; ++d) sum += x[d];
    return sum / static_cast<float>(width);
  }

  // Unbiased: of a single value NaN.
  static FASTMIM_INLINE float variance_of(const float* x, int64_t width, float mean) {
    Float first{}, second{};
    int64_t d = 0;
    for (; d + 2 * W <= width; d += 2 * W) {
      const Float a = V::load(x + d) - mean, b = V::load(x + d + W) - mean;
      first += a * a, second += b * b;
    }
    float sum = V::sum(first + second);
    for (; d < width; ++d) sum += (x[d] - mean) * (x[d] - mean);
    return sum / static_cast<float>(width - 1);
  }

  static FASTMIM_INLINE Features read(const Arguments& args, int64_t row, float* scratch) {
    const float* const values = read_row(args.target, args.target_row(row), scratch);
    if (!args.normalize) return {values, 0.0f, 1.0f};
    const float mean = mean_of(values, args.target.width);
    const float variance = variance_of(values, args.target.width, mean);
    return {values, mean, 1.0f / std::sqrt(variance + 1e-6f)};
  }

  // f(d, x, z) for W values at a time of a row and its target; the last ones through copies, of
  // which f is told the number.
  template <typename F>
  static FASTMIM_INLINE void for_each(const Arguments& args, const float* x, const Features& row,
                                      const F& f) {
    const int64_t width = args.pred.width;
    const auto normalized = [&](Float t, Float weight, Float bias)
        __attribute__((always_inline)) { return (t - row.mean) * row.factor * weight + bias; };
    int64_t d = 0;
    for (; d + W <= width; d += W)
      f(d, W, V::load(x + d),
        normalized(V::load(row.values + d), V::load(args.weight + d), V::load(args.bias + d)));
    if (d == width) return;
    float rest[4][W] = {};
    const float* const from[4] = {x, row.values, args.weight, args.bias};
    for (int i = 0; i < 4; ++i) std::copy(from[i] + d, from[i] + width, rest[i]);
    f(d, static_cast<int>(width - d), V::load(rest[0]),
      normalized(V::load(rest[1]), V::load(rest[2]), V::load(rest[3])));
  }

  // The first `count` lanes to memory.
  static FASTMIM_INLINE void store(float* to, int count, Float values) {
    if (count == W) return V::store(to, values);
    float all[W];
    V::store(all, values);
    std::copy(all, all + count, to);
  }

  // The first `count` lanes, 0 in the others.
  static FASTMIM_INLINE Float only(int count, Float values) {
    if (count == W) return values;
    float all[W] = {};
    store(all, count, values);
    return V::load(all);
  }
};

template <int W>
struct SmoothL1 : Rowwise<W> {
  using typename Rowwise<W>::V;
  using typename Rowwise<W>::Float;

  static FASTMIM_INLINE void run(const Arguments& args, int64_t begin, int64_t end, double& total) {
    const int64_t width = args.pred.width;
    Scratch scratch(3 * Scratch::round(width));
    float* const pred_scratch = scratch.take(width);
    float* const target_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    for (int64_t i = begin; i < end; ++i) {
      const Features row = Rowwise<W>::read(args, i, target_scratch);
      float* const out = begin_row(args.direction, i, out_scratch);
      Float sum{};
      Rowwise<W>::for_each(
          args, read_row(args.pred, i, pred_scratch), row,
          [&](int64_t d, int count, Float x, Float z) __attribute__((always_inline)) {
            const Float off = x - z, far = V::where_below(off, 0.0f, -off, off);
            const Float loss = V::where_below(far, args.beta, off * off * (0.5f / args.beta),
                                              far - 0.5f * args.beta);
            sum += Rowwise<W>::only(count, loss);
            const Float slope = off / args.beta;
            const Float below = V::where_below(slope, -1.0f, -1.0f, slope);
            Rowwise<W>::store(out + d, count, V::where_below(-slope, -1.0f, 1.0f, below));
          });
      finish_row(args.direction, i, out);
      total += V::sum(sum);
    }
  }
};

// Similarity, and the factors of x and z in the direction of its gradient. As PyTorch's: each norm
// is at least 1e-8.
template <typename T>
struct Cosine {
  T similarity, of_x, of_z;
};

FASTMIM_INLINE Cosine<float> cosine(float xx, float zz, float xz) {
  const auto at_least = [](float norm)
      __attribute__((always_inline)) { return norm < SMALLEST_NORM ? SMALLEST_NORM : norm; };
  const float x_norm = std::sqrt(xx), inverse = 1.0f / at_least(x_norm);
  const float toward = inverse / at_least(std::sqrt(zz)), similarity = xz * toward;
  return {similarity, x_norm > SMALLEST_NORM ? similarity * inverse * inverse : 0.0f, toward};
}

template <int W>
struct CosineRows : Rowwise<W> {
  using typename Rowwise<W>::V;
  using typename Rowwise<W>::Float;

  static FASTMIM_INLINE void run(const Arguments& args, int64_t begin, int64_t end, double& total) {
    const int64_t width = args.pred.width;
    Scratch scratch(3 * Scratch::round(width));
    float* const pred_scratch = scratch.take(width);
    float* const target_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    for (int64_t i = begin; i < end; ++i) {
      const float* const pred = read_row(args.pred, i, pred_scratch);
      const Features row = Rowwise<W>::read(args, i, target_scratch);
      Float xx{}, zz{}, xz{};
      Rowwise<W>::for_each(
          args, pred, row,
          [&](int64_t, int count, Float x, Float z) __attribute__((always_inline)) {
            z = Rowwise<W>::only(count, z);  // of x they are 0
            xx += x * x, zz += z * z, xz += x * z;
          });
      const auto found = cosine(V::sum(xx), V::sum(zz), V::sum(xz));
      total += found.similarity;
      float* const out = begin_row(args.direction, i, out_scratch);
      Rowwise<W>::for_each(args, pred, row,
                           [&](int64_t d, int count, Float x, Float z)
                               __attribute__((always_inline)) {
                                 Rowwise<W>::store(out + d, count,
                                                   x * found.of_x - z * found.of_z);
                               });
      finish_row(args.direction, i, out);
    }
  }
};

// Over the tokens of an image, for each feature.
template <int W>
struct CosineImages : Rowwise<W> {
  using typename Rowwise<W>::V;
  using typename Rowwise<W>::Float;

  static FASTMIM_INLINE void run(const Arguments& args, int64_t image, double& total) {
    const int64_t width = args.pred.width, tokens = args.tokens;
    Scratch scratch(6 * Scratch::round(width) + 2 * Scratch::round(tokens));
    float* const pred_scratch = scratch.take(width);
    float* const target_scratch = scratch.take(width);
    float* const out_scratch = scratch.take(width);
    float* const xx = scratch.take(width);
    float* const zz = scratch.take(width);
    float* const xz = scratch.take(width);
    float* const means = scratch.take(tokens);
    float* const factors = scratch.take(tokens);
    for (float* const sums : {xx, zz, xz}) std::fill_n(sums, width, 0.0f);
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t i = image * tokens + token;
      const Features row = Rowwise<W>::read(args, i, target_scratch);
      means[token] = row.mean, factors[token] = row.factor;
      Rowwise<W>::for_each(
          args, read_row(args.pred, i, pred_scratch), row,
          [&](int64_t d, int count, Float x, Float z) __attribute__((always_inline)) {
            add(xx + d, count, x * x), add(zz + d, count, z * z), add(xz + d, count, x * z);
          });
    }
    for (int64_t d = 0; d < width; ++d) {
      const auto found = cosine(xx[d], zz[d], xz[d]);
      total += found.similarity;
      xx[d] = found.of_x, zz[d] = found.of_z;
    }
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t i = image * tokens + token;
      const float* const values = read_row(args.target, args.target_row(i), target_scratch);
      float* const out = begin_row(args.direction, i, out_scratch);
      Rowwise<W>::for_each(
          args, read_row(args.pred, i, pred_scratch), {values, means[token], factors[token]},
          [&](int64_t d, int count, Float x, Float z) __attribute__((always_inline)) {
            Rowwise<W>::store(out + d, count, x * load(xx + d, count) - z * load(zz + d, count));
          });
      finish_row(args.direction, i, out);
    }
  }

 private:
  static FASTMIM_INLINE Float load(const float* from, int count) {
    if (count == W) return V::load(from);
    float all[W] = {};
    std::copy(from, from + count, all);
    return V::load(all);
  }

  static FASTMIM_INLINE void add(float* sums, int count, Float values) {
    Rowwise<W>::store(sums, count, load(sums, count) + values);
  }
};

// The sum over `parts` of what f(part, total) adds, each on one thread.
template <typename F>
double sum_of(int64_t parts, int64_t cost, const F& f) {
  std::vector<double> partial(static_cast<size_t>(parts));
  in_parallel(parts, cost, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part, partial[static_cast<size_t>(part)]);
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  return sum;
}

template <template <int> class Kernel>
double over_rows(const Arguments& args, int64_t rows) {
  return sum_of((rows + SUMMED_ROWS - 1) / SUMMED_ROWS, 4 * SUMMED_ROWS * args.pred.width,
                [&](int64_t group, double& total) {
                  const int64_t begin = group * SUMMED_ROWS;
                  const int64_t end = std::min(rows, begin + SUMMED_ROWS);
                  wide<Kernel>(args, begin, end, total);
                });
}

double over_images(const Arguments& args, int64_t images) {
  return sum_of(images, 6 * args.tokens * args.pred.width,
                [&](int64_t image, double& total) { wide<CosineImages>(args, image, total); });
}

void check_feature_loss(const Checks& check, const Tensor& pred, const Tensor& target,
                        const std::optional<Tensor>& ids, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias) {
  check.dimensions("pred", pred, 3);
  check.dimensions("target", target, 3);
  check_width(check, "pred", pred);
  check_row_type(check, "pred", pred);
  check_row_type(check, "target", target);
  const int64_t width = pred.size(2);
  check.shape("target", target, {pred.size(0), ids ? target.size(1) : pred.size(1), width});
  if (ids) {
    check.ids("ids", *ids, pred.size(0));
    check.shape("ids", *ids, {pred.size(0), pred.size(1)});
  }
  if (weight) check.shape("weight", *weight, {width});
  if (bias) check.shape("bias", *bias, {width});
}

// As floats, or the same value for every feature.
std::vector<float> per_feature(const std::optional<Tensor>& given, int64_t width, float otherwise) {
  std::vector<float> values(static_cast<size_t>(width), otherwise);
  if (given) std::copy_n(data<float>(of_dtype(*given, ScalarType::Float)), width, values.begin());
  return values;
}

std::tuple<Tensor, Tensor> feature_loss_cpu(Tensor pred, Tensor target_features,
                                            std::optional<Tensor> ids, bool normalize,
                                            std::optional<Tensor> weight,
                                            std::optional<Tensor> bias, std::string kind,
                                            double beta) {
  const Checks check{"feature_loss", "cpu"};
  check_feature_loss(check, pred, target_features, ids, weight, bias);
  pred = packed(pred), target_features = packed(target_features);
  const int64_t images = pred.size(0), tokens = pred.size(1), width = pred.size(2);
  std::optional<Ids> positions;
  if (ids) positions.emplace("feature_loss", "ids", *ids, target_features.size(1));
  const std::vector<float> factors = per_feature(weight, width, 1.0f);
  const std::vector<float> summands = per_feature(bias, width, 0.0f);
  Tensor direction = new_like(pred);
  const Arguments args{source(pred),    source(target_features),
                       positions ? &*positions : nullptr,
                       tokens,          target_features.size(1),
                       normalize,       factors.data(),
                       summands.data(), target(direction),
                       static_cast<float>(beta)};
  const int64_t rows = images * tokens;
  double value = 0;
  if (kind == "smooth_l1") {
    value = over_rows<SmoothL1>(args, rows) / static_cast<double>(std::max<int64_t>(rows * width, 1));
  } else if (kind == "cosine" && rows > 0) {
    value = 1 - over_rows<CosineRows>(args, rows) / static_cast<double>(rows);
  } else if (kind == "cosine_token" && rows > 0) {
    value = 1 - over_images(args, images) / static_cast<double>(images * width);
  } else if (kind != "cosine" && kind != "cosine_token") {
    refuse("feature_loss: expected kind smooth_l1, cosine or cosine_token, got '", kind, "'");
  }
  const Tensor loss = new_tensor(pred, {}, ScalarType::Float);
  *mutable_data<float>(loss) = static_cast<float>(value);
  return {loss, direction};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("feature_loss", TORCH_BOX(&feature_loss_cpu));
}
