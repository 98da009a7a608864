// attention_window on CUDA: registration. The device code, what it does, and how it is launched are
// in attention_window.cuh.

#include <cstring>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/attention_window_host.h"
#include "attention_window.cuh"
#include "stream.h"

namespace fastjac::attention_window {
namespace {

// Calls run(zero, square): a zero of the element type, and whether the power is 2, as a constant.
template <typename Run>
void for_type_and_power(ScalarType dtype, double power, const Run& run) {
  const auto with_type = [&](auto zero) {
    std::memset(&zero, 0, sizeof(zero));
    power == 2 ? run(zero, std::true_type()) : run(zero, std::false_type());
  };
  switch (dtype) {
    case ScalarType::Double:
      return with_type(double{});
    case ScalarType::Float:
      return with_type(float{});
    case ScalarType::BFloat16:
      return with_type(__nv_bfloat16{});
    default:
      return with_type(__half{});
  }
}

std::tuple<Tensor, Tensor> attention_window_cuda(const Tensor& features, int64_t k, double power) {
  return allocate_and_find(
      features, k, power,
      [&](const Map& m, const Tensor& z, const Tensor& position, const Tensor& value) {
        const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
        const int64_t attention = m.batch * m.pixels(), sums = m.batch * m.rows() * m.width;
        const int64_t rows = m.batch * m.rows();
        const Tensor room = torch::stable::new_empty(value, {attention + sums + rows});
        const Tensor indices = torch::stable::new_empty(position, {rows});
        for_type_and_power(z.scalar_type(), power, [&](auto zero, auto square) {
          using scalar_t = decltype(zero);
          using acc_t = accumulator_t<scalar_t>;
          auto* base = static_cast<acc_t*>(room.mutable_data_ptr());
          const Operands<scalar_t> operands{
              static_cast<const scalar_t*>(z.const_data_ptr()),
              static_cast<int64_t*>(position.mutable_data_ptr()),
              static_cast<acc_t*>(value.mutable_data_ptr()),
              base,
              base + attention,
              base + attention + sums,
              static_cast<int64_t*>(indices.mutable_data_ptr())
          };
          STD_TORCH_CHECK(
              find_window<square>(Stream(z), m, operands, power),
              "attention_window: features must have at most ", kMaxBlocks,
              " pixels in all on CUDA, got ", describe(z.sizes())
          );
        });
      }
  );
}

std::tuple<Tensor, Tensor> attention_window_slope_cuda(
    const Tensor& features, const Tensor& position, int64_t k, double power
) {
  return allocate_and_differentiate(
      features, position, k, power,
      [&](const window_crop::Crop& crop, const Tensor& at, const Tensor& slope,
          const Tensor& bend) {
        const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
        for_type_and_power(features.scalar_type(), power, [&](auto zero, auto square) {
          using scalar_t = decltype(zero);
          STD_TORCH_CHECK(
              find_slope<square>(
                  Stream(features), crop, features.size(1),
                  static_cast<const scalar_t*>(features.const_data_ptr()),
                  static_cast<const int64_t*>(at.const_data_ptr()), zero, power,
                  static_cast<scalar_t*>(slope.mutable_data_ptr()),
                  static_cast<scalar_t*>(bend.mutable_data_ptr())
              ),
              "attention_window_slope: features have too many planes for CUDA: ",
              describe(features.sizes())
          );
        });
      }
  );
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m) {
  m.impl("attention_window", TORCH_BOX(&attention_window_cuda));
  m.impl("attention_window_slope", TORCH_BOX(&attention_window_slope_cuda));
}

} // namespace fastjac::attention_window
