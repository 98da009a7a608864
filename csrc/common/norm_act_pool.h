// The arithmetic of norm_act_pool, shared by the CPU and the CUDA kernels. Includes nothing of
// PyTorch. Per channel, with d = u - mean, r = invstd, x^ = d r, m the mean over N values:
//
//   z = scale u + shift (+ residual),  a = act(z),  y = pool(a)
//   g = act'(z) unpool(gy),  P(g) = g - m(g) - x^ m(g x^)
//
//   backward:    gu = gamma r P(g) + coefficient x^ + curvature      (P the identity: not training)
//   pushforward: tn = gamma r P(tu),  T = r sum P(g) tu,  ty = act'(z) (tn + tresidual)
//                kappa = -r (gamma r P(g) m(x^ tu) + tn m(g x^))
//
// Everything is affine in five sums per channel, so what is written for a pixel is
//
//   of_g g + of_tu tu + of_d d + constant.
//
// d, and not u, because u's mean may be far larger than its deviation.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace fastjac::norm_act_pool {

enum class Activation : int { kNone, kRelu, kRelu6, kLeakyRelu, kSilu };

// act(z). T is a number, or a vector of numbers that ?: selects among lane by lane. exp(x) is called
// for SiLU alone. A NaN stays one.
template <typename T, typename acc_t, typename Exp>
FASTJAC_ALWAYS_INLINE T activate(Activation kind, acc_t slope, const T& z, const Exp& exp) {
  const T zero = T{};
  switch (kind) {
    case Activation::kNone:
      return z;
    case Activation::kRelu:
      return z <= zero ? zero : z;
    case Activation::kRelu6: {
      const T low = z <= zero ? zero : z, six = zero + acc_t(6);
      return low >= six ? six : low;
    }
    case Activation::kLeakyRelu:
      return z > zero ? z : z * slope;
    case Activation::kSilu:
      return z / (exp(-z) + acc_t(1));
  }
  return z;
}

// act'(z) x, for a cotangent or a tangent x. At a kink, and for a NaN, PyTorch's choice.
template <typename T, typename acc_t, typename Exp>
FASTJAC_ALWAYS_INLINE T
activate_backward(Activation kind, acc_t slope, const T& z, const T& x, const Exp& exp) {
  const T zero = T{};
  switch (kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return z <= zero ? zero : x;
    case Activation::kRelu6: {
      const T low = z <= zero ? zero : x, six = zero + acc_t(6);
      return z >= six ? zero : low;
    }
    case Activation::kLeakyRelu:
      return z > zero ? x : x * slope;
    case Activation::kSilu: {
      const T sigmoid = acc_t(1) / (exp(-z) + acc_t(1));
      return x * sigmoid * (z * (acc_t(1) - sigmoid) + acc_t(1));
    }
  }
  return x;
}

// A square max-pool; kernel 1 is none.
struct Pool {
  int kernel, stride, padding;

  FASTJAC_ALWAYS_INLINE int64_t output(int64_t size) const {
    return (size + 2 * padding - kernel) / stride + 1;
  }
};

// What becomes of the channels' moments: [C] each, and each may be null.
template <typename acc_t>
struct Statistics {
  acc_t *mean, *var, *invstd, *running_mean, *running_var;
  double momentum, unbiased, eps;

  // variance: biased. update: the running ones, as PyTorch's BatchNorm does.
  FASTJAC_ALWAYS_INLINE void write(int64_t c, double m, double variance, bool update) const {
    if (mean != nullptr) mean[c] = static_cast<acc_t>(m);
    if (var != nullptr) var[c] = static_cast<acc_t>(variance);
    if (invstd != nullptr) invstd[c] = inverse(variance);
    if (update && running_mean != nullptr) running_mean[c] = moved(running_mean[c], m);
    if (update && running_var != nullptr) {
      running_var[c] = moved(running_var[c], variance * unbiased);
    }
  }
  // The running ones are those to normalise with.
  FASTJAC_ALWAYS_INLINE void copy_running(int64_t c) const {
    mean[c] = running_mean[c];
    invstd[c] = inverse(running_var[c]);
  }

 private:
  FASTJAC_ALWAYS_INLINE acc_t inverse(double variance) const {
    return static_cast<acc_t>(1 / std::sqrt(variance + eps));
  }
  FASTJAC_ALWAYS_INLINE acc_t moved(double from, double to) const {
    return static_cast<acc_t>((1 - momentum) * from + momentum * to);
  }
};

// What the biased variance of so many values is multiplied by.
inline double unbiased(int64_t count) {
  return count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1;
}

// A channel's sums over all its values, in the order in which kernels keep them.
template <typename acc_t>
struct Sums {
  acc_t g, gd, gt, t, td; // of g, g d, g tu, tu, tu d
};

// What a pixel gets: of_g g + of_tu tu + of_d d + constant.
template <typename acc_t>
struct Affine {
  acc_t of_g, of_tu, of_d, constant;
};

// gamma r P(x) for x with the sums of x and x d; the coefficient of x stands in of_g.
template <typename acc_t>
FASTJAC_ALWAYS_INLINE Affine<acc_t> projection(
    acc_t sum, acc_t sum_d, acc_t scale, acc_t invstd, acc_t count
) {
  return {scale, 0, -scale * invstd * invstd * sum_d / count, -scale * sum / count};
}

// u's cotangent, without the curvature. scale = gamma r.
template <typename acc_t>
FASTJAC_ALWAYS_INLINE Affine<acc_t> backward(
    const Sums<acc_t>& s, acc_t scale, acc_t invstd, acc_t count, bool training, acc_t coefficient
) {
  Affine<acc_t> k =
      training ? projection(s.g, s.gd, scale, invstd, count) : Affine<acc_t>{scale, 0, 0, 0};
  k.of_d += coefficient * invstd;
  return k;
}

// tn, the tangent of BatchNorm's output; batch: the statistics vary with u.
template <typename acc_t>
FASTJAC_ALWAYS_INLINE Affine<acc_t> tangent(
    const Sums<acc_t>& s, acc_t scale, acc_t invstd, acc_t count, bool batch
) {
  Affine<acc_t> k =
      batch ? projection(s.t, s.td, scale, invstd, count) : Affine<acc_t>{scale, 0, 0, 0};
  return {0, k.of_g, k.of_d, k.constant};
}

// T = r sum P(g) tu, the gradient of gamma. The coefficient is -scale T / count.
template <typename acc_t>
FASTJAC_ALWAYS_INLINE acc_t total(const Sums<acc_t>& s, acc_t invstd, acc_t count, bool batch) {
  if (!batch) return invstd * s.gt;
  return invstd * (s.gt - s.g * (s.t / count) - invstd * invstd * s.gd * (s.td / count));
}

// kappa, for batch statistics.
template <typename acc_t>
FASTJAC_ALWAYS_INLINE Affine<acc_t> curvature(
    const Sums<acc_t>& s, acc_t scale, acc_t invstd, acc_t count
) {
  const acc_t along_t = -invstd * (invstd * s.td / count); // -r m(x^ tu)
  const acc_t along_g = -invstd * (invstd * s.gd / count); // -r m(g x^)
  const Affine<acc_t> g = projection(s.g, s.gd, scale, invstd, count);
  const Affine<acc_t> t = projection(s.t, s.td, scale, invstd, count);
  return {
      along_t * g.of_g, along_g * t.of_g, along_t * g.of_d + along_g * t.of_d,
      along_t * g.constant + along_g * t.constant
  };
}

} // namespace fastjac::norm_act_pool
