// What norm_act_pool's kernels write where windows share pixels: each pixel's cotangent is the sum of g over
// the windows that chose it, row by row of windows, and in a row from left to right.
//
// Row i of the windows has the rows of pixels 2 i - padding, the one below it, and one more, which it shares
// with row i + 1; columns likewise (norm_act_pool_overlapping.h).
#pragma once

#include "norm_act_pool_overlapping.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

// Channels-last: a window hands out its g to the columns of its pixels. What reaches a column from the next
// window, or a row from the windows below, is added to what is kept of it.
template <typename scalar_t, bool kRelu>
struct Scattering : Overlapping<scalar_t, kRelu, true> {
  using Base = Overlapping<scalar_t, kRelu, true>;
  using Base::Base;
  using Base::L, Base::kNothing, Base::m, Base::pixel, Base::row, Base::gy;
  using typename Base::acc_t, typename Base::index_t, typename Base::V, typename Base::I;
  using typename Base::Held, typename Base::Terms;

  // What a range of segments keeps.
  struct Kept {
    Scratch<acc_t>
        shared; // [1 + W + 2, padded C]: of the row of pixels that the next windows share
    Scratch<acc_t> column; // [3, C] in blocks: of the next windows' first column
    Scratch<index_t>
        taps; // [9, L]: 0 ... 0, 1 ... 1, ...; as constants they would be made again and again
    // Of a row of windows, [w, C], where the reduce pass left no choices: those, and g where the gate does not
    // just open or close.
    Scratch<int8_t> which;
    Scratch<acc_t> g;

    Kept(const Scattering& k, bool writes)
        : shared(writes ? (k.m.width + 3) * k.m.padded_channels : 0),
          column(writes ? 3 * k.m.padded_channels : 0),
          taps(9 * L),
          which(!writes || k.m.chosen ? 0 : k.m.out_width * k.pixel),
          g(!writes || kRelu || k.m.chosen ? 0 : k.m.out_width * k.pixel) {
      for (int i = 0; i < 9 * L; ++i) taps.data[i] = i / L;
    }
  };

  // Which rows of pixels are written: 0 and 1 of the windows.
  struct Rows {
    bool first, second;
  };

  template <Terms kTerms>
  void write_row(int64_t b, int64_t i, Rows rows, const Kept& kept) const {
    // As in look_at_row().
    const Scattering copy(*this);
    copy.template write_windows<kTerms>(b, i, rows, kept);
  }
  template <Terms kTerms>
  FASTJAC_ALWAYS_INLINE void write_windows(
      int64_t b, int64_t i, Rows rows, const Kept& kept
  ) const {
    const int64_t begin = (b * m.out_height + i) * m.out_width * pixel;
    const int8_t* which = m.chosen + begin;
    if (!m.chosen) {
      which = kept.which.data;
      this->template row_of_windows<kWhich, 0, 0>(
          b, i,
          [&](int64_t out, const Held&, const auto& x, auto count, const auto&) FASTJAC_INLINED {
            const auto open = greater(this->gated(x.at.z, V{} + acc_t(1)), V{});
            const I chosen = kRelu ? select(open, x.which, I{} + kNothing) : x.which;
            store_bytes(kept.which.data + out - begin, to_bytes<L>(chosen), count);
            if constexpr (!kRelu) {
              const V g = this->gated(x.at.z, load<L>(gy + out, count));
              store(kept.g.data + out - begin, g, count);
            }
          }
      );
    }
    const auto g_of = [&](int64_t at, auto count) FASTJAC_INLINED {
      if constexpr (!kRelu) {
        if (!m.chosen) return load<L>(kept.g.data + at, count);
      }
      return load<L>(gy + begin + at, count);
    };

    const int64_t in = (b * m.height + 2 * i - m.padding) * row;
    const int64_t width = m.width, out_width = m.out_width, padded = m.padded_channels;
    const int64_t padding = m.padding;
    acc_t *const shared_row = kept.shared.data + padded, *const columns = kept.column.data;
    const index_t* const taps = kept.taps.data;
    // Windows j, of which there are none from w on, and the pixels of their first two columns.
    const auto windows = [&](int64_t j, auto inner) FASTJAC_INLINED {
      const int64_t left = 2 * j - padding, first_row = in + left * pixel;
      const bool is_left = inner || left >= 0, is_middle = inner || left + 1 < width;
      const bool exist = inner || j < out_width;
      acc_t* const of_left = shared_row + left * padded;
      this->each_vector([&](int64_t k, auto count) FASTJAC_INLINED {
        const Held of = this->held(k);
        acc_t *const shared = of_left + k, *const column = columns + Base::of_vector(k, 3);
        const int64_t at = j * pixel + k;
        const I chosen =
            exist ? from_bytes<index_t, L>(load_indices<L>(which + at, count)) : I{} + kNothing;
        const V g = exist ? g_of(at, count) : V{};
        // x, and g where tap n was chosen
        const auto with = [&](const V& x, int n) FASTJAC_INLINED {
          return add_where(equal(chosen, load_raw<L, index_t>(taps + n * L)), x, g);
        };
        const auto write = [&](bool is_row, int h, const V& first, const V& second)
                               FASTJAC_INLINED {
                                 if (!is_row) return;
                                 const int64_t to = first_row + h * row + k;
                                 if (is_left) this->template emit<kTerms>(to, of, first, count);
                                 if (is_middle) {
                                   this->template emit<kTerms>(to + pixel, of, second, count);
                                 }
                               };
        const auto kept_of = [&](int n) FASTJAC_INLINED { return column + n * kPadding; };
        const auto place = [&](int n) FASTJAC_INLINED { return shared + n * padded; };

        const V first = with(load<L>(kept_of(0)), 0), second = with(load<L>(place(1)), 1);
        store(kept_of(0), with(load<L>(place(2)), 2));
        write(rows.first, 0, first, second);
        const V below = with(load<L>(kept_of(1)), 3);
        store(kept_of(1), with(V{}, 5));
        write(rows.second, 1, below, with(V{}, 4));
        store(place(0), with(load<L>(kept_of(2)), 6));
        store(place(1), with(V{}, 7));
        store(kept_of(2), with(V{}, 8));
      });
    };
    for (int64_t k = 0; k < padded; k += L) {
      acc_t* const column = columns + Base::of_vector(k, 3);
      store(column, load<L>(shared_row - padding * padded + k));
      for (int n = 1; n < 3; ++n) store(column + n * kPadding, V{});
    }
    int64_t j = 0;
    if (padding) windows(j++, std::false_type());
    for (; j < out_width && 2 * j + 1 - padding < width; ++j) windows(j, std::true_type());
    for (; 2 * j - padding < width; ++j) windows(j, std::false_type());
  }

