// ema_update_ and adamw_ema_ on the CPU: one pass over memory, one parallel region for all tensors.
//
// Bound by memory: 12 bytes an element (EMA), 28 (AdamW), 36 (both); in split storage the same with
// two bytes less for bf16 gradients. The result does not depend on the number of threads, on the
// instruction set or on the storage: every element is one chain of IEEE operations (see adamw.h).
#include "adamw.h"
#include "optim_arguments.h"
#include "simd.h"

namespace {

using namespace fastmim;

// Elements a thread takes at a time, a multiple of the vector width, so that chunks stay aligned.
constexpr int64_t CHUNK = 1 << 14;
// Elements converted to float32 at a time: three buffers of them stay in the first-level cache.
constexpr int64_t BLOCK = 1 << 10;

struct AdamWChunk {
  Weights param;
  Weights teacher;  // all null: no EMA
  Gradients grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t size;
  float decay;
};

struct EmaChunk {
  Weights teacher;
  Weights student;
  int64_t size;
};

bool exists(const Weights& weights) { return weights.fp32 != nullptr || weights.bf16 != nullptr; }

// The master weights of a block: where they lie if that is float32, otherwise in `buffer`.
FASTMIM_INLINE float* load(const Weights& weights, int64_t size, float* buffer) {
  if (weights.fp32 != nullptr) return weights.fp32;
  const uint16_t* __restrict__ high = weights.bf16;
  const uint16_t* __restrict__ remainder = weights.remainder;
  for (int64_t i = 0; i < size; ++i) buffer[i] = join(high[i], remainder[i]);
  return buffer;
}

FASTMIM_INLINE const float* load(const Gradients& grad, int64_t size, float* buffer) {
  if (grad.format == Format::FLOAT32) return grad.fp32();
  const uint16_t* half = grad.half();
  if (grad.format == Format::BFLOAT16)
    for (int64_t i = 0; i < size; ++i) buffer[i] = widen_bfloat16(half[i]);
  else
    for (int64_t i = 0; i < size; ++i) buffer[i] = widen_float16(half[i]);
  return buffer;
}

// Writes what is not the float32 master itself.
FASTMIM_INLINE void store(const Weights& weights, int64_t size, const float* master) {
  uint16_t* __restrict__ bf16 = weights.bf16;
  uint16_t* __restrict__ remainder = weights.remainder;
  if (remainder != nullptr)
    for (int64_t i = 0; i < size; ++i) {
      const Halves halves = split(master[i]);
      bf16[i] = halves.high;
      remainder[i] = halves.remainder;
    }
  else if (bf16 != nullptr)
    for (int64_t i = 0; i < size; ++i) bf16[i] = round_to_bfloat16(master[i]);
}

template <bool EMA>
FASTMIM_INLINE void adamw_loop(float* __restrict__ param, const float* __restrict__ grad,
                               float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                               float* __restrict__ teacher, int64_t size, float decay,
                               const AdamWScalars& scalars) {
  const AdamWScalars c = scalars;
  for (int64_t i = 0; i < size; ++i) {
    adamw(param[i], grad[i], exp_avg[i], exp_avg_sq[i], decay, c);
    if constexpr (EMA) ema(teacher[i], param[i], c.one_minus_momentum);
  }
}

FASTMIM_INLINE void ema_loop(float* __restrict__ teacher, const float* __restrict__ student,
                             int64_t size, float one_minus_momentum) {
  for (int64_t i = 0; i < size; ++i) ema(teacher[i], student[i], one_minus_momentum);
}

FASTMIM_INLINE void adamw_chunk(const AdamWChunk& chunk, const AdamWScalars& c) {
  alignas(64) float params[BLOCK], grads[BLOCK], teachers[BLOCK];
  const bool plain = chunk.param.remainder == nullptr && chunk.param.bf16 == nullptr &&
                     chunk.teacher.bf16 == nullptr && chunk.grad.format == Format::FLOAT32;
  const int64_t block = plain ? chunk.size : BLOCK;
  for (int64_t begin = 0; begin < chunk.size; begin += block) {
    const int64_t size = std::min(block, chunk.size - begin);
    const Weights param = chunk.param.from(begin), teacher = chunk.teacher.from(begin);
    float* const p = load(param, size, params);
    const float* const g = load(chunk.grad.from(begin), size, grads);
    float* const m = chunk.exp_avg + begin;
    float* const v = chunk.exp_avg_sq + begin;
    if (exists(teacher)) {
      float* const t = load(teacher, size, teachers);
      adamw_loop<true>(p, g, m, v, t, size, chunk.decay, c);
      store(teacher, size, t);
    } else {
      adamw_loop<false>(p, g, m, v, nullptr, size, chunk.decay, c);
    }
    store(param, size, p);
  }
}

FASTMIM_INLINE void ema_chunk(const EmaChunk& chunk, float one_minus_momentum) {
  alignas(64) float teachers[BLOCK], students[BLOCK];
  const bool plain = chunk.teacher.bf16 == nullptr && chunk.student.bf16 == nullptr;
  const int64_t block = plain ? chunk.size : BLOCK;
  for (int64_t begin = 0; begin < chunk.size; begin += block) {
    const int64_t size = std::min(block, chunk.size - begin);
    const Weights teacher = chunk.teacher.from(begin);
    float* const t = load(teacher, size, teachers);
    ema_loop(t, load(chunk.student.from(begin), size, students), size, one_minus_momentum);
    store(teacher, size, t);
  }
}

struct Variant {
  void (*adamw)(const AdamWChunk&, const AdamWScalars&);
  void (*ema)(const EmaChunk&, float);
};

#define FASTMIM_VARIANT(name, attributes)                                                       \
  attributes void name##_adamw(const AdamWChunk& chunk, const AdamWScalars& c) {                \
    adamw_chunk(chunk, c);                                                                      \
  }                                                                                             \
  attributes void name##_ema(const EmaChunk& chunk, float weight) { ema_chunk(chunk, weight); } \
  constexpr Variant name{name##_adamw, name##_ema};

FASTMIM_VARIANT(baseline, )
#if defined(__x86_64__)
FASTMIM_VARIANT(avx2, __attribute__((target("avx2"))))
FASTMIM_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,prefer-vector-width=512"))))
constexpr Variant VARIANTS[] = {baseline, avx2, avx512};
#else
constexpr Variant VARIANTS[] = {baseline};
#endif

const Variant& variant() {
  static const Variant& chosen = VARIANTS[simd_variant()];
  return chosen;
}

// Calls add(offset, size) for the chunks of a tensor.
template <typename Add>
void for_each_chunk(int64_t numel, const Add& add) {
  for (int64_t offset = 0; offset < numel; offset += CHUNK)
    add(offset, std::min(CHUNK, numel - offset));
}

template <typename Chunk, typename Kernel>
void run(const std::vector<Chunk>& chunks, const Kernel& kernel) {
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t k = begin; k < end; ++k)
                                  kernel(chunks[static_cast<size_t>(k)]);
                              });
}

