// The arithmetic of EMA and AdamW, one element at a time; for the CPU and the CUDA kernels.
//
// Both are compiled without contraction to FMA and with IEEE division and square root, so that a
// CPU of any generation and a GPU give the same bits. The kernels are bound by memory: it costs
// nothing.
#pragma once

#include <cmath>
#include <cstdint>

#include "inline.h"

namespace fastmim {

// What every element of a call shares: computed in double, rounded to float once.
struct AdamWScalars {
  float grad_scale;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;                 // lr / (1 - beta1^step)
  float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float one_minus_momentum;
};

// By squaring, not pow(): two libraries may differ in its last bit.
FASTMIM_INLINE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// `step` counts from 1: the value after the increment.
FASTMIM_INLINE AdamWScalars adamw_scalars(double lr, double momentum, double grad_scale,
                                          double clip, double beta1, double beta2, double eps,
                                          int64_t step) {
  const double correction1 = 1.0 - power(beta1, step);
  const double correction2 = 1.0 - power(beta2, step);
  return {
      static_cast<float>(grad_scale * clip),
      static_cast<float>(1.0 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2),
      static_cast<float>(lr / correction1),
      static_cast<float>(1.0 / sqrt(correction2)),
      static_cast<float>(eps),
      static_cast<float>(1.0 - momentum),
  };
}

FASTMIM_INLINE float weight_decay_factor(double lr, double weight_decay) {
  return static_cast<float>(1.0 - lr * weight_decay);
}

// Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2).
FASTMIM_INLINE void adamw(float& param, float grad, float& exp_avg, float& exp_avg_sq, float decay,
                          const AdamWScalars& c) {
  const float g = grad * c.grad_scale;
  exp_avg += c.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
  const float denominator = sqrtf(exp_avg_sq) * c.inverse_sqrt_correction2 + c.eps;
  param = param * decay - c.step_size * (exp_avg / denominator);
}

FASTMIM_INLINE void ema(float& teacher, float student, float one_minus_momentum) {
  teacher += one_minus_momentum * (student - teacher);
}

}  // namespace fastmim
