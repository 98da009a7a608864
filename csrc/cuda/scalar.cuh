// Elements in memory and in arithmetic: stored as scalar_t, computed with as acc_t.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastjac {

template <typename scalar_t>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename scalar_t>
using accumulator_t = typename AccumulatorOf<scalar_t>::type;

__device__ inline double to_acc(double x) {
  return x;
}
__device__ inline float to_acc(float x) {
  return x;
}
__device__ inline float to_acc(__half x) {
  return __half2float(x);
}
__device__ inline float to_acc(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline void assign(double& out, double x) {
  out = x;
}
__device__ inline void assign(float& out, float x) {
  out = x;
}
__device__ inline void assign(__half& out, float x) {
  out = __float2half_rn(x);
}
__device__ inline void assign(__nv_bfloat16& out, float x) {
  out = __float2bfloat16_rn(x);
}

// One access of kLanes elements.
template <typename scalar_t, int kLanes>
struct alignas(sizeof(scalar_t) * kLanes) Vector {
  scalar_t x[kLanes];
};

// An element, to compute with. Of two bfloat16 in a word, one instruction for either.
template <typename scalar_t, int kLanes>
__device__ inline accumulator_t<scalar_t> element(const Vector<scalar_t, kLanes>& x, int lane) {
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16> && kLanes % 2 == 0) {
    unsigned words[kLanes / 2];
    memcpy(words, &x, sizeof(words));
    const unsigned word = words[lane / 2];
    return __uint_as_float(lane % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return to_acc(x.x[lane]);
  }
}

template <int kLanes, typename scalar_t>
__device__ inline Vector<scalar_t, kLanes> load_vector(const scalar_t* address) {
  return *reinterpret_cast<const Vector<scalar_t, kLanes>*>(address);
}
template <int kLanes, typename scalar_t>
__device__ inline void store_vector(scalar_t* address, const Vector<scalar_t, kLanes>& x) {
  *reinterpret_cast<Vector<scalar_t, kLanes>*>(address) = x;
}

} // namespace fastjac
