// ema_update_ and adamw_ema_ on CUDA: one launch for any list of tensors.
//
// As many blocks as the GPU holds at once share the chunks of all tensors; each element has one
// writer: deterministic. Bound by memory: 12 bytes an element (EMA), 28 (AdamW), 36 (both); in
// split storage the same with two bytes less for bf16 gradients, 2 more for every bf16 copy. The
// host reads no tensor: scalars, step and the skip flag are read by the kernels, so a CUDA graph
// replays with their new values.
#include "adamw.h"
#include "device_table.h"
#include "optim_arguments.h"

namespace {

using namespace fastmim;

constexpr int THREADS = 256;

struct EmaEntry {
  Weights teacher;
  Weights student;
  int64_t numel;
};

struct AdamWEntry {
  Weights param;
  Weights teacher;
  Gradients grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t numel;
};

struct AdamWInputs {
  int64_t* step;
  const double* lr;
  const double* momentum;
  const double* grad_scale;
  const double* clip;
  const bool* skip;
  const double* weight_decay;  // of every tensor
  double beta1, beta2, eps;
};

enum class Storage { NONE, PLAIN, SPLIT };

__device__ bool aligned(const void* pointer, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// Whether four weights, gradients or numbers can be read and written at once. Null is aligned.
__device__ bool aligned(const Weights& w) {
  return aligned(w.fp32, 16) && aligned(w.bf16, 8) && aligned(w.remainder, 8);
}
__device__ bool aligned(const Gradients& g) {
  return aligned(g.data, g.format == Format::FLOAT32 ? 16 : 8);
}
__device__ bool aligned(const float* x) { return aligned(x, 16); }

// Adjacent numbers that a thread reads and writes at once: four where all pointers allow it, else
// one. Four 16-bit numbers are 8 bytes, not 16, so that in every list adjacent threads touch
// adjacent memory.
template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
  T x[WIDTH];
};

template <int WIDTH, typename T>
__device__ Pack<T, WIDTH> read(const T* data, int i) {
  return reinterpret_cast<const Pack<T, WIDTH>*>(data)[i];
}

template <int WIDTH, typename T>
__device__ void write(T* data, int i, const Pack<T, WIDTH>& pack) {
  reinterpret_cast<Pack<T, WIDTH>*>(data)[i] = pack;
}

// Weights as they lie in memory: all loads of a pack are issued before the first is converted.
template <Storage STORAGE, int WIDTH>
struct WeightPack {
  Pack<float, WIDTH> master;

  __device__ WeightPack(const Weights& w, int i) : master(read<WIDTH>(w.fp32, i)) {}
  __device__ float get(int j) const { return master.x[j]; }
  __device__ void put(int j, float value) { master.x[j] = value; }
  __device__ void store(const Weights& w, int i) const {
    write(w.fp32, i, master);
    if (w.bf16 == nullptr) return;
    Pack<uint16_t, WIDTH> copy;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) copy.x[j] = round_to_bfloat16(master.x[j]);
    write(w.bf16, i, copy);
  }
};

template <int WIDTH>
struct WeightPack<Storage::SPLIT, WIDTH> {
  Pack<uint16_t, WIDTH> high, remainder;

  __device__ WeightPack(const Weights& w, int i)
      : high(read<WIDTH>(w.bf16, i)), remainder(read<WIDTH>(w.remainder, i)) {}
  __device__ float get(int j) const { return join(high.x[j], remainder.x[j]); }
  __device__ void put(int j, float value) {
    const Halves halves = split(value);
    high.x[j] = halves.high;
    remainder.x[j] = halves.remainder;
  }
  __device__ void store(const Weights& w, int i) const {
    write(w.bf16, i, high);
    write(w.remainder, i, remainder);
  }
};

template <int WIDTH>
struct GradientPack {
  Format format;
  Pack<float, WIDTH> fp32;
  Pack<uint16_t, WIDTH> half;

  __device__ GradientPack(const Gradients& g, int i) : format(g.format) {
    if (format == Format::FLOAT32)
      fp32 = read<WIDTH>(g.fp32(), i);
    else
      half = read<WIDTH>(g.half(), i);
  }
  __device__ float get(int j) const {
    if (format == Format::FLOAT32) return fp32.x[j];
    return format == Format::BFLOAT16 ? widen_bfloat16(half.x[j]) : widen_float16(half.x[j]);
  }
};

