// window_crop on CUDA: device code. Which element comes from where is in common/window_crop.h.
//
// Layout: the crop is dense, contiguous or channels-last; the source is read through its strides.
// A block writes a strip of rows of one output plane, so that what depends on the sample and on the
// plane is the same for all of its threads. A thread loads four vectors, and then stores them.
// Stores are of 16 bytes where rows are whole vectors, and so are loads where the source's rows are
// too, and aligned: channels-last with whole vectors of channels. Where the source's rows are dense, an
// element's place is a sum; where pixels of several channels are not, a division for each vector finds
// it. Must move the crop's part of the source, and the output.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/window_crop.h"
#include "launch.h"
#include "scalar.cuh"

namespace fastjac::window_crop {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 3; // 80 registers: on 10.0 and 12.0, 64 are not enough
constexpr int kVectorsPerThread = 4; // loaded before the first is stored
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1; // of a grid

// How a grid covers the output: block `plane * strips + strip` has the plane's rows
// [strip * strip_rows, ...).
struct Strips {
  int64_t strips, strip_rows;
};

// An output row's vector, from its element i on. row: the source's, or null; first: the source row's
// element under the output row's first.
template <int kVector, bool kWholeLoads, typename T>
__device__ inline Vector<T, kVector> read_vector(
    const Crop& g, const T* __restrict__ row, int64_t first, int64_t i, T fill
) {
  const int64_t at = first + i, source_length = g.source_width * g.unit;
  Vector<T, kVector> z;
  if constexpr (kWholeLoads) { // a vector lies inside or outside as a whole
#pragma unroll
    for (int k = 0; k < kVector; ++k) z.x[k] = fill;
    // As words: a choice between narrower elements would wait for the load.
    using Words = Vector<unsigned, sizeof(z) / sizeof(unsigned)>;
    Words words;
    memcpy(&words, &z, sizeof(z));
    if (row != nullptr && at >= 0 && at < source_length) {
      words = *reinterpret_cast<const Words*>(row + at);
    }
    memcpy(&z, &words, sizeof(z));
  } else {
    // Outside of the row a place may be any: unsigned, since it may overflow.
    uint64_t place = at, step = 1, to_next_pixel = 0;
    int64_t left = kVector + 1; // elements of the pixel
    if (!g.dense()) {
      const int64_t pixel = g.unit == 1 ? i : i / g.unit, channel = i - pixel * g.unit;
      place = uint64_t(at - channel) * g.pixel_stride;
      step = g.pixel_stride;
      if (g.unit > 1) {
        const uint64_t first_pixel = first / g.unit;
        place = (first_pixel + pixel) * g.pixel_stride + uint64_t(channel) * g.unit_stride;
        step = g.unit_stride;
        to_next_pixel = g.pixel_stride - uint64_t(g.unit) * g.unit_stride;
        left = g.unit - channel;
      }
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const bool inside = row != nullptr && at + k >= 0 && at + k < source_length;
      z.x[k] = inside ? row[int64_t(place)] : fill;
      place += step;
      if (--left == 0) {
        place += to_next_pixel;
        left = g.unit;
      }
    }
  }
  return z;
}

// Calls write(i, z) for each vector of the block's strip: z is what goes to the output's element i.
template <int kVector, bool kWholeLoads, typename T, typename F>
__device__ inline void gather(
    const Crop& g,
    const Strips& s,
    const T* __restrict__ source, // the source's strides
    const int64_t* __restrict__ start, // [batch, 2]
    T fill,
    const F& write
) {
  // Of 32 bits, as the grid is: strips and planes are factors of its blocks.
  const unsigned strips = unsigned(s.strips), planes = unsigned(g.planes);
  const unsigned block_plane = blockIdx.x / strips, block_sample = block_plane / planes;
  const int64_t plane = block_plane, strip = blockIdx.x - block_plane * strips;
  const int64_t sample = block_sample, length = g.length();
  const int64_t first_row = g.first_row(start[2 * sample]);
  const int64_t first = g.first_element(start[2 * sample + 1]);
  const int64_t end = Crop::bounded((strip + 1) * s.strip_rows, 0, g.rows);
  const T* __restrict__ map = source + g.row_offset(sample, block_plane - block_sample * planes, 0);
  const int64_t begin = threadIdx.x * kVector;
  int64_t row = begin < length ? strip * s.strip_rows + threadIdx.y : end, i = begin;
  while (row < end) {
    Vector<T, kVector> z[kVectorsPerThread];
    int64_t to[kVectorsPerThread];
#pragma unroll
    for (int n = 0; n < kVectorsPerThread; ++n) {
      const int64_t y = first_row + row;
      const bool there = row < end, in_map = there && y >= 0 && y < g.source_rows;
      z[n] = read_vector<kVector, kWholeLoads>(
          g, in_map ? map + y * g.row_stride : nullptr, first, i, fill
      );
      to[n] = there ? (plane * g.rows + row) * length + i : -1;
      i += blockDim.x * kVector;
      if (i >= length) {
        i = begin;
        row += blockDim.y;
      }
    }
#pragma unroll
    for (int n = 0; n < kVectorsPerThread; ++n) {
      if (to[n] >= 0) write(to[n], z[n]);
    }
  }
}

template <int kVector, bool kWholeLoads, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) copy_crop(
    Crop g,
    Strips s,
    const T* __restrict__ source, // the source's strides
    const int64_t* __restrict__ start, // [batch, 2]
    T fill,
    T* __restrict__ out // [batch, planes, rows, width, unit]
) {
  gather<kVector, kWholeLoads>(
      g, s, source, start, fill,
      [=](int64_t i, const Vector<T, kVector>& z) { store_vector<kVector>(out + i, z); }
  );
}

