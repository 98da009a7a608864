// norm_act_pool on CUDA: what its kernels share. The formulas are in common/norm_act_pool.h.
//
// Layout: maps are dense, [B, H, W, C] or [B, C, H, W]. They are cut into cells, and a thread works
// on the cells of kLanes channels at a time (channels-last), or on kLanes neighbouring cells of one
// channel (contiguous), so that an access has 16 bytes where rows are whole vectors and aligned, and
// one element elsewhere. Narrower are those that take the registers of too many lanes (8 bytes: 3x3 pools
// and the pushforward in 16 bits), float64's (8 bytes: it is for checks), and one element's where 3x3
// windows of a contiguous map overlap. A cell owns, for a pool of
//
//   none  the same pixel of kPixels cells: that many loads are in flight before the first is used;
//   2x2   a window. In a map of odd size the last cells are cut off, and own no window;
//   3x3   2x2 pixels, which up to four windows share: the cell's own, to the right, below, and both.
//
// Each pixel belongs to one cell, and each window too. Whatever a pixel gets, its thread gathers: it
// finds the choice of each window that holds the pixel from u. So there are no atomics, nothing is
// saved for the backward, and u is read from memory once per pass: what neighbouring cells share is
// in the L1 cache.
//
// Block `chunk * tiles + tile` works on a tile of channels (kWarp vectors at most, or one channel if
// contiguous) and on a chunk of the cells of the whole batch. `across` of its threads stand side by
// side along the channels, the others one cell further each. Sums over the threads of a block, a
// tree, go to `partial`, and a block per channel adds up the chunks in order, in float64. Chunks
// depend on the shapes alone, and so the results are the same from run to run.
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
#include "scalar.cuh"

namespace fastjac::norm_act_pool {

constexpr int kThreads = 128;
constexpr int kSums = 5; // members of Sums
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 4096; // several waves on any device; then a thread has more cells
constexpr int64_t kCellsPerThread = 4; // at least, to pay for its start

struct Shape {
  int64_t batch, channels, height, width, out_height, out_width;
  Pool pool;
  bool channels_last;

  int64_t count() const { // values per channel
    return batch * height * width;
  }
  FASTJAC_HOST_DEVICE int64_t pixel_stride() const {
    return channels_last ? channels : 1;
  }
};

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

// How a grid covers the cells.
struct Cells {
  int64_t rows, columns, count; // of a map; count: of the batch
  int64_t first; // row and column of a map's first cell
  int64_t chunk, chunks;
  int64_t step, step_batch, step_row, step_column; // from a thread's cell to its next
  int tiles, across;
};

// A kernel's specialisation. With one lane the layout is a matter of strides alone: then kLast.
template <typename scalar, int kLanes_, int kKernel_, bool kLast_>
struct Traits {
  using scalar_t = scalar;
  using acc_t = accumulator_t<scalar_t>;
  static constexpr int kLanes = kLanes_;
  static constexpr int kKernel = kKernel_; // of the pool; 1: none
  static constexpr int kChannels = kLast_ ? kLanes : 1; // of a thread
  static constexpr int kAlong = kLast_ ? 1 : kLanes; // neighbouring cells of a thread
  static constexpr int kPixels = kKernel == 1 && kLanes > 1 ? 2 : 4; // of a cell
  static constexpr int kOwn = kKernel == 1 ? kPixels : 1; // windows that a cell owns
  // Whether what a thread keeps of its channels and windows is much.
  static constexpr bool kWide = kLanes == 8 || (kKernel == 3 && kLanes > 1);
  // Pixels that are stored together: where a row's elements alternate between a cell's left and
  // right pixels, both.
  static constexpr int kGroup = kKernel == 2 && kAlong > 1 ? 2 : 1;
};

// Some pixels of one map.
template <typename T, int kCount>
struct Values {
  Vector<typename T::scalar_t, T::kLanes> x[kCount];

  __device__ typename T::acc_t operator()(int i, int lane) const {
    return to_acc(x[i].x[lane]);
  }
};
template <typename T>
using Pixels = Values<T, T::kPixels>; // of a cell, row by row
template <typename T>
using Windows = Values<T, T::kOwn>; // that a cell owns: of y

// Where a cell's pixels and windows are: the offset of the first lane; -1 where there is none.
template <typename T>
struct Cell {
  int64_t pixel[T::kPixels]; // row by row
  int64_t window[T::kOwn];
  // With a pool: its first pixel, and its own window.
  int64_t batch, row, column, window_row, window_column;
};

// A thread's place in the grid, and its cells, one after another.
template <typename T>
class Worker {
 public:
  const Shape& shape;
  const Cells& cells;
  int64_t chunk, channel; // the first of its channels

  __device__ Worker(const Shape& s, const Cells& c) : shape(s), cells(c) {
    const unsigned tile = blockIdx.x % unsigned(c.tiles);
    chunk = blockIdx.x / unsigned(c.tiles);
    channel = (int64_t(tile) * c.across + threadIdx.x % unsigned(c.across)) * T::kChannels;
    index_ = chunk * c.chunk + threadIdx.x / unsigned(c.across);
    end_ = (chunk + 1) * c.chunk < c.count ? (chunk + 1) * c.chunk : c.count;
    if (channel >= s.channels) end_ = index_;
    b_ = index_ / c.columns;
    j_ = index_ - b_ * c.columns;
    i_ = b_ % c.rows;
    b_ /= c.rows;
  }

