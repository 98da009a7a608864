// What norm_act_pool's kernels do with a segment (norm_act_pool.h says what that is).
//
// Channels-last: a vector holds channels of one pixel. Contiguous: it holds neighbouring outputs of
// one channel, whose pixels under a pool of stride 2 are every other one of a row: a segment's rows are
// taken apart first, into lines that such a vector is contiguous in, and that have room at both ends.
// The vectors of parameters are read at the channel there; here, from an array of one value.
//
// A window is walked in row order and keeps the first of its largest values. Pixels must be read once
// and written once: forward u + y; sums u + gy (+ tu); write u + gy + gu (+ gresidual, tu, ...). The
// rows that a step needs twice are in the cache the second time.
#pragma once

#include "lanes.h"
#include "norm_act_pool.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

using namespace fastjac::FASTJAC_TARGET_NAME;

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// kKernel is the pool's; kRelu: the activation is ReLU, and otherwise m says which.
template <typename scalar_t, int kKernel, bool kRelu, bool kLast>
struct Kernel {
  using acc_t = accumulator_t<scalar_t>;
  using index_t = index_of<acc_t>;
  static constexpr int L = kLanes<acc_t>;
  static constexpr int kStride = kKernel == 1 ? 1 : 2;
  static constexpr index_t kNothing = -1; // no tap
  static constexpr bool kShuffled = !kLast && kKernel > 1; // lanes are every other pixel
  template <int N>
  using V = Lanes<acc_t, N>;
  template <int N>
  using I = Lanes<index_t, N>;

  const Maps& m;
  const Activation activation = kRelu ? Activation::kRelu : m.activation;
  const acc_t slope = static_cast<acc_t>(m.slope);
  const int64_t pixel = kLast ? m.channels : 1; // distance of neighbours in a row
  const int64_t row = m.width * pixel;
  const scalar_t* const u = static_cast<const scalar_t*>(m.u);
  const scalar_t* const residual = static_cast<const scalar_t*>(m.residual);
  const scalar_t* const tu = static_cast<const scalar_t*>(m.tu);
  const scalar_t* const tresidual = static_cast<const scalar_t*>(m.tresidual);
  const scalar_t* const curvature = static_cast<const scalar_t*>(m.curvature);
  const scalar_t* const gy = static_cast<const scalar_t*>(m.gy);
  scalar_t* const gu = static_cast<scalar_t*>(m.gu);
  scalar_t* const gresidual = static_cast<scalar_t*>(m.gresidual);
  scalar_t* const y = static_cast<scalar_t*>(m.y);

  const bool past_caches = m.past_caches;

  // Else nothing is added for a d that is not finite, which times zero is not zero.
  const bool adds_d = m.adds_d;

  // [kParameters, stride]: of the channels, or of one, in every lane.
  const acc_t* parameters = static_cast<const acc_t*>(m.parameters);
  int64_t parameters_stride = m.padded_channels;
  acc_t of_channel[kParameters * kPadding];
  acc_t* lanes = nullptr; // [kSums, stride]: a segment's sums
  const int64_t lanes_stride = kLast ? m.padded_channels : kRunLanes;
  acc_t* lines = nullptr; // [maps, kKernel, 2, line]: rows taken apart, zeros where they end
  const int64_t line = (m.out_width / L + 2) * L;

  explicit Kernel(const Maps& maps) : m(maps) {
    for (int64_t& begin : rows_in_lines) begin = -1;
  }

  // Contiguous: the parameters are those of channel c from here on.
  void at_channel(int64_t c) {
    const auto* all = static_cast<const acc_t*>(m.parameters);
    for (int i = 0; i < kParameters; ++i) {
      const acc_t x = all[i * m.padded_channels + c];
      for (int lane = 0; lane < kPadding; ++lane) of_channel[i * kPadding + lane] = x;
    }
    parameters = of_channel;
    parameters_stride = kPadding;
  }

  // N outputs: their windows' first pixels are at `in`, and the taps [h0, h1) x [w0, w1) of all the
  // windows lie in the map.
  template <int N, typename Count>
  struct At {
    static constexpr int kLanes = N;
    int64_t in, out;
    int64_t lane; // of the sums
    Count count;
    int h0, h1, w0, w1;
    int64_t column = 0; // of the first output
    int first_line = 0; // of the window's first row
  };

