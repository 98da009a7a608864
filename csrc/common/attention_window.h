// The arithmetic of attention_window. With Z = features [B, C, h, w] and p the power,
//
//   A = mean over channels of |Z|^p,   P = mean of A over k x k windows, stride 1
//   position = P's argmax, value = P there
//   slope = dvalue/dZ = p |z|^(p-1) sign(z) / (C k^2),   bend = p (p-1) |z|^(p-2) / (C k^2)
//
// the last two inside the window, and zero elsewhere.
//
// Includes nothing of PyTorch: shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace fastjac::attention_window {

// |z|^p and its derivatives; kSquare: p is 2, and not looked at.
template <bool kSquare, typename acc_t>
struct Magnitude {
  acc_t p;

  FASTJAC_ALWAYS_INLINE acc_t value(acc_t z) const {
    if constexpr (kSquare) return z * z;
    return p == 1 ? std::fabs(z) : std::pow(std::fabs(z), p);
  }

  FASTJAC_ALWAYS_INLINE acc_t slope(acc_t z) const {
    if constexpr (kSquare) return 2 * z;
    const acc_t sign = acc_t(z > 0) - acc_t(z < 0); // at a NaN 0, as PyTorch's
    return p == 1 ? sign : p * sign * std::pow(std::fabs(z), p - 1);
  }

  FASTJAC_ALWAYS_INLINE acc_t bend(acc_t z) const {
    if constexpr (kSquare) return 2;
    return p == 1 ? acc_t(0) : p * (p - 1) * std::pow(std::fabs(z), p - 2);
  }
};

// The features, dense: [batch, channels, height, width], or [batch, height, width, channels].
struct Map {
  int64_t batch, channels, height, width, k;
  bool channels_last;

  FASTJAC_ALWAYS_INLINE int64_t pixels() const {
    return height * width;
  }
  // Positions of the window.
  FASTJAC_ALWAYS_INLINE int64_t rows() const {
    return height - k + 1;
  }
  FASTJAC_ALWAYS_INLINE int64_t columns() const {
    return width - k + 1;
  }
};

// A window's value, and row * columns + column; no window has a negative index.
template <typename acc_t>
struct Best {
  acc_t value;
  int64_t index;

  // Whether PyTorch's argmax prefers x: a NaN before any number, then the larger, then the first.
  FASTJAC_HOST_DEVICE bool loses_to(const Best& x) const {
    if (index < 0 || x.index < 0) return index < 0;
    const bool nan = value != value, x_nan = x.value != x.value;
    if (nan || x_nan) return x_nan && (!nan || x.index < index);
    return x.value > value || (x.value == value && x.index < index);
  }
};

} // namespace fastjac::attention_window
