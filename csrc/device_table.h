// The table of tensors that one launch works through, in device memory.
//
// As a kernel argument it would be limited to 32764 bytes, some 300 tensors. Uploaded once, it is
// found again by its content, so that a training step costs a comparison on the host and no copy.
#pragma once

#include <cstring>
#include <list>
#include <mutex>
#include <type_traits>

#include "cuda_stream.h"

namespace fastmim {

// Elements of a tensor that a block updates at a time, a multiple of 4: chunks of an aligned tensor
// are aligned.
constexpr int64_t CHUNK = 1 << 13;

struct ChunkOf {
  int32_t tensor;
  int32_t index;  // its first element is index * CHUNK
};

// What a kernel gets.
template <typename Entry>
struct Table {
  const Entry* entries;  // one for every tensor, empty ones too
  const ChunkOf* chunks;
  int64_t num_chunks;
  unsigned* arrived;  // zero between launches; for kernels that count their blocks
};

// Sets the capture mode of the thread, and back.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Tables with entries of one type, which has a member numel.
template <typename Entry>
class DeviceTables {
  // Compared by bytes, so no byte may be padding.
  static_assert(std::has_unique_object_representations_v<Entry>);

 public:
  // A table, and what keeps its memory: hold it until the kernel is launched.
  struct Found {
    Table<Entry> table;
    Tensor memory;
  };

  // Never destroyed: when static objects are, CUDA may have shut down.
  static DeviceTables& instance() {
    static DeviceTables& tables = *new DeviceTables;
    return tables;
  }

  // The table of the entries, for a kernel that is queued to this stream next.
  Found find(const char* op, const std::vector<Entry>& entries, int32_t device,
             cudaStream_t stream) {
    cudaStreamCaptureStatus capturing;
    check_cuda(op, cudaStreamIsCapturing(stream, &capturing));
    if (capturing != cudaStreamCaptureStatusNone) {
      const Image image(op, entries);
      return {image.placed_at(upload_for_ever(op, image.bytes)), Tensor()};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto kept = kept_.begin(); kept != kept_.end(); ++kept)
      if (kept->device == device && kept->stream == stream && same(kept->entries, entries)) {
        kept_.splice(kept_.begin(), kept_, kept);
        return kept->found;
      }
    const Image image(op, entries);
    const Tensor memory = upload(image.bytes, device);
    kept_.push_front(
        {device, stream, entries, {image.placed_at(memory.mutable_data_ptr()), memory}});
    if (kept_.size() > MOST_KEPT) kept_.pop_back();
    return kept_.front().found;
  }

 private:
  static constexpr size_t MOST_KEPT = 16;  // gradients come back at a few sets of addresses
  static constexpr size_t HEADER = 256;    // bytes; holds the counter and aligns what follows

  // A table belongs to the stream it was uploaded on. There the copy precedes every use without an
  // event, and PyTorch gives the memory of a dropped table to later work of the same stream only.
  struct Kept {
    int32_t device;
    cudaStream_t stream;
    std::vector<Entry> entries;
    Found found;
  };

  // The bytes of a table: header, entries, chunks.
  struct Image {
    std::vector<char> bytes;
    size_t chunks_at;
    int64_t num_chunks = 0;

    Image(const char* op, const std::vector<Entry>& entries)
        : chunks_at(HEADER + entries.size() * sizeof(Entry)) {
      for (const Entry& entry : entries) num_chunks += (entry.numel + CHUNK - 1) / CHUNK;
      if (num_chunks > INT32_MAX || entries.size() > INT32_MAX)
        refuse(op, ": more than 2^31 - 1 chunks of ", CHUNK, " elements in one call");
      bytes.resize(chunks_at + static_cast<size_t>(num_chunks) * sizeof(ChunkOf));
      if (!entries.empty())
        std::memcpy(bytes.data() + HEADER, entries.data(), entries.size() * sizeof(Entry));
      char* end = bytes.data() + chunks_at;
      for (size_t i = 0; i < entries.size(); ++i)
        for (int64_t k = 0; k * CHUNK < entries[i].numel; ++k, end += sizeof(ChunkOf)) {
          const ChunkOf chunk{static_cast<int32_t>(i), static_cast<int32_t>(k)};
          std::memcpy(end, &chunk, sizeof(chunk));
        }
    }

    Table<Entry> placed_at(void* memory) const {
      char* const start = static_cast<char*>(memory);
      return {reinterpret_cast<const Entry*>(start + HEADER),
              reinterpret_cast<const ChunkOf*>(start + chunks_at), num_chunks,
              reinterpret_cast<unsigned*>(start)};
    }
  };

  static bool same(const std::vector<Entry>& a, const std::vector<Entry>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Entry)) == 0);
  }

  // Queued, without waiting: from pinned memory, which PyTorch reuses only after the copy.
  static Tensor upload(const std::vector<char>& bytes, int32_t device) {
    const std::vector<int64_t> size{static_cast<int64_t>(bytes.size())};
    const Tensor pinned =
        torch::stable::empty(size, ScalarType::Byte, std::nullopt,
                             torch::stable::Device(torch::headeronly::DeviceType::CPU), true);
    std::memcpy(pinned.mutable_data_ptr(), bytes.data(), bytes.size());
    Tensor memory = torch::stable::empty(
        size, ScalarType::Byte, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
    torch::stable::copy_(memory, pinned, /*non_blocking=*/true);
    return memory;
  }

  // For a graph under capture: copied now, on a stream of its own, so that the graph has the kernel
  // alone. Whether and when the graph will run or be destroyed is not known here: the memory
  // is never freed, and a table that no kernel of this stream has waited for is not offered to
  // other calls. Waits for the copy, once per capture. Relaxed, because while capturing CUDA
  // refuses allocations; these need not be replayed.
  static void* upload_for_ever(const char* op, const std::vector<char>& bytes) {
    const RelaxedCapture relaxed;
    void* memory = nullptr;
    cudaStream_t side = nullptr;
    check_cuda(op, cudaMalloc(&memory, bytes.size()));
    check_cuda(op, cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    cudaError_t error =
        cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, side);
    if (error == cudaSuccess) error = cudaStreamSynchronize(side);
    cudaStreamDestroy(side);
    check_cuda(op, error);
    return memory;
  }

  std::mutex mutex_;
  std::list<Kept> kept_;  // the latest used first
};

}  // namespace fastmim
