// norm_act_pool on CUDA, the pushforward. With tz = of_tu tu + of_d d + constant + tresidual:
//
//   fixed statistics   push     tu, gy, u -> ty = act'(z) tz at the windows' choices; sum of g tu
//                      combine  -> T, the coefficient
//   batch statistics   reduce   tu, gy, u -> the five sums, per channel and chunk
//                      combine  -> the sums per channel, T, the coefficient
//                      push     tu, gy, u, the sums -> ty, and the curvature where it is wanted
//
// Must move tu, u and gy in and ty out once; batch statistics, the first three twice, and the
// curvature out. Four lanes at most, so that 16-bit maps are accessed by 8 bytes: five maps of a
// cell and what is known of its channels would not fit into the registers otherwise.
//
// Includes nothing of PyTorch.
#pragma once

#include "norm_act_pool_backward.cuh"

namespace fastjac::norm_act_pool {

template <typename scalar_t>
struct Tangents {
  const scalar_t* __restrict__ tu; // [B, C, H, W]
  const scalar_t* __restrict__ tresidual; // [B, C, H, W]; or null
  const scalar_t* __restrict__ gy; // [B, C, h, w]
};

template <typename T, bool kBatch>
__global__ void __launch_bounds__(kThreads, !kBatch ? 4 : T::kWide ? 2 : 3) push(
    Inputs<typename T::scalar_t> x,
    Tangents<typename T::scalar_t> tangents,
    const Sums<typename T::acc_t>* __restrict__ sums, // [C], where kBatch
    double count,
    typename T::scalar_t* __restrict__ ty, // [B, C, h, w]
    typename T::scalar_t* __restrict__ kappa, // [B, C, H, W], or null; where kBatch
    typename T::acc_t* __restrict__ partial, // [1, C, chunks], where not kBatch
    Shape shape,
    Cells cells
) {
  using scalar_t = typename T::scalar_t;
  using acc_t = typename T::acc_t;
  Worker<T> worker(shape, cells);
  const Norm<T> norm(x, worker);
  Affine<acc_t> of_tn[T::kChannels], of_kappa[T::kChannels];
#pragma unroll
  for (int k = 0; k < T::kChannels; ++k) {
    const int64_t c = worker.channel < shape.channels ? worker.channel + k : 0;
    const Sums<acc_t> s = kBatch ? sums[c] : Sums<acc_t>{};
    of_tn[k] = tangent(s, norm.scale[k], x.invstd[c], acc_t(count), kBatch);
    if (kBatch) of_kappa[k] = curvature(s, norm.scale[k], x.invstd[c], acc_t(count));
  }
  acc_t sum[1][T::kChannels] = {};
  Windowing<T> windows(x, norm, worker);
  const bool curved = kBatch && kappa != nullptr;
  worker.template for_each_cell<kBatch ? 2 : 1>([&](const auto& cell) {
    windows.load(cell);
    Pixels<T> t{}, t_residual{};
    if constexpr (T::kKernel != 3) {
      t = load_pixels(tangents.tu, cell);
      t_residual = load_pixels(tangents.tresidual, cell);
    }
    const auto gy = kBatch ? Windows<T>{} : load_windows<T>(tangents.gy, cell);
    windows.choose(cell);
    const auto t_chosen = windows.chosen(tangents.tu, cell, t);
    const auto r_chosen = windows.chosen(tangents.tresidual, cell, t_residual);
    with_activation(x.activation, [&](auto kind) {
#pragma unroll
      for (int w = 0; w < T::kOwn; ++w) {
        if (!cell.has_window(w)) continue;
        Vector<scalar_t, T::kLanes> out;
#pragma unroll
        for (int k = 0; k < T::kLanes; ++k) {
          const int c = k % T::kChannels;
          const acc_t z = windows.choice[w].z[k], tu = t_chosen(w, k);
          acc_t tz = of_tn[c].of_tu * tu + r_chosen(w, k);
          if constexpr (kBatch) tz += of_tn[c].of_d * windows.choice[w].d[k] + of_tn[c].constant;
          assign(out.x[k], gated<acc_t>(kind.value, x.slope, z, tz));
          if constexpr (!kBatch) sum[0][c] += gated<acc_t>(kind.value, x.slope, z, gy(w, k)) * tu;
        }
        store_vector<T::kLanes>(ty + cell.window_offset(w), out);
      }
    });
    if (curved) {
      windows.load_cotangents(tangents.gy, cell);
      if constexpr (T::kKernel == 3) t = windows.pixels(tangents.tu, cell);
      windows.unpool(cell);
      with_activation(x.activation, [&](auto kind) {
#pragma unroll
        for (int p = 0; p < T::kPixels; p += T::kGroup) {
          const auto residual = windows.residual(cell, p);
          Values<T, T::kGroup> out;
#pragma unroll
          for (int i = 0; i < T::kGroup; ++i) {
#pragma unroll
            for (int k = 0; k < T::kLanes; ++k) {
              const Affine<acc_t>& of = of_kappa[k % T::kChannels];
              const acc_t d = windows.d(p + i, k), z = windows.z(p + i, k, residual(i, k));
              const acc_t g = gated<acc_t>(kind.value, x.slope, z, windows.unpooled(p + i, k));
              const acc_t rest = of.of_tu * t(p + i, k) + (of.of_d * d + of.constant);
              assign(out.x[i].x[k], of.of_g * g + rest);
            }
          }
          store_group(kappa, cell, p, out);
        }
      });
    }
    windows.leave();
  });
  if constexpr (!kBatch) {
    block_sums(sum, worker, [&](int, int64_t channel, acc_t total) {
      partial[channel * cells.chunks + worker.chunk] = total;
    });
  }
}

template <typename scalar_t>
struct PushforwardOutputs {
  using acc_t = accumulator_t<scalar_t>;

