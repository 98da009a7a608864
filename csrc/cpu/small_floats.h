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

// Converts as a plain loop can do it. (Inlined, since it is compiled for several instruction sets.)
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  FASTJAC_ALWAYS_INLINE explicit BFloat16(float x) {
    uint32_t f;
    std::memcpy(&f, &x, sizeof f);
    bits = static_cast<uint16_t>(x == x ? to_bfloat16(f) : 0x7fc0u);
  }
  FASTJAC_ALWAYS_INLINE operator float() const {
    const uint32_t f = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &f, sizeof x);
    return x;
  }
};
// Converted by widen() and narrow() alone.
struct Half {
  uint16_t bits;
};

// What is computed in.
template <typename scalar_t>
using accumulator_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// n numbers one after the other, exactly; and back, to the nearest, ties to even.
void widen(const Half* from, int64_t n, float* to);
void narrow(const float* from, int64_t n, Half* to);

namespace small_floats {

struct Kernels {
  void (*widen)(const Half* from, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, Half* to);
};

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

} // namespace small_floats
} // namespace fastjac
