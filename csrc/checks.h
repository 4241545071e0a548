// How the CPU and the CUDA operators refuse arguments: in the same words, without reading values.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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
  void list(const std::string& name, const Tensors& xs, const std::string& like_name,
            const Tensors& like,
            std::initializer_list<ScalarType> types = {ScalarType::Float}) const {
    if (xs.size() != like.size())
      refuse(op, ": ", name, " has ", xs.size(), " tensors, ", like_name, " has ", like.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      const auto type = xs[i].scalar_type();
      if (std::find(types.begin(), types.end(), type) == types.end()) {
        std::string expected;
        for (const ScalarType t : types)
          expected += (expected.empty() ? "" : " or ") + std::string(torch::headeronly::toString(t));
        refuse(op, ": expected ", name, "[", i, "] to be ", expected, ", got ",
               torch::headeronly::toString(type));
      }
      if (!same_shape(xs[i], like[i]))
        refuse(op, ": ", name, "[", i, "] has shape ", shape_of(xs[i]), ", ", like_name, "[", i,
               "] has ", shape_of(like[i]));
      if (!xs[i].is_contiguous()) refuse(op, ": ", name, "[", i, "] is not contiguous");
      placed(name, static_cast<int64_t>(i), xs[i]);
    }
  }

  void placed(const std::string& name, int64_t i, const Tensor& x) const {
    if (device_of(x) == device) return;
    const std::string which = i < 0 ? name : name + "[" + std::to_string(i) + "]";
    refuse(op, ": ", which, " is on ", device_of(x), ", expected ", device);
  }
};

}  // namespace fastmim
