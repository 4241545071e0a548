// How the CPU and the CUDA operators refuse arguments: in the same words, without reading values.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
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

template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape_of(const Tensor& x) { return text_of(x.sizes()); }

inline std::string device_of(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  if (x.is_cuda()) return "cuda:" + std::to_string(x.get_device_index());
  return "another device";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half || dtype == ScalarType::Double;
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

  void shape(const char* name, const Tensor& x, std::initializer_list<int64_t> expected) const {
    const auto sizes = x.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()))
      refuse(op, ": expected ", name, " to have shape ", text_of(expected), ", got ", shape_of(x));
    placed(name, -1, x);
  }

  void dimensions(const char* name, const Tensor& x, int64_t expected) const {
    if (x.dim() != expected)
      refuse(op, ": expected ", name, " to have ", expected, " dimensions, got ", shape_of(x));
    placed(name, -1, x);
  }

  void ids(const char* name, const Tensor& x, int64_t rows) const {
    if (x.dim() != 2 || x.size(0) != rows || x.scalar_type() != ScalarType::Long)
      refuse(op, ": expected ", name, " to be (", rows, ", K) of Long (int64), got ",
             torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
    placed(name, -1, x);
  }

  void dtype(const char* name, ScalarType given, bool accepted) const {
    if (!accepted) refuse(op, ": ", name, " cannot be ", torch::headeronly::toString(given));
  }

  void floating(const char* name, const Tensor& x) const {
    dtype(name, x.scalar_type(), is_floating(x.scalar_type()));
  }

  void placed(const std::string& name, int64_t i, const Tensor& x) const {
    if (device_of(x) == device) return;
    const std::string which = i < 0 ? name : name + "[" + std::to_string(i) + "]";
    refuse(op, ": ", which, " is on ", device_of(x), ", expected ", device);
  }
};

inline void check_sample_masks(const Tensor& sample_ids, int64_t num_patches,
                               const std::string& device) {
  const Checks check{"sample_masks", device};
  check.dimensions("sample_ids", sample_ids, 1);
  check.dtype("sample_ids", sample_ids.scalar_type(),
              sample_ids.scalar_type() == ScalarType::Long);
  // A rank and a counter have 32 bits.
  if (num_patches < 0 || num_patches > UINT32_MAX)
    refuse("sample_masks: expected num_patches in [0, 2^32), got ", num_patches);
}

inline void check_gather_tokens(const Tensor& x, const Tensor& ids, const std::string& device) {
  const Checks check{"gather_tokens", device};
  check.dimensions("x", x, 3);
  check.ids("ids", ids, x.size(0));
}

inline void check_scatter_tokens(const Tensor& x, const Tensor& ids, int64_t num_tokens,
                                 const std::string& device) {
  const Checks check{"scatter_tokens", device};
  check.dimensions("x", x, 3);
  check.ids("ids", ids, x.size(0));
  check.shape("ids", ids, {x.size(0), x.size(1)});
  if (num_tokens < 0) refuse("scatter_tokens: expected num_tokens >= 0, got ", num_tokens);
}

inline void check_restore_tokens(const Tensor& x, const Tensor& mask_token,
                                 const Tensor& ids_restore, const Tensor& pos_embed,
                                 const std::string& device) {
  const Checks check{"restore_tokens", device};
  check.dimensions("x", x, 3);
  check.ids("ids_restore", ids_restore, x.size(0));
  const int64_t n = ids_restore.size(1), width = x.size(2);
  if (x.size(1) < 1 || x.size(1) > n + 1)
    refuse("restore_tokens: expected x to have from 1 to ", n + 1, " tokens an image, got ",
           shape_of(x));
  check.shape("mask_token", mask_token, {1, 1, width});
  check.shape("pos_embed", pos_embed, {1, n + 1, width});
  check.floating("x", x);
  check.floating("mask_token", mask_token);
  check.floating("pos_embed", pos_embed);
  if ((x.scalar_type() == ScalarType::Double) != (pos_embed.scalar_type() == ScalarType::Double))
    refuse("restore_tokens: x is ", torch::headeronly::toString(x.scalar_type()),
           " and pos_embed ", torch::headeronly::toString(pos_embed.scalar_type()),
           "; expected both to be Double or none");
}

inline void check_restore_tokens_backward(const Tensor& grad, const Tensor& ids_shuffle,
                                          int64_t num_visible, const std::string& device) {
  const Checks check{"restore_tokens_backward", device};
  check.dimensions("grad", grad, 3);
  check.floating("grad", grad);
  check.ids("ids_shuffle", ids_shuffle, grad.size(0));
  check.shape("grad", grad, {ids_shuffle.size(0), ids_shuffle.size(1) + 1, grad.size(2)});
  if (num_visible < 0 || num_visible > ids_shuffle.size(1))
    refuse("restore_tokens_backward: expected num_visible in [0, ", ids_shuffle.size(1), "], got ",
           num_visible);
}

// What gather_patches and patch_loss read.
inline void check_patches(const Checks& check, const Tensor& imgs, const Tensor& ids,
                          int64_t patch_size, const std::optional<Tensor>& scale,
                          const std::optional<Tensor>& shift) {
  check.dimensions("imgs", imgs, 4);
  check.dtype("imgs", imgs.scalar_type(),
              imgs.scalar_type() == ScalarType::Byte || is_floating(imgs.scalar_type()));
  if (patch_size < 1 || imgs.size(2) % patch_size || imgs.size(3) % patch_size)
    refuse(check.op, ": expected imgs (B, C, H, W) with H and W divisible by the patch size ",
           patch_size, ", got ", shape_of(imgs));
  check.ids("ids", ids, imgs.size(0));
  if (scale) check.shape("scale", *scale, {imgs.size(1)});
  if (shift) check.shape("shift", *shift, {imgs.size(1)});
}

inline void check_gather_patches(const Tensor& imgs, const Tensor& ids, int64_t patch_size,
                                 const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& shift, ScalarType dtype,
                                 const std::string& device) {
  const Checks check{"gather_patches", device};
  check_patches(check, imgs, ids, patch_size, scale, shift);
  check.dtype("the result", dtype, is_floating(dtype));
}

inline void check_patch_loss(const Tensor& pred, const Tensor& imgs, const Tensor& ids,
                             int64_t patch_size, const std::optional<Tensor>& teacher_pred,
                             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                             const std::string& device) {
  const Checks check{"patch_loss", device};
  check_patches(check, imgs, ids, patch_size, scale, shift);
  check.floating("pred", pred);
  check.shape("pred", pred,
              {ids.size(0), ids.size(1), imgs.size(1) * patch_size * patch_size});
  if (!teacher_pred) return;
  check.shape("teacher_pred", *teacher_pred, {pred.size(0), pred.size(1), pred.size(2)});
  check.dtype("teacher_pred", teacher_pred->scalar_type(),
              teacher_pred->scalar_type() == pred.scalar_type());
}

}  // namespace fastmim
