// Gathering rows on the CPU.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/window_crop.h"

namespace fastjac::window_crop {

template <typename T>
inline void fill_run(T* out, int64_t count, T fill, bool fill_is_zero) {
  if (count == 0) return;
  if (fill_is_zero) {
    std::memset(out, 0, count * sizeof(T));
  } else {
    std::fill_n(out, count, fill);
  }
}

// Bytes; a shorter run is over before its first ones are there, so the run of kAhead rows later is asked for.
constexpr int64_t kShort = 1024;
constexpr int64_t kAhead = 24;

inline void prefetch(const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i);
  __builtin_prefetch(at + bytes - 1);
}

// Writes the output's rows [begin, end) of all batch * planes * rows.
template <typename T>
inline void gather_rows(
    const Crop& g,
    const T* source, // the source's strides
    const int64_t* start, // [batch, 2]
    T fill,
    T* out, // [batch, planes, rows, width, unit]
    int64_t begin,
    int64_t end
) {
  const T zero{};
  const bool fill_is_zero = std::memcmp(&fill, &zero, sizeof(T)) == 0, dense = g.dense();
  const int64_t length = g.length();
  const int64_t planes_ahead = kAhead / g.rows, rows_ahead = kAhead % g.rows;
  const int64_t ahead = planes_ahead * g.plane_stride + rows_ahead * g.row_stride;
  const int64_t to_next_plane = g.plane_stride - g.rows * g.row_stride;
  for (int64_t row = begin; row < end;) {
    const int64_t plane = row / g.rows, sample = plane / g.planes;
    const int64_t first = g.first_element(start[2 * sample + 1]);
    const Span span = g.inside(first);
    const int64_t bytes = (span.end - span.begin) * sizeof(T);
    const T* from = source + g.row_offset(sample, plane % g.planes, 0);
    int64_t y = g.first_row(start[2 * sample]) + row % g.rows;
    for (const int64_t stop = std::min(end, (plane + 1) * g.rows); row < stop; ++row, ++y) {
      T* to = out + row * length;
      if (y < 0 || y >= g.source_rows) {
        fill_run(to, length, fill, fill_is_zero);
        continue;
      }
      const T* source_row = from + y * g.row_stride;
      fill_run(to, span.begin, fill, fill_is_zero);
      if (dense) {
        if (bytes < kShort) {
          const bool here = row + rows_ahead < (plane + 1) * g.rows;
          const T* later = source_row + first + span.begin + ahead;
          prefetch(here ? later : later + to_next_plane, bytes);
        }
        std::copy(source_row + first + span.begin, source_row + first + span.end, to + span.begin);
      } else {
        for (int64_t i = span.begin; i < span.end; ++i) to[i] = source_row[g.offset(first + i)];
      }
      fill_run(to + span.end, length - span.end, fill, fill_is_zero);
    }
  }
}

} // namespace fastjac::window_crop
