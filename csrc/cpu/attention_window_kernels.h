// attention_window's kernels on the CPU, for one instruction set (lanes.h says how it is compiled). The
// formulas are in common/attention_window.h.
#pragma once

#include "attention_window.h"
#include "stored_lanes.h"

namespace fastjac::attention_window::FASTJAC_TARGET_NAME {
namespace {

using namespace fastjac::FASTJAC_TARGET_NAME;

// Lanes that a pixel's channels are added up in, on any instruction set.
constexpr int kSumLanes = 16;

// Of lanes in groups of kGroup, those of the lower (kUpper: upper) half of each, of a and then of b.
template <int kGroup, bool kUpper, typename T, int... i>
inline T halves(const T& a, const T& b, std::integer_sequence<int, i...>) {
  constexpr int kHalf = kGroup / 2;
  return __builtin_shufflevector(a, b, (i / kHalf * kGroup + i % kHalf + (kUpper ? kHalf : 0))...);
}
// Adds up the lanes of L vectors as trees: lane i is the sum of vector i. kGroup lanes are of one vector.
template <int kGroup, typename V, int L>
inline V add_up_each(V (&x)[L]) {
  if constexpr (kGroup == 1) {
    return x[0];
  } else {
    constexpr auto all = std::make_integer_sequence<int, L>();
#pragma GCC unroll 16
    for (int i = 0; i < kGroup / 2; ++i) {
      const V low = halves<kGroup, false>(x[2 * i], x[2 * i + 1], all);
      x[i] = low + halves<kGroup, true>(x[2 * i], x[2 * i + 1], all);
    }
    return add_up_each<kGroup / 2>(x);
  }
}

// kPower: 1 or 2, or 0, and power says which.
template <typename scalar_t, int kPower>
struct Of {
  using acc_t = accumulator_t<scalar_t>;
  static constexpr int L = kLanes<acc_t>;
  using V = Lanes<acc_t, L>;
  using One = Magnitude<kPower == 2, acc_t>;

  // f(lane) of each
  template <typename F>
  static V each(const V& z, const F& f) {
    acc_t lanes[L];
    store(lanes, z);
    for (int i = 0; i < L; ++i) lanes[i] = f(lanes[i]);
    return load<L>(lanes);
  }
  static FASTJAC_ALWAYS_INLINE V value(const One& one, const V& z) {
    if constexpr (kPower == 2) return z * z;
    if constexpr (kPower == 1) return z < V{} ? -z : z;
    return each(z, [&](acc_t x) { return one.value(x); });
  }
  static FASTJAC_ALWAYS_INLINE V slope(const One& one, const V& z) {
    if constexpr (kPower == 2) return z + z;
    if constexpr (kPower == 1)
      return (z > V{} ? V{} + acc_t(1) : V{}) - (z < V{} ? V{} + acc_t(1) : V{});
    return each(z, [&](acc_t x) { return one.slope(x); });
  }
  static FASTJAC_ALWAYS_INLINE V bend(const One& one, const V& z) {
    if constexpr (kPower > 0) return V{} + one.bend(0);
    return each(z, [&](acc_t x) { return one.bend(x); });
  }

  // Channels apart by the map's pixels. Eight at a time, as a tree: fewer passes over the sums, and less
  // rounding.
  static void planar_means(const Map& m, const scalar_t* z, int64_t n, const One& one, acc_t* a) {
    const int64_t stride = m.pixels();
    const acc_t count = static_cast<acc_t>(m.channels);
    std::memset(a, 0, n * sizeof(acc_t));
    const auto each_vector = [&](const auto& f) FASTJAC_INLINED {
      int64_t i = 0;
      for (; i + L <= n; i += L) f(i, Whole{});
      if (i < n) f(i, Part{n - i});
    };
    const auto of = [&](int64_t c, int64_t i, auto there)
                        FASTJAC_INLINED { return value(one, load<L>(z + c * stride + i, there)); };
    int64_t c = 0;
    for (; c + 8 <= m.channels; c += 8) {
      each_vector([&](int64_t i, auto there) FASTJAC_INLINED {
        const auto at = [&](int k) FASTJAC_INLINED { return of(c + k, i, there); };
        const V low = (at(0) + at(1)) + (at(2) + at(3)), high = (at(4) + at(5)) + (at(6) + at(7));
        store(a + i, V(load<L>(a + i, there) + (low + high)), there);
      });
    }
    for (; c < m.channels; ++c) {
      each_vector([&](int64_t i, auto there) FASTJAC_INLINED {
        store(a + i, V(load<L>(a + i, there) + of(c, i, there)), there);
      });
    }
    each_vector([&](int64_t i, auto there)
                    FASTJAC_INLINED { store(a + i, V(load<L>(a + i, there) / count), there); });
  }

