// jacobian_match on CUDA: device code and its launches. The formula is in common/jacobian_match.h.
//
// Layout: js, jt, v are [B, N] in memory; a sample's N elements may come in any order, the same for
// all three. A sample is cut into chunks; block `sample * chunks + chunk` of kThreads threads works
// on one. A chain of launches, no atomics, no host synchronisation:
//
//   normalised:  sum_squares     js, jt -> norms [B, chunks]
//                sum_difference  js, jt, norms -> differences [B, chunks]
//                write_gradient  js, jt, norms, differences -> v, loss
//   raw:         match_raw       js, jt -> v, differences [B, chunks]
//                write_loss      differences -> loss
//
// Each block adds up its sample's chunks by itself, always in the same order: it costs less than a
// launch, and the result is the same from run to run. Chunks depend on N alone. Must move 3 N
// elements per sample (js and jt in, v out); the second and third reading hit the L2 cache as long
// as the batch fits there.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstdint>

#include "../common/jacobian_match.h"
#include "launch.h"
#include "scalar.cuh"

namespace fastjac::jacobian_match {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 4; // 64 registers: room for the loads in flight, no spills
constexpr int kWarp = 32;
constexpr int64_t kElementsPerThread =
    16; // at least: two to eight 16-byte loads in flight from each input
constexpr int64_t kMaxChunks = 1024; // four of a sample's partial sums per thread

// What part of the batch a block works on.
struct Chunking {
  int64_t n; // elements of a sample
  int64_t chunk; // elements of a chunk: a multiple of kThreads * kElementsPerThread
  int64_t chunks; // chunks of a sample

  __device__ int64_t sample() const {
    return blockIdx.x / chunks;
  }
  __device__ int64_t index() const {
    return blockIdx.x % chunks;
  }
  __device__ int64_t begin() const {
    return index() * chunk;
  }
  __device__ int64_t end() const {
    return begin() + chunk < n ? begin() + chunk : n;
  }
};

// Both sums over the block's threads, a tree; valid in every thread.
template <typename acc_t>
__device__ inline Sums<acc_t> block_sums(Sums<acc_t> x) {
  __shared__ Sums<acc_t> warps[kThreads / kWarp];
  const auto warp_sums = [&] {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      x.first += __shfl_xor_sync(0xffffffffu, x.first, offset);
      x.second += __shfl_xor_sync(0xffffffffu, x.second, offset);
    }
  };
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  warp_sums();
  __syncthreads(); // `warps` may still be read from an earlier call
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  x = lane < kThreads / kWarp ? warps[lane] : Sums<acc_t>{0, 0};
  warp_sums();
  return x;
}

// A sample's sums from its chunks' [chunks]; valid in every thread.
template <typename acc_t>
__device__ inline Sums<acc_t> sample_sums(const Sums<acc_t>* __restrict__ partial, int64_t chunks) {
  Sums<acc_t> x{0, 0};
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    x.first += partial[i].first;
    x.second += partial[i].second;
  }
  return block_sums(x);
}

// Calls f(s, t) on the elements of the block's chunk, vectors of kVector at a time: of 16 bytes, or one
// element where the data is not aligned for that. f returns v's element, and v is written where kWrite.
template <bool kWrite, int kVector, typename scalar_t, typename F>
__device__ inline void for_chunk(
    const scalar_t* __restrict__ js, // [B, N]
    const scalar_t* __restrict__ jt, // [B, N]
    scalar_t* __restrict__ v, // [B, N], or null
    const Chunking& c,
    const F& f
) {
  const int64_t start = c.sample() * c.n;
#pragma unroll 4
  for (int64_t i = c.begin() + threadIdx.x * kVector; i < c.end(); i += kThreads * kVector) {
    const auto s = load_vector<kVector>(js + start + i), t = load_vector<kVector>(jt + start + i);
    Vector<scalar_t, kVector> out;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if constexpr (kWrite) {
        assign(out.x[k], f(to_acc(s.x[k]), to_acc(t.x[k])));
      } else {
        f(to_acc(s.x[k]), to_acc(t.x[k]));
      }
    }
    if constexpr (kWrite) store_vector(v + start + i, out);
  }
}

template <int kVector, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) sum_squares(
    const scalar_t* __restrict__ js, // [B, N]
    const scalar_t* __restrict__ jt, // [B, N]
    Sums<acc_t>* __restrict__ norms, // [B, chunks]
    Chunking c
) {
  Sums<acc_t> x{0, 0};
  for_chunk<false, kVector>(js, jt, static_cast<scalar_t*>(nullptr), c, [&](acc_t s, acc_t t) {
    x.first += s * s;
    x.second += t * t;
  });
  x = block_sums(x);
  if (threadIdx.x == 0) norms[blockIdx.x] = x;
}

