// What norm_act_pool's kernels do with segments (norm_act_pool.h says what those are) where windows share
// pixels: 3x3 of stride 2.
//
// Windows i have the rows 2 i - padding of pixels, the one below it, and one more, which is the first row of
// windows i + 1; columns likewise. What they choose of a row of pixels is found once, and of the shared row
// kept for the next windows. Where a first or a last row or column lies outside the map, the middle one is
// looked at twice, and does not replace itself.
//
// NaNs cost a comparison each, so vectors are looked through as if there were none; where there was one,
// they are looked through again.
#pragma once

#include "norm_act_pool_pixels.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

template <typename scalar_t, bool kRelu, bool kLast>
struct Overlapping : Pixels<scalar_t, 3, kRelu, kLast> {
  using P = Pixels<scalar_t, 3, kRelu, kLast>;
  using P::add, P::gated, P::held, P::open, P::P;
  using P::L, P::kNothing, P::m, P::pixel, P::row, P::u, P::tu, P::gy, P::y, P::lanes, P::adds_d;
  using typename P::acc_t, typename P::index_t, typename P::V, typename P::I, typename P::Held;
  using typename P::Choice, typename P::Tap, typename P::Terms;

  // What the windows of a row chose of the row of pixels that they share with the row above, and of the one
  // that they share with the row below, by turns: [places / L, 2, a Tap's parts and which it is, L]. The two lie
  // side by side, or their distance may be one at which they drive each other out of the caches.
  template <int kAsked>
  static constexpr int kKept = L * (P::template kParts<kAsked> + !!(kAsked & kWhich));
  static constexpr int kMostKept = kKept<kTheU | kTheTangents | kWhich>;
  acc_t* kept = nullptr;
  const int64_t padded = m.padded_channels; // of m, each vector would ask for these again
  const int64_t places = (m.out_width * (kLast ? padded : 1) + L - 1) / L * L;
  int8_t* const chosen = m.chosen;
  // That which row i shares with the row above, of the windows at `place`.
  template <int kAsked>
  FASTJAC_ALWAYS_INLINE acc_t* kept_above(int64_t i, int64_t place) const {
    return kept + (2 * (place / L) + i % 2) * kKept<kAsked>;
  }
  template <int kAsked>
  FASTJAC_ALWAYS_INLINE void keep(acc_t* at, const Choice& x) const {
    const auto next = [&](const auto& part) FASTJAC_INLINED {
      store_as<acc_t>(at, part);
      at += L;
    };
    this->template each_part<kAsked>(next, x.at);
    if constexpr (kAsked & kWhich) next(x.which);
  }
  template <int kAsked>
  FASTJAC_ALWAYS_INLINE void recall(Choice& x, const acc_t* at) const {
    const auto next = [&](auto& part) FASTJAC_INLINED {
      part = bit_cast<std::remove_reference_t<decltype(part)>>(load_raw<L, acc_t>(at));
      at += L;
    };
    this->template each_part<kAsked>(next, x.at);
    if constexpr (kAsked & kWhich) next(x.which);
  }

  // Channels-last, pixels did not come by themselves: those behind the ones at `at` of a window, which for its
  // vector k are two.
  static constexpr int64_t kAhead = 1024 / sizeof(scalar_t);
  FASTJAC_ALWAYS_INLINE void ask_ahead(int64_t at, int64_t k) const {
    const scalar_t* later = u + at + k + kAhead;
    __builtin_prefetch(later);
    if (2 * L * sizeof(scalar_t) > 64) __builtin_prefetch(later + L);
  }

  // The windows' three pixels in a row, and which of them the first and the last are: 0 and 2, or where there
  // is no such pixel 1, and the middle one stands in its place.
  struct Three {
    Tap left, middle, right;
    I first, last;
  };
  template <int kAsked, bool kNan>
  FASTJAC_ALWAYS_INLINE void choose_among(Choice& best, const Three& x) const {
    this->template copy<kAsked>(best.at, x.left);
    best.which = x.first;
    this->template merge<kAsked, kNan>(best, x.middle, I{} + index_t(1));
    this->template merge<kAsked, kNan>(best, x.right, x.last);
  }