float* data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

template <typename T>
T value(const Tensor& x) {
  return *static_cast<const T*>(x.const_data_ptr());
}

void ema_update_cpu(const EmaArguments& given) {
  if (value<bool>(given.skip)) return;
  std::vector<EmaChunk> chunks;
  for (size_t i = 0; i < given.teachers.tensors.size(); ++i) {
    const Weights teacher = given.teachers.at(i), student = given.students.at(i);
    for_each_chunk(given.teachers.tensors[i].numel(), [&](int64_t offset, int64_t size) {
      chunks.push_back({teacher.from(offset), student.from(offset), size});
    });
  }
  const auto one_minus_momentum = static_cast<float>(1.0 - value<double>(given.momentum));
  run(chunks, [&](const EmaChunk& chunk) { variant().ema(chunk, one_minus_momentum); });
}

void adamw_ema_cpu(const AdamWArguments& given) {
  if (!given.params.exist() || value<bool>(given.skip)) return;
  const auto lr = value<double>(given.lr);
  const auto* const weight_decay = static_cast<const double*>(given.weight_decay.const_data_ptr());
  std::vector<AdamWChunk> chunks;
  for (size_t i = 0; i < given.params.tensors.size(); ++i) {
    const AdamWChunk all{given.params.at(i),
                         given.teachers.at(i),
                         gradients(given.grads[i]),
                         data(given.exp_avgs[i]),
                         data(given.exp_avg_sqs[i]),
                         given.params.tensors[i].numel(),
                         weight_decay_factor(lr, weight_decay[i])};
    for_each_chunk(all.size, [&](int64_t offset, int64_t size) {
      chunks.push_back({all.param.from(offset), all.teacher.from(offset), all.grad.from(offset),
                        all.exp_avg + offset, all.exp_avg_sq + offset, size, all.decay});
    });
  }
  const int64_t now = ++*static_cast<int64_t*>(given.step.mutable_data_ptr());
  const AdamWScalars scalars = adamw_scalars(lr, value<double>(given.momentum),
                                             value<double>(given.grad_scale),
                                             value<double>(given.clip), given.beta1, given.beta2,
                                             given.eps, now);
  run(chunks, [&](const AdamWChunk& chunk) { variant().adamw(chunk, scalars); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update<&ema_update_cpu>));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema<&adamw_ema_cpu>));
}
