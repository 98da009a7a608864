// Gathering rows on the CPU.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/window_crop.h"

namespace fastjac::window_crop {

// `rows` runs of `count` elements, `step` apart.
template <typename T>
inline void fill_rows(T* out, int64_t rows, int64_t count, int64_t step, T fill) {
  if (count == 0) return;
  const T zero{};
  if (std::memcmp(&fill, &zero, sizeof(T)) == 0) { // its bits: -0 is no zero
    for (; rows > 0; --rows, out += step) std::memset(out, 0, count * sizeof(T));
  } else {
    for (; rows > 0; --rows, out += step) std::fill_n(out, count, fill);
  }
}

// `rows` runs of `bytes`, at least kBlock; a run's last block may overlap the one before. A short run is
// over before its memory is there, so what lies `ahead` of it is asked for.
template <int kBlock>
inline void copy_blocks(
    char* to,
    const char* from,
    int64_t rows,
    int64_t bytes,
    int64_t to_step,
    int64_t from_step,
    int64_t ahead
) {
  const int64_t last = bytes - kBlock;
  for (; rows > 0; --rows, to += to_step, from += from_step) {
    for (int64_t i = 0; i < last; i += kBlock) {
      __builtin_prefetch(from + i + ahead);
      std::memcpy(to + i, from + i, kBlock);
    }
    __builtin_prefetch(from + bytes - 1 + ahead);
    std::memcpy(to + last, from + last, kBlock);
  }
}

// `rows` runs of `count` elements; the steps and `ahead` are in elements too.
template <typename T>
inline void copy_rows(
    T* to,
    const T* from,
    int64_t rows,
    int64_t count,
    int64_t to_step,
    int64_t from_step,
    int64_t ahead
) {
  constexpr int64_t kLong = 1024; // bytes; the processor sees such a run coming
  const int64_t bytes = count * sizeof(T);
  if (bytes >= kLong) {
    for (; rows > 0; --rows, to += to_step, from += from_step) std::memcpy(to, from, bytes);
    return;
  }
  const auto run = [&](auto copy) {
    copy(
        reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), rows, bytes,
        to_step * sizeof(T), from_step * sizeof(T), ahead * sizeof(T)
    );
  };
  if (bytes >= 64) return run(copy_blocks<64>);
  if (bytes >= 32) return run(copy_blocks<32>);
  if (bytes >= 16) return run(copy_blocks<16>);
  if (bytes >= 8) return run(copy_blocks<8>);
  if (bytes >= 4) return run(copy_blocks<4>);
  if (bytes >= 2) return run(copy_blocks<2>);
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
  constexpr int64_t kAhead = 24; // rows at least, where there are several planes
  const int64_t length = g.length();
  const int64_t ahead =
      g.planes > 1 ? (1 + kAhead / g.rows) * g.plane_stride : kAhead * g.row_stride;
  for (int64_t row = begin; row < end;) {
    const int64_t plane = row / g.rows, sample = plane / g.planes;
    const int64_t first = g.first_element(start[2 * sample + 1]);
    const Span columns = g.inside(first);
    const int64_t y = g.first_row(start[2 * sample]) + row % g.rows; // the source's
    const int64_t rows = std::min(end, (plane + 1) * g.rows) - row;
    const int64_t top = Crop::bounded(-y, 0, rows);
    const int64_t bottom = Crop::bounded(g.source_rows - y, top, rows);

    T* to = out + row * length;
    fill_rows(to, 1, top * length, 0, fill);
    fill_rows(to + bottom * length, 1, (rows - bottom) * length, 0, fill);
    to += top * length;
    const int64_t inside = bottom - top, width = columns.end - columns.begin;
    const T* from = source + g.row_offset(sample, plane % g.planes, y + top);
    fill_rows(to, inside, columns.begin, length, fill);
    fill_rows(to + columns.end, inside, length - columns.end, length, fill);
    if (g.dense()) {
      const T* source_rows = from + first + columns.begin;
      copy_rows(to + columns.begin, source_rows, inside, width, length, g.row_stride, ahead);
    } else {
      for (int64_t i = 0; i < inside; ++i, to += length, from += g.row_stride) {
        for (int64_t j = columns.begin; j < columns.end; ++j) to[j] = from[g.offset(first + j)];
      }
    }
    row += rows;
  }
}

} // namespace fastjac::window_crop