  void write(int64_t b, int64_t c, int64_t begin, int64_t end, const Kept& kept) const {
    this->with_terms([&](auto terms)
                         FASTJAC_INLINED { write_terms<terms()>(b, c, begin, end, kept); });
  }
  template <Terms kTerms>
  void write_terms(int64_t b, int64_t c, int64_t begin, int64_t end, const Kept& kept) const {
    std::memset(kept.shared.data, 0, (m.width + 3) * m.padded_channels * sizeof(acc_t));
    if (!m.chosen) this->template look_above<kWhich>(b, most(0, begin - 1));
    if (begin > 0) write_row<kTerms>(b, begin - 1, {false, false}, kept);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t top = 2 * i - m.padding;
      write_row<kTerms>(b, i, {top >= 0, top + 1 < m.height}, kept);
    }
    if (end < m.segments) return;
    const int64_t next = 2 * end - m.padding; // the last windows' last row
    if (next >= m.height) return;
    for (int64_t w = 0; w < m.width; ++w) {
      this->each_vector([&](int64_t k, auto count) {
        const V g = load<L>(kept.shared.data + (w + 1) * m.padded_channels + k);
        const int64_t at = (b * m.height + next) * row + w * pixel + k;
        this->template emit<kTerms>(at, this->held(k), g, count);
      });
    }
    this->template emit_none<kTerms>(b, c, (next + 1) * m.width, (m.height - next - 1) * m.width);
  }
};

// Contiguous: each pixel gathers the g of the windows around it.
template <typename scalar_t, bool kRelu>
struct Gathering : Overlapping<scalar_t, kRelu, false> {
  using Base = Overlapping<scalar_t, kRelu, false>;
  using Base::Base, Base::image_of;
  using Base::L, Base::kNothing, Base::m, Base::row, Base::gy;
  using typename Base::acc_t, typename Base::index_t, typename Base::V, typename Base::I;
  using typename Base::Held, typename Base::Terms;

  // What the windows of a row chose, and their g: [1 + w + 2]. The first and the last two are of windows that
  // do not exist, and chose nothing.
  struct Row {
    acc_t* g;
    index_t* which;
  };
  // Those of two rows.
  struct Kept {
    const int64_t size;
    Scratch<acc_t> g;
    Scratch<index_t> which;

    Kept(const Gathering& k, bool writes)
        : size(writes ? k.m.out_width + 3 : 0), g(2 * size), which(2 * size) {
      for (int64_t i = 0; i < 2 * size; ++i) which.data[i] = kNothing;
    }
    Row row(int64_t i) const {
      return {g.data + i % 2 * size, which.data + i % 2 * size};
    }
  };

