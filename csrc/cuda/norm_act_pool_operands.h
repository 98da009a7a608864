// From the tensors of norm_act_pool's operators to what its kernels take. For code that is bound to
// PyTorch; device code does not include it.
#pragma once

#include <limits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../common/norm_act_pool_host.h"
#include "norm_act_pool.cuh"
#include "stream.h"

namespace fastjac::norm_act_pool {

// The operators' arguments that all of them have, checked.
struct Arguments {
  const Tensor& u;
  const MaybeTensor &residual, &weight, &bias;
  const Tensor &mean, &invstd;
  Activation activation;
  double slope;

  void check(const char* op, const Geometry& g) const {
    check_map(op, "residual", residual, u, g);
    check_channels(op, "weight", weight, u);
    check_channels(op, "bias", bias, u);
    check_channels(op, "mean", mean, u);
    check_channels(op, "invstd", invstd, u);
  }
};

inline void check_grid(const char* op, const Geometry& g) {
  STD_TORCH_CHECK(
      g.channels <= std::numeric_limits<int32_t>::max(), op, ": u must have at most ",
      std::numeric_limits<int32_t>::max(), " channels on CUDA, got ", g.channels
  );
  if (g.pool.kernel < 3) return;
  // Within a window, places are bytes in 32 bits.
  constexpr int64_t most = int64_t{1} << 27;
  const int64_t row = g.width * (g.channels_last ? g.channels : 1);
  STD_TORCH_CHECK(
      g.height <= most && row <= most, op, ": for a 3x3 pool on CUDA, u must have at most ", most,
      " rows, of as many elements each, got ", g.height, " of ", row,
      "; crop it, or pool it in parts"
  );
}

inline Shape shape(const Geometry& g) {
  return {g.batch,      g.channels,  g.height, g.width,
          g.out_height, g.out_width, g.pool,   g.channels_last};
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
const T* data(const MaybeTensor& x) {
  return x ? data<T>(*x) : nullptr;
}
template <typename T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
// Null for a result that is not wanted.
template <typename T>
T* output(const Tensor& x, bool wanted) {
  return wanted ? output<T>(x) : nullptr;
}

template <typename scalar_t>
Inputs<scalar_t> inputs(const Arguments& a) {
  using acc_t = accumulator_t<scalar_t>;
  return {data<scalar_t>(a.u), data<scalar_t>(a.residual), data<acc_t>(a.weight),
          data<acc_t>(a.bias), data<acc_t>(a.mean),        data<acc_t>(a.invstd),
          a.activation,        static_cast<acc_t>(a.slope)};
}

// [count] of the accumulator dtype, on u's device.
inline Tensor scratch(const Tensor& u, int64_t count) {
  return empty_vector(u, accumulator(u.scalar_type()), count);
}

// f(an element of u's type)
template <typename F>
void with_dtype(const Tensor& u, const F& f) {
  switch (u.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    default:
      return f(__half());
  }
}

} // namespace fastjac::norm_act_pool
