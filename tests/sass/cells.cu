// The 3x3 pool's kernels as a ResNet's stem uses them: with ReLU and no residual, and the compiler sees
// it, so that a kernel's loop holds what such a cell takes. test_cells.py counts its instructions.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The kernels become functions, for the kernels below.
#undef __global__
#undef __launch_bounds__
#define __global__ __device__
#define __launch_bounds__(...)
#include "../../csrc/cuda/norm_act_pool_backward.cuh"
#include "../../csrc/cuda/norm_act_pool_forward.cuh"
#include "../../csrc/cuda/norm_act_pool_pushforward.cuh"

namespace fastjac::norm_act_pool {

#define KERNEL __attribute__((global)) void

template <typename scalar_t>
__device__ Inputs<scalar_t> stem(Inputs<scalar_t> x) {
  x.activation = Activation::kRelu;
  x.residual = nullptr;
  return x;
}

template <typename T, typename S = typename T::scalar_t>
KERNEL cells_of_forward(Inputs<S> x, S* __restrict__ y, Shape shape, Cells cells) {
  normalise_activate_pool<T>(stem(x), y, shape, cells);
}

template <typename T, typename S = typename T::scalar_t>
KERNEL cells_of_backward_sums(
    Inputs<S> x, const S* __restrict__ gy, float* __restrict__ partial, Shape shape, Cells cells
) {
  reduce<T, false>(stem(x), gy, nullptr, partial, shape, cells);
}

template <typename T, typename S = typename T::scalar_t>
KERNEL cells_of_backward(
    Inputs<S> x,
    const S* __restrict__ gy,
    const S* __restrict__ curvature,
    const Sums<float>* __restrict__ sums,
    double count,
    S* __restrict__ gu,
    Shape shape,
    Cells cells
) {
  write_backward<T>(stem(x), gy, curvature, nullptr, sums, true, count, gu, nullptr, shape, cells);
}

template <typename T, typename S = typename T::scalar_t>
KERNEL cells_of_pushforward_sums(
    Inputs<S> x,
    const S* __restrict__ gy,
    const S* __restrict__ tu,
    float* __restrict__ partial,
    Shape shape,
    Cells cells
) {
  reduce<T, true>(stem(x), gy, tu, partial, shape, cells);
}

template <typename T, typename S = typename T::scalar_t>
KERNEL cells_of_pushforward(
    Inputs<S> x,
    const S* __restrict__ tu,
    const S* __restrict__ gy,
    const Sums<float>* __restrict__ sums,
    double count,
    S* __restrict__ ty,
    S* __restrict__ kappa,
    Shape shape,
    Cells cells
) {
  push<T, true>(stem(x), {tu, nullptr, gy}, sums, count, ty, kappa, nullptr, shape, cells);
}

template <typename T, typename S = typename T::scalar_t>
KERNEL cells_of_fixed_pushforward(
    Inputs<S> x,
    const S* __restrict__ tu,
    const S* __restrict__ gy,
    double count,
    S* __restrict__ ty,
    float* __restrict__ partial,
    Shape shape,
    Cells cells
) {
  push<T, false>(stem(x), {tu, nullptr, gy}, nullptr, count, ty, nullptr, partial, shape, cells);
}

template <typename T>
void instantiate() {
  static const void* volatile kernels[] = {
      (const void*)cells_of_forward<T>,     (const void*)cells_of_backward_sums<T>,
      (const void*)cells_of_backward<T>,    (const void*)cells_of_pushforward_sums<T>,
      (const void*)cells_of_pushforward<T>, (const void*)cells_of_fixed_pushforward<T>,
  };
  (void)kernels[0];
}
template void instantiate<Traits<__nv_bfloat16, 4, 3, true>>();
template void instantiate<Traits<__half, 4, 3, true>>();

} // namespace fastjac::norm_act_pool
