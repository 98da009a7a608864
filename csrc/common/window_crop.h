// Where a crop's elements come from. With `start` [B, 2] the source pixel under the output's first,
//
//   out[b, c, i, j] = source[b, c, start[b, 0] + i, start[b, 1] + j], and `fill` outside of the source
//
// The adjoint scatters a crop into a map of zeros. Since each output pixel is written once, it is the
// same gather with start negated: source is the crop, and out the map.
//
// Includes nothing of PyTorch: shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "macros.h"

namespace fastjac::window_crop {

// A row's part [begin, end) that has a source; it is `fill` before and after.
struct Span {
  int64_t begin, end;
};

// The output is dense, [batch, planes, rows, width, unit]; the source has the same dimensions with
// source_rows and source_width, and any strides. Contiguous: planes = C, unit = 1. Channels-last:
// planes = 1, unit = C.
struct Crop {
  int64_t batch, planes, rows, width, unit;
  int64_t source_rows, source_width;
  int64_t batch_stride, plane_stride, row_stride, pixel_stride, unit_stride; // of the source
  bool adjoint;

  // Elements of an output row.
  FASTJAC_HOST_DEVICE int64_t length() const {
    return width * unit;
  }

  // Whether a source row's elements lie one after another, in the order of the output's.
  FASTJAC_HOST_DEVICE bool dense() const {
    return pixel_stride == unit && (unit == 1 || unit_stride == 1);
  }

  // Where the source's row begins.
  FASTJAC_HOST_DEVICE int64_t row_offset(int64_t sample, int64_t plane, int64_t row) const {
    return sample * batch_stride + plane * plane_stride + row * row_stride;
  }

  // Where a source row's element i is, from the row's beginning.
  FASTJAC_HOST_DEVICE int64_t offset(int64_t i) const {
    if (unit == 1) return i * pixel_stride;
    return i / unit * pixel_stride + i % unit * unit_stride;
  }

  // The source's row under the output's first, for start[sample, 0] = at.
  FASTJAC_HOST_DEVICE int64_t first_row(int64_t at) const {
    return shift(at, rows + source_rows);
  }

  // The source row's element under the output row's first, for start[sample, 1] = at.
  FASTJAC_HOST_DEVICE int64_t first_element(int64_t at) const {
    return shift(at, width + source_width) * unit;
  }

  // The elements of an output row that have a source, for that first element.
  FASTJAC_HOST_DEVICE Span inside(int64_t first) const {
    const int64_t begin = bounded(-first, 0, length());
    return {begin, bounded(source_width * unit - first, begin, length())};
  }

  FASTJAC_HOST_DEVICE static int64_t bounded(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }

 private:
  // Beyond the limit nothing has a source, and nothing overflows up to it.
  FASTJAC_HOST_DEVICE int64_t shift(int64_t at, int64_t limit) const {
    at = bounded(at, -limit, limit);
    return adjoint ? -at : at;
  }
};

} // namespace fastjac::window_crop
