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
  using acc_t = typename Accumulator<scalar_t>::type;
  using index_t = typename Accumulator<scalar_t>::index;
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

  // Else nothing is added for a d that is not finite, which times zero is not zero.
  const bool of_d = m.of_d != nullptr;

  // [C], or of one channel.
  struct Parameters {
    const acc_t *scale, *shift, *mean, *of_g, *of_tu, *of_d, *constant;
  } p;
  acc_t of_channel[7][kPadding];
  acc_t* lanes = nullptr; // [kSums, stride]: a segment's sums
  const int64_t lanes_stride = kLast ? m.padded_channels : kRunLanes;
  acc_t* lines = nullptr; // [maps, kKernel, 2, line]: rows taken apart, zeros where they end
  const int64_t line = (m.out_width / L + 2) * L;

  explicit Kernel(const Maps& maps) : m(maps) {
    const void* const given[] = {m.scale, m.shift, m.mean, m.of_g, m.of_tu, m.of_d, m.constant};
    const acc_t** const named[] = {&p.scale, &p.shift, &p.mean,    &p.of_g,
                                   &p.of_tu, &p.of_d,  &p.constant};
    for (int i = 0; i < 7; ++i) *named[i] = static_cast<const acc_t*>(given[i]);
  }

  // Contiguous: the parameters of channel c, in every lane.
  void at_channel(int64_t c) {
    const void* const given[] = {m.scale, m.shift, m.mean, m.of_g, m.of_tu, m.of_d, m.constant};
    for (int i = 0; i < 7; ++i) {
      const auto* x = static_cast<const acc_t*>(given[i]);
      for (int lane = 0; lane < kPadding; ++lane) of_channel[i][lane] = x ? x[c] : acc_t(0);
    }
    p = {of_channel[0], of_channel[1], of_channel[2], of_channel[3],
         of_channel[4], of_channel[5], of_channel[6]};
  }

  // N outputs: their windows' first pixels are at `in`, and the taps [h0, h1) x [w0, w1) of all the
  // windows lie in the map.
  template <int N, typename Count>
  struct At {
    static constexpr int kLanes = N;
    int64_t in, out;
    int64_t channel; // of the parameters
    int64_t lane; // of the sums
    Count count;
    int h0, h1, w0, w1;
    int64_t column = 0; // of the first output
  };

  // What windows are looked up in, when it is taken apart.
  enum Source { kZ, kU, kTu, kTresidual, kSources };

  acc_t* line_of(int source, int h, int odd) const {
    return lines + ((source * kKernel + h) * 2 + odd) * line;
  }
  static constexpr int64_t kLines = kShuffled ? kSources * kKernel * 2 : 0;

  // Tap (h, w) of a map that is taken apart, or not.
  template <int N, typename Count>
  FASTJAC_ALWAYS_INLINE V<N> tap(Source source, const At<N, Count>& at, int h, int w) const {
    return load<N>(line_of(source, h, w % 2) + at.column + w / 2);
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
  template <bool kValue, bool kTangent>
  void take_apart(int64_t top, int h0, int h1) const {
    const V<L> scale = load<L>(p.scale), shift = load<L>(p.shift); // the channel's, in every lane
    for (int h = h0; h < h1; ++h) {
      const int64_t from = top + h * row;
      const auto rows = [&](Source source, const auto& value) {
        take_apart(line_of(source, h, 0), line_of(source, h, 1), value);
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
      if constexpr (!kValue) row_of(kU, u);
      if (kTangent && tu) row_of(kTu, tu);
      if (kTangent && tresidual) row_of(kTresidual, tresidual);
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

  // Of each window: the largest a, and z, u, ... where it is; and which of the kernel^2 taps. What is
  // not asked for, or not there, is not set: to clear it costs more than all the rest.
  template <int N>
  struct Chosen {
    V<N> a, z, u, tu, tresidual;
    I<N> which;
  };

  // What windows are ordered by: a; under ReLU z, which is as good where a's gate is open.
  template <int N>
  static FASTJAC_ALWAYS_INLINE const V<N>& key(const Chosen<N>& x) {
    if constexpr (kRelu) {
      return x.z;
    } else {
      return x.a;
    }
  }

  // kValue: a and z are wanted, else z and u; kTangent: the tangents; kWhich: the tap.
  template <bool kValue, bool kTangent, bool kWhich, int N, typename Count>
  FASTJAC_ALWAYS_INLINE Chosen<N> choose(const At<N, Count>& at) const {
    const V<N> scale = load<N>(p.scale + at.channel), shift = load<N>(p.shift + at.channel);
    const auto look = [&](int h, int w) __attribute__((always_inline)) {
      Chosen<N> x;
      if constexpr (kShuffled) {
        x.z = tap(kZ, at, h, w);
        if constexpr (!kValue) x.u = tap(kU, at, h, w);
        if (kTangent && tu) x.tu = tap(kTu, at, h, w);
        if (kTangent && tresidual) x.tresidual = tap(kTresidual, at, h, w);
      } else {
        x.u = tap(u, at, h, w);
        x.z = x.u * scale + shift;
        if (residual) x.z += tap(residual, at, h, w);
        if (kTangent && tu) x.tu = tap(tu, at, h, w);
        if (kTangent && tresidual) x.tresidual = tap(tresidual, at, h, w);
      }
      if constexpr (!kRelu) x.a = activated<N>(x.z);
      x.which = I<N>{} + index_t(h * kKernel + w);
      return x;
    };
    Chosen<N> best = look(kKernel < 3 ? 0 : at.h0, kKernel < 3 || kShuffled ? 0 : at.w0);
    const auto take = [&](const Chosen<N>& x, const auto& where) __attribute__((always_inline)) {
      if constexpr (!kRelu) best.a = where ? x.a : best.a;
      best.z = where ? x.z : best.z;
      if constexpr (!kValue) best.u = where ? x.u : best.u;
      if (kTangent && tu) best.tu = where ? x.tu : best.tu;
      if (kTangent && tresidual) best.tresidual = where ? x.tresidual : best.tresidual;
      if constexpr (kWhich) best.which = where ? x.which : best.which;
    };
    const auto see = [&](int h, int w) __attribute__((always_inline)) {
      const Chosen<N> x = look(h, w);
      take(x, (key<N>(x) > key<N>(best)) | (key<N>(x) != key<N>(x)));
    };
    if constexpr (kKernel == 2) {
      see(0, 1);
      see(1, 0);
      see(1, 1);
    } else if constexpr (kKernel == 3) {
      // The first is seen twice: it does not replace itself by another.
      if (at.w1 - at.w0 == 3) {
        for (int h = at.h0; h < at.h1; ++h) {
          see(h, 0);
          see(h, 1);
          see(h, 2);
        }
      } else if constexpr (kShuffled) {
        static constexpr index_t kEven[] = {0,  2,  4,  6,  8,  10, 12, 14,
                                            16, 18, 20, 22, 24, 26, 28, 30};
        const auto inside = [&](int w) {
          const I<N> column = load_raw<N, index_t>(kEven) + index_t(2 * at.column - m.padding + w);
          return (column >= 0) & (column < index_t(m.width));
        };
        take(look(at.h0, 1), ~inside(0)); // a window's middle column is in the map
        for (int h = at.h0; h < at.h1; ++h) {
          for (int w = 0; w < 3; ++w) {
            const Chosen<N> x = look(h, w);
            const auto better = (key<N>(x) > key<N>(best)) | (key<N>(x) != key<N>(x));
            take(x, better & inside(w));
          }
        }
      } else {
        for (int h = at.h0; h < at.h1; ++h) {
          for (int w = at.w0; w < at.w1; ++w) see(h, w);
        }
      }
    }
    if constexpr (kRelu && kValue) best.a = activated<N>(best.z);
    return best;
  }

  // Contiguous runs of `n` pixels from `begin` on (of image b, channel c): f(in, channel, lane, count).
  template <typename F>
  void each_pixel(int64_t b, int64_t c, int64_t begin, int64_t n, const F& f) const {
    if constexpr (kLast) {
      for (int64_t i = begin; i < begin + n; ++i) {
        const int64_t in = (b * m.height * m.width + i) * m.channels;
        int64_t k = 0;
        for (; k + L <= m.channels; k += L) f(in + k, k, k, Whole{});
        if (k < m.channels) f(in + k, k, k, Part{m.channels - k});
      }
    } else {
      const int64_t in = (b * m.channels + c) * m.height * m.width + begin;
      int64_t k = 0;
      for (; k + L <= n; k += L) f(in + k, int64_t(0), k % kRunLanes, Whole{});
      if (k < n) f(in + k, int64_t(0), k % kRunLanes, Part{n - k});
    }
  }

  // The outputs of segment i of image b: f(At). What f will look up: see choose.
  template <bool kValue, bool kTangent, typename F>
  void each_output(int64_t b, int64_t c, int64_t i, const F& f) const {
    if constexpr (kKernel == 1) {
      const int64_t begin = i * m.run, n = least(m.run, m.height * m.width - begin);
      each_pixel(b, c, begin, n, [&](int64_t in, int64_t channel, int64_t lane, auto count) {
        f(At<L, decltype(count)>{in, in, channel, lane, count, 0, 1, 0, 1});
      });
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
          f(At<L, Whole>{in + k, out + k, k, k, Whole{}, h0, h1, w0, w1});
        }
        if (k < m.channels) {
          f(At<L, Part>{in + k, out + k, k, k, Part{m.channels - k}, h0, h1, w0, w1});
        }
      }
    } else {
      take_apart<kValue, kTangent>(in_row, h0, h1);
      for (int64_t j = 0; j < m.out_width; j += L) {
        const int64_t in = in_row + j * kStride - m.padding, lane = j % kRunLanes;
        const int64_t n = least(L, m.out_width - j);
        const int w0 = begins(j), w1 = ends(j + n - 1);
        if (n == L) {
          f(At<L, Whole>{in, out_row + j, 0, lane, Whole{}, h0, h1, w0, w1, j});
        } else {
          f(At<L, Part>{in, out_row + j, 0, lane, Part{n}, h0, h1, w0, w1, j});
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
    each_output<true, false>(b, c, i, [&](const auto& at) {
      store(y + at.out, choose<true, false, false>(at).a, at.count);
    });
  }

  void reduce(int64_t b, int64_t c, int64_t i) const {
    each_output<false, true>(b, c, i, [&](const auto& at) {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<false, true, kKernel == 3>(at);
      const V<N> g = gated<N>(x.z, load<N>(gy + at.out, at.count));
      const V<N> d = x.u - load<N>(p.mean + at.channel);
      if constexpr (kKernel == 3) {
        if (m.chosen) {
          const V<N> open = gated<N>(x.z, V<N>{} + acc_t(1));
          const I<N> which = open != acc_t(0) ? x.which : I<N>{} + kNothing;
          store_raw(m.chosen + at.out, convert<int8_t, N>(which), at.count);
        }
      }
      add<N>(0, at.lane, g);
      add<N>(1, at.lane, g * d);
      if (!tu) return;
      add<N>(2, at.lane, g * x.tu);
      if constexpr (kKernel == 1) {
        add<N>(3, at.lane, x.tu);
        add<N>(4, at.lane, x.tu * d);
      }
    });
    if (kKernel == 1 || !tu) return;
    const int64_t begin = owned_begin(i) * m.width, n = owned_end(i) * m.width - begin;
    each_pixel(b, c, begin, n, [&](int64_t in, int64_t channel, int64_t lane, auto count) {
      const V<L> t = load<L>(tu + in, count);
      const V<L> d = load<L>(u + in, count) - load<L>(p.mean + channel);
      add<L>(3, lane, t);
      add<L>(4, lane, t * d);
    });
  }

  void pushforward(int64_t b, int64_t c, int64_t i) const {
    each_output<false, true>(b, c, i, [&](const auto& at) {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<false, true, false>(at);
      const V<N> d = x.u - load<N>(p.mean + at.channel);
      V<N> t = load<N>(p.of_tu + at.channel) * x.tu;
      if (of_d) t += load<N>(p.of_d + at.channel) * d + load<N>(p.constant + at.channel);
      if (tresidual) t += x.tresidual;
      store(y + at.out, gated<N>(x.z, t), at.count);
      if (lanes) add<N>(2, at.lane, gated<N>(x.z, load<N>(gy + at.out, at.count)) * x.tu);
    });
  }

  // What is written for N pixels with cotangent g.
  template <int N, typename Count>
  FASTJAC_ALWAYS_INLINE void emit(int64_t in, int64_t channel, const V<N>& g, Count count) const {
    if (gresidual) store(gresidual + in, g, count);
    if (!gu) return;
    V<N> out = load<N>(p.of_g + channel) * g;
    if (of_d) {
      const V<N> d = load<N>(u + in, count) - load<N>(p.mean + channel);
      out += load<N>(p.of_d + channel) * d + load<N>(p.constant + channel);
    }
    if (tu) out += load<N>(p.of_tu + channel) * load<N>(tu + in, count);
    if (curvature) out += load<N>(curvature + in, count);
    store(gu + in, out, count);
  }
  // Contiguous: for the pixels of `count` pairs, at `in`.
  FASTJAC_ALWAYS_INLINE void emit_pairs(
      int64_t in, const V<L>& even, const V<L>& odd, Whole count
  ) const {
    constexpr auto all = std::make_integer_sequence<int, L>();
    emit<L>(in, 0, interleaved<0>(even, odd, all), count);
    emit<L>(in + L, 0, interleaved<L>(even, odd, all), count);
  }
  void emit_pairs(int64_t in, const V<L>& even, const V<L>& odd, Part count) const {
    emit_some(in, even, odd, 2 * count.n);
  }
  // The first n of those pixels.
  void emit_some(int64_t in, const V<L>& even, const V<L>& odd, int64_t n) const {
    constexpr auto all = std::make_integer_sequence<int, L>();
    emit<L>(in, 0, interleaved<0>(even, odd, all), Part{least(L, n)});
    if (n > L) emit<L>(in + L, 0, interleaved<L>(even, odd, all), Part{n - L});
  }
  // For pixels that no window chose.
  void emit_none(int64_t b, int64_t c, int64_t begin, int64_t n) const {
    each_pixel(b, c, begin, n, [&](int64_t in, int64_t channel, int64_t, auto count) {
      emit<L>(in, channel, V<L>{}, count);
    });
  }

  void write(int64_t b, int64_t c, int64_t i) const {
    static_assert(kKernel < 3);
    each_output<true, false>(b, c, i, [&](const auto& at) {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<true, false, true>(at);
      const V<N> g = gated<N>(x.z, load<N>(gy + at.out, at.count));
      if constexpr (kKernel == 1) {
        emit<N>(at.in, at.channel, g, at.count);
        return;
      }
      const auto of = [&](int which) -> V<N> { return x.which == index_t(which) ? g : V<N>{}; };
      for (int h = 0; h < 2; ++h) {
        const int64_t in = at.in + h * row;
        const V<N> left = of(2 * h), right = of(2 * h + 1);
        if constexpr (kShuffled) {
          emit_pairs(in, left, right, at.count);
        } else {
          emit<N>(in, at.channel, left, at.count);
          emit<N>(in + pixel, at.channel, right, at.count);
        }
      }
    });
    if constexpr (kKernel == 2) {
      const int64_t begin = owned_begin(i), covered = 2 * m.out_width;
      for (int64_t h = begin; h < begin + 2; ++h) {
        emit_none(b, c, h * m.width + covered, m.width - covered);
      }
      emit_none(b, c, (begin + 2) * m.width, (owned_end(i) - begin - 2) * m.width);
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
        store_raw(to.which + pixel + k, convert<index_t, L>(which), count);
      };
      const int64_t n = m.out_width * pixel;
      int64_t k = 0;
      for (; k + L <= n; k += L) copy(k, Whole{});
      if (k < n) copy(k, Part{n - k});
      return;
    }
    each_output<true, false>(b, c, i, [&](const auto& at) {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<true, false, true>(at);
      const int64_t place = at.out - begin + pixel;
      store(to.g + place, gated<N>(x.z, load<N>(gy + at.out, at.count)), at.count);
      store_raw(to.which + place, x.which, at.count);
    });
  }

  // The cotangent at column 2 j - padding (+ 1: odd) of an input row that is row h of the windows of
  // `upper`, and row 0 of those of `lower`, if any. `at` is the place of window j.
  template <int N, typename Count>
  FASTJAC_ALWAYS_INLINE V<N> gathered(
      const Row& upper, int h, const Row* lower, int64_t at, bool odd, Count count
  ) const {
    V<N> g{};
    const auto see = [&](const Row& from, int64_t place, int tap) __attribute__((always_inline)) {
      const I<N> which = load_indices<N>(from.which + place, count);
      g += which == index_t(tap) ? load<N>(from.g + place, count) : V<N>{};
    };
    const auto see_row = [&](const Row& from, int first) __attribute__((always_inline)) {
      if (odd) {
        see(from, at, first + 1);
      } else {
        see(from, at - pixel, first + 2);
        see(from, at, first);
      }
    };
    see_row(upper, 3 * h);
    if (lower) see_row(*lower, 0);
    return g;
  }

  void emit_row(int64_t b, int64_t c, int64_t y, const Row& upper, int h, const Row* lower) const {
    const int64_t image = kLast ? b : b * m.channels + c;
    const int64_t in = (image * m.height + y) * row;
    const auto single = [&](int64_t w, auto lanes_, int64_t k, auto count) {
      constexpr int N = decltype(lanes_)::value;
      const int64_t from_left = w + m.padding, at = (from_left / 2 + 1) * pixel + k;
      const bool odd = from_left % 2;
      emit<N>(in + w * pixel + k, k, gathered<N>(upper, h, lower, at, odd, count), count);
    };
    if constexpr (kLast) {
      constexpr std::integral_constant<int, L> whole;
      for (int64_t w = 0; w < m.width; ++w) {
        int64_t k = 0;
        for (; k + L <= m.channels; k += L) single(w, whole, k, Whole{});
        if (k < m.channels) single(w, whole, k, Part{m.channels - k});
      }
    } else {
      constexpr std::integral_constant<int, 1> one;
      int64_t w = 0;
      for (; w < m.padding; ++w) single(w, one, 0, Whole{});
      for (; w < m.width; w += 2 * L) {
        const int64_t at = (w + m.padding) / 2 + 1;
        const V<L> even = gathered<L>(upper, h, lower, at, false, Whole{});
        const V<L> odd = gathered<L>(upper, h, lower, at, true, Whole{});
        if (w + 2 * L <= m.width) {
          emit_pairs(in + w, even, odd, Whole{});
        } else {
          emit_some(in + w, even, odd, m.width - w);
        }
      }
    }
  }

  // Segments [begin, end) of image b. Input row 2 i - padding is the last of window row i - 1 and the
  // first of window row i; the next is the middle one of window row i.
  void write_overlapping(
      int64_t b, int64_t c, int64_t begin, int64_t end, Row above, Row here
  ) const {
    if (begin > 0) choose_row(b, c, begin - 1, above);
    for (int64_t i = begin; i < end; ++i) {
      choose_row(b, c, i, here);
      const int64_t top = i * kStride - m.padding;
      if (i > 0) {
        emit_row(b, c, top, above, 2, &here);
      } else if (top >= 0) {
        emit_row(b, c, top, here, 0, nullptr);
      }
      if (top + 1 < m.height) emit_row(b, c, top + 1, here, 1, nullptr);
      const Row next = above;
      above = here;
      here = next;
    }
    if (end < m.segments) return;
    const int64_t next = end * kStride - m.padding;
    if (next >= m.height) return;
    emit_row(b, c, next, above, 2, nullptr);
    emit_none(b, c, (next + 1) * m.width, (m.height - next - 1) * m.width);
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