// The packs `begin` to `end` of a chunk.
template <int WIDTH, Storage TEACHER, Storage STUDENT>
__device__ void ema_packs(const EmaEntry& e, int begin, int end, float weight) {
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += THREADS) {
    WeightPack<TEACHER, WIDTH> t(e.teacher, i);
    const WeightPack<STUDENT, WIDTH> s(e.student, i);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      float teacher = t.get(j);
      ema(teacher, s.get(j), weight);
      t.put(j, teacher);
    }
    t.store(e.teacher, i);
  }
}

template <Storage TEACHER, Storage STUDENT>
__global__ void __launch_bounds__(THREADS)
    ema_kernel(const __grid_constant__ Table<EmaEntry> table, const double* momentum,
               const bool* skip) {
  if (*skip) return;
  const float weight = static_cast<float>(1.0 - *momentum);
  for (int64_t k = static_cast<int64_t>(blockIdx.x); k < table.num_chunks;
       k += static_cast<int64_t>(gridDim.x)) {
    const ChunkOf chunk = table.chunks[k];
    const EmaEntry& all = table.entries[chunk.tensor];
    const int64_t offset = chunk.index * CHUNK;
    const int size = static_cast<int>(min(CHUNK, all.numel - offset));
    const EmaEntry e{all.teacher.from(offset), all.student.from(offset), size};
    const int packs = aligned(e.teacher) && aligned(e.student) ? size / 4 : 0;
    ema_packs<4, TEACHER, STUDENT>(e, 0, packs, weight);
    ema_packs<1, TEACHER, STUDENT>(e, packs * 4, size, weight);
  }
}

// The number of this step, which `step` becomes when the last block has read it: then no block of
// this launch needs the old value any more. The fence before the count orders a block's read
// before it; the fence after orders the last block's write behind all counts, so behind all
// reads. Called by one thread of every block; leaves `arrived` at zero for the next launch.
__device__ int64_t advance(int64_t* step, unsigned* arrived) {
  const int64_t now = *static_cast<volatile int64_t*>(step) + 1;
  __threadfence();
  if (atomicAdd(arrived, 1u) + 1 == static_cast<int64_t>(gridDim.x)) {
    __threadfence();
    *step = now;
    *arrived = 0;
  }
  return now;
}

template <int WIDTH, Storage PARAM, Storage TEACHER>
__device__ void adamw_packs(const AdamWEntry& e, int begin, int end, float decay,
                            const AdamWScalars& c) {
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += THREADS) {
    WeightPack<PARAM, WIDTH> p(e.param, i);
    Pack<float, WIDTH> m = read<WIDTH>(e.exp_avg, i);
    Pack<float, WIDTH> v = read<WIDTH>(e.exp_avg_sq, i);
    const GradientPack<WIDTH> g(e.grad, i);
    const auto step = [&](int j) {
      float param = p.get(j);
      adamw(param, g.get(j), m.x[j], v.x[j], decay, c);
      p.put(j, param);
      return param;
    };
    if constexpr (TEACHER == Storage::NONE) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) step(j);
    } else {
      WeightPack<TEACHER, WIDTH> t(e.teacher, i);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        float teacher = t.get(j);
        ema(teacher, step(j), c.one_minus_momentum);
        t.put(j, teacher);
      }
      t.store(e.teacher, i);
    }
    p.store(e.param, i);
    write(e.exp_avg, i, m);
    write(e.exp_avg_sq, i, v);
  }
}

template <Storage PARAM, Storage TEACHER>
__global__ void __launch_bounds__(THREADS, 2)  // left to itself, ptxas spills one at 80 registers
    adamw_kernel(const __grid_constant__ Table<AdamWEntry> table,
                 const __grid_constant__ AdamWInputs inputs) {
  if (*inputs.skip) return;
  const double lr = *inputs.lr;
  __shared__ AdamWScalars shared;
  if (threadIdx.x == 0)  // double arithmetic is slow on some GPUs: once a block
    shared = adamw_scalars(lr, *inputs.momentum, *inputs.grad_scale, *inputs.clip, inputs.beta1,
                           inputs.beta2, inputs.eps, advance(inputs.step, table.arrived));
  __syncthreads();
  const AdamWScalars c = shared;
  for (int64_t k = static_cast<int64_t>(blockIdx.x); k < table.num_chunks;
       k += static_cast<int64_t>(gridDim.x)) {
    const ChunkOf chunk = table.chunks[k];
    const AdamWEntry& all = table.entries[chunk.tensor];
    const int64_t offset = chunk.index * CHUNK;
    const int size = static_cast<int>(min(CHUNK, all.numel - offset));
    const AdamWEntry e{all.param.from(offset), all.teacher.from(offset), all.grad.from(offset),
                       all.exp_avg + offset,   all.exp_avg_sq + offset,  size};
    const float decay = weight_decay_factor(lr, inputs.weight_decay[chunk.tensor]);
    const bool whole = aligned(e.param) && aligned(e.teacher) && aligned(e.grad) &&
                       aligned(e.exp_avg) && aligned(e.exp_avg_sq);
    const int packs = whole ? size / 4 : 0;
    adamw_packs<4, PARAM, TEACHER>(e, 0, packs, decay, c);
    adamw_packs<1, PARAM, TEACHER>(e, packs * 4, size, decay, c);
  }
}

