// norm_act_pool on CUDA: 3x3 windows, two pixels apart, which overlap.
//
// A thread goes down a strip of cells, one window below the other. The last row of a window is the
// first of the next: its choice is kept, so that a window costs the six pixels of its other rows, and
// z of each is computed once. A window chooses from each row, and then from the rows' choices.
//
// A pixel gets what four windows at most give. Those in the thread's own column it has chosen itself;
// those to the left are its neighbour's in the block, which hands over its choices through shared
// memory, a byte each. What the last row gets is kept until the next window's part is known.
//
// The rows above a strip are computed again, without being written, to have what is kept; so is a
// block's first column, for its neighbours alone. Threads go in step: a barrier for each row of cells.
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool_windows.cuh"

namespace fastjac::norm_act_pool {

template <typename T>
class Windowing<T, true> {
 public:
  using scalar_t = typename T::scalar_t;
  using acc_t = typename T::acc_t;

  Choice<T> choice[1];

  __device__ Windowing(const Inputs<scalar_t>& x, const Norm<T>& norm, const Worker<T>& worker)
      : x_(x), norm_(norm), worker_(worker) {}

  // The window's other rows.
  __device__ void load(const StripCell<T>& cell) {
    const auto load_rows = [&](const scalar_t* __restrict__ map, Pixel(&out)[2][3]) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int b = 0; b < 3; ++b) {
          out[a][b] = load_vector<T::kLanes>(map + cell.row[a + 1] + cell.column[b]);
        }
      }
    };
    const auto normalise = [&](const auto& residual) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int b = 0; b < 3; ++b) {
#pragma unroll
          for (int k = 0; k < T::kLanes; ++k) {
            Row& row = rows_[a + 1];
            row.d[b][k] = norm_.d(element(u_[a][b], k), k);
            row.z[b][k] = residual(norm_.z(row.d[b][k], k), a, b, k);
          }
        }
      }
    };
    load_rows(x_.u, u_);
    if (x_.residual == nullptr) {
      normalise([](acc_t z, int, int, int) { return z; });
    } else {
      Pixel residual[2][3];
      load_rows(x_.residual, residual);
      normalise([&](acc_t z, int a, int b, int k) { return z + element(residual[a][b], k); });
    }
  }

  __device__ void choose(const StripCell<T>& cell) {
    const auto &has_row = cell.has_row, &has_column = cell.has_column;
    with_order(x_.activation, x_.slope, [&](const auto& key) {
#pragma unroll
      for (int k = 0; k < T::kLanes; ++k) {
#pragma unroll
        for (int a = 1; a < 3; ++a) {
          Row& row = rows_[a];
          Best& best = row.best[k];
          const acc_t first = key(row.z[0][k]), second = key(row.z[1][k]), third = key(row.z[2][k]);
          const int tap = a == 1 ? 3 : 0;
          best = {first, row.z[0][k], row.d[0][k], tap};
          best.offer(!has_column[0], true, {second, row.z[1][k], row.d[1][k], tap + 1});
          best.offer(false, has_column[2], {third, row.z[2][k], row.d[2][k], tap + 2});
        }
        Best best = rows_[0].best[k], last = rows_[2].best[k];
        best.key = key(best.z);
        last.tap += 6;
        best.offer(!has_row[0], true, rows_[1].best[k]);
        best.offer(false, has_row[2], last);
        choice[0].z[k] = best.z;
        choice[0].d[k] = best.d;
        choice[0].tap[k] = best.tap;
      }
    });
  }

  // The cell's pixels of a map like u, or the nearest.
  __device__ Pixels<T> pixels(const scalar_t* __restrict__ map, const StripCell<T>& cell) const {
    Pixels<T> v;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      v.x[p] = load_vector<T::kLanes>(map + cell.pixel_offset(p));
    }
    return v;
  }

  // The pixels of a map that the cell's window chose.
  __device__ Windows<T> chosen(
      const scalar_t* __restrict__ map, const StripCell<T>& cell, const Pixels<T>&
  ) const {
    Windows<T> out{};
    if (map == nullptr || !cell.has_window(0)) return out;
    // In bytes, which for a row fit into an int.
    constexpr int kSize = sizeof(scalar_t);
    const int right = int(worker_.shape.pixel_stride()) * kSize;
    const int down = int(worker_.shape.width) * right;
    const char* __restrict__ center = reinterpret_cast<const char*>(map + cell.row[1]);
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) {
      const int tap = choice[0].tap[k], row = tap * 11 >> 5, column = tap - 3 * row;
      const int place = row * down + (column * right + (k * kSize - down - right));
      out.x[0].x[k] = *reinterpret_cast<const scalar_t*>(center + place);
    }
    return out;
  }

  __device__ void load_cotangents(const scalar_t* __restrict__ gy, const StripCell<T>& cell) {
    gy_ = load_vector<T::kLanes>(gy + cell.window);
    left_gy_ = load_vector<T::kLanes>(gy + cell.window + cell.left_window);
  }

  __device__ void unpool(const StripCell<T>& cell) {
    static_assert(T::kLanes <= 4, "a byte each");
    __shared__ unsigned taps[2][kThreads]; // of one row of cells and of the next, in turn
    unsigned mine = 0; // no tap where there is no window
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) mine |= unsigned(choice[0].tap[k]) << (8 * k);
    taps[turn_][threadIdx.x] = cell.window_exists ? mine : ~0u;
    __syncthreads();
    const unsigned left = cell.left_thread < 0 ? ~0u : taps[turn_][cell.left_thread];
    turn_ ^= 1;
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) {
      const int tap = choice[0].tap[k];
      const unsigned left_tap = left & 0xffu << (8 * k);
      const acc_t g = element(gy_, k), left_g = element(left_gy_, k);
#pragma unroll
      for (int a = 0; a < 3; ++a) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          acc_t& sum = rows_[a].sum[b][k];
          const bool mine = cell.window_exists & (tap == 3 * a + b);
          if (a > 0) {
            sum = mine ? g : acc_t(0);
          } else if (mine) {
            sum += g;
          }
          if (b == 0 && left_tap == (3 * a + 2u) << (8 * k)) sum += left_g;
        }
      }
    }
  }

  __device__ acc_t unpooled(int p, int lane) const {
    return rows_[p / 2].sum[p % 2][lane];
  }
  __device__ acc_t d(int p, int lane) const {
    return rows_[p / 2].d[p % 2][lane];
  }
  __device__ Values<T, 1> residual(const StripCell<T>&, int) const { // in z already
    return {};
  }
  __device__ Values<T, 1> group(
      const scalar_t* __restrict__ map, const StripCell<T>& cell, int p
  ) const {
    return {load_or_zero<T>(map, map == nullptr ? -1 : cell.pixel_offset(p))};
  }
  __device__ acc_t z(int p, int lane, acc_t) const {
    return rows_[p / 2].z[p % 2][lane];
  }

  // To the next cell of the strip.
  __device__ void leave() {
    rows_[0] = rows_[2];
  }

 private:
  using Pixel = Vector<scalar_t, T::kLanes>;

  // What a row of three pixels, or a window, chose.
  struct Best {
    acc_t key, z, d;
    int tap;

    // As preferred(), without a branch. first: nothing was before. Where x is not there it stands
    // for what was before, and so is better only as a NaN.
    __device__ void offer(bool first, bool there, const Best& x) {
      const bool better = ((x.key > key) | first) | ((x.key != x.key) & there);
      key = better ? x.key : key;
      z = better ? x.z : z;
      d = better ? x.d : d;
      tap = better ? x.tap : tap;
    }
  };
  struct Row {
    acc_t z[3][T::kLanes], d[3][T::kLanes];
    Best best[T::kLanes];
    acc_t sum[2][T::kLanes]; // what its first two pixels, the cell's, get
  };

  const Inputs<scalar_t>& x_;
  const Norm<T>& norm_;
  const Worker<T>& worker_;
  Row rows_[3]{};
  Pixel u_[2][3], gy_, left_gy_;
  int turn_ = 0;
};

} // namespace fastjac::norm_act_pool
