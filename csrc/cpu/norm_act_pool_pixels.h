// What norm_act_pool's kernels share: how pixels are read, chosen among, summed and written.
//
// Channels-last: a vector holds channels of one pixel. Contiguous: it holds neighbouring outputs of one
// channel, whose pixels under a pool of stride 2 are every other one of a row. In either layout a pair of
// vectors holds pixels and their neighbours to the right, lane by lane.
// The vectors of parameters are read at the channel there; here, from an array of one value.
#pragma once

#include <cstdlib>

#include "norm_act_pool.h"
#include "stored_lanes.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

using namespace fastjac::FASTJAC_TARGET_NAME;

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Zeroed memory of one task after the other, in which vectors lie within cache lines.
template <typename T>
struct Scratch {
  static constexpr size_t kLine = 64;
  T* data;
  explicit Scratch(int64_t n) {
    const size_t size = ((n + 64) * sizeof(T) + kLine - 1) / kLine * kLine;
    data = static_cast<T*>(std::aligned_alloc(kLine, size));
    if (data == nullptr) std::abort();
    std::memset(data, 0, size);
  }
  ~Scratch() {
    std::free(data);
  }
  Scratch(const Scratch&) = delete;
};

// What is asked for where a window's largest value is, besides z.
enum Asked { kZAlone = 0, kWhich = 1, kTheU = 2, kTheTangents = 4 };

// kRelu: the activation is ReLU, and otherwise m says which. kLast: channels-last.
template <typename scalar_t, int kKernel, bool kRelu, bool kLast>
struct Pixels {
  using acc_t = accumulator_t<scalar_t>;
  using index_t = index_of<acc_t>;
  static constexpr int L = kLanes<acc_t>;
  static constexpr int kStride = kKernel == 1 ? 1 : 2;
  static constexpr index_t kNothing = -1; // no tap
  static constexpr int64_t kRun = 16; // pixels whose sums are added up in registers
  using V = Lanes<acc_t, L>;
  using I = Lanes<index_t, L>;

  const Maps& m;
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
  const bool adds_d = m.adds_d;

  // [kParameters, C] in blocks; contiguous: a block of one channel's, in every lane.
  const acc_t* parameters = static_cast<const acc_t*>(m.parameters);
  acc_t of_channel[kParameters * kPadding];
  // [kSums, size] in blocks: the sums of some segments, where there are sums.
  acc_t* lanes = nullptr;
  const int64_t lanes_size = kLast ? m.padded_channels : kRunLanes;

  explicit Pixels(const Maps& maps) : m(maps) {}

  // Contiguous: the parameters are those of channel c from here on.
  void at_channel(int64_t c) {
    const auto* all = static_cast<const acc_t*>(m.parameters);
    for (int i = 0; i < kParameters; ++i) {
      const acc_t x = all[in_blocks(c, kParameters) + i * kPadding];
      for (int lane = 0; lane < kPadding; ++lane) of_channel[i * kPadding + lane] = x;
    }
    parameters = of_channel;
  }

  // in_blocks() of a vector's first lane.
  static FASTJAC_ALWAYS_INLINE int64_t of_vector(int64_t lane, int rows) {
    return L == kPadding ? lane * rows : in_blocks(lane, rows);
  }

  // The parameters of a vector's channels, in registers: from memory they would be loaded again after each
  // store of the accumulator type.
  struct Held {
    V scale, shift, mean, of_g, of_tu, of_d, constant; // in the order of the rows
  };
  FASTJAC_ALWAYS_INLINE Held held(int64_t channel) const {
    const acc_t* const all = parameters + of_vector(channel, kParameters);
    const auto row = [&](int i) FASTJAC_INLINED { return load<L>(all + i * kPadding); };
    return {row(0), row(1), row(2), row(3), row(4), row(5), row(6)};
  }

  // f(first channel, count) for the vectors of a pixel's channels.
  template <typename F>
  FASTJAC_ALWAYS_INLINE void each_vector(const F& f) const {
    int64_t k = 0;
    for (; k + L <= m.channels; k += L) f(k, Whole{});
    if (k < m.channels) f(k, Part{m.channels - k});
  }

  // Contiguous runs of `n` pixels from `begin` on (of image b, channel c): f(in, held, lane, count).
  template <typename F>
  void each_pixel(int64_t b, int64_t c, int64_t begin, int64_t n, const F& f) const {
    if constexpr (kLast) {
      for (int64_t i = begin; i < begin + n; ++i) {
        const int64_t in = (b * m.height * m.width + i) * m.channels;
        each_vector([&](int64_t k, auto count) FASTJAC_INLINED { f(in + k, held(k), k, count); });
      }
    } else {
      const int64_t in = (b * m.channels + c) * m.height * m.width + begin;
      const Held all = held(0);
      int64_t k = 0;
      for (; k + L <= n; k += L) f(in + k, all, k % kRunLanes, Whole{});
      if (k < n) f(in + k, all, k % kRunLanes, Part{n - k});
    }
  }

