// ema_update_ and adamw_ema_ on the CPU: one pass over memory, one parallel region for all tensors.
//
// Bound by memory: 12 bytes an element (EMA), 28 (AdamW), 36 (both); in split storage the same with
// two bytes less for bf16 gradients. The result does not depend on the number of threads, on the
// instruction set or on the storage: every element is one chain of IEEE operations (see adamw.h).
#include "adamw.h"
#include "cpu.h"
#include "optim_arguments.h"

namespace {

using namespace fastmim;

// Elements a thread takes at a time, a multiple of the vector width, so that chunks stay aligned.
constexpr int64_t CHUNK = 1 << 14;

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

enum class Storage { NONE, PLAIN, SPLIT };

FASTMIM_INLINE Storage storage(const Weights& weights) {
  if (weights.remainder != nullptr) return Storage::SPLIT;
  return weights.fp32 != nullptr ? Storage::PLAIN : Storage::NONE;
}

// Element i of some master weights.
template <Storage STORAGE>
FASTMIM_INLINE float get(const float* fp32, const uint16_t* high, const uint16_t* remainder,
                         int64_t i) {
  if constexpr (STORAGE == Storage::SPLIT) return join(high[i], remainder[i]);
  return fp32[i];
}

template <Storage STORAGE>
FASTMIM_INLINE void put(float* fp32, uint16_t* high, uint16_t* remainder, int64_t i, float master) {
  if constexpr (STORAGE == Storage::SPLIT) {
    const Halves halves = split(master);
    high[i] = halves.high;
    remainder[i] = halves.remainder;
  } else {
    fp32[i] = master;
  }
}

template <Format FORMAT>
FASTMIM_INLINE float get(const Gradients& grad, int64_t i) {
  if constexpr (FORMAT == Format::BFLOAT16) return widen_bfloat16(grad.half()[i]);
  if constexpr (FORMAT == Format::FLOAT16) return widen_float16(grad.half()[i]);
  return grad.fp32()[i];
}

// After the update of a chunk, whose weights are then in the second-level cache.
FASTMIM_INLINE void copy(const Weights& weights, int64_t size) {
  if (weights.fp32 == nullptr || weights.bf16 == nullptr) return;
  for (int64_t i = 0; i < size; ++i) weights.bf16[i] = round_to_bfloat16(weights.fp32[i]);
}

// The lists of a call do not overlap. GCC does not keep __restrict__ on the way through get and put,
// and these are too many pointers to compare, so ivdep says it of the loop: 3.5 against 0.66 ns an
// element in split storage (EPYC with AVX-512, one thread).
template <Storage PARAM, Storage TEACHER, Format GRAD>
FASTMIM_INLINE void adamw_loop(const AdamWChunk& chunk, const AdamWScalars& scalars) {
  float* param = chunk.param.fp32;
  uint16_t* param_high = chunk.param.bf16;
  uint16_t* param_remainder = chunk.param.remainder;
  float* teacher = chunk.teacher.fp32;
  uint16_t* teacher_high = chunk.teacher.bf16;
  uint16_t* teacher_remainder = chunk.teacher.remainder;
  float* exp_avg = chunk.exp_avg;
  float* exp_avg_sq = chunk.exp_avg_sq;
  const Gradients grad = chunk.grad;
  const AdamWScalars c = scalars;
  const float decay = chunk.decay;
#pragma GCC ivdep
  for (int64_t i = 0; i < chunk.size; ++i) {
    float p = get<PARAM>(param, param_high, param_remainder, i);
    adamw(p, get<GRAD>(grad, i), exp_avg[i], exp_avg_sq[i], decay, c);
    put<PARAM>(param, param_high, param_remainder, i, p);
    if constexpr (TEACHER != Storage::NONE) {
      float t = get<TEACHER>(teacher, teacher_high, teacher_remainder, i);
      ema(t, p, c.one_minus_momentum);
      put<TEACHER>(teacher, teacher_high, teacher_remainder, i, t);
    }
  }
}

template <Storage PARAM, Storage TEACHER>
FASTMIM_INLINE void adamw_by_format(const AdamWChunk& chunk, const AdamWScalars& c) {
  switch (chunk.grad.format) {
    case Format::FLOAT32: return adamw_loop<PARAM, TEACHER, Format::FLOAT32>(chunk, c);
    case Format::BFLOAT16: return adamw_loop<PARAM, TEACHER, Format::BFLOAT16>(chunk, c);
    case Format::FLOAT16: return adamw_loop<PARAM, TEACHER, Format::FLOAT16>(chunk, c);
  }
}

template <Storage PARAM>
FASTMIM_INLINE void adamw_by_teacher(const AdamWChunk& chunk, const AdamWScalars& c) {
  switch (storage(chunk.teacher)) {
    case Storage::NONE: return adamw_by_format<PARAM, Storage::NONE>(chunk, c);
    case Storage::PLAIN: return adamw_by_format<PARAM, Storage::PLAIN>(chunk, c);
    case Storage::SPLIT: return adamw_by_format<PARAM, Storage::SPLIT>(chunk, c);
  }
}

FASTMIM_INLINE void adamw_chunk(const AdamWChunk& chunk, const AdamWScalars& c) {
  if (storage(chunk.param) == Storage::SPLIT)
    adamw_by_teacher<Storage::SPLIT>(chunk, c);
  else
    adamw_by_teacher<Storage::PLAIN>(chunk, c);
  copy(chunk.param, chunk.size);
  copy(chunk.teacher, chunk.size);
}

template <Storage TEACHER, Storage STUDENT>
FASTMIM_INLINE void ema_loop(const EmaChunk& chunk, float one_minus_momentum) {
  float* teacher = chunk.teacher.fp32;
  uint16_t* teacher_high = chunk.teacher.bf16;
  uint16_t* teacher_remainder = chunk.teacher.remainder;
  const float* student = chunk.student.fp32;
  const uint16_t* student_high = chunk.student.bf16;
  const uint16_t* student_remainder = chunk.student.remainder;
#pragma GCC ivdep
  for (int64_t i = 0; i < chunk.size; ++i) {
    float t = get<TEACHER>(teacher, teacher_high, teacher_remainder, i);
    ema(t, get<STUDENT>(student, student_high, student_remainder, i), one_minus_momentum);
    put<TEACHER>(teacher, teacher_high, teacher_remainder, i, t);
  }
}

template <Storage TEACHER>
FASTMIM_INLINE void ema_by_student(const EmaChunk& chunk, float one_minus_momentum) {
  if (storage(chunk.student) == Storage::SPLIT)
    ema_loop<TEACHER, Storage::SPLIT>(chunk, one_minus_momentum);
  else
    ema_loop<TEACHER, Storage::PLAIN>(chunk, one_minus_momentum);
}

FASTMIM_INLINE void ema_chunk(const EmaChunk& chunk, float one_minus_momentum) {
  if (storage(chunk.teacher) == Storage::SPLIT)
    ema_by_student<Storage::SPLIT>(chunk, one_minus_momentum);
  else
    ema_by_student<Storage::PLAIN>(chunk, one_minus_momentum);
  copy(chunk.teacher, chunk.size);
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
  const auto kernel = simd<ema_chunk>();
  run(chunks, [&](const EmaChunk& chunk) { kernel(chunk, one_minus_momentum); });
}

void adamw_ema_cpu(const AdamWArguments& given) {
  if (!given.params.exist() || value<bool>(given.skip)) return;
  const auto lr = value<double>(given.lr);
  const auto* const weight_decay = data<double>(given.weight_decay);
  std::vector<AdamWChunk> chunks;
  for (size_t i = 0; i < given.params.tensors.size(); ++i) {
    const AdamWChunk all{given.params.at(i),
                         given.teachers.at(i),
                         gradients(given.grads[i]),
                         mutable_data<float>(given.exp_avgs[i]),
                         mutable_data<float>(given.exp_avg_sqs[i]),
                         given.params.tensors[i].numel(),
                         weight_decay_factor(lr, weight_decay[i])};
    for_each_chunk(all.size, [&](int64_t offset, int64_t size) {
      chunks.push_back({all.param.from(offset), all.teacher.from(offset), all.grad.from(offset),
                        all.exp_avg + offset, all.exp_avg_sq + offset, size, all.decay});
    });
  }
  const int64_t now = ++*mutable_data<int64_t>(given.step);
  const AdamWScalars scalars = adamw_scalars(lr, value<double>(given.momentum),
                                             value<double>(given.grad_scale),
                                             value<double>(given.clip), given.beta1, given.beta2,
                                             given.eps, now);
  const auto kernel = simd<adamw_chunk>();
  run(chunks, [&](const AdamWChunk& chunk) { kernel(chunk, scalars); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update<&ema_update_cpu>));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema<&adamw_ema_cpu>));
}
