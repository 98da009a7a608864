// norm_act_pool on CUDA: how blocks and threads go through the maps.
//
// Layout: maps are dense, [B, H, W, C] or [B, C, H, W]. They are cut into cells, and a thread works
// on the cells of kLanes channels at a time (channels-last), or on kLanes neighbouring cells of one
// channel (contiguous), so that an access has 16 bytes where rows are whole vectors and aligned, and
// one element elsewhere. Narrower are those that take the registers of too many lanes (8 bytes: 3x3
// pools and the pushforward in 16 bits), float64's (8 bytes: it is for checks), and one element's where
// 3x3 windows of a contiguous map overlap. A cell owns, for a pool of
//
//   none  the same pixel of kPixels cells: that many loads are in flight before the first is used;
//   2x2   a window. In a map of odd size the last cells are cut off, and own no window;
//   3x3   a window and its first 2x2 pixels, which up to four windows share: the cell's own, to the
//         left, above, and both. A thread goes down a strip of cells (norm_act_pool_strips.cuh).
//
// Each pixel belongs to one cell, and each window too. A pixel's thread gathers what the windows that
// chose the pixel give. So there are no atomics, nothing is saved for the backward, and u is read
// from memory once per pass: what neighbouring cells share is in the L1 cache.
//
// Block `chunk * tiles + tile` works on a tile of channels (kWarp vectors at most, or one channel if
// contiguous) and on a chunk of the cells of the whole batch. `across` of its threads stand side by
// side along the channels, the others one cell further each. Sums over the threads of a block, a
// tree, go to `partial`, and a block per channel adds up the chunks in order, in float64. Chunks
// depend on the shapes alone, and so the results are the same from run to run.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstdint>

#include "../common/norm_act_pool.h"
#include "scalar.cuh"

namespace fastjac::norm_act_pool {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// A launch's blocks; beyond, a thread has more cells. Where a block has sums: as many as a device of
// 132 multiprocessors runs at once, four each, and few enough to be added up quickly. Where it has
// none: several times as many as any device runs at once, so that none idles at the end.
constexpr int64_t kMaxSummingBlocks = 528;
constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kCellsPerThread = 4; // at least, to pay for its start
constexpr int64_t kStripRows = 8; // a 3x3 pool's strip is cut no shorter: rows before it cost too
constexpr int kStripAcross = 8; // threads along the channels at most, so that few columns are halos

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

// How a grid covers the cells. 3x3 pools: how it covers the strips, so a row here is one of strips.
struct Cells {
  int64_t rows, columns, count; // of a map; count: of the batch
  int64_t chunk, chunks;
  int64_t step, step_batch, step_row, step_column; // from a thread's cell to its next
  int64_t strip; // rows of cells in a strip
  int tiles, across;
  int lead; // rows above a strip that its thread computes too, and another writes
  int halo; // columns left of a block's, likewise
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
  static constexpr bool kWide =
      kLanes == 8 || (kKernel == 3 && (kLanes > 1 || sizeof(scalar_t) == 8));
  // Pixels that are stored together: where a row's elements alternate between a cell's left and
  // right pixels, both.
  static constexpr int kGroup = kKernel == 2 && kAlong > 1 ? 2 : 1;
};

// Where a cell's pixels and windows are: the offset of the first lane; -1 where there is none, or it
// is another thread's to write.
template <typename T>
struct Cell {
  int64_t pixel[T::kPixels]; // row by row
  int64_t window[T::kOwn];

  __device__ bool has_pixel(int p) const {
    return pixel[p] >= 0;
  }
  __device__ bool has_window(int w) const {
    return window[w] >= 0;
  }
  __device__ int64_t pixel_offset(int p) const {
    return pixel[p];
  }
  __device__ int64_t window_offset(int w) const {
    return window[w];
  }
};

// A 3x3 pool's cell, and the window that begins with it. Where a window's row or column is outside of
// the map, it stands for the nearest inside: so all may be loaded.
template <typename T>
struct StripCell {
  int64_t row[3]; // of the window: the offset of its second column's pixel
  int column[3]; // from there to its other columns'
  bool has_row[3], has_column[3]; // of the window: whether they are in the map
  bool mine; // whether the cell is this thread's to write
  int64_t window; // offset of the cell's window, or of the nearest
  bool window_exists;
  int left_window; // from there to the offset of the one to the left
  int left_thread; // whose cell that is; -1: there is none

