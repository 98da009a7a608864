// norm_act_pool on CUDA, the backward. With g = act'(z) unpool(gy):
//
//   reduce         gy, u -> the sums of g and g d, per channel and chunk
//   combine        -> the sums per channel, weight's and bias's cotangents
//   write_backward gy, u, the sums -> gu = of_g g + of_d d + constant + curvature, residual's g
//
// The sums need the windows' choices alone: each adds gy at its own choice. write_backward gathers.
// Must move u and gy in twice, gu out once, and residual, its cotangent and the curvature where there
// are any. Without sums, u and gy once. 128 registers, or 168 where a thread has eight channels or
// overlapping windows, or 255 where those are of 32 or 64 bits: no spills.
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool.cuh"
#include "norm_act_pool_strips.cuh"
#include "norm_act_pool_sums.cuh"

namespace fastjac::norm_act_pool {

// Where kTangent, also the sums of g tu, tu and tu d, for the pushforward.
template <typename T, bool kTangent>
__global__ void __launch_bounds__(kThreads, 4 - T::kWide - kTangent) reduce(
    Inputs<typename T::scalar_t> x,
    const typename T::scalar_t* __restrict__ gy, // [B, C, h, w]
    const typename T::scalar_t* __restrict__ tu, // [B, C, H, W], where kTangent
    typename T::acc_t* __restrict__ partial, // [sums, C, chunks]
    Shape shape,
    Cells cells
) {
  using acc_t = typename T::acc_t;
  constexpr int kCount = kTangent ? kSums : 2;
  Worker<T> worker(shape, cells);
  const Norm<T> norm(x, worker);
  Windowing<T> windows(x, norm, worker);
  acc_t sums[kCount][T::kChannels] = {};
  worker.for_each_cell([&](const auto& cell) {
    windows.load(cell);
    Pixels<T> t{};
    if constexpr (kTangent) t = windows.pixels(tu, cell);
    const auto cotangent = load_windows<T>(gy, cell);
    windows.choose(cell);
    Windows<T> t_chosen{};
    if constexpr (kTangent) t_chosen = windows.chosen(tu, cell, t);
    with_activation(x.activation, [&](auto kind) {
#pragma unroll
      for (int w = 0; w < T::kOwn; ++w) {
        if (!cell.has_window(w)) continue;
#pragma unroll
        for (int k = 0; k < T::kLanes; ++k) {
          const int c = k % T::kChannels;
          const acc_t g =
              gated<acc_t>(kind.value, x.slope, windows.choice[w].z[k], cotangent(w, k));
          sums[0][c] += g;
          sums[1][c] += g * windows.choice[w].d[k];
          if constexpr (kTangent) sums[2][c] += g * t_chosen(w, k);
        }
      }
    });
    if constexpr (kTangent) {
#pragma unroll
      for (int p = 0; p < T::kPixels; ++p) {
        if (!cell.has_pixel(p)) continue;
#pragma unroll
        for (int k = 0; k < T::kLanes; ++k) {
          const int c = k % T::kChannels;
          sums[3][c] += t(p, k);
          sums[4][c] += t(p, k) * windows.d(p, k);
        }
      }
    }
    windows.leave();
  });
  block_sums(sums, worker, [&](int s, int64_t channel, acc_t sum) {
    partial[(s * shape.channels + channel) * cells.chunks + worker.chunk] = sum;
  });
}

// What the backward makes of u's cotangent.
template <typename scalar_t>
struct BackwardOutputs {
  using acc_t = accumulator_t<scalar_t>;

