// norm_act_pool on CUDA: what its kernels share. The formulas are in common/norm_act_pool.h.
//
// z is (u - mean) scale + bias, and not scale u + shift: where the mean is large that cancels, and
// d = u - mean is needed anyway. Every kernel computes it alike, so that all agree on what a window
// chose.
//
// Includes nothing of PyTorch.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "../common/norm_act_pool.h"
#include "launch.h"
#include "norm_act_pool_cells.cuh"
#include "scalar.cuh"

namespace fastjac::norm_act_pool {

constexpr int kSums = 5; // members of Sums

// What the kernels normalise, and how.
template <typename scalar_t>
struct Inputs {
  using acc_t = accumulator_t<scalar_t>;

  const scalar_t* __restrict__ u; // [B, C, H, W]
  const scalar_t* __restrict__ residual; // like u; or null
  const acc_t* __restrict__ weight; // [C]; or null, for 1
  const acc_t* __restrict__ bias; // [C]; or null, for 0
  const acc_t* __restrict__ mean; // [C]
  const acc_t* __restrict__ invstd; // [C]
  Activation activation;
  acc_t slope;

  __device__ acc_t scale(int64_t channel) const {
    return weight == nullptr ? invstd[channel] : weight[channel] * invstd[channel];
  }
};

// Some pixels of one map.
template <typename T, int kCount>
struct Values {
  Vector<typename T::scalar_t, T::kLanes> x[kCount];

  __device__ typename T::acc_t operator()(int i, int lane) const {
    return element(x[i], lane);
  }
};
template <typename T>
using Pixels = Values<T, T::kPixels>; // of a cell, row by row
template <typename T>
using Windows = Values<T, T::kOwn>; // that a cell owns: of y

// Where `at` is negative, zero. As words: a choice between elements of 16 bits takes one instruction
// for each, and waits for the load.
template <typename T>
__device__ inline Vector<typename T::scalar_t, T::kLanes> load_or_zero(
    const typename T::scalar_t* __restrict__ map, int64_t at
) {
  using Loaded = Vector<typename T::scalar_t, T::kLanes>;
  if constexpr (sizeof(Loaded) % sizeof(unsigned) != 0) {
    return at < 0 ? Loaded{} : load_vector<T::kLanes>(map + at);
  } else {
    using Words = Vector<unsigned, sizeof(Loaded) / sizeof(unsigned)>;
    Words words{};
    if (at >= 0) words = *reinterpret_cast<const Words*>(map + at);
    Loaded loaded;
    memcpy(&loaded, &words, sizeof(loaded));
    return loaded;
  }
}

// kCount of the cell's pixels of a map, from `first` on, in whole groups; zero where there is none,
// or no map.
template <typename T, int kCount = T::kPixels>
__device__ inline Values<T, kCount> load_pixels(
    const typename T::scalar_t* __restrict__ map, const Cell<T>& cell, int first = 0
) {
  Values<T, kCount> v{};
  if (map == nullptr) return v;
#pragma unroll
  for (int p = 0; p < kCount; p += T::kGroup) {
    const int64_t at = cell.pixel[first + p];
    if constexpr (T::kGroup == 1) {
      v.x[p] = load_or_zero<T>(map, at);
    } else {
      if (at < 0) continue;
      const auto left = load_vector<T::kLanes>(map + at);
      const auto right = load_vector<T::kLanes>(map + at + T::kLanes);
#pragma unroll
      for (int k = 0; k < 2 * T::kLanes; ++k) {
        v.x[p + k % 2].x[k / 2] = k < T::kLanes ? left.x[k] : right.x[k - T::kLanes];
      }
    }
  }
  return v;
}

// A group of the cell's pixels, from `first` on.
template <typename T, typename AnyCell>
__device__ inline void store_group(
    typename T::scalar_t* __restrict__ map,
    const AnyCell& cell,
    int first,
    const Values<T, T::kGroup>& v
) {
  if (map == nullptr || !cell.has_pixel(first)) return;
  const int64_t at = cell.pixel_offset(first);
  if constexpr (T::kGroup == 1) {
    store_vector<T::kLanes>(map + at, v.x[0]);
  } else {
    Vector<typename T::scalar_t, T::kLanes> left, right;
#pragma unroll
    for (int k = 0; k < 2 * T::kLanes; ++k) {
      (k < T::kLanes ? left.x[k] : right.x[k - T::kLanes]) = v.x[k % 2].x[k / 2];
    }
    store_vector<T::kLanes>(map + at, left);
    store_vector<T::kLanes>(map + at + T::kLanes, right);
  }
}

// The cell's own windows of y's cotangent; zero where there is none.
template <typename T, typename AnyCell>
__device__ inline Windows<T> load_windows(
    const typename T::scalar_t* __restrict__ y, const AnyCell& cell
) {
  Windows<T> v{};
#pragma unroll
  for (int w = 0; w < T::kOwn; ++w) {
    v.x[w] = load_or_zero<T>(y, cell.has_window(w) ? cell.window_offset(w) : -1);
  }
  return v;
}

// A thread's channels: d and z from u.
template <typename T>
struct Norm {
  using acc_t = typename T::acc_t;
  acc_t mean[T::kChannels], scale[T::kChannels], bias[T::kChannels];

