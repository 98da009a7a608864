// What norm_act_pool's kernels write where windows share pixels: each pixel's cotangent is the sum of g over
// the windows that chose it, row by row of windows, and in a row from left to right.
//
// Row i of the windows has the rows of pixels 2 i - padding, the one below it, and one more, which it shares
// with row i + 1; columns likewise (norm_act_pool_overlapping.h).
#pragma once

#include "norm_act_pool_overlapping.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

// What bytes that say which tap was chosen are compared with: [9, L]. As constants they would be made again and
// again.
template <typename index_t, int L>
struct Taps {
  using Vector = decltype(comparable<index_t, L>(Lanes<int8_t, L>()));
  using tap_t = std::remove_reference_t<decltype(Vector()[0])>;
  tap_t values[9 * L];
  Taps() {
    for (int i = 0; i < 9 * L; ++i) values[i] = tap_t(i / L);
  }
  FASTJAC_ALWAYS_INLINE Vector operator[](int n) const {
    return load_raw<L, tap_t>(values + n * L);
  }
};

// Channels-last: the windows of a row and those of the row above hand out their g to the first two rows of
// pixels of the former. What reaches a column from the windows to its left is kept.
template <typename scalar_t, bool kRelu>
struct Scattering : Overlapping<scalar_t, kRelu, true> {
  using Base = Overlapping<scalar_t, kRelu, true>;
  using Base::Base;
  using Base::L, Base::kNothing, Base::m, Base::pixel, Base::row, Base::gy;
  using typename Base::acc_t, typename Base::index_t, typename Base::V, typename Base::I;
  using typename Base::Held, typename Base::Terms;

  // What the windows of a row chose, and act'(z) gy: under the gates that just open and close that is gy, for
  // where they are closed nothing was chosen.
  struct Row {
    const int8_t* which;
    const scalar_t* gy;
    const acc_t* g;
  };
  // What a range of segments keeps.
  struct Kept {
    const int64_t size; // of a row of windows
    Scratch<acc_t> column; // [3, C] in blocks: of the next windows' first column
    Scratch<int8_t> nothing; // a row that is not there chose nothing
    Scratch<int8_t> which; // of two rows of windows, where the reduce pass left no choices
    Scratch<acc_t> g;
    Taps<index_t, L> taps;

    Kept(const Scattering& k, bool writes)
        : size(writes ? k.m.out_width * k.pixel : 0),
          column(writes ? 3 * k.padded : 0),
          nothing(size),
          which(k.m.chosen ? 0 : 2 * size),
          g(kRelu || k.m.chosen ? 0 : 2 * size) {
      std::memset(nothing.data, kNothing, size);
    }
  };

  // Those of row i, which need not be there.
  Row windows_of(int64_t b, int64_t i, const Kept& kept) const {
    if (i < 0 || i >= m.out_height) return {kept.nothing.data, gy, kept.g.data};
    const scalar_t* const their = gy + (b * m.out_height + i) * kept.size;
    if (m.chosen) return {m.chosen + (their - gy), their, nullptr};
    const int64_t place = i % 2 * kept.size;
    return {kept.which.data + place, their, kept.g.data + place};
  }
  // Finds them, where the reduce pass left no choices.
  void choose_row(int64_t b, int64_t i, const Kept& kept) const {
    if (m.chosen) return;
    const int64_t to = (i % 2 - (b * m.out_height + i)) * kept.size;
    this->template row_of_windows<kWhich, 0, 0>(
        b, i,
        [&](int64_t out, const Held&, const auto& x, auto count, const auto&) FASTJAC_INLINED {
          const I chosen = kRelu ? select(this->open(x.at.z), x.which, I{} + kNothing) : x.which;
          store_bytes(kept.which.data + to + out, to_bytes<L>(chosen), count);
          if constexpr (!kRelu) {
            const V g = this->gated(x.at.z, load<L>(gy + out, count));
            store(kept.g.data + to + out, g, count);
          }
        }
    );
  }

