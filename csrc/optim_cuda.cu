// ema_update_ and adamw_ema_ on CUDA: a launch takes up to 512 tensors, their table as an argument.
//
// A block updates one chunk of one tensor; each element has one writer and no atomics:
// deterministic. Bound by memory: 12 bytes an element (EMA), 28 (AdamW), 36 (both). The host reads
// no tensor: scalars, step and the skip flag are read by the kernels, so a CUDA graph replays with
// their new values.
#include "adamw.h"
#include "checks.h"

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>
#include <dlfcn.h>

namespace {

using namespace fastmim;

constexpr int MAX_TENSORS = 512;  // 26 KiB of 32764 bytes of arguments (CUDA 12.1, sm_70)
constexpr int THREADS = 256;
constexpr int64_t CHUNK = 1 << 14;  // a multiple of 4: chunks of an aligned tensor are aligned

// Tensor i of a launch has the blocks first_block[i] to first_block[i + 1]; an empty one has none.
struct Blocks {
  int64_t numel[MAX_TENSORS];
  int first_block[MAX_TENSORS + 1];
  int count;
};

struct EmaTable {
  float* teacher[MAX_TENSORS];
  const float* student[MAX_TENSORS];
  Blocks blocks;
};

struct AdamWTable {
  float* param[MAX_TENSORS];
  const float* grad[MAX_TENSORS];
  float* exp_avg[MAX_TENSORS];
  float* exp_avg_sq[MAX_TENSORS];
  float* teacher[MAX_TENSORS];
  Blocks blocks;
};
static_assert(sizeof(AdamWTable) + 128 <= 32764, "kernel arguments are limited to 32764 bytes");

struct AdamWInputs {
  const int64_t* step;
  const double* lr;
  const double* momentum;
  const double* grad_scale;
  const bool* skip;
  const double* weight_decay;  // of the first tensor of the launch
  double beta1, beta2, eps;
};

__device__ int tensor_of_block(const Blocks& blocks, int block) {
  int low = 0, high = blocks.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (blocks.first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

__device__ bool aligned(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

__global__ void __launch_bounds__(THREADS)
    ema_kernel(const __grid_constant__ EmaTable table, const double* __restrict__ momentum) {
  const int k = tensor_of_block(table.blocks, static_cast<int>(blockIdx.x));
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.blocks.first_block[k]) * CHUNK;
  const int size = static_cast<int>(min(CHUNK, table.blocks.numel[k] - begin));
  float* __restrict__ teacher = table.teacher[k] + begin;
  const float* __restrict__ student = table.student[k] + begin;
  const float weight = static_cast<float>(1.0 - *momentum);

  int done = 0;
  if (aligned(teacher) && aligned(student)) {  // a view such as x[1:] is not
    done = size / 4 * 4;
    for (int i = static_cast<int>(threadIdx.x); i < size / 4; i += THREADS) {
      float4 t = reinterpret_cast<float4*>(teacher)[i];
      const float4 s = reinterpret_cast<const float4*>(student)[i];
      ema(t.x, s.x, weight);
      ema(t.y, s.y, weight);
      ema(t.z, s.z, weight);
      ema(t.w, s.w, weight);
      reinterpret_cast<float4*>(teacher)[i] = t;
    }
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < size; i += THREADS)
    ema(teacher[i], student[i], weight);
}

// Runs before adamw_kernel in the same stream, so that every block sees one value of `step`.
__global__ void advance_step_kernel(int64_t* step, const bool* skip) {
  if (!*skip) ++*step;
}

template <bool EMA>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const __grid_constant__ AdamWTable table,
                 const __grid_constant__ AdamWInputs inputs) {
  if (*inputs.skip) return;
  const int k = tensor_of_block(table.blocks, static_cast<int>(blockIdx.x));

  __shared__ AdamWScalars shared;
  __shared__ float shared_decay;
  if (threadIdx.x == 0) {  // double arithmetic is slow on some GPUs: once a block
    shared = adamw_scalars(*inputs.lr, *inputs.momentum, *inputs.grad_scale, inputs.beta1,
                           inputs.beta2, inputs.eps, *inputs.step);
    shared_decay = weight_decay_factor(*inputs.lr, inputs.weight_decay[k]);
  }
  __syncthreads();
  const AdamWScalars c = shared;
  const float decay = shared_decay;

  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.blocks.first_block[k]) * CHUNK;
  const int size = static_cast<int>(min(CHUNK, table.blocks.numel[k] - begin));
  float* __restrict__ param = table.param[k] + begin;
  const float* __restrict__ grad = table.grad[k] + begin;
  float* __restrict__ exp_avg = table.exp_avg[k] + begin;
  float* __restrict__ exp_avg_sq = table.exp_avg_sq[k] + begin;
  float* __restrict__ teacher = EMA ? table.teacher[k] + begin : nullptr;

  int done = 0;
  if (aligned(param) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq) &&
      aligned(teacher)) {
    done = size / 4 * 4;
    for (int i = static_cast<int>(threadIdx.x); i < size / 4; i += THREADS) {
      float4 p = reinterpret_cast<float4*>(param)[i];
      const float4 g = reinterpret_cast<const float4*>(grad)[i];
      float4 m = reinterpret_cast<float4*>(exp_avg)[i];
      float4 v = reinterpret_cast<float4*>(exp_avg_sq)[i];
      adamw(p.x, g.x, m.x, v.x, decay, c);
      adamw(p.y, g.y, m.y, v.y, decay, c);
      adamw(p.z, g.z, m.z, v.z, decay, c);
      adamw(p.w, g.w, m.w, v.w, decay, c);
      reinterpret_cast<float4*>(param)[i] = p;
      reinterpret_cast<float4*>(exp_avg)[i] = m;
      reinterpret_cast<float4*>(exp_avg_sq)[i] = v;
      if constexpr (EMA) {
        float4 t = reinterpret_cast<float4*>(teacher)[i];
        ema(t.x, p.x, c.one_minus_momentum);
        ema(t.y, p.y, c.one_minus_momentum);
        ema(t.z, p.z, c.one_minus_momentum);
        ema(t.w, p.w, c.one_minus_momentum);
        reinterpret_cast<float4*>(teacher)[i] = t;
      }
    }
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < size; i += THREADS) {
    adamw(param[i], grad[i], exp_avg[i], exp_avg_sq[i], decay, c);
    if constexpr (EMA) ema(teacher[i], param[i], c.one_minus_momentum);
  }
}