  // Writes to y, gu or gresidual.
  template <typename X, typename Count>
  FASTJAC_ALWAYS_INLINE void put(scalar_t* p, const X& x, Count count) const {
    if constexpr (kKernel == 1 && std::is_same_v<Count, Whole>) {
      if (past_caches) return store_past_caches(p, x);
    }
    store(p, x, count);
  }

  // The parameters of a vector's channels, in registers: from memory they would be loaded again after each
  // store of the accumulator type.
  template <int N>
  struct Held {
    V<N> scale, shift, mean, of_g, of_tu, of_d, constant; // in the order of the rows
  };
  template <int N>
  FASTJAC_ALWAYS_INLINE Held<N> held(int64_t channel) const {
    const auto row = [&](int i) FASTJAC_INLINED {
      return load<N>(parameters + i * parameters_stride + channel);
    };
    return {row(0), row(1), row(2), row(3), row(4), row(5), row(6)};
  }

  // What windows are looked up in, when it is taken apart.
  enum Source { kZ, kU, kTu, kTresidual, kSources };

  // The rows of a window lie in turn in kKernel lines, from `first_line` on.
  acc_t* line_of(int source, int first_line, int h, int odd) const {
    const int place = first_line + h < kKernel ? first_line + h : first_line + h - kKernel;
    return lines + ((source * kKernel + place) * 2 + odd) * line;
  }
  // Where the rows that are in the lines begin: windows of 3x3 share a row.
  mutable int64_t rows_in_lines[kKernel];
  static constexpr int64_t kLines = kShuffled ? kSources * kKernel * 2 : 0;

  // Tap (h, w) of a map that is taken apart, or not.
  template <int N, typename Count>
  FASTJAC_ALWAYS_INLINE V<N> tap(Source source, const At<N, Count>& at, int h, int w) const {
    return load<N>(line_of(source, at.first_line, h, w % 2) + at.column + w / 2);
  }
  template <int N, typename Count>
  FASTJAC_ALWAYS_INLINE V<N> tap(const scalar_t* x, const At<N, Count>& at, int h, int w) const {
    return load<N>(x + at.in + h * row + w * pixel, at.count);
  }

  // even[q] and odd[q] are the columns 2 q - padding and the next of a row; value(column, lanes).
  template <typename F>
  void take_apart(acc_t* even, acc_t* odd, const F& value) const {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, L> several;
    constexpr auto all = std::make_integer_sequence<int, L>();
    const auto single = [&](int64_t column) {
      const int64_t at = column + m.padding;
      (at % 2 ? odd : even)[at / 2] = value(column, one);
    };
    const auto vectors = [&](int64_t q) {
      const int64_t column = 2 * q - m.padding;
      const V<L> low = value(column, several), high = value(column + L, several);
      store(even + q, every_other<0>(low, high, all));
      store(odd + q, every_other<1>(low, high, all));
    };
    const int64_t first = m.padding, last = (m.width + m.padding) / 2 - L;
    if (last < first) {
      for (int64_t column = 0; column < m.width; ++column) single(column);
      return;
    }
    for (int64_t column = 0; column < first; ++column) single(column);
    for (int64_t q = first; q < last; q += L) vectors(q);
    vectors(last); // some of it once more
    for (int64_t column = 2 * (last + L) - m.padding; column < m.width; ++column) single(column);
  }

  // Rows [h0, h1) of the windows whose first row is at `top`: z, and what else is looked up.
  template <int kAsked>
  void take_apart(int64_t top, int h0, int h1, int first_line) const {
    const V<L> scale = held<L>(0).scale, shift = held<L>(0).shift;
    for (int h = h0; h < h1; ++h) {
      const int64_t from = top + h * row;
      int64_t& there = rows_in_lines[(first_line + h) % kKernel];
      if (there == from) continue;
      there = from;
      const auto rows = [&](Source source, const auto& value) {
        take_apart(line_of(source, first_line, h, 0), line_of(source, first_line, h, 1), value);
      };
      const auto row_of = [&](Source source, const scalar_t* x) {
        rows(source, [&](int64_t column, auto lanes_) {
          return load<decltype(lanes_)::value>(x + from + column);
        });
      };
      rows(kZ, [&](int64_t column, auto lanes_) {
        constexpr int N = decltype(lanes_)::value;
        const scalar_t* x = u + from + column;
        __builtin_prefetch(x + kStride * row); // of the next segment: too short a run by itself
        V<N> z;
        if constexpr (N == 1) {
          z = load<1>(x) * scale[0] + shift[0];
        } else {
          z = load<N>(x) * scale + shift;
        }
        if (residual) z += load<N>(residual + from + column);
        return z;
      });
      if constexpr (kAsked & kTheU) row_of(kU, u);
      if constexpr (kAsked & kTheTangents) row_of(kTu, tu);
      if ((kAsked & kTheTangents) && tresidual) row_of(kTresidual, tresidual);
    }
  }