  // A vector of windows in a row.
  struct At {
    int64_t out; // from the row's first output on
    int64_t lane; // of the sums
    int64_t place; // in what is kept of a part
  };
  // The middle pixel of a row's first windows, in row h of pixels.
  int64_t middle_of_first(int64_t image, int64_t h) const {
    return (image * m.height + h) * row + (1 - m.padding) * pixel;
  }
  // f(At, held, Three[kRows], count) for the windows of a row: what they have of rows of pixels. `in`: the
  // first windows' middle pixels there.
  template <int kAsked, int kRows, typename F>
  FASTJAC_ALWAYS_INLINE void each_three(const int64_t (&in)[kRows], const F& f) const {
    const int64_t pixels = m.width - (1 - m.padding); // from the first middle one on
    if constexpr (kLast) {
      // Windows j, all of whose columns exist if `inner`.
      const auto windows = [&](int64_t j, auto inner) FASTJAC_INLINED {
        const bool is_left = inner || j > 0 || !m.padding, is_right = inner || 2 * j + 1 < pixels;
        const I first = I{} + index_t(is_left ? 0 : 1), last = I{} + index_t(is_right ? 2 : 1);
        const int64_t from = 2 * j * pixel, out = j * pixel, place = j * padded;
        this->each_vector([&](int64_t k, auto count) FASTJAC_INLINED {
          const Held of = held(k);
          Three x[kRows];
#pragma GCC unroll 2
          for (int h = 0; h < kRows; ++h) {
            const int64_t at = in[h] + from + k;
            ask_ahead(at, k);
            this->template look<kAsked>(x[h].left, is_left ? at - pixel : at, of, count);
            this->template look<kAsked>(x[h].middle, at, of, count);
            this->template look<kAsked>(x[h].right, is_right ? at + pixel : at, of, count);
            x[h].first = first;
            x[h].last = last;
          }
          f(At{out + k, k, place + k}, of, x, count);
        });
      };
      windows(0, std::false_type());
      int64_t j = 1;
      for (; j < m.out_width && 2 * j + 1 < pixels; ++j) windows(j, std::true_type());
      for (; j < m.out_width; ++j) windows(j, std::false_type());
    } else {
      const Held of = held(0);
      Tap left[kRows]; // the pixel to the left of the next windows', in the last lane
#pragma GCC unroll 2
      for (int h = 0; h < kRows; ++h) {
        this->template look_with<kAsked>(left[h], of, [&](const scalar_t* map) FASTJAC_INLINED {
          return V{} + load<1>(map + in[h] - (m.padding ? 0 : 1));
        });
      }
      const index_t of_first[L] = {m.padding ? 1 : 0};
      I first = load_raw<L, index_t>(of_first);
      const auto step = [&](int64_t j, auto count, auto of_pixels) FASTJAC_INLINED {
        Three x[kRows];
#pragma GCC unroll 2
        for (int h = 0; h < kRows; ++h) {
          const int64_t at = in[h] + 2 * j, ahead = in[0] + 2 * row + 2 * (kRows * j + h * L);
          this->template look_at_both<kAsked>(x[h].middle, x[h].right, at, ahead, of, of_pixels);
          this->template each_part<kAsked>(
              [](V& before, V& last, const V& right) FASTJAC_INLINED {
                before = moved_up(last, right, std::make_integer_sequence<int, L>());
                last = right;
              },
              x[h].left, left[h], x[h].right
          );
          x[h].first = first;
          x[h].last = I{} + index_t(2);
          if constexpr (!std::is_same_v<decltype(of_pixels), Whole>) {
            if (of_pixels.n % 2 != 0) repeat_middle<kAsked>(x[h], of_pixels.n / 2);
          }
        }
        first = I{};
        f(At{j, j % kPadding, j}, of, x, count);
      };
      int64_t j = 0;
      for (; j + L <= m.out_width && 2 * (j + L) <= pixels; j += L) step(j, Whole{}, Whole{});
      for (; j < m.out_width; j += L) {
        const int64_t n = least(L, m.out_width - j);
        step(j, Part{n}, Part{least(2 * n, pixels - 2 * j)});
      }
    }
  }
  // Contiguous: in lane `lane` there is no right pixel.
  template <int kAsked>
  void repeat_middle(Three& x, int64_t lane) const {
    index_t lanes_[L] = {};
    lanes_[lane] = 1;
    const auto missing = greater(load_raw<L, index_t>(lanes_), I{});
    this->template each_part<kAsked>(
        [&](V& to, const V& from) { to = select(missing, from, to); }, x.right, x.middle
    );
    x.last = select(missing, I{} + index_t(1), x.last);
  }

