// What norm_act_pool's kernels do with segments (norm_act_pool.h says what those are) where windows share
// no pixel: 2x2, or no pool.
//
// Pixels must be read once and written once: forward u + y; sums u + gy (+ tu); write u + gy + gu
// (+ gresidual, tu, ...).
#pragma once

#include "norm_act_pool_pixels.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

template <typename scalar_t, int kKernel, bool kRelu, bool kLast>
struct Disjoint : Pixels<scalar_t, kKernel, kRelu, kLast> {
  using P = Pixels<scalar_t, kKernel, kRelu, kLast>;
  using P::add, P::each_pixel, P::gated, P::held, P::P;
  using P::L, P::m, P::pixel, P::row, P::u, P::tu, P::tresidual, P::gy, P::y, P::lanes, P::adds_d;
  using typename P::acc_t, typename P::index_t, typename P::V, typename P::I, typename P::Held;
  using typename P::Choice, typename P::Tap, typename P::Terms;

  // How many segments' sums the lanes may hold: 256 outputs of a channel, or 64 to a lane.
  int64_t most_held() const {
    const int64_t outputs = kKernel == 1 ? least(m.run, m.height * m.width) : m.out_width;
    return most(1, (kLast ? 256 : 64 * kRunLanes) / outputs);
  }

  // A vector of outputs: their windows' first pixels are at `in`.
  template <typename Count>
  struct At {
    int64_t in, out;
    int64_t lane; // of the sums
    Count count;
    int64_t ahead = 0; // contiguous: what is asked for meanwhile

    // Contiguous: of the pixels in a row of the windows.
    auto pixels() const {
      if constexpr (kLast || std::is_same_v<Count, Whole>) {
        return count;
      } else {
        return Part{2 * count.n};
      }
    }
  };

  // The outputs of segment i of image b: f(At, Held).
  template <typename F>
  void each_output(int64_t b, int64_t c, int64_t i, const F& f) const {
    if constexpr (kKernel == 1) {
      const int64_t begin = i * m.run, n = least(m.run, m.height * m.width - begin);
      each_pixel(
          b, c, begin, n,
          [&](int64_t in, const Held& of, int64_t lane, auto count)
              FASTJAC_INLINED { f(At<decltype(count)>{in, in, lane, count}, of); }
      );
      return;
    }
    const int64_t image = kLast ? b : b * m.channels + c;
    const int64_t in_row = (image * m.height + 2 * i) * row;
    const int64_t out_row = (image * m.out_height + i) * m.out_width * pixel;
    if constexpr (kLast) {
      for (int64_t j = 0; j < m.out_width; ++j) {
        const int64_t in = in_row + 2 * j * pixel, out = out_row + j * pixel;
        this->each_vector([&](int64_t k, auto count) FASTJAC_INLINED {
          f(At<decltype(count)>{in + k, out + k, k, count}, held(k));
        });
      }
    } else {
      const Held all = held(0);
      int64_t j = 0;
      const auto at = [&](auto count) FASTJAC_INLINED {
        const int64_t ahead = in_row + 2 * row + 4 * j;
        f(At<decltype(count)>{in_row + 2 * j, out_row + j, j % kRunLanes, count, ahead}, all);
      };
      for (; j + L <= m.out_width; j += L) at(Whole{});
      if (j < m.out_width) at(Part{m.out_width - j});
    }
  }