  template <int N>
  FASTJAC_ALWAYS_INLINE V<N> activated(const V<N>& z) const {
    return activate(activation, slope, z, [](const auto& x) { return exponential(x); });
  }
  // act'(z) x
  template <int N>
  FASTJAC_ALWAYS_INLINE V<N> gated(const V<N>& z, const V<N>& x) const {
    return activate_backward(activation, slope, z, x, [](const auto& e) { return exponential(e); });
  }

  // Of each window: the largest a, z there, and what else was asked for there. What was not, is not set.
  template <int N>
  struct Chosen {
    V<N> a, z, u, tu, tresidual;
    I<N> which; // of the kernel^2 taps
  };
  enum Asked { kZAlone = 0, kWhich = 1, kTheU = 2, kTheTangents = 4 };

  // The taps [h0, h1) x [w0, w1) in row order; or all, unrolled.
  struct SomeTaps {
    int h0, h1, w0, w1;

    template <typename F>
    FASTJAC_ALWAYS_INLINE void each(const F& f) const {
      for (int h = h0; h < h1; ++h) {
        for (int w = w0; w < w1; ++w) f(h, w);
      }
    }
  };
  struct AllTaps {
    static constexpr int h0 = 0, w0 = 0;

    template <typename F>
    FASTJAC_ALWAYS_INLINE void each(const F& f) const {
#pragma GCC unroll 9
      for (int tap = 0; tap < kKernel * kKernel; ++tap) f(tap / kKernel, tap % kKernel);
    }
  };

  template <int kAsked, int N, typename Count>
  FASTJAC_ALWAYS_INLINE Chosen<N> choose(const At<N, Count>& at, const Held<N>& of) const {
    if constexpr (kKernel == 3) {
      if (at.h1 - at.h0 < 3 || at.w1 - at.w0 < 3) {
        const int w0 = kShuffled ? 0 : at.w0, w1 = kShuffled ? 3 : at.w1;
        return choose_among<kAsked, N>(at, of, SomeTaps{at.h0, at.h1, w0, w1});
      }
    }
    return choose_among<kAsked, N>(at, of, AllTaps{});
  }

