// window_crop on the CPU. Which element comes from where is in common/window_crop.h.
//
// Layout: the crop is dense, contiguous or channels-last; the source is read through its strides.
// The threads share the output's rows. A row is a run of fill, a copy and a run of fill; the copy
// is one of whole runs of memory where the source's row is dense. Must move the crop's part of the
// source, and the output.

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/window_crop_host.h"
#include "window_crop.h"

namespace fastjac::window_crop {
namespace {

constexpr int64_t kGrain = 32768; // elements below which another thread costs more than it brings

Tensor window_crop_cpu(
    const Tensor& x, const Tensor& start, int64_t height, int64_t width, double fill, bool adjoint
) {
  return allocate_and_run(
      x, start, height, width, fill, adjoint,
      [](const Crop& g, const auto* source, const int64_t* starts, auto bits, auto* out) {
        torch::stable::parallel_for(
            0, g.batch * g.planes * g.rows, std::max<int64_t>(1, kGrain / g.length()),
            [&](int64_t begin, int64_t end) {
              gather_rows(g, source, starts, bits, out, begin, end);
            }
        );
      }
  );
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("window_crop", TORCH_BOX(&window_crop_cpu));
}

} // namespace fastjac::window_crop
