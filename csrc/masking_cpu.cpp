// sample_masks on the CPU: Philox4x32-10 for the words, then the rank of each word in its image.
//
// The algorithm is that of fastmim.ops.sample_masks, in integers: equal to the bit everywhere.
#include "cpu.h"

#include <bit>
#include <tuple>
#include <utility>

namespace {

using namespace fastmim;

// Salmon et al., SC 2011. Draw d gives the words 4 * d to 4 * d + 3.
FASTMIM_INLINE void philox(uint64_t seed, uint32_t epoch, uint64_t sample_id, uint32_t draws,
                           uint32_t* __restrict__ words) {
  for (uint32_t d = 0; d < draws; ++d) {
    uint32_t c0 = d, c1 = epoch;
    auto c2 = static_cast<uint32_t>(sample_id), c3 = static_cast<uint32_t>(sample_id >> 32);
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0;
      const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    const size_t first = size_t{4} * d;
    words[first] = c0;
    words[first + 1] = c1;
    words[first + 2] = c2;
    words[first + 3] = c3;
  }
}

// Sorts (word, position) by as many leading bits as give one word a bucket, then by insertion:
// words are uniform, so a bucket holds few.
class Ranking {
 public:
  explicit Ranking(uint32_t count)
      : count_(count),
        bits_(std::bit_width(count > 0 ? count - 1 : 0)),
        ends_(size_t{1} << bits_),
        keys_(count) {}

  void operator()(const uint32_t* words, int64_t* ids_shuffle, int64_t* ids_restore) {
    std::fill(ends_.begin(), ends_.end(), 0);
    for (uint32_t i = 0; i < count_; ++i) ++ends_[bucket(words[i])];
    uint32_t begin = 0;
    for (uint32_t& end : ends_) begin += std::exchange(end, begin);
    for (uint32_t i = 0; i < count_; ++i)
      keys_[ends_[bucket(words[i])]++] = uint64_t{words[i]} << 32 | i;

    for (uint32_t i = 1; i < count_; ++i) {
      const uint64_t key = keys_[i];
      uint32_t place = i;
      for (; place > 0 && keys_[place - 1] > key; --place) keys_[place] = keys_[place - 1];
      keys_[place] = key;
    }
    for (uint32_t rank = 0; rank < count_; ++rank) {
      const auto position = static_cast<uint32_t>(keys_[rank]);
      ids_shuffle[rank] = position;
      ids_restore[position] = rank;
    }
  }

 private:
  size_t bucket(uint32_t word) const { return uint64_t{word} << bits_ >> 32; }

  uint32_t count_;
  int bits_;
  std::vector<uint32_t> ends_;
  std::vector<uint64_t> keys_;
};

std::tuple<Tensor, Tensor> sample_masks_cpu(Tensor sample_ids, int64_t seed, int64_t epoch,
                                            int64_t num_patches) {
  check_sample_masks(sample_ids, num_patches, "cpu");
  const int64_t images = sample_ids.size(0);
  const Tensor ids_shuffle = new_tensor(sample_ids, {images, num_patches});
  const Tensor ids_restore = new_tensor(sample_ids, {images, num_patches});
  const int64_t* const samples = data<int64_t>(sample_ids);
  const int64_t stride = sample_ids.stride(0);
  int64_t* const shuffle = mutable_data<int64_t>(ids_shuffle);
  int64_t* const restore = mutable_data<int64_t>(ids_restore);
  const auto draws = static_cast<uint32_t>((num_patches + 3) / 4);
  const auto draw = simd<philox>();
  // A position takes some 20 times as long as an element of a copy.
  in_parallel(images, 20 * num_patches, [&](int64_t begin, int64_t end) {
    Ranking rank(static_cast<uint32_t>(num_patches));
    std::vector<uint32_t> words(size_t{4} * draws);
    for (int64_t b = begin; b < end; ++b) {
      draw(static_cast<uint64_t>(seed), static_cast<uint32_t>(epoch),
           static_cast<uint64_t>(samples[b * stride]), draws, words.data());
      rank(words.data(), shuffle + b * num_patches, restore + b * num_patches);
    }
  });
  return {ids_shuffle, ids_restore};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmim_native, CPU, m) {
  m.impl("sample_masks", TORCH_BOX(&sample_masks_cpu));
}