// The getter of the current stream lives in libtorch_cuda.so. Linked, this library would not load
// under a CPU-only torch; and dlsym(RTLD_DEFAULT) does not see it, because Python loads torch
// RTLD_LOCAL. So it is looked up in the library that torch has loaded.
cudaStream_t current_stream(int32_t device) {
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
void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) refuse(op, ": ", cudaGetErrorString(error));
}

// Calls enter(k, i) for the k-th tensor of a launch, which is tensor i of all, and launch(first,
// blocks) when the table is full and at the end.
template <typename Enter, typename Launch>
void in_tables(const Tensors& like, Blocks& blocks, const Enter& enter, const Launch& launch) {
  for (size_t first = 0; first < like.size(); first += MAX_TENSORS) {
    blocks.count = static_cast<int>(std::min<size_t>(MAX_TENSORS, like.size() - first));
    int64_t grid = 0;
    for (int k = 0; k < blocks.count; ++k) {
      const size_t i = first + static_cast<size_t>(k);
      enter(k, i);
      blocks.numel[k] = like[i].numel();
      blocks.first_block[k] = static_cast<int>(grid);
      grid += (blocks.numel[k] + CHUNK - 1) / CHUNK;
    }
    if (grid > INT32_MAX) refuse("fastmim: more than 2^31 - 1 blocks in one launch");
    blocks.first_block[blocks.count] = static_cast<int>(grid);
    if (grid > 0) launch(first, static_cast<unsigned>(grid));
  }
}

float* data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

void ema_update_cuda(Tensors teachers, Tensors students, Tensor momentum) {
  check_ema_update(teachers, students, momentum, device_of(momentum));
  const int32_t device = momentum.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  EmaTable table;
  in_tables(
      teachers, table.blocks,
      [&](int k, size_t i) {
        table.teacher[k] = data(teachers[i]);
        table.student[k] = read<float>(students[i]);
      },
      [&](size_t, unsigned grid) {
        ema_kernel<<<grid, THREADS, 0, stream>>>(table, read<double>(momentum));
        check_launch("ema_update_");
      });
}

void adamw_ema_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors teachers, Tensor step, Tensor lr, Tensor momentum, Tensor grad_scale,
                    Tensor skip, Tensor weight_decay, double beta1, double beta2, double eps) {
  check_adamw_ema(params, grads, exp_avgs, exp_avg_sqs, teachers, step, lr, momentum, grad_scale,
                  skip, weight_decay, device_of(step));
  if (params.empty()) return;
  const int32_t device = step.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  advance_step_kernel<<<1, 1, 0, stream>>>(static_cast<int64_t*>(step.mutable_data_ptr()),
                                           read<bool>(skip));
  check_launch("adamw_ema_");

  AdamWInputs inputs{read<int64_t>(step),
                     read<double>(lr),
                     read<double>(momentum),
                     read<double>(grad_scale),
                     read<bool>(skip),
                     nullptr,
                     beta1,
                     beta2,
                     eps};
  AdamWTable table;
  in_tables(
      params, table.blocks,
      [&](int k, size_t i) {
        table.param[k] = data(params[i]);
        table.grad[k] = read<float>(grads[i]);
        table.exp_avg[k] = data(exp_avgs[i]);
        table.exp_avg_sq[k] = data(exp_avg_sqs[i]);
        table.teacher[k] = teachers.empty() ? nullptr : data(teachers[i]);
      },
      [&](size_t first, unsigned grid) {
        inputs.weight_decay = read<double>(weight_decay) + first;
        const auto kernel = teachers.empty() ? adamw_kernel<false> : adamw_kernel<true>;
        kernel<<<grid, THREADS, 0, stream>>>(table, inputs);
        check_launch("adamw_ema_");
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_cuda));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_cuda));
}