  __device__ bool has_window(int) const {
    return mine & window_exists;
  }
  __device__ int64_t pixel_offset(int p) const {
    return row[p / 2] + column[p % 2];
  }
  __device__ int64_t window_offset(int) const {
    return window;
  }
  __device__ bool has_pixel(int p) const {
    return mine & has_row[p / 2] & has_column[p % 2];
  }
};

// Keeps what is computed once in a register: the compiler would compute it again at each use.
__device__ inline void in_register(int& x) {
  asm("" : "+r"(x));
}

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
    begin_ = chunk * c.chunk;
    index_ = begin_ + threadIdx.x / unsigned(c.across) - c.halo;
    end_ = (chunk + 1) * c.chunk < c.count ? (chunk + 1) * c.chunk : c.count;
    if (T::kKernel != 3 && channel >= s.channels) end_ = index_;
    b_ = index_ / c.columns;
    j_ = index_ - b_ * c.columns;
    if (j_ < 0) { // a halo before the first
      j_ += c.columns;
      --b_;
    }
    i_ = b_ % c.rows;
    b_ /= c.rows;
  }

  // f(cell), for each of the thread's. 3x3: as often for every thread of a block, so that f may hold a
  // barrier. kAtOnce: cells in a turn of the loop; with two, none of what f keeps for the next cell is
  // copied between registers.
  template <int kAtOnce = 1, typename F>
  __device__ void for_each_cell(const F& f) {
    if constexpr (T::kKernel < 3) {
      while (has_cells()) f(next());
    } else {
      for (int64_t first = begin_; first < end_; first += cells.step) {
        walk_strip<kAtOnce>(f);
        advance();
      }
    }
  }

  __device__ bool has_cells() const {
    return index_ < end_;
  }

  __device__ Cell<T> next() {
    static_assert(T::kKernel < 3);
    Cell<T> cell;
    if constexpr (T::kKernel == 1) {
#pragma unroll
      for (int p = 0; p < T::kPixels; ++p) {
        cell.pixel[p] = cell.window[p] = has_cells() ? pixel(b_, i_, j_ * T::kAlong) : -1;
        advance();
      }
    } else {
      const int64_t column = j_ * T::kAlong;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int64_t i = 2 * i_ + p / 2, j = 2 * column + p % 2;
        cell.pixel[p] = i < shape.height && j < shape.width ? pixel(b_, i, j) : -1;
      }
      cell.window[0] =
          i_ < shape.out_height && column < shape.out_width ? window(b_, i_, column) : -1;
      advance();
    }
    return cell;
  }

 private:
  __device__ int64_t pixel(int64_t b, int64_t row, int64_t column) const {
    return offset(shape.height, shape.width, b, row, column);
  }
  __device__ int64_t window(int64_t b, int64_t row, int64_t column) const {
    return offset(shape.out_height, shape.out_width, b, row, column);
  }
  __device__ int64_t offset(int64_t h, int64_t w, int64_t b, int64_t i, int64_t j) const {
    return b * h * w * shape.channels + channel * (shape.channels_last ? 1 : h * w) +
           (i * w + j) * shape.pixel_stride();
  }

  // From the row `lead` above the strip to its last.
  template <int kAtOnce, typename F>
  __device__ void walk_strip(const F& f) const {
    const bool there = channel < shape.channels && index_ >= 0 && index_ < cells.count;
    const bool mine = there && index_ >= begin_ && index_ < end_ &&
                      threadIdx.x >= unsigned(cells.halo * cells.across);
    // A thread without a strip walks down the first.
    const int64_t b = there ? b_ : 0, c = there ? channel : 0;
    const int strip = there ? int(i_) * int(cells.strip) : 0, j = there ? int(j_) : 0;
    const int height = int(shape.height), width = int(shape.width), padding = shape.pool.padding;
    const int out_height = int(shape.out_height), out_width = int(shape.out_width);
    // A row's elements fit into an int.
    int right = int(shape.pixel_stride()), down = width * right, out_down = out_width * right;
    in_register(down);
    in_register(out_down);
    const int64_t plane = shape.channels_last ? c : 0;
    const int64_t u = (b * shape.channels + (c - plane)) * height * width + plane;
    const int64_t y = (b * shape.channels + (c - plane)) * out_height * out_width + plane;

    StripCell<T> cell;
    const auto nearest = [](int at, int size) { return at < 0 ? 0 : at < size ? at : size - 1; };
    const int left = 2 * j - padding, second = nearest(left + 1, width);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      cell.has_column[k] = left + k >= 0 && left + k < width;
      cell.column[k] = (nearest(left + k, width) - second) * right;
    }
    in_register(cell.column[0]);
    in_register(cell.column[2]);
    const int own = nearest(j, out_width);
    cell.left_window = (nearest(j - 1, out_width) - own) * right;
    in_register(cell.left_window);
    cell.left_thread = there && j > 0 ? int(threadIdx.x) - cells.across : -1;
    in_register(cell.left_thread);
    int i = strip - cells.lead, top = 2 * i - padding; // the window's first row
    cell.row[2] = u + int64_t(nearest(top, height)) * down + second * right;
    cell.has_row[2] = unsigned(top) < unsigned(height);
    cell.window = y + int64_t(nearest(i - 1, out_height)) * out_down + own * right;
    const auto step = [&] {
      cell.row[0] = cell.row[2];
      cell.has_row[0] = cell.has_row[2];
#pragma unroll
      for (int a = 1; a < 3; ++a) {
        cell.has_row[a] = unsigned(top + a) < unsigned(height);
        const bool next = unsigned(top + a - 1) < unsigned(height - 1); // else the same one
        cell.row[a] = cell.row[a - 1] + (next ? unsigned(down) : 0u);
      }
      cell.window += unsigned(i - 1) < unsigned(out_height - 1) ? unsigned(out_down) : 0u;
      cell.mine = mine && i >= strip;
      cell.window_exists = there && unsigned(i) < unsigned(out_height) && j < out_width;
      f(cell);
      ++i;
      top += 2;
    };
#pragma unroll 1
    while (i < strip + int(cells.strip)) {
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) step();
    }
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

  int64_t begin_, index_, end_, b_, i_, j_;
};

} // namespace fastjac::norm_act_pool
