// norm_act_pool on CUDA: sums per channel. Each thread adds up its cells' values, a block its threads'
// (a tree), and one block per channel the chunks (in order, in float64).
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool.cuh"

namespace fastjac::norm_act_pool {

// The sums of x over the block's threads, for each channel of the block's tile; calls
// write(sum's index, channel, sum).
template <typename T, int kCount, typename F>
__device__ inline void block_sums(
    const typename T::acc_t (&x)[kCount][T::kChannels], const Worker<T>& worker, const F& write
) {
  using acc_t = typename T::acc_t;
  __shared__ acc_t warps[kWarps][kWarp * T::kChannels];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int across = worker.cells.across, channels = across * T::kChannels;
  const int64_t first = worker.channel - (threadIdx.x % across) * T::kChannels; // of the tile
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    acc_t sum[T::kChannels];
#pragma unroll
    for (int k = 0; k < T::kChannels; ++k) sum[k] = x[s][k];
    for (int distance = across; distance < kWarp; distance *= 2) {
#pragma unroll
      for (int k = 0; k < T::kChannels; ++k) {
        sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], distance);
      }
    }
    if (s > 0) __syncthreads(); // `warps` may still be read
    if (lane < across) {
#pragma unroll
      for (int k = 0; k < T::kChannels; ++k) warps[warp][lane * T::kChannels + k] = sum[k];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      if (first + c >= worker.shape.channels) break;
      acc_t total = warps[0][c];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) total += warps[w][c];
      write(s, first + c, total);
    }
  }
}

// Over the block's threads, a tree; valid in thread 0.
__device__ inline double block_sum(double x) {
  __shared__ double warps[kWarps];
  const auto warp_sum = [&] {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
  };
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  warp_sum();
  __syncthreads(); // `warps` may still be read from an earlier call
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  x = lane < kWarps ? warps[lane] : 0;
  warp_sum();
  return x;
}

// What combine makes of a channel's sums. Each may be null.
template <typename acc_t>
struct Totals {
  Sums<acc_t>* __restrict__ sums; // [C]
  acc_t* __restrict__ gweight; // [C]: the backward's
  acc_t* __restrict__ gbias; // [C]
  acc_t* __restrict__ total; // [C]: the pushforward's T
  acc_t* __restrict__ coefficient; // [C]
};

// Adds up the chunks' sums, kCount from the first-th member of Sums on. A block per channel. Must
// move them once: of a channel, at most kMaxSummingBlocks.
template <int kFirst, int kCount, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, 4) combine(
    const acc_t* __restrict__ partial, // [kCount, C, chunks]
    int64_t chunks,
    Inputs<scalar_t> x,
    double count,
    bool batch, // the statistics vary in the pushforward
    Totals<acc_t> out
) {
  const int64_t channel = blockIdx.x, channels = gridDim.x;
  double sum[kSums] = {};
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    double mine = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
      mine += partial[(s * channels + channel) * chunks + i];
    }
    sum[kFirst + s] = block_sum(mine);
  }
  if (threadIdx.x > 0) return;
  const Sums<double> sums{sum[0], sum[1], sum[2], sum[3], sum[4]};
  const double invstd = x.invstd[channel], total_ = total(sums, invstd, count, batch);
  if (out.sums != nullptr) {
    out.sums[channel] = {
        acc_t(sums.g), acc_t(sums.gd), acc_t(sums.gt), acc_t(sums.t), acc_t(sums.td)
    };
  }
  if (out.gweight != nullptr) out.gweight[channel] = acc_t(invstd * sums.gd);
  if (out.gbias != nullptr) out.gbias[channel] = acc_t(sums.g);
  if (out.total != nullptr) out.total[channel] = acc_t(total_);
  if (out.coefficient != nullptr) {
    out.coefficient[channel] = acc_t(-double(x.scale(channel)) * total_ / count);
  }
}

} // namespace fastjac::norm_act_pool
