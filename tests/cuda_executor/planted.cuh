// Small kernels, each with a fault that the executor must find, or without. Device code like any
// other, but test_executor.cpp alone compiles it.
#pragma once

#include <cstdint>

namespace planted {

constexpr int kThreads = 128;

enum class Index { kRight, kShifted, kPastTheEnd, kBeforeTheBeginning };

// y[i] = x[i] + 1
template <Index kIndex>
__global__ void increment(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kIndex == Index::kPastTheEnd ? i > n : i >= n) return;
  if (kIndex == Index::kShifted) {
    y[i ? i - 1 : n - 1] = x[i] + 1;
  } else if (kIndex == Index::kBeforeTheBeginning) {
    y[i] = x[i - 1] + 1;
  } else {
    y[i] = x[i] + 1;
  }
}

enum class Sum { kRight, kNoFirstBarrier, kNoLastBarrier, kBarrierInBranch, kHalfTheWarps, kExit };

// sums[b] = the sum of x[b, :], for each of `rounds` in turn over the same shared memory.
template <Sum kSum>
__global__ void row_sum(
    const float* __restrict__ x, // [B, kThreads]
    float* __restrict__ sums, // [B]
    int rounds
) {
  __shared__ float warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float total = 0;
  for (int r = 0; r < rounds; ++r) {
    float value = x[blockIdx.x * kThreads + threadIdx.x];
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if (kSum != Sum::kNoFirstBarrier) __syncthreads(); // `warps` may still be read
    if (lane == 0) warps[warp] = value;
    if (kSum == Sum::kExit && warp == 3) return;
    if (kSum == Sum::kBarrierInBranch) {
      if (warp < 2) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (kSum != Sum::kNoLastBarrier) {
      __syncthreads();
    }
    value = 0;
    for (int w = 0; w < kThreads / 32 / (kSum == Sum::kHalfTheWarps ? 2 : 1); ++w) {
      value += warps[w];
    }
    total = value;
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

enum class Reverse { kRight, kNoBarrier, kWarpBarrier, kPastTheEnd, kUnwritten };

// y = each block's x, back to front, through dynamic shared memory.
extern __shared__ float dynamic[];

template <Reverse kReverse>
__global__ void reverse(const float* __restrict__ x, float* __restrict__ y) {
  const int i = threadIdx.x, n = blockDim.x, start = blockIdx.x * n;
  if (kReverse != Reverse::kUnwritten || i % 2) {
    dynamic[i + (kReverse == Reverse::kPastTheEnd)] = x[start + i];
  }
  if (kReverse == Reverse::kWarpBarrier) {
    __syncwarp();
  } else if (kReverse != Reverse::kNoBarrier) {
    __syncthreads();
  }
  y[start + i] = dynamic[n - 1 - i];
}

enum class Count { kAtomic, kPlain };

// total = how many of x's elements are positive
template <Count kCount>
__global__ void count_positive(const float* __restrict__ x, int* __restrict__ total) {
  const int mine = __syncthreads_count(x[blockIdx.x * kThreads + threadIdx.x] > 0);
  if (threadIdx.x > 0) return;
  if (kCount == Count::kAtomic) {
    atomicAdd(total, mine);
  } else {
    *total += mine;
  }
}

// y[i] = x[i], four at a time
__global__ inline void copy_vectors(const float* __restrict__ x, float* __restrict__ y) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  reinterpret_cast<float4*>(y)[i] = reinterpret_cast<const float4*>(x)[i];
}

// y[i] = bounded[i] for i below `count`
__global__ inline void beyond_the_array(float* __restrict__ y, int count) {
  __shared__ float bounded[4], next[4];
  if (threadIdx.x < 4) bounded[threadIdx.x] = next[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  if (int(threadIdx.x) < count) y[threadIdx.x] = bounded[threadIdx.x] + next[0];
}

// y[i] = x[i * scale mod 8], with an index of 32 bits
__global__ inline void short_index(const float* __restrict__ x, float* __restrict__ y, int scale) {
  y[threadIdx.x] = x[int(threadIdx.x) * scale & 7];
}

// What each shuffle and vote gives, one row each
__global__ inline void shuffles_and_votes(int* __restrict__ out) { // [7, 32]
  constexpr unsigned all = 0xffffffffu;
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(all, lane, 5);
  out[32 + lane] = __shfl_up_sync(all, lane, 3, 8);
  out[64 + lane] = __shfl_down_sync(all, lane, 3, 8);
  out[96 + lane] = __shfl_xor_sync(all, lane, 9);
  out[128 + lane] = int(__ballot_sync(all, lane % 3 == 0));
  out[160 + lane] = __any_sync(all, lane == 7) + 2 * __any_sync(all, lane == 32);
  out[192 + lane] = __all_sync(all, lane < 32) + 2 * __all_sync(all, lane < 31);
}

} // namespace planted