  scalar_t* __restrict__ gu; // [B, C, H, W]; each may be null
  scalar_t* __restrict__ gresidual; // [B, C, H, W]
  acc_t* __restrict__ gweight; // [C]
  acc_t* __restrict__ gbias; // [C]
};

template <typename T>
__global__ void __launch_bounds__(
    kThreads, !T::kWide ? 4 : T::kKernel == 3 && sizeof(typename T::scalar_t) > 2 ? 2 : 3
) write_backward(
    Inputs<typename T::scalar_t> x,
    const typename T::scalar_t* __restrict__ gy, // [B, C, h, w]
    const typename T::scalar_t* __restrict__ curvature, // [B, C, H, W]; or null
    const typename T::acc_t* __restrict__ coefficient, // [C]; or null
    const Sums<typename T::acc_t>* __restrict__ sums, // [C]; where training
    bool training,
    double count,
    typename T::scalar_t* __restrict__ gu, // [B, C, H, W]; or null
    typename T::scalar_t* __restrict__ gresidual, // [B, C, H, W]; or null
    Shape shape,
    Cells cells
) {
  using acc_t = typename T::acc_t;
  Worker<T> worker(shape, cells);
  const Norm<T> norm(x, worker);
  const bool has_d = training || coefficient != nullptr;
  acc_t of_d[T::kChannels], constant[T::kChannels]; // of_g is the scale
#pragma unroll
  for (int k = 0; k < T::kChannels; ++k) {
    const int64_t c = worker.channel < shape.channels ? worker.channel + k : 0;
    const Affine<acc_t> affine = backward(
        training ? sums[c] : Sums<acc_t>{}, norm.scale[k], x.invstd[c], acc_t(count), training,
        coefficient == nullptr ? acc_t(0) : coefficient[c]
    );
    of_d[k] = affine.of_d;
    constant[k] = affine.constant;
  }
  Windowing<T> windows(x, norm, worker);
  worker.for_each_cell([&](const auto& cell) {
    windows.load(cell);
    windows.load_cotangents(gy, cell);
    if constexpr (T::kKernel > 1) windows.choose(cell);
    windows.unpool(cell);
    with_activation(x.activation, [&](auto kind) {
#pragma unroll
      for (int p = 0; p < T::kPixels; p += T::kGroup) {
        const auto residual = windows.residual(cell, p);
        const auto added = windows.group(curvature, cell, p);
        Values<T, T::kGroup> out, g_out;
#pragma unroll
        for (int i = 0; i < T::kGroup; ++i) {
#pragma unroll
          for (int k = 0; k < T::kLanes; ++k) {
            const int c = k % T::kChannels;
            const acc_t d = windows.d(p + i, k), z = windows.z(p + i, k, residual(i, k));
            const acc_t g = gated<acc_t>(kind.value, x.slope, z, windows.unpooled(p + i, k));
            acc_t cotangent = norm.scale[c] * g;
            // Not of a d that is not finite, where nothing is of d.
            if (has_d) cotangent += of_d[c] * d + constant[c];
            assign(out.x[i].x[k], cotangent + added(i, k));
            assign(g_out.x[i].x[k], g);
          }
        }
        store_group(gu, cell, p, out);
        store_group(gresidual, cell, p, g_out);
      }
    });
    windows.leave();
  });
}

constexpr int kBackwardLanes = 8;

template <typename scalar_t>
Plan plan_backward(
    const Shape& shape,
    const Inputs<scalar_t>& x,
    const scalar_t* gy,
    const scalar_t* curvature,
    const BackwardOutputs<scalar_t>& out
) {
  return make_plan<scalar_t, kBackwardLanes>(
      shape, false, {x.u, x.residual, gy, curvature, out.gu, out.gresidual}
  );
}

// Whether the sums are needed; then the scratch is: `partial` [plan.partials(2)], and `sums` [C].
template <typename scalar_t>
bool backward_needs_sums(bool training, const BackwardOutputs<scalar_t>& out) {
  return (training && out.gu != nullptr) || out.gweight != nullptr || out.gbias != nullptr;
}

template <typename scalar_t, typename Launch>
void backward(
    const Launch& launch,
    const Plan& plan,
    const Inputs<scalar_t>& x,
    const scalar_t* gy, // [B, C, h, w]
    const scalar_t* curvature, // [B, C, H, W]; or null
    const accumulator_t<scalar_t>* coefficient, // [C]; or null
    bool training,
    const BackwardOutputs<scalar_t>& out,
    accumulator_t<scalar_t>* partial, // scratch
    Sums<accumulator_t<scalar_t>>* sums // scratch
) {
  using acc_t = accumulator_t<scalar_t>;
  const double count = static_cast<double>(plan.shape.count());
  with_traits<scalar_t, kBackwardLanes>(plan, [&](auto traits) {
    using T = decltype(traits);
    if (backward_needs_sums(training, out)) {
      launch(
          plan.blocks(), reduce<T, false>, x, gy, static_cast<const scalar_t*>(nullptr), partial,
          plan.shape, plan.cells
      );
      const Totals<acc_t> totals{sums, out.gweight, out.gbias, nullptr, nullptr};
      launch(
          plan.channels(), combine<0, 2, scalar_t, acc_t>, partial, plan.cells.chunks, x, count,
          false, totals
      );
    }
    if (out.gu == nullptr && out.gresidual == nullptr) return;
    launch(
        plan.unsummed_blocks(), write_backward<T>, x, gy, curvature, coefficient, sums,
        training && out.gu != nullptr, count, out.gu, out.gresidual, plan.shape, plan.unsummed
    );
  });
}

} // namespace fastjac::norm_act_pool
