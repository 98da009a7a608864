// channel_statistics and batch_norm_statistics on CUDA: the moments of each channel, u read once.
//
// A thread adds its values up by Welford's recurrence, of their deviations from a value of the channel
// that is not its largest or smallest, which all threads subtract: what is left of a large mean is as
// small as the deviations. The
// threads of a block, in a tree, and then the chunks of a channel, in order and in float64, are
// merged pairwise (Chan, Golub and LeVeque). Must move u in, once.
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool.cuh"

namespace fastjac::norm_act_pool {

// Of n values: their mean, and the sum of their squared deviations from it.
template <typename acc_t>
struct Moments {
  acc_t n, mean, squares;

  __device__ void merge(const Moments& y) {
    if (y.n == 0) return;
    const acc_t both = n + y.n, d = y.mean - mean, share = y.n / both;
    mean += d * share;
    squares += y.squares + d * d * n * share;
    n = both;
  }
  __device__ Moments shuffled(int distance) const {
    return {
        __shfl_xor_sync(0xffffffffu, n, distance), __shfl_xor_sync(0xffffffffu, mean, distance),
        __shfl_xor_sync(0xffffffffu, squares, distance)
    };
  }
};

// What all threads subtract: of the channel's first, middle and last value the one in between, so that
// an outlier is never taken. Without a pool, a map is one row.
template <typename acc_t, typename scalar_t>
__device__ acc_t pivot(const scalar_t* __restrict__ u, const Shape& shape, int64_t channel) {
  const auto at = [&](int64_t b, int64_t j) -> acc_t {
    const int64_t map = b * shape.channels * shape.width;
    return to_acc(
        u[map + (shape.channels_last ? j * shape.channels + channel : channel * shape.width + j)]
    );
  };
  const acc_t x = at(0, 0), y = at(shape.batch / 2, shape.width / 2);
  const acc_t z = at(shape.batch - 1, shape.width - 1);
  const acc_t low = x < y ? x : y, high = x < y ? y : x;
  return z < low ? low : z < high ? z : high;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 6) chunk_moments(
    const typename T::scalar_t* __restrict__ u, // [B, C, H, W]
    Moments<double>* __restrict__ partial, // [C, chunks]
    Shape shape,
    Cells cells
) {
  using acc_t = typename T::acc_t;
  Worker<T> worker(shape, cells);
  acc_t subtracted[T::kChannels];
#pragma unroll
  for (int k = 0; k < T::kChannels; ++k) {
    const int64_t c = worker.channel < shape.channels ? worker.channel + k : 0;
    subtracted[k] = pivot<acc_t>(u, shape, c);
  }
  acc_t n = 0, mean[T::kLanes] = {}, squares[T::kLanes] = {};
  while (worker.has_cells()) {
    const Cell<T> cell = worker.next();
    const Pixels<T> v = load_pixels(u, cell);
#pragma unroll
    for (int p = 0; p < T::kPixels; ++p) {
      if (cell.pixel[p] < 0) continue;
      n += 1;
      const acc_t inverse = 1 / n;
#pragma unroll
      for (int k = 0; k < T::kLanes; ++k) {
        const acc_t x = v(p, k) - subtracted[k % T::kChannels], d = x - mean[k];
        mean[k] += d * inverse;
        squares[k] += d * (x - mean[k]);
      }
    }
  }

  __shared__ Moments<acc_t> warps[kWarps][kWarp * T::kChannels];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, across = cells.across;
#pragma unroll
  for (int k = 0; k < T::kChannels; ++k) {
    Moments<acc_t> m{n, mean[k], squares[k]};
#pragma unroll
    for (int other = k + T::kChannels; other < T::kLanes; ++other) {
      m.merge({n, mean[other], squares[other]});
    }
    for (int distance = across; distance < kWarp; distance *= 2) m.merge(m.shuffled(distance));
    if (lane < across) warps[warp][lane * T::kChannels + k] = m;
  }
  __syncthreads();
  const int64_t first = worker.channel - (threadIdx.x % across) * T::kChannels; // of the tile
  for (int c = threadIdx.x; c < across * T::kChannels; c += kThreads) {
    if (first + c >= shape.channels) break;
    Moments<acc_t> m = warps[0][c];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) m.merge(warps[w][c]);
    const double shift = pivot<acc_t>(u, shape, first + c);
    partial[(first + c) * cells.chunks + worker.chunk] = {
        double(m.n), shift + double(m.mean), double(m.squares)
    };
  }
}

// A block per channel.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, 8) combine_moments(
    const Moments<double>* __restrict__ partial, // [C, chunks]
    int64_t chunks,
    Statistics<acc_t> out
) {
  Moments<double> m{0, 0, 0};
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    m.merge(partial[blockIdx.x * chunks + i]);
  }
  __shared__ Moments<double> warps[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) m.merge(m.shuffled(distance));
  if (lane == 0) warps[warp] = m;
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) m.merge(warps[w]);
  out.write(blockIdx.x, m.mean, m.squares / m.n, true);
}

// Of no values (zeros), or the running ones as they are.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) fixed_statistics(
    int64_t channels, bool training, Statistics<acc_t> out
) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  if (training) {
    out.write(c, 0, 0, false);
  } else {
    out.copy_running(c);
  }
}

constexpr int kStatisticsLanes = 8;

// Scratch: Moments<double> [plan.partials(1)].
template <typename scalar_t>
Plan plan_statistics(Shape shape, const scalar_t* u) {
  shape.pool = {1, 1, 0};
  return make_plan<scalar_t, kStatisticsLanes>(shape, false, {u});
}

template <typename scalar_t, typename Launch>
void statistics(
    const Launch& launch,
    const Plan& plan,
    const scalar_t* u, // [B, C, H, W]
    Moments<double>* partial, // scratch
    const Statistics<accumulator_t<scalar_t>>& out
) {
  with_traits<scalar_t, kStatisticsLanes>(plan, [&](auto traits) {
    using T = decltype(traits);
    if constexpr (T::kKernel == 1) {
      launch(plan.blocks(), chunk_moments<T>, u, partial, plan.shape, plan.cells);
    }
  });
  launch(
      plan.channels(), combine_moments<accumulator_t<scalar_t>>, partial, plan.cells.chunks, out
  );
}

// What needs no values: see the kernel.
template <typename acc_t, typename Launch>
void without_values(
    const Launch& launch, int64_t channels, bool training, const Statistics<acc_t>& out
) {
  const auto blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
  launch(fastjac::Geometry{blocks, kThreads}, fixed_statistics<acc_t>, channels, training, out);
}

} // namespace fastjac::norm_act_pool
