// bfloat16 and float16 on the CPU: stored in 16 bits, and float32 in arithmetic. Includes nothing of
// PyTorch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/macros.h"

namespace fastjac {

// The bits of the nearest bfloat16, ties to even, for those of a float32: a number, or a vector of numbers.
// Of a NaN's the lower half must be zero, as it is in one that was a bfloat16 or that arithmetic made.
template <typename Bits>
FASTJAC_ALWAYS_INLINE Bits to_bfloat16(const Bits& f) {
  return (f + 0x7fffu + ((f >> 16) & 1u)) >> 16;
}

// As they lie in memory; stored_lanes.h converts them.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What is computed in.
template <typename scalar_t>
using accumulator_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

} // namespace fastjac