  // Of a row, as the lanes lie. Contiguous: in kPadding lanes, whatever L is.
  acc_t* row_sums = nullptr;

  // Row i of the windows: f(out, held, choice, count, sum), which calls sum(which, its terms) for those of
  // [kFirst, kEnd) that g is in. False, and nothing is added: there were NaNs, and !kNan.
  template <int kAsked, bool kNan, int kFirst, int kEnd, typename F>
  bool look_at_row(int64_t image, int64_t i, const F& f) const {
    // Which nothing but this function sees: its members stay in registers.
    const Overlapping copy(*this);
    return copy.template look_at_windows<kAsked, kNan, kFirst, kEnd>(image, i, f);
  }
  template <int kAsked, bool kNan, int kFirst, int kEnd, typename F>
  FASTJAC_ALWAYS_INLINE bool look_at_windows(int64_t image, int64_t i, const F& f) const {
    const int64_t h = 2 * i + 1 - m.padding;
    const bool last = h + 1 == m.height; // the windows' last row is missing
    const int64_t middle = middle_of_first(image, h), below = last ? middle : middle + row;
    const int64_t out = (image * m.out_height + i) * m.out_width * pixel;
    const I of_middle = I{} + index_t(3), of_below = I{} + index_t(last ? 3 : 6);
    auto nan = unordered(V{}, V{});
    each_three<kAsked, 2>(
        {middle, below},
        [&](const At& at, const Held& of, const auto& x, auto count) FASTJAC_INLINED {
          if constexpr (!kNan) {
            for (const Three& three : x) { // the left pixel was the last windows' right one
              nan = nan | unordered(P::key(three.middle), P::key(three.right));
              if (!m.padding) nan = nan | unordered(P::key(three.left));
            }
          }
          Choice best, next;
          recall<kAsked>(best, this->template kept_above<kAsked>(i, at.place));
          choose_among<kAsked, kNan>(next, x[0]);
          this->template merge<kAsked, kNan>(best, next.at, I(next.which + of_middle));
          choose_among<kAsked, kNan>(next, x[1]);
          keep<kAsked>(this->template kept_above<kAsked>(i + 1, at.place), next);
          this->template merge<kAsked, kNan>(best, next.at, I(next.which + of_below));
          f(out + at.out, of, best, count, [&](int sum, const V& terms) FASTJAC_INLINED {
            P::add_to(row_sums, sum, at.lane, terms);
          });
        }
    );
    const bool again = !kNan && any(nan);
    for (int sum = kFirst; lanes && sum < kEnd; ++sum) {
      for (int64_t k = 0; k < (kLast ? padded : kPadding); k += L) {
        acc_t* from = row_sums + P::of_vector(k, kSums) + sum * kPadding;
        if (!again) add(sum, k, load<L>(from));
        store(from, V{});
      }
    }
    return !again;
  }
  template <int kAsked, int kFirst, int kEnd, typename F>
  void row_of_windows(int64_t image, int64_t i, const F& f) const {
    if (look_at_row<kAsked, false, kFirst, kEnd>(image, i, f)) return;
    look_at_row<kAsked, true, kFirst, kEnd>(image, i, f);
  }
  // Finds what row i of the windows shares with the row above; where there is nothing above, its middle row
  // stands there.
  template <int kAsked>
  void look_above(int64_t image, int64_t i) const {
    const bool missing = 2 * i < m.padding;
    const int64_t in = middle_of_first(image, missing ? 0 : 2 * i - m.padding);
    each_three<kAsked, 1>(
        {in}, [&](const At& at, const Held&, const auto& x, auto) FASTJAC_INLINED {
          Choice best;
          choose_among<kAsked, true>(best, x[0]);
          if (missing) best.which += 3;
          keep<kAsked>(this->template kept_above<kAsked>(i, at.place), best);
        }
    );
  }
  int64_t image_of(int64_t b, int64_t c) const {
    return kLast ? b : b * m.channels + c;
  }
  template <int kAsked, int kFirst, int kEnd, typename F>
  void rows_of_windows(int64_t b, int64_t c, int64_t begin, int64_t end, const F& f) const {
    const int64_t image = image_of(b, c);
    look_above<kAsked>(image, begin);
    for (int64_t i = begin; i < end; ++i) {
      row_of_windows<kAsked, kFirst, kEnd>(image, i, f);
      // while its pixels are in the caches
      if constexpr (kEnd == kSums) this->add_tangents(b, c, i);
    }
  }

