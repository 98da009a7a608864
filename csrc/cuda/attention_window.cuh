// attention_window on CUDA: device code. The formulas are in common/attention_window.h.
//
// A chain of launches, no atomics, no host synchronisation:
//
//   planar_means or interleaved_means   features -> attention A [B, h, w]
//   sum_columns                         A -> column sums [B, rows, w]
//   find_in_rows                        column sums -> each row's best window [B, rows]
//   find                                rows -> position [B, 2], value [B]
//
// planar_means: a block has kPixelLanes vectors of pixels, which kChannelLanes threads share.
// interleaved_means: a power of two of lanes shares a pixel, so that few channels leave none idle.
// Both read the features in vectors of 16 bytes where they are aligned and whole, and once: that is
// what must be moved. Windows are summed over rows, then over columns, from the L2 cache, with no
// running sum: no rounding is carried from one window to the next, and a NaN stays in its windows.
//
// write_slope gathers the window as window_crop does, and writes slope and bend.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/attention_window.h"
#include "launch.h"
#include "scalar.cuh"
#include "window_crop.cuh"

namespace fastjac::attention_window {

constexpr int kThreads = 256;
// 80 registers, and 128 for the slope: left to itself the compiler takes fewer, and spills.
constexpr int kBlocksPerProcessor = 3, kSlopeBlocksPerProcessor = 2;
constexpr int kWarp = 32;
constexpr int kPixelLanes = 32;
constexpr int kChannelLanes = kThreads / kPixelLanes;
constexpr int64_t kMaxBlocks = window_crop::kMaxBlocks;

template <int kVector, bool kSquare, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) planar_means(
    Map m,
    int64_t blocks, // of a sample
    const scalar_t* __restrict__ features, // [B, C, h, w]
    Magnitude<kSquare, acc_t> magnitude,
    acc_t* __restrict__ attention // [B, h, w]
) {
  constexpr int kPixels = kPixelLanes * kVector; // of a block
  __shared__ acc_t shared[kChannelLanes][kPixels];
  const int64_t sample = blockIdx.x / blocks, pixels = m.pixels();
  const int64_t block = blockIdx.x % blocks * kPixels;
  const int64_t pixel = block + threadIdx.x * kVector;
  acc_t sums[kVector] = {};
  if (pixel < pixels) {
    const scalar_t* __restrict__ from = features + sample * m.channels * pixels + pixel;
#pragma unroll 4
    for (int64_t c = threadIdx.y; c < m.channels; c += kChannelLanes) {
      const auto z = load_vector<kVector>(from + c * pixels);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += magnitude.value(to_acc(z.x[i]));
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) shared[threadIdx.y][threadIdx.x * kVector + i] = sums[i];
  __syncthreads();
  for (int i = threadIdx.y * kPixelLanes + threadIdx.x; i < kPixels; i += kThreads) {
    if (block + i >= pixels) break;
    acc_t sum = shared[0][i];
#pragma unroll
    for (int y = 1; y < kChannelLanes; ++y) sum += shared[y][i];
    attention[sample * pixels + block + i] = sum / static_cast<acc_t>(m.channels);
  }
}

// A block has kThreads / lanes pixels of all samples'; lanes is a power of two, kWarp at most.
template <int kVector, bool kSquare, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) interleaved_means(
    Map m,
    int lanes,
    const scalar_t* __restrict__ features, // [B, h, w, C]
    Magnitude<kSquare, acc_t> magnitude,
    acc_t* __restrict__ attention // [B, h, w]
) {
  const int64_t pixel = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const bool present = pixel < m.batch * m.pixels();
  const int lane = threadIdx.x % lanes;
  acc_t sum = 0;
  if (present) {
    const scalar_t* __restrict__ from = features + pixel * m.channels;
#pragma unroll 4
    for (int64_t c = lane * kVector; c < m.channels; c += lanes * kVector) {
      const auto z = load_vector<kVector>(from + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += magnitude.value(to_acc(z.x[i]));
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (present && lane == 0) attention[pixel] = sum / static_cast<acc_t>(m.channels);
}

// One thread per column and row of windows.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) sum_columns(
    Map m,
    const acc_t* __restrict__ attention, // [B, h, w]
    acc_t* __restrict__ sums // [B, rows, w]
) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = i / m.width;
  if (row >= m.batch * m.rows()) return;
  const int64_t sample = row / m.rows();
  const acc_t* __restrict__ top =
      attention + (sample * m.height + row % m.rows()) * m.width + i % m.width;
  acc_t sum = top[0];
#pragma unroll 4
  for (int64_t y = 1; y < m.k; ++y) sum += top[y * m.width];
  sums[i] = sum;
}

// The best of the block's threads', valid in the first.
template <typename acc_t>
__device__ inline Best<acc_t> block_best(Best<acc_t> best) {
  __shared__ acc_t values[kThreads / kWarp];
  __shared__ int64_t indices[kThreads / kWarp];
  const auto warp_best = [&] {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const Best<acc_t> other{
          __shfl_xor_sync(0xffffffffu, best.value, offset),
          __shfl_xor_sync(0xffffffffu, best.index, offset)
      };
      if (best.loses_to(other)) best = other;
    }
  };
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  warp_best();
  if (lane == 0) {
    values[warp] = best.value;
    indices[warp] = best.index;
  }
  __syncthreads();
  best = {0, -1};
  if (lane < kThreads / kWarp) best = {values[lane], indices[lane]};
  warp_best();
  return best;
}

