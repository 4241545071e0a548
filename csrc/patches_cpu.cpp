// gather_patches and patch_loss on the CPU: pixels are read from the images where they lie.
//
// Bound by memory. A row of a result is written once, by one thread; the loss is summed over fixed
// groups of rows, so results do not depend on the number of threads.
#include "cpu.h"

#include <cmath>
#include <tuple>

namespace {

using namespace fastmim;

constexpr int64_t SUMMED_ROWS = 16;  // rows that one partial sum of the loss covers
constexpr int LANES = 16;            // of a sum, whatever the instruction set

// One patch in an image; strides in elements, pixels of a row side by side.
struct Patch {
  const void* origin;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t channels;
  int64_t side;
};

// pixels[i] * scale + shift for as many blocks of COUNT pixels as fit. Returns where it stopped.
template <int COUNT, typename S>
FASTMIM_INLINE int64_t normalize_blocks(const S* __restrict__ pixels, int64_t begin, int64_t end,
                                        Wide<S> scale, Wide<S> shift, Wide<S>* __restrict__ out) {
  for (; begin + COUNT <= end; begin += COUNT)
    for (int lane = 0; lane < COUNT; ++lane)
      out[begin + lane] = static_cast<Wide<S>>(pixels[begin + lane]) * scale + shift;
  return begin;
}

// out (C, p, p). Patches are 4 to 32 pixels wide: too few to leave a remainder to scalar code.
template <typename S>
FASTMIM_INLINE void load(const Patch& patch, const Wide<S>* scale, const Wide<S>* shift,
                         Wide<S>* out) {
  const int64_t side = patch.side;
  for (int64_t c = 0; c < patch.channels; ++c) {
    const S* const channel = static_cast<const S*>(patch.origin) + c * patch.channel_stride;
    for (int64_t r = 0; r < side; ++r, out += side) {
      const S* const row = channel + r * patch.row_stride;
      int64_t done = normalize_blocks<16>(row, 0, side, scale[c], shift[c], out);
      done = normalize_blocks<8>(row, done, side, scale[c], shift[c], out);
      done = normalize_blocks<4>(row, done, side, scale[c], shift[c], out);
      normalize_blocks<1>(row, done, side, scale[c], shift[c], out);
    }
  }
}

template <typename From, typename To>
FASTMIM_INLINE void convert(const From* __restrict__ from, int64_t count, To* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = static_cast<To>(static_cast<Wide<To>>(static_cast<Wide<From>>(from[i])));
}

// Where the patches named by (B, K) positions lie, and the affine map of their channels.
template <typename S>
class Patches {
 public:
  Patches(const Tensor& imgs, const Ids& ids, int64_t kept, int64_t side,
          const std::optional<Tensor>& scale, const std::optional<Tensor>& shift)
      : imgs_(imgs.stride(3) == 1 || imgs.size(3) <= 1 ? imgs : packed(imgs)),
        ids_(ids),
        kept_(kept),
        columns_(imgs.size(3) / side),
        image_stride_(imgs_.stride(0)),
        patch_{imgs_.const_data_ptr(), imgs_.stride(1), imgs_.stride(2), imgs_.size(1), side},
        scale_(per_channel(scale, 1)),
        shift_(per_channel(shift, -0.0)) {}  // x + -0.0 is x, for x = -0.0 too

  // Patch `i` of the B * K to out (C, p, p).
  void load_to(int64_t i, Wide<S>* out) const {
    const int64_t id = ids_.at(i);
    const int64_t offset = (i / kept_) * image_stride_ +
                           (id / columns_) * patch_.side * patch_.row_stride +
                           (id % columns_) * patch_.side;
    Patch patch = patch_;
    patch.origin = static_cast<const S*>(patch_.origin) + offset;
    load_(patch, scale_.data(), shift_.data(), out);
  }

  int64_t channels() const { return patch_.channels; }
  int64_t area() const { return patch_.side * patch_.side; }
  int64_t size() const { return channels() * area(); }

 private:
  std::vector<Wide<S>> per_channel(const std::optional<Tensor>& given, double otherwise) const {
    const auto channels = static_cast<size_t>(imgs_.size(1));
    if (!given) return std::vector<Wide<S>>(channels, static_cast<Wide<S>>(otherwise));
    const Tensor values = of_dtype(*given, ScalarType::Double);
    std::vector<Wide<S>> rounded(channels);
    std::transform(data<double>(values), data<double>(values) + channels, rounded.begin(),
                   [](double value) { return static_cast<Wide<S>>(value); });
    return rounded;
  }