  __device__ Norm(const Inputs<typename T::scalar_t>& x, const Worker<T>& worker) {
#pragma unroll
    for (int k = 0; k < T::kChannels; ++k) {
      // A thread without channels has no cells, and may read any.
      const int64_t c = worker.channel < worker.shape.channels ? worker.channel + k : 0;
      mean[k] = x.mean[c];
      scale[k] = x.scale(c);
      bias[k] = x.bias == nullptr ? acc_t(0) : x.bias[c];
    }
  }
  __device__ acc_t d(acc_t u, int lane) const {
    return u - mean[lane % T::kChannels];
  }
  __device__ acc_t z(acc_t d, int lane) const {
    return std::fma(d, scale[lane % T::kChannels], bias[lane % T::kChannels]);
  }
};

template <Activation kKind>
using Constant = std::integral_constant<Activation, kKind>;

// f(the activation, as a constant): one branch for all that f does.
template <typename F>
__device__ inline void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kNone:
      return f(Constant<Activation::kNone>());
    case Activation::kRelu:
      return f(Constant<Activation::kRelu>());
    case Activation::kRelu6:
      return f(Constant<Activation::kRelu6>());
    case Activation::kLeakyRelu:
      return f(Constant<Activation::kLeakyRelu>());
    case Activation::kSilu:
      return f(Constant<Activation::kSilu>());
  }
}

template <typename acc_t>
__device__ inline acc_t value(Activation kind, acc_t slope, acc_t z) {
  return activate(kind, slope, z, [](acc_t x) { return std::exp(x); });
}
template <typename acc_t>
__device__ inline acc_t gated(Activation kind, acc_t slope, acc_t z, acc_t x) {
  return activate_backward(kind, slope, z, x, [](acc_t e) { return std::exp(e); });
}

// How a call is launched: the widest accesses that its maps allow, and the grid.
struct Plan {
  Shape shape;
  Cells cells; // of a kernel with sums
  Cells unsummed; // of one without
  int lanes;

  fastjac::Geometry blocks() const {
    return {static_cast<unsigned>(cells.tiles * cells.chunks), kThreads};
  }
  fastjac::Geometry unsummed_blocks() const {
    return {static_cast<unsigned>(unsummed.tiles * unsummed.chunks), kThreads};
  }
  fastjac::Geometry channels() const {
    return {static_cast<unsigned>(shape.channels), kThreads};
  }
  // Elements of scratch for `sums` partial sums per channel and chunk.
  int64_t partials(int sums) const {
    return sums * shape.channels * cells.chunks;
  }
};

// kMost: lanes that the kernel's registers allow.
template <typename scalar_t, int kMost>
constexpr int kVectorLanes = std::is_same_v<scalar_t, double>     ? 1
                             : kMost < int(16 / sizeof(scalar_t)) ? kMost
                                                                  : int(16 / sizeof(scalar_t));

// Calls run(Traits) with those that the plan asks for. A contiguous map's 3x3 windows overlap in
// memory: there a lane is a cell.
template <typename scalar_t, int kMost, typename Run>
void with_traits(const Plan& plan, const Run& run) {
  constexpr int kLanes = kVectorLanes<scalar_t, kMost>;
  const int kernel = plan.shape.pool.kernel;
  const bool last = plan.shape.channels_last;
  if (plan.lanes == 1) {
    if (kernel == 1) return run(Traits<scalar_t, 1, 1, true>());
    if (kernel == 2) return run(Traits<scalar_t, 1, 2, true>());
    return run(Traits<scalar_t, 1, 3, true>());
  }
  if constexpr (kLanes > 1) {
    if (kernel == 1 && last) return run(Traits<scalar_t, kLanes, 1, true>());
    if (kernel == 1) return run(Traits<scalar_t, kLanes, 1, false>());
    if (kernel == 2 && last) return run(Traits<scalar_t, kLanes, 2, true>());
    if (kernel == 2) return run(Traits<scalar_t, kLanes, 2, false>());
    return run(Traits<scalar_t, (kLanes < 4 ? kLanes : 4), 3, true>());
  }
}

