// norm_act_pool on CUDA: what the pool's windows choose, and what their cotangents give to each pixel.
// Found from u each time. Here: no pool, and 2x2 windows, each of which is its cell's alone. 3x3
// windows overlap: norm_act_pool_strips.cuh.
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
  } else if (kind == Activation::kLeakyRelu) {
    f([=](acc_t z) { return z > 0 ? z : z * slope; });
  } else {
    f([](acc_t z) { return z; });
  }
}

// Whether a window prefers a candidate to the best of those before it: the largest; of equal ones the
// first; of NaNs the last, before any number. Chosen so, a row at a time and then of the rows, a
// window's pixel is the same as one by one.
template <typename acc_t>
__device__ inline bool preferred(acc_t candidate, acc_t best) {
  return (candidate > best) | (candidate != candidate);
}

// What a window chose: which of its pixels, row by row, and that one's z and d.
template <typename T>
struct Choice {
  using acc_t = typename T::acc_t;
  acc_t z[T::kLanes], d[T::kLanes];
  int tap[T::kLanes];
};

// A thread's windows and pixels, cell by cell: load(), then choose() where it is of use, then
// load_cotangents() and unpool().
template <typename T, bool kOverlap = T::kKernel == 3>
class Windowing {
 public:
  using scalar_t = typename T::scalar_t;
  using acc_t = typename T::acc_t;

  Choice<T> choice[T::kOwn]; // of the windows that the cell owns

  __device__ Windowing(const Inputs<scalar_t>& x, const Norm<T>& norm, const Worker<T>&)
      : x_(x), norm_(norm) {}

  __device__ void load(const Cell<T>& cell) {
    u_ = pixels(x_.u, cell);
  }

  __device__ void choose(const Cell<T>& cell) {
    const Pixels<T> residual = load_pixels(x_.residual, cell);
    if constexpr (T::kKernel == 1) {
#pragma unroll
      for (int p = 0; p < T::kPixels; ++p) {
#pragma unroll
        for (int k = 0; k < T::kLanes; ++k) {
          choice[p].d[k] = d(p, k);
          choice[p].z[k] = z(p, k, residual(p, k));
          choice[p].tap[k] = 0;
        }
      }
    } else {
      with_order(x_.activation, x_.slope, [&](const auto& key) {
        acc_t best[T::kLanes];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int k = 0; k < T::kLanes; ++k) {
            const acc_t pixel_z = z(p, k, residual(p, k)), a = key(pixel_z);
            if (p > 0 && !preferred(a, best[k])) continue;
            best[k] = a;
            choice[0].z[k] = pixel_z;
            choice[0].d[k] = d(p, k);
            choice[0].tap[k] = p;
          }
        }
      });
    }
  }

  // The cell's pixels of a map like u.
  __device__ Pixels<T> pixels(const scalar_t* __restrict__ map, const Cell<T>& cell) const {
    return load_pixels(map, cell);
  }

  // The pixels of a map that the cell's own windows chose; v: the map's pixels of the cell.
  __device__ Windows<T> chosen(
      const scalar_t* __restrict__, const Cell<T>&, const Pixels<T>& v
  ) const {
    Windows<T> out{};
    if constexpr (T::kKernel == 1) {
#pragma unroll
      for (int p = 0; p < T::kPixels; ++p) out.x[p] = v.x[p];
    } else {
#pragma unroll
      for (int k = 0; k < T::kLanes; ++k) {
        out.x[0].x[k] = v.x[0].x[k];
#pragma unroll
        for (int p = 1; p < 4; ++p) {
          if (choice[0].tap[k] == p) out.x[0].x[k] = v.x[p].x[k];
        }
      }
    }
    return out;
  }

  __device__ void load_cotangents(const scalar_t* __restrict__ gy, const Cell<T>& cell) {
    gy_ = load_windows<T>(gy, cell);
  }
  __device__ void unpool(const Cell<T>&) {}

  // Of pixel p: the cotangent of a; d; and z, `residual` being the map's group from `first` on.
  __device__ acc_t unpooled(int p, int lane) const {
    if constexpr (T::kKernel == 1) return gy_(p, lane);
    return choice[0].tap[lane] == p ? gy_(0, lane) : acc_t(0);
  }
  __device__ acc_t d(int p, int lane) const {
    return norm_.d(u_(p, lane), lane);
  }
  __device__ Values<T, T::kGroup> residual(const Cell<T>& cell, int first) const {
    return group(x_.residual, cell, first);
  }
  __device__ Values<T, T::kGroup> group(
      const scalar_t* __restrict__ map, const Cell<T>& cell, int first
  ) const {
    return load_pixels<T, T::kGroup>(map, cell, first);
  }
  __device__ acc_t z(int p, int lane, acc_t residual) const {
    return norm_.z(d(p, lane), lane) + residual;
  }
  __device__ void leave() {}

 private:
  const Inputs<scalar_t>& x_;
  const Norm<T>& norm_;
  Pixels<T> u_;
  Windows<T> gy_;
};

} // namespace fastjac::norm_act_pool