  Tensor imgs_;
  const Ids& ids_;
  int64_t kept_;
  int64_t columns_;
  int64_t image_stride_;
  Patch patch_;
  std::vector<Wide<S>> scale_;
  std::vector<Wide<S>> shift_;
  void (*load_)(const Patch&, const Wide<S>*, const Wide<S>*, Wide<S>*) = simd<load<S>>();
};

template <typename F>
auto for_pixels(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Byte ? f(Type<uint8_t>()) : for_floating(dtype, f);
}

int64_t count_patches(const Tensor& imgs, int64_t side) {
  return (imgs.size(2) / side) * (imgs.size(3) / side);
}

template <typename S, typename Out>
void gather(const Patches<S>& patches, int64_t rows, Out* out) {
  using T = Wide<S>;
  const int64_t size = patches.size();
  const auto store = simd<convert<T, Out>>();
  in_parallel(rows, size, [&](int64_t begin, int64_t end) {
    std::vector<T> pixels(static_cast<size_t>(std::is_same_v<T, Out> ? 0 : size));
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (std::is_same_v<T, Out>) {
        patches.load_to(i, out + i * size);
      } else {
        patches.load_to(i, pixels.data());
        store(pixels.data(), size, out + i * size);
      }
    }
  });
}

Tensor gather_patches_cpu(Tensor imgs, Tensor ids, int64_t patch_size, std::optional<Tensor> scale,
                          std::optional<Tensor> shift, ScalarType dtype) {
  check_gather_patches(imgs, ids, patch_size, scale, shift, dtype, "cpu");
  const Ids positions("gather_patches", "ids", ids, count_patches(imgs, patch_size));
  const int64_t images = imgs.size(0), kept = ids.size(1);
  const Tensor out =
      new_tensor(imgs, {images, kept, imgs.size(1) * patch_size * patch_size}, dtype);
  for_pixels(imgs.scalar_type(), [&](auto pixel_type) {
    for_floating(dtype, [&](auto out_type) {
      using S = typename decltype(pixel_type)::type;
      using Out = typename decltype(out_type)::type;
      const Patches<S> patches(imgs, positions, kept, patch_size, scale, shift);
      gather<S, Out>(patches, images * kept, mutable_data<Out>(out));
    });
  });
  return out;
}

FASTMIM_INLINE double total(const double (&lanes)[LANES]) {
  double sums[LANES];
  std::copy(lanes, lanes + LANES, sums);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

template <typename T>
FASTMIM_INLINE double sum(const T* x, int64_t count) {
  double lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(x[i + lane]);
  for (; i < count; ++i) lanes[i % LANES] += static_cast<double>(x[i]);
  return total(lanes);
}

template <typename T>
FASTMIM_INLINE double sum_of_squares(const T* x, int64_t count, double mean) {
  double lanes[LANES] = {};
  const auto add = [&](int lane, T value) __attribute__((always_inline)) {
    const double centred = static_cast<double>(value) - mean;
    lanes[lane] += centred * centred;
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) add(lane, x[i + lane]);
  for (; i < count; ++i) add(static_cast<int>(i % LANES), x[i]);
  return total(lanes);
}

// CHANNELS: their number, or 0 for any; a constant lets the transposition vectorise.
template <int CHANNELS, typename T>
FASTMIM_INLINE void transpose(const T* __restrict__ pixels, int64_t any_channels, int64_t area,
                              double mean, double factor, double* __restrict__ target) {
  const int64_t channels = CHANNELS > 0 ? CHANNELS : any_channels;
  for (int64_t i = 0; i < area; ++i)
    for (int64_t c = 0; c < channels; ++c)
      target[i * channels + c] = (static_cast<double>(pixels[c * area + i]) - mean) * factor;
}

// pixels (C, p, p) to target (p, p, C), normalised if asked for. In double: the mean and the
// variance are one error for a whole patch, which does not average out in the loss.
template <typename T>
FASTMIM_INLINE void make_target(const T* pixels, int64_t channels, int64_t area, bool norm_pix,
                                double* target) {
  const int64_t size = channels * area;
  double mean = 0, factor = 1;
  if (norm_pix) {
    mean = sum(pixels, size) / static_cast<double>(size);
    const double variance = sum_of_squares(pixels, size, mean) / static_cast<double>(size - 1);
    factor = 1 / std::sqrt(variance + 1e-6);
  }
  if (channels == 3)
    transpose<3>(pixels, channels, area, mean, factor, target);
  else
    transpose<0>(pixels, channels, area, mean, factor, target);
}

// Sums of squares over some rows.
struct Terms {
  double pixel[LANES] = {};
  double consistency[LANES] = {};
};

// Adds one row to `terms` and writes the direction of its gradient: without the factor 2 / (number
// of values).
template <bool TEACHER, typename W>
FASTMIM_INLINE void add_row(const W* __restrict__ pred, const W* __restrict__ teacher,
                            const double* __restrict__ target, int64_t size, double gamma,
                            W* __restrict__ direction, Terms& terms) {
  double pixel[LANES], consistency[LANES];
  std::copy(terms.pixel, terms.pixel + LANES, pixel);
  std::copy(terms.consistency, terms.consistency + LANES, consistency);
  const auto add = [&](int lane, int64_t i) __attribute__((always_inline)) {
    const double value = static_cast<double>(pred[i]);
    double error = value - target[i];
    pixel[lane] += error * error;
    if constexpr (TEACHER) {
      const double distance = value - static_cast<double>(teacher[i]);
      consistency[lane] += distance * distance;
      error += gamma * distance;
    }
    direction[i] = static_cast<W>(error);
  };
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) add(lane, i + lane);
  for (; i < size; ++i) add(static_cast<int>(i % LANES), i);
  std::copy(pixel, pixel + LANES, terms.pixel);
  std::copy(consistency, consistency + LANES, terms.consistency);
}

