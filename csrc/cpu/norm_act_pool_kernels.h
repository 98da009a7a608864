// norm_act_pool's kernels on the CPU, for one instruction set: the statistics, and the passes. Those of
// the backward are compiled apart (norm_act_pool_backward.h), beside these.
#pragma once

#include "norm_act_pool_passes.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

// Adds the lanes of x, from kFirst on, to numbers in float64.
template <int kFirst = 0, typename T>
inline void add_wide(double* to, const T& x) {
  constexpr int N = sizeof(T) / sizeof(x[0]), kPart = kLanes<double>;
  const auto part = widened<kFirst>(x, std::make_integer_sequence<int, kPart>());
  store(to, Lanes<double, kPart>(load<kPart>(to) + part));
  if constexpr (kFirst + kPart < N) add_wide<kFirst + kPart>(to + kPart, x);
}

// sums[0], sums[1] of u minus what is near its mean: over 16 values in the accumulator type, and
// in float64 from there on. u is read once.
template <typename scalar_t, bool kLast>
void statistics(const Maps& m, int64_t begin, int64_t end) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int L = kLanes<acc_t>, kRun = 16;
  using V = Lanes<acc_t, L>;
  const auto* u = static_cast<const scalar_t*>(m.u);
  const auto* shift = static_cast<const acc_t*>(m.parameters); // [C]
  // Of `columns` vectors side by side, n rows down: side by side first, as they lie in memory.
  const auto deviations = [](const scalar_t* x, int64_t step, int64_t n, const acc_t* at,
                             int64_t next, double* sum, double* square, auto columns, auto count) {
    constexpr int K = decltype(columns)::value;
    V s[K]{}, q[K]{}, shift[K];
    for (int k = 0; k < K; ++k) shift[k] = load<L>(at + k * next);
    for (int64_t i = 0; i < n; ++i) {
      for (int k = 0; k < K; ++k) {
        const V d = load<L>(x + i * step + k * L, count) - shift[k];
        s[k] += d;
        q[k] += d * d;
      }
    }
    for (int k = 0; k < K; ++k) {
      add_wide(sum + k * L, s[k]);
      add_wide(square + k * L, q[k]);
    }
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 4> several;
  Scratch<double> scratch(2 * (kLast ? m.padded_channels : kRunLanes));
  each_range<kLast>(
      m, begin, end, [&](double* sums, int64_t b, int64_t c, int64_t first, int64_t last, bool) {
        const int64_t from = first * m.run, n = least(last * m.run, m.height * m.width) - from;
        if constexpr (kLast) {
          const scalar_t* x = u + (b * m.height * m.width + from) * m.channels;
          for (int64_t i = 0; i < n; i += kRun, x += kRun * m.channels) {
            const int64_t pixels = least(kRun, n - i);
            double* const square = sums + m.padded_channels;
            const auto columns = [&](int64_t k, auto many, auto count) {
              deviations(
                  x + k, m.channels, pixels, shift + k, L, sums + k, square + k, many, count
              );
            };
            int64_t k = 0;
            for (; k + 4 * L <= m.channels; k += 4 * L) columns(k, several, Whole{});
            for (; k + L <= m.channels; k += L) columns(k, one, Whole{});
            if (k < m.channels) columns(k, one, Part{m.channels - k});
          }
        } else {
          const scalar_t* x = u + (b * m.channels + c) * m.height * m.width + from;
          double* const to = scratch.data;
          double* const square = to + kRunLanes;
          std::memset(to, 0, 2 * kRunLanes * sizeof(double));
          acc_t at[L];
          store(at, V(V{} + shift[c]));
          int64_t i = 0;
          while (i + kRunLanes <= n) {
            const int64_t rows = least(kRun, (n - i) / kRunLanes);
            for (int k = 0; k < kRunLanes; k += 4 * L) {
              deviations(x + i + k, kRunLanes, rows, at, 0, to + k, square + k, several, Whole{});
            }
            i += rows * kRunLanes;
          }
          for (; i < n; ++i) {
            const double d = load<1>(x + i) - shift[c];
            to[i % kRunLanes] += d;
            square[i % kRunLanes] += d * d;
          }
          for (int half = kRunLanes / 2; half > 0; half /= 2) {
            for (int k = 0; k < half; ++k) {
              to[k] += to[k + half];
              square[k] += square[k + half];
            }
          }
          sums[c] += to[0];
          sums[m.padded_channels + c] += square[0];
        }
      }
  );
}

void dispatch_statistics(const Maps& m, int64_t begin, int64_t end) {
  for_storage(m.storage, [&](auto zero) {
    if (m.channels_last) {
      statistics<decltype(zero), true>(m, begin, end);
    } else {
      statistics<decltype(zero), false>(m, begin, end);
    }
  });
}

} // namespace

const Kernels kernels = {
    dispatch_statistics, dispatch<Pass::kForward>, reduce, dispatch<Pass::kPushforward>, write
};

} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