  template <int kAsked, int N, typename Count, typename Taps>
  FASTJAC_ALWAYS_INLINE Chosen<N> choose_among(
      const At<N, Count>& at, const Held<N>& of, const Taps& taps
  ) const {
    constexpr bool kAll = std::is_same_v<Taps, AllTaps>;
    const auto look = [&](int h, int w) FASTJAC_INLINED -> V<N> {
      if constexpr (kShuffled) {
        return tap(kZ, at, h, w);
      } else {
        const V<N> z = tap(u, at, h, w) * of.scale + of.shift;
        return residual ? V<N>(z + tap(residual, at, h, w)) : z;
      }
    };
    // What windows are ordered by: under ReLU z, which is as good where a's gate is open.
    const auto key_of = [&](const V<N>& z) FASTJAC_INLINED -> V<N> {
      if constexpr (kRelu) {
        return z;
      } else {
        return activated<N>(z);
      }
    };
    const auto number = [](int h, int w) { return I<N>{} + index_t(h * kKernel + w); };

    if constexpr (kRelu && kAll && kAsked == kZAlone) { // no matter where
      Chosen<N> best;
      best.z = look(0, 0);
      auto nan = unordered(best.z, best.z);
      V<N> last;
      taps.each([&](int h, int w) FASTJAC_INLINED {
        const int tap = h * kKernel + w;
        if (tap == 0) return;
        const V<N> x = look(h, w);
        best.z = larger(x, best.z);
        if (tap % 2 == 0 || tap == kKernel * kKernel - 1) nan = nan | unordered(x, last);
        last = x;
      });
      if (kKernel > 1) best.z = select(nan, V<N>{} + acc_t(NAN), best.z);
      best.a = activated<N>(best.z);
      return best;
    }
    V<N> z = look(taps.h0, taps.w0), key = key_of(z);
    using Mask = decltype(greater(key, key) | unordered(key));
    Chosen<N> best;
    // What is asked for moves from tap (h, w) to best: move(best's, the tap's).
    const auto each_asked = [&](int h, int w, const auto& move) FASTJAC_INLINED {
      const auto there = [&](const auto& from) FASTJAC_INLINED { return tap(from, at, h, w); };
      if constexpr (kAsked & kWhich) move(best.which, number(h, w));
      if constexpr (kShuffled) {
        if constexpr (kAsked & kTheU) move(best.u, there(kU));
        if constexpr (kAsked & kTheTangents) move(best.tu, there(kTu));
        if ((kAsked & kTheTangents) && tresidual) move(best.tresidual, there(kTresidual));
      } else {
        if constexpr (kAsked & kTheU) move(best.u, there(u));
        if constexpr (kAsked & kTheTangents) move(best.tu, there(tu));
        if ((kAsked & kTheTangents) && tresidual) move(best.tresidual, there(tresidual));
      }
    };
    each_asked(taps.h0, taps.w0, [](auto& to, const auto& x) FASTJAC_INLINED { to = x; });
    const auto take = [&](int h, int w, V<N> x, V<N> k, Mask where) FASTJAC_INLINED {
      key = select(where, k, key);
      if constexpr (!kRelu) z = select(where, x, z);
      each_asked(h, w, [&](auto& to, const auto& x) FASTJAC_INLINED { to = select(where, x, to); });
    };
    // Lanes that have column w: a row's ends are not among all taps.
    const auto inside = [&](int w) FASTJAC_INLINED {
      static constexpr index_t kEven[] = {0,  2,  4,  6,  8,  10, 12, 14,
                                          16, 18, 20, 22, 24, 26, 28, 30};
      const I<N> column = load_raw<N, index_t>(kEven) + index_t(2 * at.column - m.padding + w);
      return greater(column, I<N>{} - 1) & greater(I<N>{} + index_t(m.width), column);
    };
    if constexpr (!kAll && kShuffled) { // a window's middle column is in the map
      const V<N> x = look(taps.h0, 1);
      take(taps.h0, 1, x, key_of(x), ~inside(0));
    }
    taps.each([&](int h, int w) FASTJAC_INLINED {
      if (kAll && h == 0 && w == 0) return; // else it is seen twice, and does not replace itself
      const V<N> x = look(h, w), k = key_of(x);
      const Mask better = greater(k, key) | unordered(k);
      if constexpr (!kAll && kShuffled) {
        take(h, w, x, k, better & inside(w));
      } else {
        take(h, w, x, k, better);
      }
    });

    best.z = kRelu ? key : z;
    best.a = kRelu ? activated<N>(key) : key;
    return best;
  }

  // Contiguous runs of `n` pixels from `begin` on (of image b, channel c): f(in, held, lane, count).
  template <typename F>
  void each_pixel(int64_t b, int64_t c, int64_t begin, int64_t n, const F& f) const {
    if constexpr (kLast) {
      for (int64_t i = begin; i < begin + n; ++i) {
        const int64_t in = (b * m.height * m.width + i) * m.channels;
        int64_t k = 0;
        for (; k + L <= m.channels; k += L) f(in + k, held<L>(k), k, Whole{});
        if (k < m.channels) f(in + k, held<L>(k), k, Part{m.channels - k});
      }
    } else {
      const int64_t in = (b * m.channels + c) * m.height * m.width + begin;
      const Held<L> all = held<L>(0);
      int64_t k = 0;
      for (; k + L <= n; k += L) f(in + k, all, k % kRunLanes, Whole{});
      if (k < n) f(in + k, all, k % kRunLanes, Part{n - k});
    }
  }

