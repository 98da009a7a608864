// window_crop on CUDA: device code. Which element comes from where is in common/window_crop.h.
//
// Layout: the crop is dense, contiguous or channels-last; the source is read through its strides.
// A block writes a strip of rows of one output plane, so that what depends on the sample and on the
// plane is the same for all of its threads. Stores are of 16 bytes where rows are whole vectors, and
// so are loads where the source's rows are too, and aligned: channels-last with whole vectors of
// channels. Must move the crop's part of the source, and the output.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/window_crop.h"
#include "launch.h"
#include "scalar.cuh"

namespace fastjac::window_crop {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 3; // 80 registers: on 10.0 and 12.0, 64 are not enough
constexpr int64_t kVectorsPerThread = 4; // loads in flight
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1; // of a grid

// How a grid covers the output: block `plane * strips + strip` has the plane's rows
// [strip * strip_rows, ...).
struct Strips {
  int64_t strips, strip_rows;
};

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
  const int64_t plane = blockIdx.x / s.strips, strip = blockIdx.x % s.strips;
  const int64_t sample = plane / g.planes, length = g.length();
  const int64_t first_row = g.first_row(start[2 * sample]);
  const int64_t first = g.first_element(start[2 * sample + 1]);
  const int64_t source_length = g.source_width * g.unit;
  const int64_t end = Crop::bounded((strip + 1) * s.strip_rows, 0, g.rows);
#pragma unroll kVectorsPerThread
  for (int64_t row = strip * s.strip_rows + threadIdx.y; row < end; row += blockDim.y) {
    const int64_t y = first_row + row;
    const bool in_map = y >= 0 && y < g.source_rows;
    const T* __restrict__ from = source + g.row_offset(sample, plane % g.planes, in_map ? y : 0);
    const int64_t to = (plane * g.rows + row) * length;
    for (int64_t i = threadIdx.x * kVector; i < length; i += blockDim.x * kVector) {
      Vector<T, kVector> z;
      if constexpr (kWholeLoads) { // a vector lies inside or outside as a whole
        if (in_map && first + i >= 0 && first + i < source_length) {
          z = load_vector<kVector>(from + first + i);
        } else {
#pragma unroll
          for (int k = 0; k < kVector; ++k) z.x[k] = fill;
        }
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const int64_t at = first + i + k;
          const bool inside = in_map && at >= 0 && at < source_length;
          z.x[k] = inside ? from[g.offset(at)] : fill;
        }
      }
      write(to + i, z);
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