// One block per row of windows.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) find_in_rows(
    Map m,
    const acc_t* __restrict__ sums, // [B, rows, w]
    acc_t* __restrict__ values, // [B, rows]
    int64_t* __restrict__ indices // [B, rows]
) {
  const acc_t* __restrict__ row = sums + int64_t{blockIdx.x} * m.width;
  const int64_t first = blockIdx.x % m.rows() * m.columns();
  const acc_t area = static_cast<acc_t>(m.k * m.k);
  Best<acc_t> best{0, -1};
  for (int64_t x = threadIdx.x; x < m.columns(); x += kThreads) {
    acc_t sum = row[x];
#pragma unroll 4
    for (int64_t i = 1; i < m.k; ++i) sum += row[x + i];
    const Best<acc_t> window{sum / area, first + x};
    if (best.loses_to(window)) best = window;
  }
  best = block_best(best);
  if (threadIdx.x == 0) {
    values[blockIdx.x] = best.value;
    indices[blockIdx.x] = best.index;
  }
}

// One block per sample.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) find(
    Map m,
    const acc_t* __restrict__ values, // [B, rows]
    const int64_t* __restrict__ indices, // [B, rows]
    int64_t* __restrict__ position, // [B, 2]
    acc_t* __restrict__ value // [B]
) {
  const int64_t rows = blockIdx.x * m.rows();
  Best<acc_t> best{0, -1};
  for (int64_t y = threadIdx.x; y < m.rows(); y += kThreads) {
    const Best<acc_t> row{values[rows + y], indices[rows + y]};
    if (best.loses_to(row)) best = row;
  }
  best = block_best(best);
  if (threadIdx.x == 0) {
    position[2 * int64_t{blockIdx.x}] = best.index / m.columns();
    position[2 * int64_t{blockIdx.x} + 1] = best.index % m.columns();
    value[blockIdx.x] = best.value;
  }
}

template <int kVector, bool kWholeLoads, bool kSquare, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kSlopeBlocksPerProcessor) write_slope(
    window_crop::Crop g,
    window_crop::Strips s,
    const scalar_t* __restrict__ features, // the features' strides
    const int64_t* __restrict__ position, // [B, 2]
    scalar_t zero,
    Magnitude<kSquare, acc_t> magnitude,
    acc_t scale,
    scalar_t* __restrict__ slope, // [B, C, k, k], as the crop is laid out
    scalar_t* __restrict__ bend // likewise
) {
  window_crop::gather<kVector, kWholeLoads>(
      g, s, features, position, zero, [=](int64_t i, const Vector<scalar_t, kVector>& gathered) {
        Vector<scalar_t, kVector> slopes, bends;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const acc_t z = to_acc(gathered.x[k]);
          assign(slopes.x[k], magnitude.slope(z) * scale);
          assign(bends.x[k], magnitude.bend(z) * scale);
        }
        store_vector<kVector>(slope + i, slopes);
        store_vector<kVector>(bend + i, bends);
      }
  );
}

