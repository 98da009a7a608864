// window_crop on CUDA: launch and registration. The device code, and what it does, is in
// window_crop.cuh.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/window_crop_host.h"
#include "stream.h"
#include "window_crop.cuh"

namespace fastjac::window_crop {
namespace {

Tensor window_crop_cuda(
    const Tensor& x, const Tensor& start, int64_t height, int64_t width, double fill, bool adjoint
) {
  return allocate_and_run(
      x, start, height, width, fill, adjoint,
      [&](const Crop& g, const auto* source, const int64_t* starts, auto bits, auto* out) {
        const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
        STD_TORCH_CHECK(
            crop(Stream(x), g, source, starts, bits, out),
            "window_crop: the crop has too many planes for CUDA: [", g.batch, ", ", x.size(1), ", ",
            height, ", ", width, "]"
        );
      }
  );
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m) {
  m.impl("window_crop", TORCH_BOX(&window_crop_cuda));
}

} // namespace fastjac::window_crop