template <bool TEACHER, typename S, typename P>
Terms add_rows(const Patches<S>& patches, bool norm_pix, const P* pred, const P* teacher,
               int64_t rows, double gamma, P* direction) {
  using W = Wide<P>;
  constexpr bool STAGED = !std::is_same_v<P, W>;
  const int64_t size = patches.size();
  const int64_t groups = (rows + SUMMED_ROWS - 1) / SUMMED_ROWS;
  std::vector<Terms> partial(static_cast<size_t>(groups));
  const auto target_of = simd<make_target<Wide<S>>>();
  const auto add = simd<add_row<TEACHER, W>>();
  const auto widen = simd<convert<P, W>>();
  const auto narrow = simd<convert<W, P>>();
  in_parallel(groups, SUMMED_ROWS * size, [&](int64_t begin, int64_t end) {
    const auto count = static_cast<size_t>(size);
    std::vector<Wide<S>> pixels(count);
    std::vector<double> target(count);
    std::vector<W> wide_pred(STAGED ? count : 0), wide_direction(STAGED ? count : 0);
    std::vector<W> wide_teacher(STAGED && TEACHER ? count : 0);
    for (int64_t i = begin * SUMMED_ROWS; i < std::min(rows, end * SUMMED_ROWS); ++i) {
      patches.load_to(i, pixels.data());
      target_of(pixels.data(), patches.channels(), patches.area(), norm_pix, target.data());
      Terms& terms = partial[static_cast<size_t>(i / SUMMED_ROWS)];
      const P* const row = pred + i * size;
      const P* const teacher_row = TEACHER ? teacher + i * size : nullptr;
      if constexpr (STAGED) {
        widen(row, size, wide_pred.data());
        if constexpr (TEACHER) widen(teacher_row, size, wide_teacher.data());
        add(wide_pred.data(), wide_teacher.data(), target.data(), size, gamma,
            wide_direction.data(), terms);
        narrow(wide_direction.data(), size, direction + i * size);
      } else {
        add(row, teacher_row, target.data(), size, gamma, direction + i * size, terms);
      }
    }
  });
  Terms sum;
  for (const Terms& terms : partial)
    for (int lane = 0; lane < LANES; ++lane) {
      sum.pixel[lane] += terms.pixel[lane];
      sum.consistency[lane] += terms.consistency[lane];
    }
  return sum;
}

Tensor scalar(const Tensor& like, double value, ScalarType dtype) {
  const Tensor out = new_tensor(like, {}, dtype);
  if (dtype == ScalarType::Double)
    *mutable_data<double>(out) = value;
  else
    *mutable_data<float>(out) = static_cast<float>(value);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_loss_cpu(
    Tensor pred, Tensor imgs, Tensor ids, int64_t patch_size, bool norm_pix,
    std::optional<Tensor> teacher_pred, double gamma, std::optional<Tensor> scale,
    std::optional<Tensor> shift) {
  check_patch_loss(pred, imgs, ids, patch_size, teacher_pred, scale, shift, "cpu");
  const Ids positions("patch_loss", "ids", ids, count_patches(imgs, patch_size));
  const int64_t kept = ids.size(1), rows = imgs.size(0) * kept;
  const auto count = static_cast<double>(std::max<int64_t>(pred.numel(), 1));
  const Tensor direction = new_tensor(pred, {pred.size(0), pred.size(1), pred.size(2)});
  const Tensor students = packed(pred);
  const Tensor teachers = teacher_pred ? packed(*teacher_pred) : students;
  const Terms sum = for_pixels(imgs.scalar_type(), [&](auto pixel_type) {
    using S = typename decltype(pixel_type)::type;
    const Patches<S> patches(imgs, positions, kept, patch_size, scale, shift);
    return for_floating(pred.scalar_type(), [&](auto pred_type) {
      using P = typename decltype(pred_type)::type;
      const auto run = teacher_pred ? add_rows<true, S, P> : add_rows<false, S, P>;
      return run(patches, norm_pix, data<P>(students), data<P>(teachers), rows, gamma,
                 mutable_data<P>(direction));
    });
  });
  const bool precise =
      pred.scalar_type() == ScalarType::Double || imgs.scalar_type() == ScalarType::Double;
  const ScalarType dtype = precise ? ScalarType::Double : ScalarType::Float;
  const double pixel = total(sum.pixel) / count, consistency = total(sum.consistency) / count;
  return {scalar(pred, pixel + gamma * consistency, dtype), scalar(pred, pixel, dtype),
          scalar(pred, consistency, dtype), direction};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches_cpu));
  m.impl("patch_loss", TORCH_BOX(&patch_loss_cpu));
}