  template <Terms kTerms>
  void write_row(int64_t b, int64_t i, const Kept& kept) const {
    // As in look_at_row().
    const Scattering copy(*this);
    copy.template write_windows<kTerms>(b, i, kept);
  }
  // The cotangents of four pixels: the windows' first two columns in their first two rows.
  struct Four {
    V upper_left, upper_right, lower_left, lower_right;
  };
  // Of row i of the windows; below the last it has but a first row.
  template <Terms kTerms>
  FASTJAC_ALWAYS_INLINE void write_windows(int64_t b, int64_t i, const Kept& kept) const {
    const Row above = windows_of(b, i - 1, kept), here = windows_of(b, i, kept);
    const int64_t top = 2 * i - m.padding, in = (b * m.height + top) * row;
    const bool is_upper = top >= 0, is_lower = i < m.out_height && top + 1 < m.height;
    const int64_t width = m.width, out_width = m.out_width, padding = m.padding;
    acc_t* const columns = kept.column.data;
    const auto& taps = kept.taps;

    // Of the windows at `at`, if they exist.
    const auto scattered = [&](int64_t at, int64_t k, bool exist, auto count) FASTJAC_INLINED {
      const auto chosen_by = [&](const Row& windows) FASTJAC_INLINED {
        using Bytes = Lanes<int8_t, L>;
        return comparable<index_t, L>(
            exist ? load_indices<L>(windows.which + at, count) : Bytes{} + int8_t(kNothing)
        );
      };
      const auto g_of = [&](const Row& windows) FASTJAC_INLINED {
        if (!exist) return V{};
        if constexpr (!kRelu) {
          if (!m.chosen) return load<L>(windows.g + at, count);
        }
        return load<L>(windows.gy + at, count);
      };
      const auto chosen_above = chosen_by(above), chosen_here = chosen_by(here);
      const V g_above = g_of(above), g_here = g_of(here);
      // x, and g where tap n was chosen
      const auto with_above = [&](const V& x, int n) FASTJAC_INLINED {
        return add_where(equal(chosen_above, taps[n]), x, g_above);
      };
      const auto with = [&](const V& x, int n) FASTJAC_INLINED {
        return add_where(equal(chosen_here, taps[n]), x, g_here);
      };
      acc_t* const column = columns + Base::of_vector(k, 3);
      acc_t *const of_above = column, *const upper = column + kPadding,
                   *const lower = upper + kPadding;
      const V left = with_above(load<L>(of_above), 6) + load<L>(upper);
      const Four g = {
          with(left, 0), with(with_above(V{}, 7), 1), with(load<L>(lower), 3), with(V{}, 4)
      };
      store(of_above, with_above(V{}, 8));
      store(upper, with(V{}, 2));
      store(lower, with(V{}, 5));
      return g;
    };
    // Windows j, of which there are none from w on. `inner`: they and all of their four pixels exist.
    const auto windows = [&](int64_t j, auto inner) FASTJAC_INLINED {
      const int64_t left = 2 * j - padding, at = j * pixel, to = in + left * pixel;
      const bool exist = inner || j < out_width;
      const bool is_left = inner || left >= 0, is_right = inner || left + 1 < width;
      // f(a pixel, which of the four it is)
      const auto each_pixel = [&](const auto& f) FASTJAC_INLINED {
        if (inner || (is_upper && is_left)) f(to, &Four::upper_left);
        if (inner || (is_upper && is_right)) f(to + pixel, &Four::upper_right);
        if (inner || (is_lower && is_left)) f(to + row, &Four::lower_left);
        if (inner || (is_lower && is_right)) f(to + row + pixel, &Four::lower_right);
      };
      const auto vector = [&](int64_t k, auto count) FASTJAC_INLINED {
        const Four g = scattered(at + k, k, exist, count);
        const Held of = this->held(k);
        each_pixel([&](int64_t in_map, auto which) FASTJAC_INLINED {
          this->template emit<kTerms>(in_map + k, of, g.*which, count);
        });
      };
      this->each_vector(vector);
    };
    std::memset(columns, 0, 3 * this->padded * sizeof(acc_t));
    int64_t j = 0;
    if (padding) windows(j++, std::false_type());
    const int64_t whole = is_upper && is_lower ? least(out_width, (width + padding) / 2) : j;
    for (; j < whole; ++j) windows(j, std::true_type());
    for (; 2 * j - padding < width; ++j) windows(j, std::false_type());
  }