template <int kVector, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) sum_difference(
    const scalar_t* __restrict__ js, // [B, N]
    const scalar_t* __restrict__ jt, // [B, N]
    const Sums<acc_t>* __restrict__ norms, // [B, chunks]
    Sums<acc_t>* __restrict__ differences, // [B, chunks]: sum d^2 and <d, u>
    acc_t eps,
    Chunking c
) {
  const Scales<acc_t> k = scales(sample_sums(norms + c.sample() * c.chunks, c.chunks), eps);
  Sums<acc_t> x{0, 0};
  for_chunk<false, kVector>(js, jt, static_cast<scalar_t*>(nullptr), c, [&](acc_t s, acc_t t) {
    const Element<true, acc_t> e(s, t, k);
    x.first += e.d * e.d;
    x.second += e.d * e.u;
  });
  x = block_sums(x);
  if (threadIdx.x == 0) differences[blockIdx.x] = x;
}

template <int kVector, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) write_gradient(
    const scalar_t* __restrict__ js, // [B, N]
    const scalar_t* __restrict__ jt, // [B, N]
    const Sums<acc_t>* __restrict__ norms, // [B, chunks]
    const Sums<acc_t>* __restrict__ differences, // [B, chunks]
    scalar_t* __restrict__ v, // [B, N]
    acc_t* __restrict__ loss, // [B]
    acc_t eps,
    Chunking c
) {
  const Scales<acc_t> k = scales(sample_sums(norms + c.sample() * c.chunks, c.chunks), eps);
  const Sums<acc_t> sums = sample_sums(differences + c.sample() * c.chunks, c.chunks);
  const acc_t along = k.a_is_norm ? sums.second : acc_t(0);
  for_chunk<true, kVector>(js, jt, v, c, [&](acc_t s, acc_t t) {
    return Element<true, acc_t>(s, t, k).gradient(k, along);
  });
  if (threadIdx.x == 0 && c.index() == 0) loss[c.sample()] = sums.first;
}

template <int kVector, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) match_raw(
    const scalar_t* __restrict__ js, // [B, N]
    const scalar_t* __restrict__ jt, // [B, N]
    scalar_t* __restrict__ v, // [B, N]
    Sums<acc_t>* __restrict__ differences, // [B, chunks]: sum d^2, and nothing
    Chunking c
) {
  Sums<acc_t> x{0, 0};
  for_chunk<true, kVector>(js, jt, v, c, [&](acc_t s, acc_t t) {
    const Element<false, acc_t> e(s, t, {});
    x.first += e.d * e.d;
    return e.gradient({}, acc_t(0));
  });
  x = block_sums(x);
  if (threadIdx.x == 0) differences[blockIdx.x] = x;
}

// One block per sample.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) write_loss(
    const Sums<acc_t>* __restrict__ differences, // [B, chunks]
    acc_t* __restrict__ loss, // [B]
    int64_t chunks
) {
  const Sums<acc_t> x = sample_sums(differences + blockIdx.x * chunks, chunks);
  if (threadIdx.x == 0) loss[blockIdx.x] = x.first;
}

inline Chunking chunking(int64_t n) {
  constexpr int64_t step = kThreads * kElementsPerThread;
  const int64_t steps = (n + step - 1) / step;
  const int64_t steps_per_chunk = (steps + kMaxChunks - 1) / kMaxChunks;
  return {n, steps_per_chunk * step, (steps + steps_per_chunk - 1) / steps_per_chunk};
}

// What the launches work on.
template <typename scalar_t>
struct Operands {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* js; // [B, N]
  const scalar_t* jt; // [B, N]
  scalar_t* v; // [B, N]
  acc_t* loss; // [B]
  Sums<acc_t>* partial; // [2, B, chunks], scratch
  int64_t batch;
};

template <int kVector, typename scalar_t, typename Launch>
void launch_all(
    const Launch& launch, const Operands<scalar_t>& x, const Chunking& c, bool normalize, double eps
) {
  using acc_t = accumulator_t<scalar_t>;
  Sums<acc_t>*norms = x.partial, *differences = x.partial + x.batch * c.chunks;
  const Geometry chunks{static_cast<unsigned>(x.batch * c.chunks), kThreads};
  const Geometry samples{static_cast<unsigned>(x.batch), kThreads};
  if (normalize) {
    launch(chunks, sum_squares<kVector, scalar_t, acc_t>, x.js, x.jt, norms, c);
    launch(
        chunks, sum_difference<kVector, scalar_t, acc_t>, x.js, x.jt, norms, differences,
        acc_t(eps), c
    );
    launch(
        chunks, write_gradient<kVector, scalar_t, acc_t>, x.js, x.jt, norms, differences, x.v,
        x.loss, acc_t(eps), c
    );
  } else {
    launch(chunks, match_raw<kVector, scalar_t, acc_t>, x.js, x.jt, x.v, differences, c);
    launch(samples, write_loss<acc_t>, differences, x.loss, c.chunks);
  }
}

// With accesses of 16 bytes where the data allows it.
template <typename scalar_t, typename Launch>
void match(
    const Launch& launch, const Operands<scalar_t>& x, const Chunking& c, bool normalize, double eps
) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (c.n % kVector == 0 && aligned(x.js) && aligned(x.jt) && aligned(x.v)) {
    launch_all<kVector>(launch, x, c, normalize, eps);
  } else {
    launch_all<1>(launch, x, c, normalize, eps);
  }
}

} // namespace fastjac::jacobian_match
