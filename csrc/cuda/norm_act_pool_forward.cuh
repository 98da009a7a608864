// norm_act_pool on CUDA, the forward: y = pool(act((u - mean) scale + bias + residual)).
//
// A thread works on the window that its cell owns, or on the cell's pixels where there is no pool.
// Must move u (and residual) in and y out, once. 80 registers, or 128 where a thread has eight
// channels or overlapping windows: no spills, and loads enough in flight.
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool.cuh"
#include "norm_act_pool_strips.cuh"

namespace fastjac::norm_act_pool {

template <typename T>
__global__ void __launch_bounds__(kThreads, T::kWide ? 4 : 6) normalise_activate_pool(
    Inputs<typename T::scalar_t> x,
    typename T::scalar_t* __restrict__ y, // [B, C, h, w]
    Shape shape,
    Cells cells
) {
  Worker<T> worker(shape, cells);
  const Norm<T> norm(x, worker);
  Windowing<T> windows(x, norm, worker);
  worker.for_each_cell([&](const auto& cell) {
    windows.load(cell);
    windows.choose(cell);
    with_activation(x.activation, [&](auto kind) {
#pragma unroll
      for (int w = 0; w < T::kOwn; ++w) {
        if (!cell.has_window(w)) continue;
        Vector<typename T::scalar_t, T::kLanes> out;
#pragma unroll
        for (int k = 0; k < T::kLanes; ++k) {
          assign(out.x[k], value<typename T::acc_t>(kind.value, x.slope, windows.choice[w].z[k]));
        }
        store_vector<T::kLanes>(y + cell.window_offset(w), out);
      }
    });
    windows.leave();
  });
}

constexpr int kForwardLanes = 8;

template <typename scalar_t>
Plan plan_forward(const Shape& shape, const Inputs<scalar_t>& x, const scalar_t* y) {
  return make_plan<scalar_t, kForwardLanes>(shape, true, {x.u, x.residual, y});
}

template <typename scalar_t, typename Launch>
void forward(const Launch& launch, const Plan& plan, const Inputs<scalar_t>& x, scalar_t* y) {
  with_traits<scalar_t, kForwardLanes>(plan, [&](auto traits) {
    using T = decltype(traits);
    launch(plan.unsummed_blocks(), normalise_activate_pool<T>, x, y, plan.shape, plan.unsummed);
  });
}

} // namespace fastjac::norm_act_pool
