// gather_tokens and scatter_tokens on CUDA: rows of bytes, any dtype.
//
// Bound by memory: every row is read once and written once; the scatter also writes zeros to the
// whole result before. One writer per row and no atomics: deterministic.
#include <cassert>

#include "cuda_stream.h"
#include "tensors.h"

namespace {

using namespace fastmim;

constexpr int THREADS = 256;

// Row r of (B, K) is token ids[r] of (B, N), image r / K. Lanes x of a block share row y.
template <typename Word, bool SCATTER>
__global__ void __launch_bounds__(THREADS)
    copy_rows_kernel(const Word* __restrict__ from, const int64_t* __restrict__ ids,
                     Word* __restrict__ to, int64_t rows, int64_t N, int64_t K,
                     int64_t words) {  // in a row
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; r < rows;
       r += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t id = ids[r];
    assert(id >= 0 && id < N);  // in debug builds; ids are made by this library
    const int64_t named = ((r / K) * N + id) * words;
    const Word* const source = from + (SCATTER ? r * words : named);
    Word* const target = to + (SCATTER ? named : r * words);
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) target[i] = source[i];
  }
}

struct Rows {
  const char* from;
  const int64_t* ids;
  char* to;
  int64_t rows, N, K, bytes;  // bytes of a row
};

template <typename Word, bool SCATTER>
void launch(const Rows& r, cudaStream_t stream) {
  const int64_t words = r.bytes / static_cast<int64_t>(sizeof(Word));
  unsigned lanes = 1;  // a power of two up to a warp, so that short rows leave few idle
  while (lanes < 32 && lanes < words) lanes *= 2;
  const dim3 block(lanes, THREADS / lanes);
  const int64_t blocks = (r.rows + block.y - 1) / block.y;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX));
  copy_rows_kernel<Word, SCATTER><<<grid, block, 0, stream>>>(
      reinterpret_cast<const Word*>(r.from), r.ids, reinterpret_cast<Word*>(r.to), r.rows, r.N, r.K,
      words);
}

// The widest words that divide the row and both addresses.
template <bool SCATTER>
void copy_rows(const char* op, const Rows& r, cudaStream_t stream) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(r.from) | reinterpret_cast<uintptr_t>(r.to) |
                         static_cast<uintptr_t>(r.bytes);
  const auto copy = bits % 16 == 0  ? &launch<uint4, SCATTER>
                    : bits % 8 == 0 ? &launch<uint64_t, SCATTER>
                    : bits % 4 == 0 ? &launch<uint32_t, SCATTER>
                    : bits % 2 == 0 ? &launch<uint16_t, SCATTER>
                                    : &launch<uint8_t, SCATTER>;
  copy(r, stream);
  check_launch(op);
}

void check(const char* op, const Tensor& x, const Tensor& ids) {
  if (x.dim() != 3 || ids.dim() != 2 || x.size(0) != ids.size(0) ||
      ids.scalar_type() != ScalarType::Long)
    refuse(op, ": expected x (B, N, D) and ids (B, K) of int64, got ", shape_of(x), " and ",
           shape_of(ids), " of ", torch::headeronly::toString(ids.scalar_type()));
  Checks{op, device_of(x)}.placed("ids", -1, ids);
}

// `out`, (B, N or K, D), filled from `x`; N is the length of the tensor that ids point into.
template <bool SCATTER>
Tensor copy_tokens(const char* op, const Tensor& strided_x, const Tensor& strided_ids, int64_t N) {
  const Tensor x = torch::stable::contiguous(strided_x), ids = torch::stable::contiguous(strided_ids);
  const int64_t B = x.size(0), D = x.size(2), K = ids.size(1);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = new_tensor(x, std::vector<int64_t>{B, SCATTER ? N : K, D});
  const cudaStream_t stream = current_stream(device);
  const Rows rows{static_cast<const char*>(x.const_data_ptr()),
                  static_cast<const int64_t*>(ids.const_data_ptr()),
                  static_cast<char*>(out.mutable_data_ptr()),
                  B * K,
                  N,
                  K,
                  D * static_cast<int64_t>(x.element_size())};
  if (SCATTER && out.numel() > 0)
    check_cuda(op, cudaMemsetAsync(rows.to, 0, static_cast<size_t>(B * N * rows.bytes), stream));
  if (rows.rows > 0 && rows.bytes > 0) copy_rows<SCATTER>(op, rows, stream);
  return out;
}

Tensor gather_tokens_cuda(Tensor x, Tensor ids) {
  check("gather_tokens", x, ids);
  return copy_tokens<false>("gather_tokens", x, ids, x.size(1));
}

Tensor scatter_tokens_cuda(Tensor x, Tensor ids, int64_t num_tokens) {
  check("scatter_tokens", x, ids);
  if (x.size(1) != ids.size(1) || ids.size(1) > num_tokens)
    refuse("scatter_tokens: expected x (B, K, D), ids (B, K) and num_tokens >= K, got ",
           shape_of(x), ", ", shape_of(ids), " and ", num_tokens);
  return copy_tokens<true>("scatter_tokens", x, ids, num_tokens);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CUDA, m) {
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens_cuda));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens_cuda));
}