  // Each: segments [begin, end) of image b, channel c.

  void forward(int64_t b, int64_t c, int64_t begin, int64_t end) const {
    rows_of_windows<kZAlone, 0, 0>(
        b, c, begin, end,
        [&](int64_t out, const Held&, const Choice& x, auto count, const auto&)
            FASTJAC_INLINED { store(y + out, this->output(x.at), count); }
    );
  }

  void reduce(int64_t b, int64_t c, int64_t begin, int64_t end) const {
    if (tu) {
      reduce_with<true>(b, c, begin, end);
    } else {
      reduce_with<false>(b, c, begin, end);
    }
  }
  template <bool kTangent>
  void reduce_with(int64_t b, int64_t c, int64_t begin, int64_t end) const {
    constexpr int kAsked = kTheU | kWhich | (kTangent ? kTheTangents : 0);
    rows_of_windows<kAsked, 0, kTangent ? kSums : 2>(
        b, c, begin, end,
        [&](int64_t out, const Held& of, const Choice& x, auto count, const auto& sum)
            FASTJAC_INLINED {
              if (kLast) __builtin_prefetch(gy + out + kAhead / 2);
              const V g = gated(x.at.z, load<L>(gy + out, count));
              if (chosen) {
                const I which = select(open(x.at.z), x.which, I{} + kNothing);
                store_bytes(chosen + out, to_bytes<L>(which), count);
              }
              sum(0, g);
              sum(1, g * (x.at.u - of.mean));
              if constexpr (kTangent) sum(2, g * x.at.tu);
            }
    );
  }

  void pushforward(int64_t b, int64_t c, int64_t begin, int64_t end) const {
    if (adds_d) {
      pushforward_with<kTheTangents | kTheU>(b, c, begin, end);
    } else {
      pushforward_with<kTheTangents>(b, c, begin, end);
    }
  }
  template <int kAsked>
  void pushforward_with(int64_t b, int64_t c, int64_t begin, int64_t end) const {
    rows_of_windows<kAsked, 2, 3>(
        b, c, begin, end,
        [&](int64_t out, const Held& of, const Choice& x, auto count, const auto& sum)
            FASTJAC_INLINED {
              store(y + out, this->template output_tangent<kAsked>(x.at, of), count);
              if (lanes) sum(2, gated(x.at.z, load<L>(gy + out, count)) * x.at.tu);
            }
    );
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