// How the grid covers an output that is not empty, with vectors of `vector` elements.
struct Cover {
  Strips strips;
  int64_t blocks;
  dim3 threads;
};

inline Cover cover(const Crop& g, int vector) {
  const int64_t vectors = g.length() / vector;
  unsigned x = 1;
  while (x < kThreads && x < vectors) x *= 2;
  const unsigned y = kThreads / x;
  const int64_t per_row = (vectors + x - 1) / x;
  const int64_t strip_rows = y * (per_row < kVectorsPerThread ? kVectorsPerThread / per_row : 1);
  const int64_t strips = (g.rows + strip_rows - 1) / strip_rows;
  return {{strips, strip_rows}, g.batch * g.planes * strips, dim3(x, y)};
}

// Calls run(vector, whole_loads), both constants, with the widest accesses that the crop allows;
// those of the output, T [batch, planes, rows, width, unit], must be aligned to 16 bytes.
template <typename T, typename Run>
void with_widest_accesses(const Crop& g, const T* source, const Run& run) {
  constexpr int kVector = 16 / sizeof(T);
  const auto whole = [](int64_t n) { return n % kVector == 0; };
  const bool whole_loads = g.dense() && whole(g.unit) && whole(g.batch_stride) &&
                           whole(g.plane_stride) && whole(g.row_stride) &&
                           reinterpret_cast<uintptr_t>(source) % 16 == 0;
  if (whole_loads) {
    run(std::integral_constant<int, kVector>(), std::true_type());
  } else if (whole(g.length())) {
    run(std::integral_constant<int, kVector>(), std::false_type());
  } else {
    run(std::integral_constant<int, 1>(), std::false_type());
  }
}

// `launch` as in launch.h. Returns whether the grid holds the output; launches nothing if not.
template <typename T, typename Launch>
bool crop(
    const Launch& launch,
    const Crop& g,
    const T* source, // the source's strides
    const int64_t* start, // [batch, 2]
    T fill,
    T* out // [batch, planes, rows, width, unit]
) {
  bool fits = false;
  with_widest_accesses(g, source, [&](auto vector, auto whole_loads) {
    const Cover c = cover(g, vector);
    fits = c.blocks <= kMaxBlocks;
    if (!fits) return;
    launch(
        Geometry{dim3(static_cast<unsigned>(c.blocks)), c.threads},
        copy_crop<vector, whole_loads, T>, g, c.strips, source, start, fill, out
    );
  });
  return fits;
}

} // namespace fastjac::window_crop
