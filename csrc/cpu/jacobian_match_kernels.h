// jacobian_match's kernels on the CPU, for one instruction set (lanes.h says how it is compiled): what is
// done with a block of a sample. The formula is in common/jacobian_match.h.
#pragma once

#include "jacobian_match.h"
#include "stored_lanes.h"

namespace fastjac::jacobian_match::FASTJAC_TARGET_NAME {
namespace {

using namespace fastjac::FASTJAC_TARGET_NAME;

// Independent lanes of a sum, on any instruction set: enough registers to hide an addition's latency.
constexpr int kSumLanes = 32;

// As a tree: the lower half of the lanes and the upper half, and so on.
template <typename T, int... i>
inline T sum_of_lanes(const Lanes<T, 2 * sizeof...(i)>& x, std::integer_sequence<int, i...>) {
  constexpr int kHalf = sizeof...(i);
  if constexpr (kHalf == 1) {
    return x[0] + x[1];
  } else {
    return sum_of_lanes<T>(
        __builtin_shufflevector(x, x, i...) + __builtin_shufflevector(x, x, (kHalf + i)...),
        std::make_integer_sequence<int, kHalf / 2>()
    );
  }
}

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

  // 2 L consecutive numbers, in the order that costs least: bfloat16s in pairs, as they lie.
  static FASTJAC_ALWAYS_INLINE Pair<V> load_both(const scalar_t* p) {
    if constexpr (kHalves<scalar_t>) {
      return load_pairs<L>(p, Whole{});
    } else {
      return {load<L>(p), load<L>(p + L)};
    }
  }
  static FASTJAC_ALWAYS_INLINE void store_both(scalar_t* p, const Pair<V>& x) {
    if constexpr (kHalves<scalar_t>) {
      store_pairs(p, x, Whole{});
    } else {
      store(p, x.first);
      store(p + L, x.second);
    }
  }
  // What has been made of both, in memory's order.
  static void in_order(V& first, V& second) {
    if constexpr (kHalves<scalar_t>) {
      constexpr auto all = std::make_integer_sequence<int, L>();
      const V low = interleaved<0>(first, second, all);
      second = interleaved<L>(first, second, all);
      first = low;
    }
  }

  // sum + x^2. A float16's square has 22 bits, and is exact in float32: fused with the addition, it gives
  // the same bits as on instruction sets that can't.
  static FASTJAC_ALWAYS_INLINE V add_square(const V& sum, const V& x) {
    if constexpr (std::is_same_v<scalar_t, Half>) {
#if defined(FASTJAC_AVX512)
      return (V)_mm512_maskz_fmadd_ps(-1, (__m512)x, (__m512)x, (__m512)sum);
#elif defined(FASTJAC_F16C)
      return (V)_mm256_fmadd_ps((__m256)x, (__m256)x, (__m256)sum);
#endif
    }
    return sum + x * x;
  }

  static double add_up(V (&sums)[kVectors]) {
#pragma GCC unroll 16
    for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sum_of_lanes<acc_t>(sums[0], std::make_integer_sequence<int, L / 2>());
  }

  // Both sums, to which add(first, second, s, t) adds; a lane that is not there has zeros.
  template <typename F>
  static Sums<double> sums(const void* js, const void* jt, int64_t n, const F& add) {
    const auto* s = static_cast<const scalar_t*>(js);
    const auto* t = static_cast<const scalar_t*>(jt);
    V first[kVectors] = {}, second[kVectors] = {};
    const auto add_to = [&](int k, const V& s_k, const V& t_k)
                            FASTJAC_INLINED { add(first[k], second[k], s_k, t_k); };
    int64_t i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; k += 2) {
        const Pair<V> s_both = load_both(s + i + k * L), t_both = load_both(t + i + k * L);
        add_to(k, s_both.first, t_both.first);
        add_to(k + 1, s_both.second, t_both.second);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; k += 2) {
      in_order(first[k], first[k + 1]);
      in_order(second[k], second[k + 1]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k, i += L) {
      const Part count{n - i < L ? n - i : L};
      if (i < n) add_to(k, load<L>(s + i, count), load<L>(t + i, count));
    }
    return {add_up(first), add_up(second)};
  }

  static Sums<double> squared_norms(const void* js, const void* jt, int64_t n) {
    return sums(js, jt, n, [](V& of_s, V& of_t, const V& s, const V& t) FASTJAC_INLINED {
      of_s = add_square(of_s, s);
      of_t = add_square(of_t, t);
    });
  }

  template <bool kNormalize>
  static Sums<double> difference(
      const void* js, const void* jt, int64_t n, const Scales<double>& scales
  ) {
    const Scales<acc_t> k = narrow(scales);
    return sums(js, jt, n, [k](V& loss, V& along, const V& s, const V& t) FASTJAC_INLINED {
      const Elements<kNormalize> e(s, t, k);
      loss += e.d * e.d;
      if constexpr (kNormalize) along += e.d * e.u;
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
    const auto gradient = [&](const V& s_i, const V& t_i) FASTJAC_INLINED {
      return Elements<kNormalize>(s_i, t_i, k).gradient(k, a);
    };
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
      const Pair<V> s_both = load_both(s + i), t_both = load_both(t + i);
      const V first = gradient(s_both.first, t_both.first);
      store_both(out + i, {first, gradient(s_both.second, t_both.second)});
    }
    for (; i < n; i += L) {
      const Part count{n - i < L ? n - i : L};
      store(out + i, gradient(load<L>(s + i, count), load<L>(t + i, count)), count);
    }
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