// windows_only: the cells that own a window, all that a kernel without sums or cotangents needs.
// maps: all that are accessed; null where there is none. The batch is not empty.
template <typename scalar_t, int kMost>
Plan make_plan(Shape s, bool windows_only, std::initializer_list<const void*> maps) {
  const int kernel = s.pool.kernel;
  if (kernel == 1) { // no rows and columns are needed; channels-last, no samples either
    s.width *= s.height * (s.channels_last ? s.batch : 1);
    s.batch = s.channels_last ? 1 : s.batch;
    s.height = s.out_height = 1;
    s.out_width = s.width;
  }
  int lanes = kVectorLanes<scalar_t, kMost>;
  if (kernel == 3 && lanes > 4) lanes = 4; // as in with_traits: registers
  const int64_t run = s.channels_last ? s.channels : kernel == 2 ? s.width / 2 : s.width;
  bool vectors = run % lanes == 0 && (s.channels_last || kernel == 1 || s.width % 2 == 0);
  if (kernel == 3 && !s.channels_last) vectors = false;
  for (const void* p : maps) vectors = vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (!vectors) lanes = 1;

  Cells c{};
  const int64_t along = s.channels_last ? 1 : lanes;
  const int most_across = kernel == 3 ? kStripAcross : kWarp;
  const int64_t vectors_across = s.channels_last ? s.channels / lanes : s.channels;
  c.across = 1;
  while (s.channels_last && c.across < most_across && c.across < vectors_across) c.across *= 2;
  const int64_t tiles = (vectors_across + c.across - 1) / c.across;
  c.tiles = static_cast<int>(tiles);

  // The cells that hold all of the pixels, the first of which are in the padding.
  const auto cells = [&](int64_t size) {
    return kernel == 1 ? size : (size + s.pool.padding + 1) / 2;
  };
  c.rows = windows_only ? s.out_height : cells(s.height);
  c.columns = (windows_only ? s.out_width : cells(s.width)) / along;
  c.strip = 1;
  int64_t least = kThreads / c.across * kCellsPerThread;
  c.step = kThreads / c.across;
  if (kernel == 3) {
    // A window begins in the last row of the one above; and to a pixel, the windows above and to the
    // left of its cell's give too.
    c.lead = windows_only ? 1 : 2;
    c.halo = windows_only ? 0 : 1;
    least = c.step -= c.halo;
    const int64_t rows = c.rows;
    const auto cut = [&](int64_t strip) {
      c.strip = strip;
      c.rows = (rows + strip - 1) / strip;
    };
    const auto blocks = [&] {
      return tiles * ((s.batch * c.rows * c.columns + least - 1) / least);
    };
    cut(rows);
    while (c.strip >= 2 * kStripRows && blocks() < kMaxSummingBlocks) cut((c.strip + 1) / 2);
    if (!windows_only) cut(c.strip + c.strip % 2); // with those before it, even
  }
  c.count = s.batch * c.rows * c.columns;

  const auto split = [&](int64_t most_blocks) {
    const int64_t most_chunks = tiles < most_blocks ? most_blocks / tiles : 1;
    const int64_t chunks = (c.count + least - 1) / least;
    Cells cut = c;
    cut.chunk = chunks <= most_chunks ? least : (c.count + most_chunks - 1) / most_chunks;
    if (kernel == 3) cut.chunk = (cut.chunk + c.step - 1) / c.step * c.step; // no turn in part
    cut.chunks = (c.count + cut.chunk - 1) / cut.chunk;
    return cut;
  };
  c.step_column = c.step % c.columns;
  c.step_row = c.step / c.columns % c.rows;
  c.step_batch = c.step / c.columns / c.rows;
  return {s, split(kMaxSummingBlocks), split(kMaxBlocks), lanes};
}

} // namespace fastjac::norm_act_pool
