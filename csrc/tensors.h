// New tensors, made past PyTorch's dispatcher (on a CPU): on its way one takes longer than a kernel
// on a small batch.
#pragma once

#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace fastmim {

// Contiguous, on the device of `like`, with no values yet.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1))
    strides[i] = stride;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made;
  const auto failed = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &made);
  if (failed) {
    const std::string what = text_of(sizes) + " of " + torch::headeronly::toString(dtype);
    if (like.is_cpu()) refuse("can't allocate memory for ", what);
    refuse("could not make a tensor ", what, " on ", device_of(like), ": see the error above");
  }
  return Tensor(made);
}

inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

inline Tensor new_like(const Tensor& like) { return new_tensor(like, like.sizes()); }

}  // namespace fastmim
