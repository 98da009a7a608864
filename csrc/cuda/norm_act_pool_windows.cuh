// norm_act_pool on CUDA: what the pool's windows choose, and what a cotangent of theirs gives to each
// pixel. Found from u each time: a 2x2 window has 4 pixels and is its cell's alone; a 3x3 one has 9,
// and a cell's 2x2 pixels are in up to four of them, whose pixels come from the L1 cache.
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool.cuh"

namespace fastjac::norm_act_pool {

// f(key), key(z) ordering a window as act(z) does. Where ReLU and ReLU6 are flat, what is chosen has
// neither a cotangent nor a tangent, and the same value: there z itself serves.
template <typename acc_t, typename F>
__device__ inline void with_order(Activation kind, acc_t slope, const F& f) {
  if (kind == Activation::kSilu) {
    f([=](acc_t z) { return value(Activation::kSilu, slope, z); });
  } else {
    const acc_t below = kind == Activation::kLeakyRelu ? slope : acc_t(1);
    f([=](acc_t z) { return z > 0 ? z : z * below; });
  }
}

// What a window chose: which of its pixels, row by row, and that one's z and d.
template <typename T>
struct Choice {
  using acc_t = typename T::acc_t;
  acc_t z[T::kLanes], d[T::kLanes];
  int tap[T::kLanes];
};

// Windows, from their pixels one by one: keeps the largest key; of equal ones the first; of NaNs the
// last, before any number.
template <typename T>
struct Chooser {
  using acc_t = typename T::acc_t;
  acc_t key[T::kLanes];
  Choice<T> best;

  __device__ void offer(bool first, int tap, int k, acc_t a, acc_t z, acc_t d) {
    if (first || a > key[k] || a != a) {
      key[k] = a;
      best.z[k] = z;
      best.d[k] = d;
      best.tap[k] = tap;
    }
  }
};

// The choice of a 3x3 window, whose first pixel is at (top, left), or in the padding.
template <typename T, typename Key>
__device__ inline Choice<T> choose_of_nine(
    const Inputs<typename T::scalar_t>& x,
    const Norm<T>& norm,
    const Worker<T>& worker,
    int64_t batch,
    int64_t top,
    int64_t left,
    const Key& key
) {
  using acc_t = typename T::acc_t;
  Chooser<T> chooser{};
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    Vector<typename T::scalar_t, T::kLanes> u[3]{};
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      if (!worker.inside(top + a, left + b)) continue;
      u[b] = load_vector<T::kLanes>(x.u + worker.pixel(batch, top + a, left + b));
    }
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      if (!worker.inside(top + a, left + b)) continue;
      Vector<typename T::scalar_t, T::kLanes> residual{};
      if (x.residual != nullptr) {
        residual = load_vector<T::kLanes>(x.residual + worker.pixel(batch, top + a, left + b));
      }
      const bool first = a == (top < 0) && b == (left < 0);
#pragma unroll
      for (int k = 0; k < T::kLanes; ++k) {
        const acc_t d = norm.d(to_acc(u[b].x[k]), k), z = norm.z(d, to_acc(residual.x[k]), k);
        chooser.offer(first, 3 * a + b, k, key(z), z, d);
      }
    }
  }
  return chooser.best;
}

// The choices of the windows that the cell owns; u and residual: the cell's pixels (not used for
// 3x3, whose windows reach further).
template <typename T>
__device__ inline void choose(
    const Inputs<typename T::scalar_t>& x,
    const Norm<T>& norm,
    const Worker<T>& worker,
    const Cell<T>& cell,
    const Pixels<T>& u,
    const Pixels<T>& residual,
    Choice<T> (&choice)[T::kOwn]
) {
  using acc_t = typename T::acc_t;
  if constexpr (T::kKernel == 1) {
#pragma unroll
    for (int p = 0; p < T::kPixels; ++p) {
#pragma unroll
      for (int k = 0; k < T::kLanes; ++k) {
        choice[p].d[k] = norm.d(u(p, k), k);
        choice[p].z[k] = norm.z(choice[p].d[k], residual(p, k), k);
        choice[p].tap[k] = 0;
      }
    }
  } else {
    with_order(x.activation, x.slope, [&](const auto& key) {
      if constexpr (T::kKernel == 2) {
        Chooser<T> chooser{};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int k = 0; k < T::kLanes; ++k) {
            const acc_t d = norm.d(u(p, k), k), z = norm.z(d, residual(p, k), k);
            chooser.offer(p == 0, p, k, key(z), z, d);
          }
        }
        choice[0] = chooser.best;
      } else {
        const int64_t top = cell.row - 1, left = cell.column - 1;
        choice[0] = choose_of_nine(x, norm, worker, cell.batch, top, left, key);
      }
    });
  }
}