  scalar_t* __restrict__ ty; // [B, C, h, w]
  scalar_t* __restrict__ kappa; // [B, C, H, W]; or null
  acc_t* __restrict__ total; // [C]
  acc_t* __restrict__ coefficient; // [C]
};

constexpr int kPushforwardLanes = 4;

// Scratch: `partial` [plan.partials(batch ? kSums : 1)], and `sums` [C].
template <typename scalar_t>
Plan plan_pushforward(
    const Shape& shape,
    const Inputs<scalar_t>& x,
    const Tangents<scalar_t>& t,
    const PushforwardOutputs<scalar_t>& out
) {
  return make_plan<scalar_t, kPushforwardLanes>(
      shape, false, {x.u, x.residual, t.tu, t.tresidual, t.gy, out.ty, out.kappa}
  );
}

template <typename scalar_t, typename Launch>
void pushforward(
    const Launch& launch,
    const Plan& plan,
    const Inputs<scalar_t>& x,
    const Tangents<scalar_t>& t,
    bool batch,
    const PushforwardOutputs<scalar_t>& out,
    accumulator_t<scalar_t>* partial, // scratch
    Sums<accumulator_t<scalar_t>>* sums // scratch
) {
  using acc_t = accumulator_t<scalar_t>;
  const double count = static_cast<double>(plan.shape.count());
  const Totals<acc_t> totals{sums, nullptr, nullptr, out.total, out.coefficient};
  with_traits<scalar_t, kPushforwardLanes>(plan, [&](auto traits) {
    using T = decltype(traits);
    const auto run = [&](auto kernel, const fastjac::Geometry& blocks, const Cells& cells) {
      launch(blocks, kernel, x, t, sums, count, out.ty, out.kappa, partial, plan.shape, cells);
    };
    if (batch) {
      launch(plan.blocks(), reduce<T, true>, x, t.gy, t.tu, partial, plan.shape, plan.cells);
      launch(
          plan.channels(), combine<0, kSums, scalar_t, acc_t>, partial, plan.cells.chunks, x, count,
          true, totals
      );
      run(push<T, true>, plan.unsummed_blocks(), plan.unsummed);
    } else {
      run(push<T, false>, plan.blocks(), plan.cells);
      launch(
          plan.channels(), combine<2, 1, scalar_t, acc_t>, partial, plan.cells.chunks, x, count,
          false, totals
      );
    }
  });
}

} // namespace fastjac::norm_act_pool
