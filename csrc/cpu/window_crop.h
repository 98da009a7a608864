// Gathering rows on the CPU.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/window_crop.h"

namespace fastjac::window_crop {

template <typename T>
inline void fill_run(T* out, int64_t count, T fill, bool fill_is_zero) {
  if (fill_is_zero) {
    std::memset(out, 0, count * sizeof(T));
  } else {
    std::fill_n(out, count, fill);
  }
}

// Writes the output's rows [begin, end) of all batch * planes * rows, and calls done(row, length)
// with each while it is in the cache.
template <typename T, typename Done>
inline void gather_rows(
    const Crop& g,
    const T* source, // the source's strides
    const int64_t* start, // [batch, 2]
    T fill,
    T* out, // [batch, planes, rows, width, unit]
    int64_t begin,
    int64_t end,
    const Done& done
) {
  const T zero{};
  const bool fill_is_zero = std::memcmp(&fill, &zero, sizeof(T)) == 0, dense = g.dense();
  const int64_t length = g.length();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t plane = row / g.rows, sample = plane / g.planes;
    const int64_t y = g.first_row(start[2 * sample]) + row % g.rows;
    T* to = out + row * length;
    if (y < 0 || y >= g.source_rows) {
      fill_run(to, length, fill, fill_is_zero);
    } else {
      const int64_t first = g.first_element(start[2 * sample + 1]);
      const Span span = g.inside(first);
      const T* from = source + g.row_offset(sample, plane % g.planes, y);
      fill_run(to, span.begin, fill, fill_is_zero);
      if (dense) {
        std::copy(from + first + span.begin, from + first + span.end, to + span.begin);
      } else {
        for (int64_t i = span.begin; i < span.end; ++i) to[i] = from[g.offset(first + i)];
      }
      fill_run(to + span.end, length - span.end, fill, fill_is_zero);
    }
    done(to, length);
  }
}

} // namespace fastjac::window_crop