// The pixels of a map that the cell's own windows chose. v: the map's pixels of the cell (not used
// for 3x3).
template <typename T>
__device__ inline Windows<T> chosen(
    const typename T::scalar_t* __restrict__ map,
    const Worker<T>& worker,
    const Cell<T>& cell,
    const Pixels<T>& v,
    const Choice<T> (&choice)[T::kOwn]
) {
  Windows<T> out{};
  if constexpr (T::kKernel == 1) {
#pragma unroll
    for (int p = 0; p < T::kPixels; ++p) out.x[p] = v.x[p];
  } else {
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) {
      const int tap = choice[0].tap[k];
      if constexpr (T::kKernel == 2) {
        out.x[0].x[k] = v.x[0].x[k];
#pragma unroll
        for (int p = 1; p < 4; ++p) {
          if (tap == p) out.x[0].x[k] = v.x[p].x[k];
        }
      } else if (map != nullptr && cell.window[0] >= 0) {
        const int64_t row = cell.row - 1 + tap / 3, column = cell.column - 1 + tap % 3;
        out.x[0].x[k] = map[worker.pixel(cell.batch, row, column) + k];
      }
    }
  }
  return out;
}

// The cotangent of a, at the cell's pixels.
template <typename T>
struct Unpooled {
  using acc_t = typename T::acc_t;
  Windows<T> gy;
  int tap[T::kLanes]; // 2x2
  acc_t sum[T::kKernel == 3 ? 4 : 1][T::kLanes]; // 3x3

  __device__ acc_t operator()(int p, int lane) const {
    if constexpr (T::kKernel == 1) {
      return gy(p, lane);
    } else if constexpr (T::kKernel == 2) {
      return tap[lane] == p ? gy(0, lane) : acc_t(0);
    } else {
      return sum[p][lane];
    }
  }
};

template <typename T>
__device__ inline Unpooled<T> unpool(
    const typename T::scalar_t* __restrict__ gy,
    const Inputs<typename T::scalar_t>& x,
    const Norm<T>& norm,
    const Worker<T>& worker,
    const Cell<T>& cell,
    const Pixels<T>& u
) {
  Unpooled<T> out{};
  if constexpr (T::kKernel < 3) out.gy = load_windows(gy, cell);
  if constexpr (T::kKernel == 2) {
    Choice<T> choice[1];
    choose(x, norm, worker, cell, u, load_pixels(x.residual, cell), choice);
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) out.tap[k] = choice[0].tap[k];
  } else if constexpr (T::kKernel == 3) {
    with_order(x.activation, x.slope, [&](const auto& key) {
#pragma unroll 1
      for (int w = 0; w < 4; ++w) { // those that hold a pixel of the cell
        const int64_t window = worker.window(cell, w);
        if (window < 0) continue;
        const int down = 2 * (w / 2), right = 2 * (w % 2);
        const auto cotangent = load_vector<T::kLanes>(gy + window);
        const Choice<T> choice = choose_of_nine(
            x, norm, worker, cell.batch, cell.row - 1 + down, cell.column - 1 + right, key
        );
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          // Where in the window the pixel is, if in it.
          const int a = 1 + p / 2 - down, b = 1 + p % 2 - right;
          const int tap = a < 0 || b < 0 ? -1 : 3 * a + b;
#pragma unroll
          for (int k = 0; k < T::kLanes; ++k) {
            if (choice.tap[k] == tap) out.sum[p][k] += to_acc(cotangent.x[k]);
          }
        }
      }
    });
  }
  return out;
}

} // namespace fastjac::norm_act_pool
