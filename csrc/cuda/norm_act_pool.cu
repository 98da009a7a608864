// channel_statistics, batch_norm_statistics and norm_act_pool on CUDA: allocation, launches and
// registration. The device code, and what it does, is in norm_act_pool_statistics.cuh and
// norm_act_pool_forward.cuh.

#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "norm_act_pool_forward.cuh"
#include "norm_act_pool_operands.h"
#include "norm_act_pool_statistics.cuh"

namespace fastjac::norm_act_pool {
namespace {

// Of a u that is not empty.
template <typename scalar_t>
void statistics(
    const Tensor& u, const Geometry& g, const Statistics<accumulator_t<scalar_t>>& out
) {
  const auto* x = data<scalar_t>(u);
  const Plan plan = plan_statistics(shape(g), x);
  const Tensor partial = empty_vector(u, ScalarType::Double, plan.partials(3)); // Moments
  statistics(Stream(u), plan, x, output<Moments<double>>(partial), out);
}

std::tuple<Tensor, Tensor> channel_statistics_cuda(const Tensor& u) {
  constexpr const char* op = "channel_statistics";
  const Geometry g = check_input(op, u, {1, 1, 0});
  check_grid(op, g);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor mean = channels_of(u), var = channels_of(u);
  if (u.numel() == 0) return {mean, var};
  with_dtype(u, [&](auto zero) {
    using acc_t = accumulator_t<decltype(zero)>;
    statistics<decltype(zero)>(u, g, {output<acc_t>(mean), output<acc_t>(var)});
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_statistics_cuda(
    const Tensor& u,
    const MaybeTensor& running_mean,
    const MaybeTensor& running_var,
    bool training,
    double momentum,
    double eps
) {
  const Geometry g = check_statistics(u, running_mean, running_var, training);
  check_grid("batch_norm_statistics", g);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor mean = channels_of(u), invstd = channels_of(u);
  if (g.channels == 0) return {mean, invstd};
  with_dtype(u, [&](auto zero) {
    using acc_t = accumulator_t<decltype(zero)>;
    const auto channels = [](const MaybeTensor& x) { // [C], or null
      return x ? output<acc_t>(*x) : nullptr;
    };
    const Statistics<acc_t> out{output<acc_t>(mean),   nullptr,
                                output<acc_t>(invstd), channels(running_mean),
                                channels(running_var), momentum,
                                unbiased(g.count()),   eps};
    if (training && u.numel() > 0) return statistics<decltype(zero)>(u, g, out);
    without_values(Stream(u), g.channels, training, out);
  });
  return {mean, invstd};
}

Tensor norm_act_pool_cuda(
    const Tensor& u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool
) {
  constexpr const char* op = "norm_act_pool";
  const Geometry g = check_input(op, u, parse_pool(op, pool));
  const Arguments arguments{
      u, residual, weight, bias, mean, invstd, parse_activation(op, activation), slope
  };
  arguments.check(op, g);
  check_grid(op, g);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor y = empty_output_like(u, g);
  if (u.numel() == 0) return y;
  with_dtype(u, [&](auto zero) {
    using scalar_t = decltype(zero);
    const Inputs<scalar_t> x = inputs<scalar_t>(arguments);
    auto* out = output<scalar_t>(y);
    forward(Stream(u), plan_forward(shape(g), x, out), x, out);
  });
  return y;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m) {
  m.impl("channel_statistics", TORCH_BOX(&channel_statistics_cuda));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics_cuda));
  m.impl("norm_act_pool", TORCH_BOX(&norm_act_pool_cuda));
}

} // namespace fastjac::norm_act_pool
