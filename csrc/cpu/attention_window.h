// What attention_window.cpp asks of the kernels of one instruction set. The formulas are in
// common/attention_window.h. Includes nothing of PyTorch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/attention_window.h"
#include "isa.h"
#include "small_floats.h"

namespace fastjac::attention_window {

// What is done with an element type and a power. Arrays are of that type, but those of acc_t, its
// accumulator's.
struct Kernels {
  // a[i] = mean over the channels of |z|^p for n pixels of one sample; acc_t. z: the first pixel's.
  void (*means)(const Map& m, const void* z, int64_t n, double power, void* a);
  // The windows of a row, sums over k x k of a, over rows and then over columns: [columns]. column_sums: [w].
  // All acc_t.
  void (*window_row)(const Map& m, const void* a, void* column_sums, void* windows);
  // slope [n] holds features, and gets their slope; bend [n] their bend.
  void (*differentiate)(void* slope, void* bend, int64_t n, double power, double scale);
};
// Indexed by the power: any, 1, 2.
struct Table {
  Kernels of_double[3], of_float[3], of_bfloat16[3], of_half[3];
};

namespace avx512 {
extern const Table kernels;
}
namespace avx2 {
extern const Table kernels;
}
namespace portable {
extern const Table kernels;
}

template <typename scalar_t>
const Kernels& kernels(double power) {
  const Table& table = FASTJAC_KERNELS;
  const int which = power == 2 ? 2 : power == 1 ? 1 : 0;
  if constexpr (std::is_same_v<scalar_t, double>) return table.of_double[which];
  if constexpr (std::is_same_v<scalar_t, float>) return table.of_float[which];
  if constexpr (std::is_same_v<scalar_t, BFloat16>) return table.of_bfloat16[which];
  if constexpr (std::is_same_v<scalar_t, Half>) return table.of_half[which];
}

} // namespace fastjac::attention_window