  void choose_row(int64_t image, int64_t i, const Row& to) const {
    const int64_t begin = (image * m.out_height + i) * m.out_width;
    if (m.chosen) {
      const auto copy = [&](int64_t k, auto count) {
        const auto which = load_indices<L>(m.chosen + begin + k, count);
        store(to.g + 1 + k, load<L>(gy + begin + k, count), count);
        store_raw(to.which + 1 + k, from_bytes<index_t, L>(which), count);
      };
      int64_t k = 0;
      for (; k + L <= m.out_width; k += L) copy(k, Whole{});
      if (k < m.out_width) copy(k, Part{m.out_width - k});
      return;
    }
    this->template row_of_windows<kWhich, 0, 0>(
        image, i,
        [&](int64_t out, const Held&, const auto& x, auto count, const auto&) FASTJAC_INLINED {
          const int64_t place = out - begin + 1;
          store(to.g + place, this->gated(x.at.z, load<L>(gy + out, count)), count);
          store_raw(to.which + place, x.which, count);
        }
    );
  }

  // The cotangents of the middle and the right pixels of the windows at `at`, in a row of pixels that is row
  // kUpper of the windows of `upper`, and if kShared row 0 of those of `lower`.
  template <int kUpper, bool kShared>
  FASTJAC_ALWAYS_INLINE Pair<V> gathered(const Row& upper, const Row& lower, int64_t at) const {
    Pair<V> g{};
    const auto see = [&](const Row& from, int first) FASTJAC_INLINED {
      const auto tap = [&](int w) { return I{} + index_t(first + w); };
      const I here = load_raw<L, index_t>(from.which + at);
      const I next = load_raw<L, index_t>(from.which + at + 1);
      const V gy = load<L>(from.g + at), gy_next = load<L>(from.g + at + 1);
      g.first = add_where(equal(here, tap(1)), g.first, gy);
      g.second = add_where(equal(here, tap(2)), g.second, gy);
      g.second = add_where(equal(next, tap(0)), g.second, gy_next);
    };
    see(upper, 3 * kUpper);
    if constexpr (kShared) see(lower, 0);
    return g;
  }

  template <Terms kTerms, int kUpper, bool kShared>
  void emit_row(int64_t image, int64_t h, const Row& upper, const Row& lower) const {
    const int64_t in = (image * m.height + h) * row;
    const auto pair = [&](int64_t at)
                          FASTJAC_INLINED { return gathered<kUpper, kShared>(upper, lower, at); };
    const Held all = this->held(0);
    if (!m.padding) this->template emit<kTerms>(in, all, pair(0).second, Part{1});
    for (int64_t w = 1 - m.padding; w < m.width; w += 2 * L) {
      // Column w is the middle of window (w + padding - 1) / 2, whose place is one more.
      const Pair<V> g = pair((w + m.padding + 1) / 2);
      if (w + 2 * L <= m.width) {
        this->template emit_pair<kTerms>(in + w, all, g, Whole{});
      } else {
        this->template emit_pair<kTerms>(in + w, all, g, Part{m.width - w});
      }
    }
  }

  void write(int64_t b, int64_t c, int64_t begin, int64_t end, const Kept& kept) const {
    this->with_terms([&](auto terms)
                         FASTJAC_INLINED { write_terms<terms()>(b, c, begin, end, kept); });
  }
  template <Terms kTerms>
  void write_terms(int64_t b, int64_t c, int64_t begin, int64_t end, const Kept& kept) const {
    const int64_t image = image_of(b, c);
    if (!m.chosen) this->template look_above<kWhich>(image, most(0, begin - 1));
    if (begin > 0) choose_row(image, begin - 1, kept.row(begin - 1));
    for (int64_t i = begin; i < end; ++i) {
      const Row above = kept.row(i + 1), here = kept.row(i);
      choose_row(image, i, here);
      const int64_t top = 2 * i - m.padding;
      if (i > 0) {
        emit_row<kTerms, 2, true>(image, top, above, here);
      } else if (top >= 0) {
        emit_row<kTerms, 0, false>(image, top, here, here);
      }
      if (top + 1 < m.height) emit_row<kTerms, 1, false>(image, top + 1, here, here);
    }
    if (end < m.segments) return;
    const int64_t next = 2 * end - m.padding;
    if (next >= m.height) return;
    const Row last = kept.row(end - 1);
    emit_row<kTerms, 2, false>(image, next, last, last);
    this->template emit_none<kTerms>(b, c, (next + 1) * m.width, (m.height - next - 1) * m.width);
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