  // Channels side by side.
  static void interleaved_means(
      const Map& m, const scalar_t* z, int64_t n, const One& one, acc_t* a
  ) {
    constexpr int kVectors = kSumLanes / L;
    const acc_t count = static_cast<acc_t>(m.channels);
    const auto sum_of = [&](const scalar_t* x) FASTJAC_INLINED {
      V sums[kVectors] = {};
      const auto add = [&](int k, int64_t c, auto there)
                           FASTJAC_INLINED { sums[k] += value(one, load<L>(x + c, there)); };
      int64_t c = 0;
      for (; c + kSumLanes <= m.channels; c += kSumLanes) {
#pragma GCC unroll 16
        for (int k = 0; k < kVectors; ++k) add(k, c + k * L, Whole{});
      }
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k, c += L) {
        if (c < m.channels) add(k, c, Part{m.channels - c < L ? m.channels - c : L});
      }
#pragma GCC unroll 4
      for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
      }
      return sums[0];
    };
    // One by one, each addition of a pixel's lanes would wait for the last.
    const auto several = [&](int64_t i, int64_t pixels, auto there) FASTJAC_INLINED {
      V sums[L] = {};
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        sums[pixel] = sum_of(z + (i + pixel) * m.channels);
      store(a + i, V(add_up_each<L>(sums) / count), there);
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) several(i, L, Whole{});
    if (i < n) several(i, n - i, Part{n - i});
  }

  static void means(const Map& m, const void* z, int64_t n, double power, void* a) {
    const One one{static_cast<acc_t>(power)};
    const auto f = m.channels_last ? interleaved_means : planar_means;
    f(m, static_cast<const scalar_t*>(z), n, one, static_cast<acc_t*>(a));
  }

  // Plain loops: the compiler makes vectors of them.
  static void window_row(const Map& m, const void* from, void* column_sums, void* to) {
    const auto* __restrict__ a = static_cast<const acc_t*>(from);
    auto* __restrict__ columns = static_cast<acc_t*>(column_sums);
    auto* __restrict__ windows = static_cast<acc_t*>(to);
    const acc_t area = static_cast<acc_t>(m.k * m.k);
    for (int64_t x = 0; x < m.width; ++x) columns[x] = a[x];
    for (int64_t i = 1; i < m.k; ++i) {
      for (int64_t x = 0; x < m.width; ++x) columns[x] += a[i * m.width + x];
    }
    for (int64_t x = 0; x < m.columns(); ++x) windows[x] = columns[x];
    for (int64_t i = 1; i < m.k; ++i) {
      for (int64_t x = 0; x < m.columns(); ++x) windows[x] += columns[x + i];
    }
    for (int64_t x = 0; x < m.columns(); ++x) windows[x] /= area;
  }

  static void differentiate(void* slopes, void* bends, int64_t n, double power, double scale) {
    auto* s = static_cast<scalar_t*>(slopes);
    auto* b = static_cast<scalar_t*>(bends);
    const One one{static_cast<acc_t>(power)};
    const acc_t k = static_cast<acc_t>(scale);
    const auto write = [&](int64_t i, auto there) FASTJAC_INLINED {
      const V z = load<L>(s + i, there);
      store(s + i, V(slope(one, z) * k), there);
      store(b + i, V(bend(one, z) * k), there);
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) write(i, Whole{});
    if (i < n) write(i, Part{n - i});
  }

  static constexpr Kernels kernels = {means, window_row, differentiate};
};

} // namespace

#define FASTJAC_OF(scalar_t) \
  {Of<scalar_t, 0>::kernels, Of<scalar_t, 1>::kernels, Of<scalar_t, 2>::kernels}
const Table kernels = {
    FASTJAC_OF(double), FASTJAC_OF(float), FASTJAC_OF(BFloat16), FASTJAC_OF(Half)
};
#undef FASTJAC_OF

} // namespace fastjac::attention_window::FASTJAC_TARGET_NAME
