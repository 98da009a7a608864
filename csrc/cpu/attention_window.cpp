// attention_window on the CPU: threads and registration. The kernels are in attention_window_kernels.h,
// the formulas in common/attention_window.h.
//
// attention_window: the threads share blocks of pixels, and leave the attention map A [B, h, w];
// then they share the samples, whose windows are summed over rows, then over columns, with no
// running sum: no rounding is carried from one window to the next, and a NaN stays in its windows.
// attention_window_slope: the threads share the window's rows; a few are gathered, and turned
// into slope and bend while they are in the cache.
//
// Must move the features, once. A pixel's and a window's sums are added up in an order that depends
// on C and k alone, so the bits do not depend on the number of threads.

#include "attention_window.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/attention_window_host.h"
#include "element_type.h"
#include "window_crop.h"

namespace fastjac::attention_window {
namespace {

constexpr int64_t kBlock = 1024; // pixels: their sums and the rows read for them fit an L1 cache
constexpr int64_t kGrain = 32768; // elements below which another thread costs more than it brings

// The best window of one sample.
template <typename acc_t>
Best<acc_t> best_window(const Map& m, const Kernels& kernel, const acc_t* a /* [h, w] */) {
  std::vector<acc_t> buffer(m.width + m.columns());
  acc_t *const column_sums = buffer.data(), *const windows = column_sums + m.width;
  Best<acc_t> best{0, -1};
  for (int64_t y = 0; y < m.rows(); ++y) {
    kernel.window_row(m, a + y * m.width, column_sums, windows);
    for (int64_t x = 0; x < m.columns(); ++x) {
      const Best<acc_t> window{windows[x], y * m.columns() + x};
      if (best.loses_to(window)) best = window;
    }
  }
  return best;
}

template <typename scalar_t>
void find(
    const Map& m, const Tensor& features, double power, const Tensor& position, const Tensor& value
) {
  using acc_t = accumulator_t<scalar_t>;
  const auto* z = static_cast<const scalar_t*>(features.const_data_ptr()); // as m says
  auto* positions = static_cast<int64_t*>(position.mutable_data_ptr()); // [B, 2]
  auto* values = static_cast<acc_t*>(value.mutable_data_ptr()); // [B]
  const Tensor attention = torch::stable::new_empty(value, {m.batch, m.height, m.width});
  auto* a = static_cast<acc_t*>(attention.mutable_data_ptr()); // [B, h, w]

  const Kernels& kernel = kernels<scalar_t>(power);
  const int64_t pixels = m.pixels(), blocks = (pixels + kBlock - 1) / kBlock;
  const int64_t block_elements = std::max<int64_t>(1, std::min(kBlock, pixels) * m.channels);
  torch::stable::parallel_for(
      0, m.batch * blocks, std::max<int64_t>(1, kGrain / block_elements),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t sample = i / blocks, first = i % blocks * kBlock;
          const int64_t n = std::min(kBlock, pixels - first);
          const int64_t offset = first * (m.channels_last ? m.channels : 1);
          const scalar_t* from = z + sample * m.channels * pixels + offset;
          kernel.means(m, from, n, power, a + sample * pixels + first);
        }
      }
  );
  torch::stable::parallel_for(
      0, m.batch, std::max<int64_t>(1, kGrain / (2 * m.k * pixels)),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Best<acc_t> best = best_window(m, kernel, a + i * pixels);
          positions[2 * i] = best.index / m.columns();
          positions[2 * i + 1] = best.index % m.columns();
          values[i] = best.value;
        }
      }
  );
}

template <typename scalar_t>
void differentiate(
    const window_crop::Crop& crop,
    const Tensor& features,
    const Tensor& position,
    double power,
    const Tensor& slope,
    const Tensor& bend
) {
  const auto* z = static_cast<const scalar_t*>(features.const_data_ptr()); // features' strides
  const auto* starts = static_cast<const int64_t*>(position.const_data_ptr()); // [B, 2]
  auto* slopes = static_cast<scalar_t*>(slope.mutable_data_ptr()); // [B, C, k, k], as the crop
  auto* bends = static_cast<scalar_t*>(bend.mutable_data_ptr()); // likewise
  const Kernels& kernel = kernels<scalar_t>(power);
  const double scale = 1.0 / (features.size(1) * crop.rows * crop.width);
  const int64_t length = crop.length(), rows = std::max<int64_t>(1, kBlock / length);
  torch::stable::parallel_for(
      0, crop.batch * crop.planes * crop.rows, std::max<int64_t>(1, kGrain / length),
      [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += rows) {
          const int64_t stop = std::min(end, row + rows);
          window_crop::gather_rows(crop, z, starts, scalar_t{}, slopes, row, stop);
          kernel.differentiate(
              slopes + row * length, bends + row * length, (stop - row) * length, power, scale
          );
        }
      }
  );
}

std::tuple<Tensor, Tensor> attention_window_cpu(const Tensor& features, int64_t k, double power) {
  return allocate_and_find(
      features, k, power,
      [&](const Map& m, const Tensor& z, const Tensor& position, const Tensor& value) {
        for_element_type(z.scalar_type(), [&](auto zero) {
          find<decltype(zero)>(m, z, power, position, value);
        });
      }
  );
}

std::tuple<Tensor, Tensor> attention_window_slope_cpu(
    const Tensor& features, const Tensor& position, int64_t k, double power
) {
  return allocate_and_differentiate(
      features, position, k, power,
      [&](const window_crop::Crop& crop, const Tensor& at, const Tensor& slope,
          const Tensor& bend) {
        for_element_type(features.scalar_type(), [&](auto zero) {
          differentiate<decltype(zero)>(crop, features, at, power, slope, bend);
        });
      }
  );
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("attention_window", TORCH_BOX(&attention_window_cpu));
  m.impl("attention_window_slope", TORCH_BOX(&attention_window_slope_cpu));
}

} // namespace fastjac::attention_window
