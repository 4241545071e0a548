// How weights and gradients lie in memory; for the CPU and the CUDA kernels.
//
// A float32 master weight is stored in one of two ways:
//
// - plain: as float32, perhaps beside a bf16 copy that the network computes with;
// - split: in 4 bytes for both, a bf16 high half that the network computes with and a signed 16-bit
//   remainder, with   bits of the master = (high << 16) + remainder   modulo 2^32.
//
// So the high half is the master rounded to nearest with ties away from zero. To even would lose
// a bit: both neighbours of a tie would then round to the even one, with remainders of -2^15 and
// +2^15, and 16 bits do not hold the second.
#pragma once

#include <bit>
#include <cstdint>

#include "inline.h"

namespace fastmim {

// Bits of NaN as PyTorch makes them.
constexpr uint32_t QUIET_NAN = 0x7fc00000;

// Some weights of one tensor. All null: there are none.
struct Weights {
  float* fp32;          // plain storage alone
  uint16_t* bf16;       // the copy, which may be missing, or the high half
  uint16_t* remainder;  // split storage alone

  FASTMIM_INLINE Weights from(int64_t offset) const {
    return {fp32 ? fp32 + offset : nullptr, bf16 ? bf16 + offset : nullptr,
            remainder ? remainder + offset : nullptr};
  }
};

enum class Format : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// Some gradients of one tensor.
struct Gradients {
  const void* data;
  Format format;

  FASTMIM_INLINE const float* fp32() const { return static_cast<const float*>(data); }
  FASTMIM_INLINE const uint16_t* half() const { return static_cast<const uint16_t*>(data); }

  FASTMIM_INLINE Gradients from(int64_t offset) const {
    if (format == Format::FLOAT32) return {fp32() + offset, format};
    return {half() + offset, format};
  }
};

FASTMIM_INLINE bool is_nan(uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }

FASTMIM_INLINE float join(uint16_t high, uint16_t remainder) {
  const auto extended = static_cast<uint32_t>(static_cast<int16_t>(remainder));  // with its sign
  return std::bit_cast<float>((static_cast<uint32_t>(high) << 16) + extended);
}

struct Halves {
  uint16_t high, remainder;
};

// A NaN becomes the NaN of PyTorch: the bits 0x7fffffff, which GPUs make, would round to a high
// half of -0, and the network would compute on.
FASTMIM_INLINE Halves split(float master) {
  uint32_t bits = std::bit_cast<uint32_t>(master);
  bits = is_nan(bits) ? QUIET_NAN : bits;
  return {static_cast<uint16_t>((bits + 0x8000) >> 16), static_cast<uint16_t>(bits)};
}

// To nearest, ties to even: as .to(torch.bfloat16).
FASTMIM_INLINE uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>((is_nan(bits) ? QUIET_NAN : rounded) >> 16);
}

FASTMIM_INLINE float widen_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// By hand, because not every CPU has an instruction for it; exact, so the bits are the same.
FASTMIM_INLINE float widen_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  const uint32_t rebased = (magnitude << 13) + ((127 - 15) << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000;  // infinity, NaN
  const auto small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;  // denormal
  const uint32_t finite = magnitude < 0x400 ? std::bit_cast<uint32_t>(small) : rebased;
  return std::bit_cast<float>(sign | (magnitude < 0x7c00 ? finite : special));
}

}  // namespace fastmim
