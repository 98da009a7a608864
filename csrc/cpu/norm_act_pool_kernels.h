// norm_act_pool's kernels on the CPU, for one instruction set (lanes.h says how it is compiled): what
// norm_act_pool_disjoint.h and norm_act_pool_unpooling.h do with segments, for ranges of chunks, and the
// statistics. The formulas are in common/norm_act_pool.h, the division of the work in norm_act_pool.h.
#pragma once

#include "norm_act_pool.h"
#include "norm_act_pool_disjoint.h"
#include "norm_act_pool_unpooling.h"
#include "stored_lanes.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

// f(task's sums, image, channel, first segment, last segment, whether it is the task's last call) for
// tasks [begin, end).
template <bool kLast, typename F>
void each_range(const Maps& m, int64_t begin, int64_t end, const F& f) {
  const int64_t stride = kSums * m.padded_channels;
  const auto sums = [&](int64_t chunk) { return m.sums ? m.sums + chunk * stride : nullptr; };
  for (int64_t task = begin; task < end; ++task) {
    if constexpr (kLast) {
      int64_t at = task * m.chunk_segments;
      const int64_t stop = least(at + m.chunk_segments, m.batch * m.segments);
      while (at < stop) {
        const int64_t b = at / m.segments, first = at % m.segments;
        const int64_t last = least(m.segments, first + stop - at);
        at += last - first;
        f(sums(task), b, int64_t(0), first, last, at == stop);
      }
    } else {
      const int64_t parts = (m.segments + m.chunk_segments - 1) / m.chunk_segments;
      const int64_t part = task % parts, plane = task / parts;
      const int64_t b = plane / m.channels, c = plane % m.channels;
      const int64_t first = part * m.chunk_segments;
      f(sums(b * parts + part), b, c, first, least(m.segments, first + m.chunk_segments), true);
    }
  }
}

enum class Pass { kForward, kReduce, kPushforward, kWrite };

template <Pass kPass, typename scalar_t, int kKernel, bool kRelu, bool kLast>
void run(const Maps& m, int64_t begin, int64_t end) {
  constexpr bool kOverlap = kKernel == 3;
  using Overlaps =
      std::conditional_t<kLast, Scattering<scalar_t, kRelu>, Gathering<scalar_t, kRelu>>;
  using K = std::conditional_t<kOverlap, Overlaps, Disjoint<scalar_t, kKernel, kRelu, kLast>>;
  using acc_t = typename K::acc_t;
  K k(m);
  const bool sums = kPass == Pass::kReduce || (kPass == Pass::kPushforward && m.sums);
  Scratch<acc_t> lanes(sums ? kSums * k.lanes_size : 0);
  if (sums) k.lanes = lanes.data;
  const auto flush = [&](double* out, int64_t c) {
    if constexpr (kPass == Pass::kReduce) k.flush(out, c, 0, m.tu ? kSums : 2);
    if constexpr (kPass == Pass::kPushforward) k.flush(out, c, 2, 3); // of g tu alone
  };
  if constexpr (kOverlap) {
    Scratch<acc_t> kept(2 * K::kMostKept * (k.places / K::L));
    k.kept = kept.data;
    Scratch<acc_t> row_sums(sums ? kSums * k.lanes_size : 0);
    k.row_sums = row_sums.data;
    const typename K::Kept rows(k, kPass == Pass::kWrite);
    each_range<kLast>(
        m, begin, end, [&](double* out, int64_t b, int64_t c, int64_t first, int64_t last, bool) {
          if constexpr (!kLast) k.at_channel(c);
          if constexpr (kPass == Pass::kForward) k.forward(b, c, first, last);
          if constexpr (kPass == Pass::kReduce) k.reduce(b, c, first, last);
          if constexpr (kPass == Pass::kPushforward) k.pushforward(b, c, first, last);
          if constexpr (kPass == Pass::kWrite) k.write(b, c, first, last, rows);
          if (sums) flush(out, c);
        }
    );
  } else {
    const int64_t most_held = k.most_held();
    int64_t held = 0;
    each_range<kLast>(
        m, begin, end,
        [&](double* out, int64_t b, int64_t c, int64_t first, int64_t last, bool done) {
          if constexpr (!kLast) k.at_channel(c);
          for (int64_t i = first; i < last; ++i) {
            if constexpr (kPass == Pass::kForward) k.forward(b, c, i);
            if constexpr (kPass == Pass::kReduce) k.reduce(b, c, i);
            if constexpr (kPass == Pass::kPushforward) k.pushforward(b, c, i);
            if constexpr (kPass == Pass::kWrite) k.write(b, c, i);
            if (!sums || (++held < most_held && !(done && i == last - 1))) continue;
            flush(out, c);
            held = 0;
          }
        }
    );
  }
}

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

// f(a number of the storage type)
template <typename F>
void for_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kDouble:
      return f(double());
    case Storage::kFloat:
      return f(float());
    case Storage::kBFloat16:
      return f(BFloat16());
    case Storage::kHalf:
      return f(Half());
  }
}

template <Pass kPass>
void dispatch(const Maps& m, int64_t begin, int64_t end) {
  for_storage(m.storage, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto with_layout = [&](auto kernel, auto relu) {
      if (m.channels_last) {
        run<kPass, scalar_t, kernel(), relu(), true>(m, begin, end);
      } else {
        run<kPass, scalar_t, kernel(), relu(), false>(m, begin, end);
      }
    };
    const auto with_kernel = [&](auto relu) {
      switch (m.kernel) {
        case 1:
          return with_layout(std::integral_constant<int, 1>(), relu);
        case 2:
          return with_layout(std::integral_constant<int, 2>(), relu);
        default:
          return with_layout(std::integral_constant<int, 3>(), relu);
      }
    };
    // ReLU by itself where speed matters most: each is a third of a second to compile.
    constexpr bool kHot =
        FASTJAC_VECTOR_BYTES > 16 && sizeof(scalar_t) < 8 && !std::is_same_v<scalar_t, Half>;
    if constexpr (kHot) {
      if (m.activation == Activation::kRelu) return with_kernel(std::true_type());
    }
    with_kernel(std::false_type());
  });
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
    dispatch_statistics, dispatch<Pass::kForward>, dispatch<Pass::kReduce>,
    dispatch<Pass::kPushforward>, dispatch<Pass::kWrite>
};

} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