  // The outputs of segment i of image b: f(At, Held). What f will look up: see choose.
  template <int kAsked, typename F>
  void each_output(int64_t b, int64_t c, int64_t i, const F& f) const {
    if constexpr (kKernel == 1) {
      const int64_t begin = i * m.run, n = least(m.run, m.height * m.width - begin);
      each_pixel(
          b, c, begin, n,
          [&](int64_t in, const Held<L>& of, int64_t lane, auto count)
              FASTJAC_INLINED { f(At<L, decltype(count)>{in, in, lane, count, 0, 1, 0, 1}, of); }
      );
      return;
    }
    const int64_t top = i * kStride - m.padding;
    const int h0 = static_cast<int>(most(0, -top));
    const int h1 = static_cast<int>(least(kKernel, m.height - top));
    const int64_t image = kLast ? b : b * m.channels + c;
    const int64_t in_row = (image * m.height + top) * row;
    const int64_t out_row = (image * m.out_height + i) * m.out_width * pixel;
    const auto begins = [&](int64_t j) { return int(most(0, m.padding - j * kStride)); };
    const auto ends = [&](int64_t j) {
      return int(least(kKernel, m.width + m.padding - j * kStride));
    };
    if constexpr (kLast) {
      for (int64_t j = 0; j < m.out_width; ++j) {
        const int64_t in = in_row + (j * kStride - m.padding) * pixel, out = out_row + j * pixel;
        const int w0 = begins(j), w1 = ends(j);
        int64_t k = 0;
        for (; k + L <= m.channels; k += L) {
          f(At<L, Whole>{in + k, out + k, k, Whole{}, h0, h1, w0, w1}, held<L>(k));
        }
        if (k < m.channels) {
          const Part rest{m.channels - k};
          f(At<L, Part>{in + k, out + k, k, rest, h0, h1, w0, w1}, held<L>(k));
        }
      }
    } else {
      const int line = static_cast<int>((top + m.padding) % kKernel);
      take_apart<kAsked>(in_row, h0, h1, line);
      const Held<L> all = held<L>(0);
      for (int64_t j = 0; j < m.out_width; j += L) {
        const int64_t in = in_row + j * kStride - m.padding, lane = j % kRunLanes;
        const int64_t n = least(L, m.out_width - j);
        const int w0 = begins(j), w1 = ends(j + n - 1);
        if (n == L) {
          f(At<L, Whole>{in, out_row + j, lane, Whole{}, h0, h1, w0, w1, j, line}, all);
        } else {
          f(At<L, Part>{in, out_row + j, lane, Part{n}, h0, h1, w0, w1, j, line}, all);
        }
      }
    }
  }

  template <int N>
  FASTJAC_ALWAYS_INLINE void add(int sum, int64_t lane, const V<N>& x) const {
    acc_t* at = lanes + sum * lanes_stride + lane;
    store(at, V<N>(load<N>(at) + x));
  }

  // Adds what the lanes hold of sums [begin, end) to those of the chunk.
  void flush(double* sums, int64_t c, int begin, int end) const {
    for (int sum = begin; sum < end; ++sum) {
      acc_t* x = lanes + sum * lanes_stride;
      if constexpr (kLast) {
        double* out = sums + sum * m.padded_channels;
        for (int64_t k = 0; k < m.channels; ++k) out[k] += x[k];
      } else {
        for (int half = kRunLanes / 2; half > 0; half /= 2) {
          for (int k = 0; k < half; ++k) x[k] += x[k + half];
        }
        sums[sum * m.padded_channels + c] += x[0];
      }
      for (int64_t k = 0; k < lanes_stride; ++k) x[k] = 0;
    }
  }
  // How many segments' sums the lanes may hold: 256 outputs of a channel, or 64 to a lane.
  int64_t most_held() const {
    const int64_t outputs = kKernel == 1 ? least(m.run, m.height * m.width) : m.out_width;
    return most(1, (kLast ? 256 : 64 * kRunLanes) / outputs);
  }

  // The input rows that segment i owns.
  int64_t owned_begin(int64_t i) const {
    return i == 0 ? 0 : i * kStride - m.padding;
  }
  int64_t owned_end(int64_t i) const {
    return i == m.segments - 1 ? m.height : (i + 1) * kStride - m.padding;
  }

