// The arguments of ema_update_ and adamw_ema_ and what is refused, for the CPU and the CUDA kernels.
#pragma once

#include "checks.h"
#include "storage.h"

namespace fastmim {

// The lists that hold some weights, in either storage: see storage.h.
struct WeightLists {
  std::string name;  // "param": the lists are params, param_remainders and param_copies
  Tensors tensors, remainders, copies;
  bool written = true;

  bool exist() const { return !tensors.empty(); }
  bool split() const { return !remainders.empty(); }

  // Those of tensor i.
  Weights at(size_t i) const {
    if (!exist()) return {};
    if (split()) return {nullptr, half(tensors[i]), half(remainders[i])};
    return {static_cast<float*>(data(tensors[i])), copies.empty() ? nullptr : half(copies[i]),
            nullptr};
  }

  void check(const Checks& check, const std::string& like_name, const Tensors& like) const {
    const std::string plural = name + "s";
    const auto type = split() ? ScalarType::BFloat16 : ScalarType::Float;
    check.list(plural, tensors, like_name, like, {type});
    if (split()) check.list(name + "_remainders", remainders, plural, tensors, {ScalarType::Short});
    if (copies.empty()) return;
    if (split())
      refuse(check.op, ": ", name, "_copies and ", name,
             "_remainders exclude each other: split storage holds the copy");
    check.list(name + "_copies", copies, plural, tensors, {ScalarType::BFloat16});
  }

 private:
  void* data(const Tensor& x) const {
    return written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr());
  }
  uint16_t* half(const Tensor& x) const { return static_cast<uint16_t*>(data(x)); }
};

inline Gradients gradients(const Tensor& x) {
  const auto type = x.scalar_type();
  return {x.const_data_ptr(), type == ScalarType::Float      ? Format::FLOAT32
                              : type == ScalarType::BFloat16 ? Format::BFLOAT16
                                                             : Format::FLOAT16};
}

struct EmaArguments {
  WeightLists teachers, students;
  Tensor momentum, skip;

  void check() const {
    const Checks check{"ema_update_", device_of(momentum)};
    check.scalar("momentum", momentum, ScalarType::Double);
    check.scalar("skip", skip, ScalarType::Bool);
    teachers.check(check, "teachers", teachers.tensors);
    students.check(check, "teachers", teachers.tensors);
  }
};

struct AdamWArguments {
  WeightLists params, teachers;
  Tensors grads, exp_avgs, exp_avg_sqs;
  Tensor step, lr, momentum, grad_scale, clip, skip, weight_decay;
  double beta1, beta2, eps;

  void check() const {
    const Checks check{"adamw_ema_", device_of(step)};
    check.scalar("step", step, ScalarType::Long);
    check.scalar("lr", lr, ScalarType::Double);
    check.scalar("momentum", momentum, ScalarType::Double);
    check.scalar("grad_scale", grad_scale, ScalarType::Double);
    check.scalar("clip", clip, ScalarType::Double);
    check.scalar("skip", skip, ScalarType::Bool);
    const auto count = static_cast<int64_t>(params.tensors.size());
    if (weight_decay.dim() != 1 || weight_decay.size(0) != count ||
        weight_decay.scalar_type() != ScalarType::Double || !weight_decay.is_contiguous())
      refuse("adamw_ema_: expected weight_decay to be a contiguous Double tensor of shape (",
             count, ",), one value a parameter, got ",
             torch::headeronly::toString(weight_decay.scalar_type()), " ", shape_of(weight_decay));
    check.placed("weight_decay", -1, weight_decay);
    params.check(check, "params", params.tensors);
    check.list("grads", grads, "params", params.tensors,
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    check.list("exp_avgs", exp_avgs, "params", params.tensors);
    check.list("exp_avg_sqs", exp_avg_sqs, "params", params.tensors);
    if (teachers.exist() || teachers.split() || !teachers.copies.empty())
      teachers.check(check, "params", params.tensors);
  }
};

// The operators as PyTorch calls them; csrc/schemas.cpp declares them with the same arguments.
template <void (*kernel)(const EmaArguments&)>
void ema_update(Tensors teachers, Tensors students, Tensors teacher_remainders,
                Tensors student_remainders, Tensors teacher_copies, Tensor momentum, Tensor skip) {
  const EmaArguments arguments{
      {"teacher", std::move(teachers), std::move(teacher_remainders), std::move(teacher_copies)},
      {"student", std::move(students), std::move(student_remainders), {}, /*written=*/false},
      std::move(momentum),
      std::move(skip)};
  arguments.check();
  kernel(arguments);
}

template <void (*kernel)(const AdamWArguments&)>
void adamw_ema(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
               Tensors teachers, Tensors param_remainders, Tensors teacher_remainders,
               Tensors param_copies, Tensors teacher_copies, Tensor step, Tensor lr,
               Tensor momentum, Tensor grad_scale, Tensor clip, Tensor skip, Tensor weight_decay,
               double beta1, double beta2, double eps) {
  const AdamWArguments arguments{
      {"param", std::move(params), std::move(param_remainders), std::move(param_copies)},
      {"teacher", std::move(teachers), std::move(teacher_remainders), std::move(teacher_copies)},
      std::move(grads),
      std::move(exp_avgs),
      std::move(exp_avg_sqs),
      std::move(step),
      std::move(lr),
      std::move(momentum),
      std::move(grad_scale),
      std::move(clip),
      std::move(skip),
      std::move(weight_decay),
      beta1,
      beta2,
      eps};
  arguments.check();
  kernel(arguments);
}

}  // namespace fastmim