// What attention_window reads, writes and needs room for.
template <typename scalar_t>
struct Operands {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* features; // as the map says
  int64_t* position; // [B, 2]
  acc_t* value; // [B]
  acc_t* attention; // [B, h, w]
  acc_t* sums; // [B, rows, w]
  acc_t* row_values; // [B, rows]
  int64_t* row_indices; // [B, rows]
};

// `launch` as in launch.h; for a batch that is not empty. Returns whether the grids hold the map;
// launches nothing if not.
template <bool kSquare, typename scalar_t, typename Launch>
bool find_window(const Launch& launch, const Map& m, const Operands<scalar_t>& x, double power) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int kVector = 16 / sizeof(scalar_t);
  const auto ceil_div = [](int64_t n, int64_t d) { return (n + d - 1) / d; };
  const auto grid = [](int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); };
  if (m.batch * m.pixels() > kMaxBlocks) return false; // no grid has more blocks than pixels

  const Magnitude<kSquare, acc_t> magnitude{static_cast<acc_t>(power)};
  const auto means = [&](auto vector) {
    if (m.channels_last) {
      int lanes = 1;
      while (lanes < kWarp && lanes * vector < m.channels) lanes *= 2;
      const int64_t blocks = ceil_div(m.batch * m.pixels(), kThreads / lanes);
      launch(
          Geometry{grid(blocks), dim3(kThreads)},
          interleaved_means<vector, kSquare, scalar_t, acc_t>, m, lanes, x.features, magnitude,
          x.attention
      );
    } else {
      const int64_t blocks = ceil_div(m.pixels(), kPixelLanes * vector);
      launch(
          Geometry{grid(m.batch * blocks), dim3(kPixelLanes, kChannelLanes)},
          planar_means<vector, kSquare, scalar_t, acc_t>, m, blocks, x.features, magnitude,
          x.attention
      );
    }
  };
  const bool whole = (m.channels_last ? m.channels : m.pixels()) % kVector == 0 &&
                     reinterpret_cast<uintptr_t>(x.features) % 16 == 0;
  if (whole) {
    means(std::integral_constant<int, kVector>());
  } else {
    means(std::integral_constant<int, 1>());
  }
  const int64_t rows = m.batch * m.rows();
  launch(
      Geometry{grid(ceil_div(rows * m.width, kThreads)), dim3(kThreads)}, sum_columns<acc_t>, m,
      x.attention, x.sums
  );
  launch(
      Geometry{grid(rows), dim3(kThreads)}, find_in_rows<acc_t>, m, x.sums, x.row_values,
      x.row_indices
  );
  launch(
      Geometry{grid(m.batch), dim3(kThreads)}, find<acc_t>, m, x.row_values, x.row_indices,
      x.position, x.value
  );
  return true;
}

// `launch` as in launch.h; for a crop that is not empty. Returns whether the grid holds it; launches
// nothing if not.
template <bool kSquare, typename scalar_t, typename Launch>
bool find_slope(
    const Launch& launch,
    const window_crop::Crop& g,
    int64_t channels,
    const scalar_t* features, // the features' strides
    const int64_t* position, // [B, 2]
    scalar_t zero,
    double power,
    scalar_t* slope, // [B, C, k, k], as the crop is laid out
    scalar_t* bend // likewise
) {
  using acc_t = accumulator_t<scalar_t>;
  const Magnitude<kSquare, acc_t> magnitude{static_cast<acc_t>(power)};
  const auto scale = static_cast<acc_t>(1.0 / (channels * g.rows * g.width));
  bool fits = false;
  window_crop::with_widest_accesses(g, features, [&](auto vector, auto whole_loads) {
    const window_crop::Cover c = window_crop::cover(g, vector);
    fits = c.blocks <= kMaxBlocks;
    if (!fits) return;
    launch(
        Geometry{dim3(static_cast<unsigned>(c.blocks)), c.threads},
        write_slope<vector, whole_loads, kSquare, scalar_t, acc_t>, g, c.strips, features, position,
        zero, magnitude, scale, slope, bend
    );
  });
  return fits;
}

} // namespace fastjac::attention_window