  // A window's pixels, in row order.
  struct Window {
    Pair<Tap> rows[2];
  };
  template <int kAsked, typename Count>
  FASTJAC_ALWAYS_INLINE void look(Window& x, const At<Count>& at, const Held& of) const {
    if constexpr (kKernel == 1) {
      P::template look<kAsked>(x.rows[0].first, at.in, of, at.count);
    } else {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int64_t in = at.in + h * row, ahead = at.ahead + h * 2 * L;
        this->template look_at_both<kAsked>(
            x.rows[h].first, x.rows[h].second, in, ahead, of, at.pixels()
        );
      }
    }
  }
  template <int kAsked>
  FASTJAC_ALWAYS_INLINE void choose(Choice& best, const Window& x) const {
    this->template copy<kAsked>(best.at, x.rows[0].first);
    if constexpr (kKernel == 1) return;
    constexpr bool kValue = kRelu && kAsked == kZAlone;
    const auto next = [&](const Tap& tap, int i) FASTJAC_INLINED {
      this->template merge<kAsked, !kValue>(best, tap, I{} + index_t(i));
    };
    best.which = I{};
    next(x.rows[0].second, 1);
    next(x.rows[1].first, 2);
    next(x.rows[1].second, 3);
    if constexpr (kValue) {
      const auto nan = unordered(x.rows[0].first.z, x.rows[0].second.z) |
                       unordered(x.rows[1].first.z, x.rows[1].second.z);
      best.at.z = select(nan, V{} + acc_t(NAN), best.at.z);
    }
  }
  template <int kAsked, typename Count>
  FASTJAC_ALWAYS_INLINE void choose(Choice& best, const At<Count>& at, const Held& of) const {
    Window x;
    look<kAsked>(x, at, of);
    choose<kAsked>(best, x);
  }

  void forward(int64_t b, int64_t c, int64_t i) const {
    each_output(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      Choice x;
      choose<kZAlone>(x, at, of);
      store(y + at.out, this->output(x.at), at.count);
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
    constexpr int kAsked = kTheU | (kTangent ? kTheTangents : 0);
    each_output(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      Choice best;
      choose<kAsked>(best, at, of);
      const Tap& x = best.at;
      const V g = gated(x.z, load<L>(gy + at.out, at.count));
      const V d = x.u - of.mean;
      add(0, at.lane, g);
      add(1, at.lane, g * d);
      if constexpr (kTangent) add(2, at.lane, g * x.tu);
      if constexpr (kTangent && kKernel == 1) this->add_tangent(at.lane, x.tu, d);
    });
    if (kTangent && kKernel > 1) this->add_tangents(b, c, i);
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
    each_output(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      Choice best;
      choose<kAsked>(best, at, of);
      const Tap& x = best.at;
      store(y + at.out, this->template output_tangent<kAsked>(x, of), at.count);
      if (lanes) add(2, at.lane, gated(x.z, load<L>(gy + at.out, at.count)) * x.tu);
    });
  }

  void write(int64_t b, int64_t c, int64_t i) const {
    this->with_terms([&](auto terms) FASTJAC_INLINED { write_terms<terms()>(b, c, i); });
  }
  template <Terms kTerms>
  void write_terms(int64_t b, int64_t c, int64_t i) const {
    each_output(b, c, i, [&](const auto& at, const auto& of) FASTJAC_INLINED {
      Window window;
      Choice x;
      look<kZAlone>(window, at, of);
      choose<kWhich>(x, window);
      const V g = gated(x.at.z, load<L>(gy + at.out, at.count));
      if constexpr (kKernel == 1) {
        this->template emit<kTerms>(at.in, of, g, at.count, window.rows[0].first.u);
        return;
      }
      const auto g_of = [&](int which) FASTJAC_INLINED {
        return select(equal(x.which, I{} + index_t(which)), g, V{});
      };
      // all of u is read before any of gu is written: for all that the compiler knows it may lie there
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Pair<V> here{window.rows[h].first.u, window.rows[h].second.u};
        this->template emit_pair<kTerms>(
            at.in + h * row, of, {g_of(2 * h), g_of(2 * h + 1)}, at.pixels(), here
        );
      }
    });
    if constexpr (kKernel == 2) {
      const int64_t begin = this->owned_begin(i), covered = 2 * m.out_width;
      for (int64_t h = begin; h < begin + 2; ++h) {
        this->template emit_none<kTerms>(b, c, h * m.width + covered, m.width - covered);
      }
      this->template emit_none<kTerms>(
          b, c, (begin + 2) * m.width, (this->owned_end(i) - begin - 2) * m.width
      );
    }
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