  void forward(int64_t b, int64_t c, int64_t i) const {
    each_output<kZAlone>(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      put(y + at.out, choose<kZAlone>(at, of).a, at.count);
    });
  }

  void reduce(int64_t b, int64_t c, int64_t i) const {
    if (tu) {
      reduce_with<true>(b, c, i);
    } else {
      reduce_with<false>(b, c, i);
    }
  }
  template <bool kTangent>
  void reduce_with(int64_t b, int64_t c, int64_t i) const {
    constexpr int kAsked = kTheU | (kTangent ? kTheTangents : 0) | (kKernel == 3 ? kWhich : 0);
    each_output<kAsked>(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<kAsked>(at, of);
      const V<N> g = gated<N>(x.z, load<N>(gy + at.out, at.count));
      const V<N> d = x.u - of.mean;
      if constexpr (kKernel == 3) {
        if (m.chosen) {
          const V<N> open = gated<N>(x.z, V<N>{} + acc_t(1));
          const I<N> which = select(greater(open, V<N>{}), x.which, I<N>{} + kNothing);
          store_raw(m.chosen + at.out, to_bytes<N>(which), at.count);
        }
      }
      add<N>(0, at.lane, g);
      add<N>(1, at.lane, g * d);
      if constexpr (kTangent) add<N>(2, at.lane, g * x.tu);
      if constexpr (kTangent && kKernel == 1) {
        add<N>(3, at.lane, x.tu);
        add<N>(4, at.lane, x.tu * d);
      }
    });
    if (kKernel == 1 || !kTangent) return;
    const int64_t begin = owned_begin(i) * m.width, n = owned_end(i) * m.width - begin;
    each_pixel(b, c, begin, n, [&](int64_t in, const Held<L>& of, int64_t lane, auto count) {
      const V<L> t = load<L>(tu + in, count);
      const V<L> d = load<L>(u + in, count) - of.mean;
      add<L>(3, lane, t);
      add<L>(4, lane, t * d);
    });
  }

  void pushforward(int64_t b, int64_t c, int64_t i) const {
    if (adds_d) {
      pushforward_with<kTheTangents | kTheU>(b, c, i);
    } else {
      pushforward_with<kTheTangents>(b, c, i);
    }
  }
  template <int kAsked>
  void pushforward_with(int64_t b, int64_t c, int64_t i) const {
    each_output<kAsked>(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<kAsked>(at, of);
      V<N> t = of.of_tu * x.tu;
      if constexpr (kAsked & kTheU) t += of.of_d * (x.u - of.mean) + of.constant;
      if (tresidual) t += x.tresidual;
      put(y + at.out, gated<N>(x.z, t), at.count);
      if (lanes) add<N>(2, at.lane, gated<N>(x.z, load<N>(gy + at.out, at.count)) * x.tu);
    });
  }

  // What a write pass writes: gu alone, of g or of g and d, or whatever is given.
  enum Terms { kOfG, kOfGAndD, kWhatever };
  // f(which of them, a constant). Each is compiled where speed matters most.
  template <typename F>
  FASTJAC_ALWAYS_INLINE void with_terms(const F& f) const {
    if constexpr (kRelu) {
      if (gu && !gresidual && !tu && !curvature) {
        if (adds_d) return f(std::integral_constant<Terms, kOfGAndD>());
        return f(std::integral_constant<Terms, kOfG>());
      }
    }
    f(std::integral_constant<Terms, kWhatever>());
  }

  // What is written for N pixels with cotangent g, where u is `here`.
  template <Terms kTerms, int N, typename Count>
  FASTJAC_ALWAYS_INLINE void emit(int64_t in, const Held<N>& of, const V<N>& g, Count count) const {
    emit<kTerms, N>(in, of, g, count, kTerms == kOfG ? V<N>{} : load<N>(u + in, count));
  }
  template <Terms kTerms, int N, typename Count>
  FASTJAC_ALWAYS_INLINE void emit(
      int64_t in, const Held<N>& of, const V<N>& g, Count count, const V<N>& here
  ) const {
    constexpr bool kAny = kTerms == kWhatever;
    if (kAny && gresidual) put(gresidual + in, g, count);
    if (kAny && !gu) return;
    V<N> out = of.of_g * g;
    if (kAny ? adds_d : kTerms == kOfGAndD) {
      out += of.of_d * (here - of.mean) + of.constant;
    }
    if (kAny && tu) out += of.of_tu * load<N>(tu + in, count);
    if (kAny && curvature) out += load<N>(curvature + in, count);
    put(gu + in, out, count);
  }
  // Contiguous: for the pixels of `count` pairs, at `in`.
  template <Terms kTerms>
  FASTJAC_ALWAYS_INLINE void emit_pairs(
      int64_t in, const Held<L>& of, const V<L>& even, const V<L>& odd, Whole count
  ) const {
    constexpr auto all = std::make_integer_sequence<int, L>();
    emit<kTerms, L>(in, of, interleaved<0>(even, odd, all), count);
    emit<kTerms, L>(in + L, of, interleaved<L>(even, odd, all), count);
  }
  template <Terms kTerms>
  void emit_pairs(
      int64_t in, const Held<L>& of, const V<L>& even, const V<L>& odd, Part count
  ) const {
    emit_some<kTerms>(in, of, even, odd, 2 * count.n);
  }
  // The first n of those pixels.
  template <Terms kTerms>
  void emit_some(
      int64_t in, const Held<L>& of, const V<L>& even, const V<L>& odd, int64_t n
  ) const {
    constexpr auto all = std::make_integer_sequence<int, L>();
    emit<kTerms, L>(in, of, interleaved<0>(even, odd, all), Part{least(L, n)});
    if (n > L) emit<kTerms, L>(in + L, of, interleaved<L>(even, odd, all), Part{n - L});
  }
  // For pixels that no window chose.
  template <Terms kTerms>
  void emit_none(int64_t b, int64_t c, int64_t begin, int64_t n) const {
    each_pixel(b, c, begin, n, [&](int64_t in, const Held<L>& of, int64_t, auto count) {
      emit<kTerms, L>(in, of, V<L>{}, count);
    });
  }

  void write(int64_t b, int64_t c, int64_t i) const {
    with_terms([&](auto terms) FASTJAC_INLINED { write_terms<terms()>(b, c, i); });
  }
  template <Terms kTerms>
  void write_terms(int64_t b, int64_t c, int64_t i) const {
    static_assert(kKernel < 3);
    each_output<kWhich>(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<kWhich>(at, of);
      const V<N> g = gated<N>(x.z, load<N>(gy + at.out, at.count));
      if constexpr (kKernel == 1) {
        emit<kTerms, N>(at.in, of, g, at.count);
        return;
      }
      const auto g_of = [&](int which) FASTJAC_INLINED {
        return select(equal(x.which, I<N>{} + index_t(which)), g, V<N>{});
      };
      if constexpr (kShuffled) {
        for (int h = 0; h < 2; ++h) {
          emit_pairs<kTerms>(at.in + h * row, of, g_of(2 * h), g_of(2 * h + 1), at.count);
        }
      } else { // all of u before any of gu: for all that the compiler knows it may lie there
        const V<N> here[] = {
            tap(u, at, 0, 0), tap(u, at, 0, 1), tap(u, at, 1, 0), tap(u, at, 1, 1)
        };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int64_t in = at.in + i / 2 * row + i % 2 * pixel;
          emit<kTerms, N>(in, of, g_of(i), at.count, here[i]);
        }
      }
    });
    if constexpr (kKernel == 2) {
      const int64_t begin = owned_begin(i), covered = 2 * m.out_width;
      for (int64_t h = begin; h < begin + 2; ++h) {
        emit_none<kTerms>(b, c, h * m.width + covered, m.width - covered);
      }
      emit_none<kTerms>(b, c, (begin + 2) * m.width, (owned_end(i) - begin - 2) * m.width);
    }
  }

  // 3x3: windows share pixels. What the windows of a row chose, and their g, [1 + w + 1, C] or [1 + w + 1]:
  // the first and the last are of windows that do not exist, and chose nothing.
  struct Row {
    acc_t* g;
    index_t* which;
  };
  int64_t row_size() const {
    return (m.out_width + 2) * pixel;
  }

  void choose_row(int64_t b, int64_t c, int64_t i, const Row& to) const {
    const int64_t image = kLast ? b : b * m.channels + c;
    const int64_t begin = (image * m.out_height + i) * m.out_width * pixel;
    if (m.chosen) {
      const auto copy = [&](int64_t k, auto count) {
        const auto which = load_indices<L>(m.chosen + begin + k, count);
        store(to.g + pixel + k, load<L>(gy + begin + k, count), count);
        store_raw(to.which + pixel + k, from_bytes<index_t, L>(which), count);
      };
      const int64_t n = m.out_width * pixel;
      int64_t k = 0;
      for (; k + L <= n; k += L) copy(k, Whole{});
      if (k < n) copy(k, Part{n - k});
      return;
    }
    each_output<kWhich>(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<kWhich>(at, of);
      const int64_t place = at.out - begin + pixel;
      store(to.g + place, gated<N>(x.z, load<N>(gy + at.out, at.count)), at.count);
      store_raw(to.which + place, x.which, at.count);
    });
  }

  // The cotangents at columns 2 j - padding (even) and the next (odd) of an input row that is row kUpper of
  // the windows of `upper`, and if kShared row 0 of those of `lower`. `at` is the place of window j.
  template <int N>
  struct Pair {
    V<N> even, odd;
  };
  template <int kUpper, bool kShared, int N, typename Count>
  FASTJAC_ALWAYS_INLINE Pair<N> gathered(
      const Row& upper, const Row& lower, int64_t at, Count count
  ) const {
    Pair<N> g{};
    const auto see = [&](const Row& from, int first) FASTJAC_INLINED {
      const auto tap = [&](int w) { return I<N>{} + index_t(first + w); };
      const I<N> left = load_indices<N>(from.which + at - pixel, count);
      const I<N> here = load_indices<N>(from.which + at, count);
      const V<N> gy_left = load<N>(from.g + at - pixel, count), gy = load<N>(from.g + at, count);
      g.even = add_where(equal(left, tap(2)), g.even, gy_left);
      g.even = add_where(equal(here, tap(0)), g.even, gy);
      g.odd = add_where(equal(here, tap(1)), g.odd, gy);
    };
    see(upper, 3 * kUpper);
    if constexpr (kShared) see(lower, 0);
    return g;
  }

  template <Terms kTerms, int kUpper, bool kShared>
  void emit_row(int64_t b, int64_t c, int64_t y, const Row& upper, const Row& lower) const {
    const int64_t image = kLast ? b : b * m.channels + c;
    const int64_t in = (image * m.height + y) * row;
    if constexpr (kLast) {
      const auto pair = [&](int64_t w, int64_t k, auto count) FASTJAC_INLINED {
        const int64_t at = ((w + m.padding) / 2 + 1) * pixel + k;
        const Pair<L> g = gathered<kUpper, kShared, L>(upper, lower, at, count);
        const Held<L> of = held<L>(k);
        if (w >= 0) emit<kTerms, L>(in + w * pixel + k, of, g.even, count);
        if (w + 1 < m.width) emit<kTerms, L>(in + (w + 1) * pixel + k, of, g.odd, count);
      };
      for (int64_t w = -m.padding; w < m.width; w += 2) {
        int64_t k = 0;
        for (; k + L <= m.channels; k += L) pair(w, k, Whole{});
        if (k < m.channels) pair(w, k, Part{m.channels - k});
      }
    } else {
      if (m.padding) { // the odd column of windows 0
        emit<kTerms, 1>(
            in, held<1>(0), gathered<kUpper, kShared, 1>(upper, lower, 1, Whole{}).odd, Whole{}
        );
      }
      const Held<L> all = held<L>(0);
      for (int64_t w = m.padding; w < m.width; w += 2 * L) {
        const int64_t at = (w + m.padding) / 2 + 1;
        const Pair<L> g = gathered<kUpper, kShared, L>(upper, lower, at, Whole{});
        if (w + 2 * L <= m.width) {
          emit_pairs<kTerms>(in + w, all, g.even, g.odd, Whole{});
        } else {
          emit_some<kTerms>(in + w, all, g.even, g.odd, m.width - w);
        }
      }
    }
  }

  // Segments [begin, end) of image b. Input row 2 i - padding is the last of window row i - 1 and the
  // first of window row i; the next is the middle one of window row i.
  void write_overlapping(
      int64_t b, int64_t c, int64_t begin, int64_t end, Row above, Row here
  ) const {
    with_terms([&](auto terms) FASTJAC_INLINED {
      write_overlapping_terms<terms()>(b, c, begin, end, above, here);
    });
  }
  template <Terms kTerms>
  void write_overlapping_terms(
      int64_t b, int64_t c, int64_t begin, int64_t end, Row above, Row here
  ) const {
    if (begin > 0) choose_row(b, c, begin - 1, above);
    for (int64_t i = begin; i < end; ++i) {
      choose_row(b, c, i, here);
      const int64_t top = i * kStride - m.padding;
      if (i > 0) {
        emit_row<kTerms, 2, true>(b, c, top, above, here);
      } else if (top >= 0) {
        emit_row<kTerms, 0, false>(b, c, top, here, here);
      }
      if (top + 1 < m.height) emit_row<kTerms, 1, false>(b, c, top + 1, here, here);
      const Row next = above;
      above = here;
      here = next;
    }
    if (end < m.segments) return;
    const int64_t next = end * kStride - m.padding;
    if (next >= m.height) return;
    emit_row<kTerms, 2, false>(b, c, next, above, above);
    emit_none<kTerms>(b, c, (next + 1) * m.width, (m.height - next - 1) * m.width);
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
