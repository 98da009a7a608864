// What norm_act_pool's kernels do with a segment (norm_act_pool.h says what that is).
//
// Channels-last: a vector holds channels of one pixel. Contiguous: it holds neighbouring outputs of
// one channel, whose pixels under a pool of stride 2 are every other one of a row: two loads and a
// shuffle. The vectors of parameters are read at the channel there; here, from an array of one value.
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

  // [C], or of one channel.
  struct Parameters {
    const acc_t *scale, *shift, *mean, *of_g, *of_tu, *of_d, *constant;
  } p;
  acc_t of_channel[7][kPadding];
  acc_t* lanes = nullptr; // [kSums, stride]: a segment's sums
  const int64_t lanes_stride = kLast ? m.padded_channels : kRunLanes;

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

  // N outputs: their windows' first pixels are at `in`, and the taps [h0, h1) x [w0, w1) of the
  // windows lie in the map.
  template <int N, typename Count>
  struct At {
    static constexpr int kLanes = N;
    int64_t in, out;
    int64_t channel; // of the parameters
    int64_t lane; // of the sums
    Count count;
    int h0, h1, w0, w1;
  };

  template <int N, typename Count>
  FASTJAC_ALWAYS_INLINE static V<N> tap(
      const scalar_t* x, const At<N, Count>& at, int64_t offset, int w
  ) {
    x += at.in + offset;
    if constexpr (kShuffled && N > 1) {
      // Never past the windows' last pixel: from there on it may not be ours to read.
      constexpr auto all = std::make_integer_sequence<int, N>();
      if (w == kKernel - 1) return every_other<1>(load<N>(x - 1), load<N>(x - 1 + N), all);
      return every_other<0>(load<N>(x), load<N>(x + N), all);
    } else {
      return load<N>(x, at.count);
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

  // Of each window: the largest a, and z, u, ... where it is; and which of the kernel^2 taps.
  template <int N>
  struct Chosen {
    V<N> a{}, z{}, u{}, tu{}, tresidual{};
    I<N> which{};
  };

  template <bool kValue, bool kTangent, bool kWhich, int N, typename Count>
  FASTJAC_ALWAYS_INLINE Chosen<N> choose(const At<N, Count>& at) const {
    const V<N> scale = load<N>(p.scale + at.channel), shift = load<N>(p.shift + at.channel);
    const auto look = [&](int h, int w) __attribute__((always_inline)) {
      const int64_t offset = h * row + w * pixel;
      Chosen<N> x;
      x.u = tap(u, at, offset, w);
      x.z = x.u * scale + shift;
      if (residual) x.z += tap(residual, at, offset, w);
      x.a = activated<N>(x.z);
      if (kTangent && tu) x.tu = tap(tu, at, offset, w);
      if (kTangent && tresidual) x.tresidual = tap(tresidual, at, offset, w);
      x.which = I<N>{} + index_t(h * kKernel + w);
      return x;
    };
    constexpr bool kWhole = kKernel < 3 || (kShuffled && N > 1); // no window lacks a column
    Chosen<N> best = look(kKernel < 3 ? 0 : at.h0, kWhole ? 0 : at.w0);
    const auto see = [&](int h, int w) __attribute__((always_inline)) {
      const Chosen<N> x = look(h, w);
      const auto better = (x.a > best.a) | (x.a != x.a);
      best.a = better ? x.a : best.a;
      best.z = better ? x.z : best.z;
      if constexpr (!kValue) best.u = better ? x.u : best.u;
      if (kTangent && tu) best.tu = better ? x.tu : best.tu;
      if (kTangent && tresidual) best.tresidual = better ? x.tresidual : best.tresidual;
      if constexpr (kWhich) best.which = better ? x.which : best.which;
    };
    if constexpr (kKernel == 2) {
      see(0, 1);
      see(1, 0);
      see(1, 1);
    } else if constexpr (kKernel == 3) {
      // The first is seen twice: it does not replace itself by another.
      for (int h = at.h0; h < at.h1; ++h) {
        if (kWhole || at.w1 - at.w0 == 3) {
          see(h, 0);
          see(h, 1);
          see(h, 2);
        } else {
          for (int w = at.w0; w < at.w1; ++w) see(h, w);
        }
      }
    }
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

  // The outputs of segment i of image b: f(At).
  template <typename F>
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
    const auto single = [&](int64_t j, auto lanes_, int64_t k, int64_t lane, auto count) {
      const int64_t left = j * kStride - m.padding;
      const int w0 = static_cast<int>(most(0, -left));
      const int w1 = static_cast<int>(least(kKernel, m.width - left));
      f(At<decltype(lanes_)::value, decltype(count)>{
          in_row + left * pixel + k, out_row + j * pixel + k, k, lane, count, h0, h1, w0, w1
      });
    };
    if constexpr (kLast) {
      constexpr std::integral_constant<int, L> whole;
      for (int64_t j = 0; j < m.out_width; ++j) {
        int64_t k = 0;
        for (; k + L <= m.channels; k += L) single(j, whole, k, k, Whole{});
        if (k < m.channels) single(j, whole, k, k, Part{m.channels - k});
      }
    } else {
      // Output j is summed in the same lane, however many of its neighbours go with it.
      constexpr std::integral_constant<int, 1> one;
      const auto lane = [&](int64_t j) { return (j - m.padding) & (kRunLanes - 1); };
      int64_t j = 0;
      for (; j < m.padding; ++j) single(j, one, 0, lane(j), Whole{}); // its window begins outside
      const auto vectors = [&](auto lanes_) {
        constexpr int N = decltype(lanes_)::value;
        for (; j * 2 - m.padding + 2 * N + kKernel - 3 < m.width; j += N) {
          const int64_t in = in_row + j * 2 - m.padding;
          f(At<N, Whole>{in, out_row + j, 0, lane(j), Whole{}, h0, h1, 0, kKernel});
        }
      };
      vectors(std::integral_constant<int, L>());
      if constexpr (L > 4) vectors(std::integral_constant<int, 4>());
      for (; j < m.out_width; ++j) single(j, one, 0, lane(j), Whole{});
    }
  }

  template <int N>
  FASTJAC_ALWAYS_INLINE void add(int sum, int64_t lane, const V<N>& x) const {
    acc_t* at = lanes + sum * lanes_stride + lane;
    store(at, V<N>(load<N>(at) + x));
  }

  // Adds a segment's sums to those of its chunk.
  void flush(double* sums, int64_t c) const {
    for (int sum = 0; sum < kSums; ++sum) {
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

  // The input rows that segment i owns.
  int64_t owned_begin(int64_t i) const {
    return i == 0 ? 0 : i * kStride - m.padding;
  }
  int64_t owned_end(int64_t i) const {
    return i == m.segments - 1 ? m.height : (i + 1) * kStride - m.padding;
  }

  void forward(int64_t b, int64_t c, int64_t i) const {
    each_output(b, c, i, [&](const auto& at) {
      store(y + at.out, choose<true, false, false>(at).a, at.count);
    });
  }

  void reduce(int64_t b, int64_t c, int64_t i) const {
    each_output(b, c, i, [&](const auto& at) {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<false, true, false>(at);
      const V<N> g = gated<N>(x.z, load<N>(gy + at.out, at.count));
      const V<N> d = x.u - load<N>(p.mean + at.channel);
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
    each_output(b, c, i, [&](const auto& at) {
      constexpr int N = std::remove_reference_t<decltype(at)>::kLanes;
      const Chosen<N> x = choose<false, true, false>(at);
      const V<N> d = x.u - load<N>(p.mean + at.channel);
      V<N> t = load<N>(p.of_tu + at.channel) * x.tu + load<N>(p.of_d + at.channel) * d +
               load<N>(p.constant + at.channel);
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
    const V<N> d = load<N>(u + in, count) - load<N>(p.mean + channel);
    V<N> out = load<N>(p.of_g + channel) * g + load<N>(p.of_d + channel) * d +
               load<N>(p.constant + channel);
    if (tu) out += load<N>(p.of_tu + channel) * load<N>(tu + in, count);
    if (curvature) out += load<N>(curvature + in, count);
    store(gu + in, out, count);
  }
  // For pixels that no window chose.
  void emit_none(int64_t b, int64_t c, int64_t begin, int64_t n) const {
    each_pixel(b, c, begin, n, [&](int64_t in, int64_t channel, int64_t, auto count) {
      emit<L>(in, channel, V<L>{}, count);
    });
  }

  void write(int64_t b, int64_t c, int64_t i) const {
    static_assert(kKernel < 3);
    each_output(b, c, i, [&](const auto& at) {
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
        if constexpr (kShuffled && N > 1) {
          constexpr auto all = std::make_integer_sequence<int, N>();
          emit<N>(in, at.channel, interleaved<0>(left, right, all), at.count);
          emit<N>(in + N, at.channel, interleaved<N>(left, right, all), at.count);
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
  static constexpr index_t kNothing = -1;
  int64_t row_size() const {
    return (m.out_width + 2) * pixel;
  }

  void choose_row(int64_t b, int64_t c, int64_t i, const Row& to) const {
    const int64_t image = kLast ? b : b * m.channels + c;
    const int64_t begin = (image * m.out_height + i) * m.out_width * pixel;
    each_output(b, c, i, [&](const auto& at) {
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
      constexpr auto all = std::make_integer_sequence<int, L>();
      int64_t w = 0;
      for (; w < m.padding; ++w) single(w, one, 0, Whole{});
      for (; w + 2 * L <= m.width; w += 2 * L) {
        const int64_t at = (w + m.padding) / 2 + 1;
        const V<L> even = gathered<L>(upper, h, lower, at, false, Whole{});
        const V<L> odd = gathered<L>(upper, h, lower, at, true, Whole{});
        emit<L>(in + w, 0, interleaved<0>(even, odd, all), Whole{});
        emit<L>(in + w + L, 0, interleaved<L>(even, odd, all), Whole{});
      }
      for (; w < m.width; ++w) single(w, one, 0, Whole{});
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