  __device__ bool has_cells() const {
    return index_ < end_;
  }

  __device__ Cell<T> next() {
    Cell<T> cell;
    if constexpr (T::kKernel == 1) {
#pragma unroll
      for (int p = 0; p < T::kPixels; ++p) {
        cell.pixel[p] = cell.window[p] = has_cells() ? pixel(b_, i_, j_ * T::kAlong) : -1;
        advance();
      }
    } else {
      cell.batch = b_;
      cell.window_row = i_ + cells.first;
      cell.window_column = (j_ + cells.first) * T::kAlong;
      // 3x3: the pixels that no window before the cell's own holds.
      const int shift = T::kKernel == 3 ? 1 - shape.pool.padding : 0;
      cell.row = 2 * cell.window_row + shift;
      cell.column = 2 * cell.window_column + shift;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int64_t row = cell.row + p / 2, column = cell.column + p % 2;
        cell.pixel[p] = inside(row, column) ? pixel(b_, row, column) : -1;
      }
      cell.window[0] = window(cell, 0);
      advance();
    }
    return cell;
  }

  __device__ bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < shape.height && column >= 0 && column < shape.width;
  }
  __device__ int64_t pixel(int64_t b, int64_t row, int64_t column) const {
    return offset(shape.height, shape.width, b, row, column);
  }
  // The cell's own window, those to the right and below, and the one to the right below.
  __device__ int64_t window(const Cell<T>& cell, int w) const {
    const int64_t i = cell.window_row + w / 2, j = cell.window_column + w % 2;
    const bool there = i >= 0 && i < shape.out_height && j >= 0 && j < shape.out_width;
    return there ? offset(shape.out_height, shape.out_width, cell.batch, i, j) : -1;
  }

 private:
  __device__ int64_t offset(int64_t h, int64_t w, int64_t b, int64_t i, int64_t j) const {
    return b * h * w * shape.channels + channel * (shape.channels_last ? 1 : h * w) +
           (i * w + j) * shape.pixel_stride();
  }

  // Without a division.
  __device__ void advance() {
    index_ += cells.step;
    j_ += cells.step_column;
    i_ += cells.step_row;
    b_ += cells.step_batch;
    if (j_ >= cells.columns) {
      j_ -= cells.columns;
      ++i_;
    }
    if (i_ >= cells.rows) {
      i_ -= cells.rows;
      ++b_;
    }
  }

  int64_t index_, end_, b_, i_, j_;
};

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
    if (at < 0) continue;
    if constexpr (T::kGroup == 1) {
      v.x[p] = load_vector<T::kLanes>(map + at);
    } else {
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
template <typename T>
__device__ inline void store_group(
    typename T::scalar_t* __restrict__ map,
    const Cell<T>& cell,
    int first,
    const Values<T, T::kGroup>& v
) {
  const int64_t at = cell.pixel[first];
  if (map == nullptr || at < 0) return;
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
template <typename T>
__device__ inline Windows<T> load_windows(
    const typename T::scalar_t* __restrict__ y, const Cell<T>& cell
) {
  Windows<T> v{};
#pragma unroll
  for (int w = 0; w < T::kOwn; ++w) {
    if (cell.window[w] >= 0) v.x[w] = load_vector<T::kLanes>(y + cell.window[w]);
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
  __device__ acc_t z(acc_t d, acc_t residual, int lane) const {
    return std::fma(d, scale[lane % T::kChannels], bias[lane % T::kChannels]) + residual;
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
  Cells cells;
  int lanes;

  fastjac::Geometry blocks() const {
    return {static_cast<unsigned>(cells.tiles * cells.chunks), kThreads};
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
  c.rows = windows_only ? s.out_height : kernel == 1 ? 1 : (s.height + 1) / 2;
  c.columns = windows_only ? s.out_width : kernel == 1 ? s.width : (s.width + 1) / 2;
  if (!windows_only && kernel == 3 && s.pool.padding == 0) { // the first pixels are before a window
    c.first = -1;
    c.rows = s.height / 2 + 1;
    c.columns = s.width / 2 + 1;
  }
  c.columns /= along;
  c.count = s.batch * c.rows * c.columns;

  const int64_t vectors_across = s.channels_last ? s.channels / lanes : s.channels;
  c.across = 1;
  while (s.channels_last && c.across < kWarp && c.across < vectors_across) c.across *= 2;
  const int64_t tiles = (vectors_across + c.across - 1) / c.across;
  c.tiles = static_cast<int>(tiles);
  c.step = kThreads / c.across;
  const int64_t least = c.step * kCellsPerThread;
  const int64_t most_chunks = tiles < kMaxBlocks ? kMaxBlocks / tiles : 1;
  const int64_t chunks = (c.count + least - 1) / least;
  c.chunk = chunks <= most_chunks ? least : (c.count + most_chunks - 1) / most_chunks;
  c.chunks = (c.count + c.chunk - 1) / c.chunk;
  c.step_column = c.step % c.columns;
  c.step_row = c.step / c.columns % c.rows;
  c.step_batch = c.step / c.columns / c.rows;
  return {s, c, lanes};
}

} // namespace fastjac::norm_act_pool
