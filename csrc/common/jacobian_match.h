// The arithmetic of jacobian_match, for one sample with Jacobians s (student) and t (teacher) of n
// elements:
//
//   a = max(|s|, eps), b = max(|t|, eps), u = s / a, d = u - t / b
//   loss = sum d^2,   v = dloss/ds = (2 / a) (d - [|s| >= eps] <d, u> u)
//
// and raw: d = s - t, loss = sum d^2, v = 2 d.
//
// The loss comes from the difference itself, since 2 - 2<s, t>/(ab) cancels when the two agree. So
// does <d, u>, which then also removes from v whatever rounding of a has left along u. Nothing is
// multiplied by more than 1/a at a time, so that norms from 1e-12 to 1e12 neither overflow nor
// underflow in fp32.
//
// Includes nothing of PyTorch: shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>

#include "macros.h"

namespace fastjac::jacobian_match {

// Two sums that are accumulated together.
template <typename acc_t>
struct Sums {
  acc_t first, second;
};

// A sample's 1/a and 1/b, and whether a is the norm (its derivative counts) or eps (a constant).
template <typename acc_t>
struct Scales {
  acc_t inv_a, inv_b;
  bool a_is_norm;
};

// From the squared norms of s and t. The comparisons keep a NaN, as clamp does.
template <typename acc_t>
FASTJAC_HOST_DEVICE inline Scales<acc_t> scales(Sums<acc_t> squared_norms, acc_t eps) {
  const acc_t norm_s = std::sqrt(squared_norms.first), norm_t = std::sqrt(squared_norms.second);
  return {
      acc_t(1) / (norm_s < eps ? eps : norm_s), acc_t(1) / (norm_t < eps ? eps : norm_t),
      norm_s >= eps
  };
}

// x * y, never contracted into a fused multiply-add: equal Jacobians must give d = 0 exactly.
// (On the host, -ffp-contract=off sees to it.)
FASTJAC_HOST_DEVICE inline float product(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
FASTJAC_HOST_DEVICE inline double product(double x, double y) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

// x a vector of numbers, on the host.
template <typename T, typename acc_t>
FASTJAC_ALWAYS_INLINE T product(const T& x, acc_t y) {
  return x * y;
}

// One element's d and u, or a vector T of them; raw: u = s is not used.
template <bool kNormalize, typename acc_t, typename T = acc_t>
struct Element {
  T d, u;

  FASTJAC_HOST_DEVICE Element(const T& s, const T& t, const Scales<acc_t>& k) {
    if constexpr (kNormalize) {
      u = product(s, k.inv_a);
      d = u - product(t, k.inv_b);
    } else {
      u = s;
      d = s - t;
    }
  }

  // along = [a is the norm] <d, u>
  FASTJAC_HOST_DEVICE T gradient(const Scales<acc_t>& k, acc_t along) const {
    if constexpr (kNormalize) {
      return 2 * k.inv_a * (d - along * u);
    } else {
      return acc_t(2) * d;
    }
  }
};

} // namespace fastjac::jacobian_match