  FASTJAC_ALWAYS_INLINE Activation activation() const { // a member would be asked for each vector
    return kRelu ? Activation::kRelu : m.activation;
  }
  FASTJAC_ALWAYS_INLINE V activated(const V& z) const {
    return activate(activation(), slope, z, [](const auto& x) { return exponential(x); });
  }
  // act'(z) x
  FASTJAC_ALWAYS_INLINE V gated(const V& z, const V& x) const {
    if constexpr (kRelu) return select(open(z), x, V{});
    return activate_backward(activation(), slope, z, x, [](const auto& e) {
      return exponential(e);
    });
  }
  // Whether act'(z) is more than zero.
  FASTJAC_ALWAYS_INLINE auto open(const V& z) const {
    if constexpr (kRelu) {
      return not_at_most(z, V{});
    } else {
      return greater(gated(z, V{} + acc_t(1)), V{});
    }
  }

  // A pixel, and what windows are ordered by: under ReLU z, which is as good where a's gate is open, and
  // else a. Tangents that were not asked for are not set.
  struct Tap {
    V z, key, u, tu, tresidual;
  };
  static FASTJAC_ALWAYS_INLINE const V& key(const Tap& tap) {
    return kRelu ? tap.z : tap.key;
  }
  FASTJAC_ALWAYS_INLINE void set_z(Tap& x, const Held& of, const V& here, const V& added) const {
    x.u = here;
    x.z = here * of.scale + of.shift;
    if (residual) x.z += added;
    if constexpr (!kRelu) x.key = activated(x.z);
  }
  // f(a map, its vector in each of the taps)
  template <int kAsked, typename F, typename... Taps>
  FASTJAC_ALWAYS_INLINE void each_tangent(const F& f, Taps&... taps) const {
    if constexpr (kAsked & kTheTangents) {
      f(tu, taps.tu...);
      if (tresidual) f(tresidual, taps.tresidual...);
    }
  }
  // f(the same vector of each) for all that is asked for.
  template <int kAsked, typename F, typename... Taps>
  FASTJAC_ALWAYS_INLINE void each_part(const F& f, Taps&... taps) const {
    f(taps.z...);
    if constexpr (!kRelu) f(taps.key...);
    if constexpr (kAsked & kTheU) f(taps.u...);
    each_tangent<kAsked>([&](const scalar_t*, auto&... t) FASTJAC_INLINED { f(t...); }, taps...);
  }

  // How many parts those are, at most.
  template <int kAsked>
  static constexpr int kParts = 1 + !kRelu + !!(kAsked & kTheU) + 2 * !!(kAsked & kTheTangents);

  // All that is asked for: a Tap as a whole is no vectors in registers, to GCC 12.
  template <int kAsked>
  FASTJAC_ALWAYS_INLINE void copy(Tap& to, const Tap& from) const {
    each_part<kAsked>([](V& a, const V& b) FASTJAC_INLINED { a = b; }, to, from);
  }

  // What read(map) has there.
  template <int kAsked, typename Read>
  FASTJAC_ALWAYS_INLINE void look_with(Tap& x, const Held& of, const Read& read) const {
    set_z(x, of, read(u), residual ? read(residual) : V{});
    each_tangent<kAsked>([&](const scalar_t* map, V& t) FASTJAC_INLINED { t = read(map); }, x);
  }
  template <int kAsked, typename Count>
  FASTJAC_ALWAYS_INLINE void look(Tap& x, int64_t in, const Held& of, Count count) const {
    look_with<kAsked>(x, of, [&](const scalar_t* map) FASTJAC_INLINED {
      return load<L>(map + in, count);
    });
  }

  // Neighbours in a row. Contiguous: `count` is that of the pixels, two to a lane.
  template <typename Count>
  FASTJAC_ALWAYS_INLINE Pair<V> pair(const scalar_t* x, Count count) const {
    if constexpr (kLast) {
      return {load<L>(x, count), load<L>(x + pixel, count)};
    } else {
      return load_pairs<L>(x, count);
    }
  }
  // Contiguous: from `ahead` on, pixels of the next rows are asked for, in the order in which they lie. Two
  // rows that are read by turns, each too short a run by itself, the processor does not see coming.
  template <int kAsked, typename Count>
  FASTJAC_ALWAYS_INLINE void look_at_both(
      Tap& first, Tap& second, int64_t in, int64_t ahead, const Held& of, Count count
  ) const {
    const auto read = [&](const scalar_t* map) FASTJAC_INLINED {
      if constexpr (!kLast) {
        const scalar_t* later = map + ahead;
        __builtin_prefetch(later);
        if (2 * L * sizeof(scalar_t) > 64) __builtin_prefetch(later + L);
      }
      return pair(map + in, count);
    };
    const Pair<V> here = read(u);
    const Pair<V> added = residual ? read(residual) : Pair<V>{};
    set_z(first, of, here.first, added.first);
    set_z(second, of, here.second, added.second);
    each_tangent<kAsked>(
        [&](const scalar_t* map, V& t_first, V& t_second) FASTJAC_INLINED {
          const Pair<V> t = read(map);
          t_first = t.first;
          t_second = t.second;
        },
        first, second
    );
  }