  void write(int64_t b, int64_t c, int64_t begin, int64_t end, const Kept& kept) const {
    this->with_terms([&](auto terms)
                         FASTJAC_INLINED { write_terms<terms()>(b, c, begin, end, kept); });
  }
  template <Terms kTerms>
  void write_terms(int64_t b, int64_t c, int64_t begin, int64_t end, const Kept& kept) const {
    if (!m.chosen) this->template look_above<kWhich>(b, most(0, begin - 1));
    if (begin > 0) choose_row(b, begin - 1, kept);
    for (int64_t i = begin; i < end; ++i) {
      choose_row(b, i, kept);
      write_row<kTerms>(b, i, kept);
    }
    if (end < m.segments) return;
    const int64_t next = 2 * end - m.padding; // the last windows' last row
    if (next >= m.height) return;
    write_row<kTerms>(b, end, kept);
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
    int8_t* which;
  };
  // Those of two rows.
  struct Kept {
    const int64_t size;
    Scratch<acc_t> g;
    Scratch<int8_t> which;
    Taps<index_t, L> taps;

    Kept(const Gathering& k, bool writes)
        : size(writes ? k.m.out_width + 3 : 0), g(2 * size), which(2 * size) {
      std::memset(which.data, kNothing, 2 * size);
    }
    Row row(int64_t i) const {
      return {g.data + i % 2 * size, which.data + i % 2 * size};
    }
  };

  void choose_row(int64_t image, int64_t i, const Row& to) const {
    const int64_t begin = (image * m.out_height + i) * m.out_width;
    if (m.chosen) {
      std::memcpy(to.which + 1, m.chosen + begin, m.out_width);
      const auto copy = [&](int64_t k, auto count) {
        store(to.g + 1 + k, load<L>(gy + begin + k, count), count);
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
          store_bytes(to.which + place, to_bytes<L>(x.which), count);
        }
    );
  }

  // The cotangents of the middle and the right pixels of the windows at `at`, in a row of pixels that is row
  // kUpper of the windows of `upper`, and if kShared row 0 of those of `lower`.
  template <int kUpper, bool kShared>
  FASTJAC_ALWAYS_INLINE Pair<V> gathered(
      const Taps<index_t, L>& taps, const Row& upper, const Row& lower, int64_t at
  ) const {
    Pair<V> g{};
    const auto see = [&](const Row& from, int first) FASTJAC_INLINED {
      const auto here = comparable<index_t, L>(load_raw<L, int8_t>(from.which + at));
      const auto next = comparable<index_t, L>(load_raw<L, int8_t>(from.which + at + 1));
      const V gy = load<L>(from.g + at), gy_next = load<L>(from.g + at + 1);
      g.first = add_where(equal(here, taps[first + 1]), g.first, gy);
      g.second = add_where(equal(here, taps[first + 2]), g.second, gy);
      g.second = add_where(equal(next, taps[first]), g.second, gy_next);
    };
    see(upper, 3 * kUpper);
    if constexpr (kShared) see(lower, 0);
    return g;
  }

  template <Terms kTerms, int kUpper, bool kShared>
  void emit_row(
      const Taps<index_t, L>& taps, int64_t image, int64_t h, const Row& upper, const Row& lower
  ) const {
    const int64_t in = (image * m.height + h) * row;
    const auto pair = [&](int64_t at) FASTJAC_INLINED {
      return gathered<kUpper, kShared>(taps, upper, lower, at);
    };
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
        emit_row<kTerms, 2, true>(kept.taps, image, top, above, here);
      } else if (top >= 0) {
        emit_row<kTerms, 0, false>(kept.taps, image, top, here, here);
      }
      if (top + 1 < m.height) emit_row<kTerms, 1, false>(kept.taps, image, top + 1, here, here);
    }
    if (end < m.segments) return;
    const int64_t next = 2 * end - m.padding;
    if (next >= m.height) return;
    const Row last = kept.row(end - 1);
    emit_row<kTerms, 2, false>(kept.taps, image, next, last, last);
    this->template emit_none<kTerms>(b, c, (next + 1) * m.width, (m.height - next - 1) * m.width);
  }
};

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