// A block for every chunk, at most those that the GPU holds at once: each then sets up once.
template <typename Kernel>
unsigned blocks_for(const char* op, Kernel kernel, int64_t num_chunks, int32_t device) {
  int processors = 0, resident = 0;
  check_cuda(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, THREADS, 0));
  return static_cast<unsigned>(std::min<int64_t>(num_chunks, int64_t{processors} * resident));
}

template <Storage TEACHER>
auto ema_kernel_for(const WeightLists& students) {
  return students.split() ? &ema_kernel<TEACHER, Storage::SPLIT>
                          : &ema_kernel<TEACHER, Storage::PLAIN>;
}

template <Storage PARAM>
auto adamw_kernel_for(const WeightLists& teachers) {
  if (!teachers.exist()) return &adamw_kernel<PARAM, Storage::NONE>;
  return teachers.split() ? &adamw_kernel<PARAM, Storage::SPLIT>
                          : &adamw_kernel<PARAM, Storage::PLAIN>;
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

void ema_update_cuda(const EmaArguments& given) {
  const auto& teachers = given.teachers.tensors;
  const int32_t device = given.momentum.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  std::vector<EmaEntry> entries(teachers.size());
  for (size_t i = 0; i < entries.size(); ++i)
    entries[i] = {given.teachers.at(i), given.students.at(i), teachers[i].numel()};

  const auto found =
      DeviceTables<EmaEntry>::instance().find("ema_update_", entries, device, stream);
  if (found.table.num_chunks == 0) return;
  const auto kernel = given.teachers.split() ? ema_kernel_for<Storage::SPLIT>(given.students)
                                             : ema_kernel_for<Storage::PLAIN>(given.students);
  const unsigned blocks = blocks_for("ema_update_", kernel, found.table.num_chunks, device);
  kernel<<<blocks, THREADS, 0, stream>>>(found.table, const_data<double>(given.momentum),
                                         const_data<bool>(given.skip));
  check_launch("ema_update_");
}

void adamw_ema_cuda(const AdamWArguments& given) {
  if (!given.params.exist()) return;
  const int32_t device = given.step.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  std::vector<AdamWEntry> entries(given.grads.size());
  for (size_t i = 0; i < entries.size(); ++i)
    entries[i] = {given.params.at(i),
                  given.teachers.at(i),
                  gradients(given.grads[i]),
                  data<float>(given.exp_avgs[i]),
                  data<float>(given.exp_avg_sqs[i]),
                  given.grads[i].numel()};
  const AdamWInputs inputs{data<int64_t>(given.step),
                           const_data<double>(given.lr),
                           const_data<double>(given.momentum),
                           const_data<double>(given.grad_scale),
                           const_data<double>(given.clip),
                           const_data<bool>(given.skip),
                           const_data<double>(given.weight_decay),
                           given.beta1,
                           given.beta2,
                           given.eps};

  const auto found =
      DeviceTables<AdamWEntry>::instance().find("adamw_ema_", entries, device, stream);
  const auto kernel = given.params.split() ? adamw_kernel_for<Storage::SPLIT>(given.teachers)
                                           : adamw_kernel_for<Storage::PLAIN>(given.teachers);
  // One block at least: the step counts, even if all tensors are empty.
  const unsigned blocks = std::max(
      1u, blocks_for("adamw_ema_", kernel, found.table.num_chunks, device));
  kernel<<<blocks, THREADS, 0, stream>>>(found.table, inputs);
  check_launch("adamw_ema_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update<&ema_update_cuda>));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema<&adamw_ema_cuda>));
}