  // What the chosen pixel becomes.
  FASTJAC_ALWAYS_INLINE V output(const Tap& x) const {
    return kRelu ? activated(x.z) : x.key;
  }
  template <int kAsked>
  FASTJAC_ALWAYS_INLINE V output_tangent(const Tap& x, const Held& of) const {
    V t = of.of_tu * x.tu;
    if constexpr (kAsked & kTheU) t += of.of_d * (x.u - of.mean) + of.constant;
    if (tresidual) t += x.tresidual;
    return gated(x.z, t);
  }

  // The pixel that each window chose, and which of its kernel^2 that is: in row order the first of the
  // largest, or the last NaN. Of what was not asked for, nothing.
  struct Choice {
    Tap at;
    I which;
  };
  // best, or a pixel that comes after it in row order. kNan: there may be NaNs.
  template <int kAsked, bool kNan>
  FASTJAC_ALWAYS_INLINE void merge(Choice& best, const Tap& x, const I& which) const {
    const auto replace = [&](const auto& where) FASTJAC_INLINED {
      each_part<kAsked>(
          [&](V& to, const V& from) FASTJAC_INLINED { to = select(where, from, to); }, best.at, x
      );
      if constexpr (kAsked & kWhich) best.which = select(where, which, best.which);
    };
    const auto better = greater(key(x), key(best.at));
    if constexpr (kNan) {
      replace(better | unordered(key(x)));
    } else {
      // The same as that selection of keys, but the next comparison need not wait for this one.
      const V largest = larger(key(x), key(best.at));
      if constexpr (!kRelu || kAsked != kZAlone) replace(better);
      (kRelu ? best.at.z : best.at.key) = largest;
    }
  }
  template <typename X>
  FASTJAC_ALWAYS_INLINE void add(int sum, int64_t lane, const X& x) const {
    add_to(lanes, sum, lane, x);
  }
  // To sums that lie as the lanes do.
  template <typename X>
  static FASTJAC_ALWAYS_INLINE void add_to(acc_t* sums, int sum, int64_t lane, const X& x) {
    acc_t* at = sums + of_vector(lane, kSums) + sum * kPadding;
    store(at, V(load<L>(at) + x));
  }

  // Adds what the lanes hold of sums [begin, end) to those of the chunk.
  void flush(double* sums, int64_t c, int begin, int end) const {
    for (int sum = begin; sum < end; ++sum) {
      const auto x = [&](int64_t k) FASTJAC_INLINED -> acc_t& {
        return lanes[in_blocks(k, kSums) + sum * kPadding];
      };
      if constexpr (kLast) {
        double* out = sums + sum * m.padded_channels;
        for (int64_t k = 0; k < m.channels; ++k) out[k] += x(k);
      } else {
        for (int half = kRunLanes / 2; half > 0; half /= 2) {
          for (int k = 0; k < half; ++k) x(k) += x(k + half);
        }
        sums[sum * m.padded_channels + c] += x(0);
      }
      for (int64_t k = 0; k < lanes_size; ++k) x(k) = 0;
    }
  }

  // The rows of pixels that segment i owns.
  int64_t owned_begin(int64_t i) const {
    return i == 0 ? 0 : i * kStride - m.padding;
  }
  int64_t owned_end(int64_t i) const {
    return i == m.segments - 1 ? m.height : (i + 1) * kStride - m.padding;
  }

