// norm_act_pool_backward on CUDA: allocation, launches and registration. The device code, and what it
// does, is in norm_act_pool_backward.cuh.

#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "norm_act_pool_backward.cuh"
#include "norm_act_pool_operands.h"

namespace fastjac::norm_act_pool {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_pool_backward_cuda(
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
    bool training,
    const MaybeTensor& coefficient,
    const MaybeTensor& curvature,
    const std::vector<bool>& mask
) {
  constexpr const char* op = "norm_act_pool_backward";
  const Geometry g = check_input(op, u, parse_pool(op, pool));
  const Arguments arguments{
      u, residual, weight, bias, mean, invstd, parse_activation(op, activation), slope
  };
  check_map(op, "gy", gy, u, g, true);
  check_map(op, "curvature", curvature, u, g);
  arguments.check(op, g);
  check_channels(op, "coefficient", coefficient, u);
  check_grid(op, g);
  STD_TORCH_CHECK(mask.size() == 4, op, ": mask must have 4 entries, got ", mask.size());
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor gu = mask[0] ? empty_input_like(u, g) : nothing(u);
  Tensor gresidual = mask[1] ? empty_input_like(u, g) : nothing(u);
  Tensor gweight = mask[2] ? channels_of(u) : nothing(u);
  Tensor gbias = mask[3] ? channels_of(u) : nothing(u);
  if (u.numel() == 0) return {gu, gresidual, gweight, gbias};
  with_dtype(u, [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulator_t<scalar_t>;
    const Inputs<scalar_t> x = inputs<scalar_t>(arguments);
    const BackwardOutputs<scalar_t> out{
        output<scalar_t>(gu, mask[0]), output<scalar_t>(gresidual, mask[1]),
        output<acc_t>(gweight, mask[2]), output<acc_t>(gbias, mask[3])
    };
    const auto *cotangent = data<scalar_t>(gy), *added = data<scalar_t>(curvature);
    const Plan plan = plan_backward(shape(g), x, cotangent, added, out);
    const bool summed = backward_needs_sums(training, out);
    const Tensor partial = scratch(u, summed ? plan.partials(2) : 0);
    const Tensor sums = scratch(u, summed ? kSums * g.channels : 0);
    backward(
        Stream(u), plan, x, cotangent, added, data<acc_t>(coefficient), training, out,
        output<acc_t>(partial), output<Sums<acc_t>>(sums)
    );
  });
  return {gu, gresidual, gweight, gbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m) {
  m.impl("norm_act_pool_backward", TORCH_BOX(&norm_act_pool_backward_cuda));
}

} // namespace fastjac::norm_act_pool
