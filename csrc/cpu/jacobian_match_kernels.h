// jacobian_match's kernels on the CPU, for one instruction set (lanes.h says how it is compiled): what is
// done with a block of a sample. The formula is in common/jacobian_match.h.
#pragma once

#include "jacobian_match.h"
#include "lanes.h"

namespace fastjac::jacobian_match::FASTJAC_TARGET_NAME {
namespace {

using namespace fastjac::FASTJAC_TARGET_NAME;

// Independent lanes of a sum, on any instruction set: enough registers to hide an addition's latency.
constexpr int kSumLanes = 32;

template <typename scalar_t>
struct Blocks {
  using acc_t = accumulator_t<scalar_t>;
  static constexpr int L = kLanes<acc_t>, kVectors = kSumLanes / L;
  using V = Lanes<acc_t, L>;
  template <bool kNormalize>
  using Elements = Element<kNormalize, acc_t, V>;

  static Scales<acc_t> narrow(const Scales<double>& k) {
    return {static_cast<acc_t>(k.inv_a), static_cast<acc_t>(k.inv_b), k.a_is_norm};
  }

  // The lanes, added up as a tree.
  static double add_up(const V (&sums)[kVectors]) {
    acc_t lanes[kSumLanes];
    for (int k = 0; k < kVectors; ++k) store(lanes + k * L, sums[k]);
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

  // Both sums of terms(s, t); a lane that is not there has zeros.
  template <typename F>
  static Sums<double> sums(const void* js, const void* jt, int64_t n, const F& terms) {
    const auto* s = static_cast<const scalar_t*>(js);
    const auto* t = static_cast<const scalar_t*>(jt);
    V first[kVectors] = {}, second[kVectors] = {};
    const auto add = [&](int k, int64_t i, auto count) FASTJAC_INLINED {
      const Sums<V> x = terms(load<L>(s + i, count), load<L>(t + i, count));
      first[k] += x.first;
      second[k] += x.second;
    };
    int64_t i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) add(k, i + k * L, Whole{});
    }
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k, i += L) {
      if (i < n) add(k, i, Part{n - i < L ? n - i : L});
    }
    return {add_up(first), add_up(second)};
  }

  static Sums<double> squared_norms(const void* js, const void* jt, int64_t n) {
    return sums(js, jt, n, [](const V& s, const V& t) FASTJAC_INLINED -> Sums<V> {
      return {s * s, t * t};
    });
  }

  template <bool kNormalize>
  static Sums<double> difference(
      const void* js, const void* jt, int64_t n, const Scales<double>& scales
  ) {
    const Scales<acc_t> k = narrow(scales);
    return sums(js, jt, n, [k](const V& s, const V& t) FASTJAC_INLINED -> Sums<V> {
      const Elements<kNormalize> e(s, t, k);
      return {e.d * e.d, kNormalize ? V(e.d * e.u) : V{}};
    });
  }

  template <bool kNormalize>
  static void write_gradient(
      const void* js, const void* jt, void* v, int64_t n, const Scales<double>& scales, double along
  ) {
    const auto* s = static_cast<const scalar_t*>(js);
    const auto* t = static_cast<const scalar_t*>(jt);
    auto* out = static_cast<scalar_t*>(v);
    const Scales<acc_t> k = narrow(scales);
    const acc_t a = static_cast<acc_t>(along);
    const auto write = [&](int64_t i, auto count) FASTJAC_INLINED {
      const Elements<kNormalize> e(load<L>(s + i, count), load<L>(t + i, count), k);
      store(out + i, e.gradient(k, a), count);
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) write(i, Whole{});
    if (i < n) write(i, Part{n - i});
  }

  static constexpr Kernels kernels = {
      squared_norms,
      {difference<false>, difference<true>},
      {write_gradient<false>, write_gradient<true>},
  };
};

} // namespace

const Table kernels = {
    Blocks<double>::kernels, Blocks<float>::kernels, Blocks<BFloat16>::kernels,
    Blocks<Half>::kernels
};

} // namespace fastjac::jacobian_match::FASTJAC_TARGET_NAME