  // Of all pixels of segment i: the sums that no g is in.
  void add_tangents(int64_t b, int64_t c, int64_t i) const {
    const int64_t begin = owned_begin(i) * m.width, end = owned_end(i) * m.width;
    if constexpr (
        kLast
    ) { // several pixels of a channel one after the other, for registers to hold its sums
      for (int64_t j = begin; j < end; j += kRun) {
        each_vector([&](int64_t k, auto count) FASTJAC_INLINED {
          const V mean = held(k).mean;
          V t{}, td{};
          int64_t in = (b * m.height * m.width + j) * m.channels + k;
          for (int64_t n = least(kRun, end - j); n > 0; --n, in += m.channels) {
            const V x = load<L>(tu + in, count);
            t += x;
            td += x * (load<L>(u + in, count) - mean);
          }
          add(3, k, t);
          add(4, k, td);
        });
      }
    } else {
      each_pixel(
          b, c, begin, end - begin, [&](int64_t in, const Held& of, int64_t lane, auto count) {
            add_tangent(lane, load<L>(tu + in, count), load<L>(u + in, count) - of.mean);
          }
      );
    }
  }
  FASTJAC_ALWAYS_INLINE void add_tangent(int64_t lane, const V& t, const V& d) const {
    add(3, lane, t);
    add(4, lane, t * d);
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

  // of_g g + of_d d + constant + of_tu tu + curvature, or what is wanted of it.
  template <Terms kTerms>
  FASTJAC_ALWAYS_INLINE V
  cotangent(const Held& of, const V& g, const V& here, const V& t, const V& added) const {
    V out = of.of_g * g;
    if (kTerms == kWhatever ? adds_d : kTerms == kOfGAndD) {
      out += of.of_d * (here - of.mean) + of.constant;
    }
    if (kTerms == kWhatever && tu) out += of.of_tu * t;
    if (kTerms == kWhatever && curvature) out += added;
    return out;
  }
  // That of the pixels at `in`, where u is `here`.
  template <Terms kTerms, typename Count>
  FASTJAC_ALWAYS_INLINE V
  cotangent_at(int64_t in, const Held& of, const V& g, Count count, const V& here) const {
    constexpr bool kAny = kTerms == kWhatever;
    const V t = kAny && tu ? load<L>(tu + in, count) : V{};
    const V added = kAny && curvature ? load<L>(curvature + in, count) : V{};
    return cotangent<kTerms>(of, g, here, t, added);
  }
  template <Terms kTerms, typename Count>
  FASTJAC_ALWAYS_INLINE V cotangent_at(int64_t in, const Held& of, const V& g, Count count) const {
    return cotangent_at<kTerms>(in, of, g, count, kTerms == kOfG ? V{} : load<L>(u + in, count));
  }
  // Writes what is wanted of the pixels at `in`, where act'(z) unpool(gy) is g, and u is `here`.
  template <Terms kTerms, typename Count, typename... Here>
  FASTJAC_ALWAYS_INLINE void emit(
      int64_t in, const Held& of, const V& g, Count count, const Here&... here
  ) const {
    constexpr bool kAny = kTerms == kWhatever;
    if (kAny && gresidual) store(gresidual + in, g, count);
    if (kAny && !gu) return;
    store(gu + in, cotangent_at<kTerms>(in, of, g, count, here...), count);
  }
  // The same for neighbours in a row, as in pair().
  template <Terms kTerms, typename Count>
  FASTJAC_ALWAYS_INLINE void emit_pair(
      int64_t in, const Held& of, const Pair<V>& g, Count count, const Pair<V>& here
  ) const {
    if constexpr (kLast) {
      emit<kTerms>(in, of, g.first, count, here.first);
      emit<kTerms>(in + pixel, of, g.second, count, here.second);
    } else if constexpr (kHalves<scalar_t>) {
      constexpr bool kAny = kTerms == kWhatever;
      if (kAny && gresidual) store_pairs(gresidual + in, g, count);
      if (kAny && !gu) return;
      const Pair<V> t = kAny && tu ? pair(tu + in, count) : Pair<V>{};
      const Pair<V> added = kAny && curvature ? pair(curvature + in, count) : Pair<V>{};
      const V first = cotangent<kTerms>(of, g.first, here.first, t.first, added.first);
      const V second = cotangent<kTerms>(of, g.second, here.second, t.second, added.second);
      store_pairs(gu + in, Pair<V>{first, second}, count);
    } else {
      constexpr auto all = std::make_integer_sequence<int, L>();
      const V low = interleaved<0>(g.first, g.second, all);
      const V high = interleaved<L>(g.first, g.second, all);
      if constexpr (std::is_same_v<Count, Whole>) {
        emit<kTerms>(in, of, low, count);
        emit<kTerms>(in + L, of, high, count);
      } else {
        emit<kTerms>(in, of, low, Part{least(L, count.n)});
        if (count.n > L) emit<kTerms>(in + L, of, high, Part{count.n - L});
      }
    }
  }
  template <Terms kTerms, typename Count>
  FASTJAC_ALWAYS_INLINE void emit_pair(
      int64_t in, const Held& of, const Pair<V>& g, Count count
  ) const {
    emit_pair<kTerms>(in, of, g, count, kTerms == kOfG ? Pair<V>{} : pair(u + in, count));
  }
  // For pixels that no window chose.
  template <Terms kTerms>
  void emit_none(int64_t b, int64_t c, int64_t begin, int64_t n) const {
    each_pixel(b, c, begin, n, [&](int64_t in, const Held& of, int64_t, auto count) {
      emit<kTerms>(in, of, V{}, count);
    });
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
