// ema_update_ and adamw_ema_ on the CPU: one pass over memory, one parallel region for all tensors.
//
// Bound by memory: 12 bytes an element (EMA), 28 (AdamW), 36 (both). The result does not depend on
// the number of threads or on the instruction set: every element is one chain of IEEE operations
// (see adamw.h).
#include "adamw.h"
#include "cpu.h"

namespace {

using namespace fastmim;

// Elements a thread takes at a time, a multiple of the vector width, so that chunks stay aligned.
constexpr int64_t CHUNK = 1 << 14;

struct AdamWChunk {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* teacher;  // nullptr: no EMA
  int64_t size;
  float decay;
};

struct EmaChunk {
  float* teacher;
  const float* student;
  int64_t size;
};

template <bool EMA>
FASTMIM_INLINE void adamw_loop(const AdamWChunk& chunk, const AdamWScalars& scalars) {
  float* __restrict__ param = chunk.param;
  const float* __restrict__ grad = chunk.grad;
  float* __restrict__ exp_avg = chunk.exp_avg;
  float* __restrict__ exp_avg_sq = chunk.exp_avg_sq;
  float* __restrict__ teacher = chunk.teacher;
  const AdamWScalars c = scalars;
  const float decay = chunk.decay;
  for (int64_t i = 0; i < chunk.size; ++i) {
    adamw(param[i], grad[i], exp_avg[i], exp_avg_sq[i], decay, c);
    if constexpr (EMA) ema(teacher[i], param[i], c.one_minus_momentum);
  }
}

FASTMIM_INLINE void ema_loop(const EmaChunk& chunk, float one_minus_momentum) {
  float* __restrict__ teacher = chunk.teacher;
  const float* __restrict__ student = chunk.student;
  for (int64_t i = 0; i < chunk.size; ++i) ema(teacher[i], student[i], one_minus_momentum);
}

// Calls add(offset, size) for the chunks of a tensor.
template <typename Add>
void for_each_chunk(int64_t numel, const Add& add) {
  for (int64_t offset = 0; offset < numel; offset += CHUNK)
    add(offset, std::min(CHUNK, numel - offset));
}

template <typename Chunk, typename Kernel>
void run(const std::vector<Chunk>& chunks, const Kernel& kernel) {
  in_parallel(static_cast<int64_t>(chunks.size()), 2 * CHUNK, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) kernel(chunks[static_cast<size_t>(k)]);
  });
}

template <typename T>
T value(const Tensor& x) {
  return *data<T>(x);
}

void ema_update_cpu(Tensors teachers, Tensors students, Tensor momentum) {
  check_ema_update(teachers, students, momentum, "cpu");
  std::vector<EmaChunk> chunks;
  for (size_t i = 0; i < teachers.size(); ++i) {
    float* const teacher = mutable_data<float>(teachers[i]);
    const float* const student = data<float>(students[i]);
    for_each_chunk(teachers[i].numel(), [&](int64_t offset, int64_t size) {
      chunks.push_back({teacher + offset, student + offset, size});
    });
  }
  const auto one_minus_momentum = static_cast<float>(1.0 - value<double>(momentum));
  const auto kernel = simd<ema_loop>();
  run(chunks, [&](const EmaChunk& chunk) { kernel(chunk, one_minus_momentum); });
}

void adamw_ema_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors teachers, Tensor step, Tensor lr, Tensor momentum, Tensor grad_scale,
                   Tensor skip, Tensor weight_decay, double beta1, double beta2, double eps) {
  check_adamw_ema(params, grads, exp_avgs, exp_avg_sqs, teachers, step, lr, momentum, grad_scale,
                  skip, weight_decay, "cpu");
  if (params.empty() || value<bool>(skip)) return;

  std::vector<AdamWChunk> chunks;
  for (size_t i = 0; i < params.size(); ++i) {
    const float decay = weight_decay_factor(value<double>(lr), data<double>(weight_decay)[i]);
    const AdamWChunk all{mutable_data<float>(params[i]),
                         data<float>(grads[i]),
                         mutable_data<float>(exp_avgs[i]),
                         mutable_data<float>(exp_avg_sqs[i]),
                         teachers.empty() ? nullptr : mutable_data<float>(teachers[i]),
                         params[i].numel(),
                         decay};
    for_each_chunk(all.size, [&](int64_t offset, int64_t size) {
      chunks.push_back({all.param + offset, all.grad + offset, all.exp_avg + offset,
                        all.exp_avg_sq + offset, all.teacher ? all.teacher + offset : nullptr, size,
                        decay});
    });
  }
  const int64_t now = ++*mutable_data<int64_t>(step);
  const AdamWScalars scalars = adamw_scalars(value<double>(lr), value<double>(momentum),
                                             value<double>(grad_scale), beta1, beta2, eps, now);
  const auto kernel = teachers.empty() ? simd<adamw_loop<false>>() : simd<adamw_loop<true>>();
  run(chunks, [&](const AdamWChunk& chunk) { kernel(chunk, scalars); });
}

}  // namespace

// Internal: the public schemas torch.ops.fastmim.* are declared in fastmim/ops, which calls these.
STABLE_TORCH_LIBRARY(fastmim_native, m) {
  m.def("ema_update_(Tensor(a!)[] teachers, Tensor[] students, Tensor momentum) -> ()");
  m.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] teachers, Tensor(e!) step, Tensor lr, "
      "Tensor momentum, Tensor grad_scale, Tensor skip, Tensor weight_decay, "
      "float beta1, float beta2, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_cpu));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_cpu));
}
