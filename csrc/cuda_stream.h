// PyTorch's current CUDA stream, and the check after a launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "checks.h"

namespace fastmim {

// The getter of the current stream lives in libtorch_cuda.so. Linked, this library would not load
// under a CPU-only torch; and dlsym(RTLD_DEFAULT) does not see it, because Python loads torch
// RTLD_LOCAL. So it is looked up in the library that torch has loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* const symbol =
        torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  if (getter == nullptr || getter(device, &stream) != AOTI_TORCH_SUCCESS)
    refuse("fastmim: this torch gives no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Not STD_CUDA_CHECK: it needs a symbol of libtorch_cuda.
inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) refuse(op, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check_cuda(op, cudaGetLastError()); }

}  // namespace fastmim
