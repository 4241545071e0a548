// What the CPU and the CUDA operators refuse, in the same words, without reading tensor values.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Not STD_TORCH_CHECK: it puts the path of the build machine in front of the message.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < x.dim(); ++d) text << (d ? ", " : "") << x.size(d);
  text << (x.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string device_of(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  if (x.is_cuda()) return "cuda:" + std::to_string(x.get_device_index());
  return "another device";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

// The checks of one call; every tensor must lie on `device`.
struct Checks {
  const char* op;
  std::string device;

  void scalar(const char* name, const Tensor& x, ScalarType dtype) const {
    if (x.dim() != 0 || x.scalar_type() != dtype)
      refuse(op, ": expected ", name, " to be a 0-d ", torch::headeronly::toString(dtype),
             " tensor, got ", torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
    placed(name, -1, x);
  }

  // A list that runs beside `like`: as long, and of the same shapes.
  void list(const char* name, const Tensors& xs, const char* like_name, const Tensors& like) const {
    if (xs.size() != like.size())
      refuse(op, ": ", name, " has ", xs.size(), " tensors, ", like_name, " has ", like.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      if (xs[i].scalar_type() != ScalarType::Float)
        refuse(op, ": expected ", name, "[", i, "] to be Float (float32), got ",
               torch::headeronly::toString(xs[i].scalar_type()));
      if (!same_shape(xs[i], like[i]))
        refuse(op, ": ", name, "[", i, "] has shape ", shape_of(xs[i]), ", ", like_name, "[", i,
               "] has ", shape_of(like[i]));
      if (!xs[i].is_contiguous()) refuse(op, ": ", name, "[", i, "] is not contiguous");
      placed(name, static_cast<int64_t>(i), xs[i]);
    }
  }

  void placed(const char* name, int64_t i, const Tensor& x) const {
    if (device_of(x) == device) return;
    const std::string which = i < 0 ? name : std::string(name) + "[" + std::to_string(i) + "]";
    refuse(op, ": ", which, " is on ", device_of(x), ", expected ", device);
  }
};

inline void check_ema_update(const Tensors& teachers, const Tensors& students,
                             const Tensor& momentum, const std::string& device) {
  const Checks check{"ema_update_", device};
  check.scalar("momentum", momentum, ScalarType::Double);
  check.list("teachers", teachers, "teachers", teachers);
  check.list("students", students, "teachers", teachers);
}

inline void check_adamw_ema(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                            const Tensors& exp_avg_sqs, const Tensors& teachers, const Tensor& step,
                            const Tensor& lr, const Tensor& momentum, const Tensor& grad_scale,
                            const Tensor& skip, const Tensor& weight_decay,
                            const std::string& device) {
  const Checks check{"adamw_ema_", device};
  check.scalar("step", step, ScalarType::Long);
  check.scalar("lr", lr, ScalarType::Double);
  check.scalar("momentum", momentum, ScalarType::Double);
  check.scalar("grad_scale", grad_scale, ScalarType::Double);
  check.scalar("skip", skip, ScalarType::Bool);
  const auto count = static_cast<int64_t>(params.size());
  if (weight_decay.dim() != 1 || weight_decay.size(0) != count ||
      weight_decay.scalar_type() != ScalarType::Double || !weight_decay.is_contiguous())
    refuse("adamw_ema_: expected weight_decay to be a contiguous Double tensor of shape (", count,
           ",), one value a parameter, got ",
           torch::headeronly::toString(weight_decay.scalar_type()), " ", shape_of(weight_decay));
  check.placed("weight_decay", -1, weight_decay);
  check.list("params", params, "params", params);
  check.list("grads", grads, "params", params);
  check.list("exp_avgs", exp_avgs, "params", params);
  check.list("exp_avg_sqs", exp_avg_sqs, "params", params);
  if (!teachers.empty()) check.list("teachers", teachers, "params", params);
}

}  // namespace fastmim
