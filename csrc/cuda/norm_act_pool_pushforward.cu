// norm_act_pool_pushforward on CUDA: allocation, launches and registration. The device code, and what
// it does, is in norm_act_pool_pushforward.cuh.

#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "norm_act_pool_operands.h"
#include "norm_act_pool_pushforward.cuh"

namespace fastjac::norm_act_pool {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_pool_pushforward_cuda(
    const Tensor& tu,
    const MaybeTensor& tresidual,
    const Tensor& gy,
    const Tensor& u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool,
    const std::string& statistics,
    bool with_curvature
) {
  constexpr const char* op = "norm_act_pool_pushforward";
  const Geometry g = check_input(op, u, parse_pool(op, pool));
  const Arguments arguments{
      u, residual, weight, bias, mean, invstd, parse_activation(op, activation), slope
  };
  check_map(op, "tu", tu, u, g, false);
  check_map(op, "tresidual", tresidual, u, g);
  check_map(op, "gy", gy, u, g, true);
  arguments.check(op, g);
  check_grid(op, g);
  STD_TORCH_CHECK(
      arguments.activation != Activation::kSilu, op,
      ": activation must be piecewise linear, got 'silu'"
  );
  const bool batch = parse_batch_statistics(op, statistics);
  STD_TORCH_CHECK(
      batch || !with_curvature, op, ": curvature=True needs statistics='batch', got 'fixed'"
  );
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor ty = empty_output_like(u, g), gweight = channels_of(u), coefficient = channels_of(u);
  Tensor kappa = with_curvature ? empty_input_like(u, g) : nothing(u);
  if (u.numel() == 0) return {ty, gweight, coefficient, kappa};
  with_dtype(u, [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulator_t<scalar_t>;
    const Inputs<scalar_t> x = inputs<scalar_t>(arguments);
    const Tangents<scalar_t> tangents{
        data<scalar_t>(tu), data<scalar_t>(tresidual), data<scalar_t>(gy)
    };
    const PushforwardOutputs<scalar_t> out{
        output<scalar_t>(ty), output<scalar_t>(kappa, with_curvature), output<acc_t>(gweight),
        output<acc_t>(coefficient)
    };
    const Plan plan = plan_pushforward(shape(g), x, tangents, out);
    const Tensor partial = scratch(u, plan.partials(batch ? kSums : 1));
    const Tensor sums = scratch(u, kSums * g.channels);
    pushforward(
        Stream(u), plan, x, tangents, batch, out, output<acc_t>(partial), output<Sums<acc_t>>(sums)
    );
  });
  return {ty, gweight, coefficient, kappa};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m) {
  m.impl("norm_act_pool_pushforward", TORCH_BOX(&norm_act_pool_pushforward_cuda));
}

} // namespace fastjac::norm_act_pool
