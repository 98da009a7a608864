// attention_window on the CPU. The formulas are in common/attention_window.h.
//
// attention_window: the threads share blocks of pixels, and leave the attention map A [B, h, w];
// then they share the samples, whose windows are summed over rows, then over columns, with no
// running sum: no rounding is carried from one window to the next, and a NaN stays in its windows.
// attention_window_slope: the threads share the window's rows; a few are gathered, and turned
// into slope and bend while they are in the cache.
//
// Must move the features, once. A pixel's and a window's sums are added up in an order that depends
// on C and k alone, so the bits do not depend on the number of threads.

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch.h>

#include "../common/attention_window.h"
#include "../common/attention_window_host.h"
#include "isa.h"
#include "small_floats.h"
#include "window_crop.h"

namespace fastjac::attention_window {
namespace {

constexpr int64_t kBlock = 1024; // pixels: their sums and the rows read for them fit an L1 cache
constexpr int kLanes = 16; // an AVX-512 register of fp32
// Pixels whose lanes are added up together: one by one, each addition waits for the last.
constexpr int kGroup = 16;
constexpr int64_t kGrain = 32768; // elements below which another thread costs more than it brings

// a[i] = mean over c of |z|^p for n pixels, z at features[c * stride + i]. Eight channels at a time,
// as a tree: fewer passes over the sums, and less rounding.
template <typename scalar_t, typename F, typename acc_t>
inline void planar_means(
    const scalar_t* __restrict__ features,
    int64_t channels,
    int64_t stride,
    int64_t n,
    const F& f,
    acc_t* __restrict__ a
) {
  for (int64_t i = 0; i < n; ++i) a[i] = 0;
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    const scalar_t* __restrict__ z = features + c * stride;
    const auto at = [&](int row, int64_t i) { return f(static_cast<acc_t>(z[row * stride + i])); };
    for (int64_t i = 0; i < n; ++i) {
      a[i] += ((at(0, i) + at(1, i)) + (at(2, i) + at(3, i))) +
              ((at(4, i) + at(5, i)) + (at(6, i) + at(7, i)));
    }
  }
  for (; c < channels; ++c) {
    const scalar_t* __restrict__ z = features + c * stride;
    for (int64_t i = 0; i < n; ++i) a[i] += f(static_cast<acc_t>(z[i]));
  }
  for (int64_t i = 0; i < n; ++i) a[i] /= static_cast<acc_t>(channels);
}

// The same, z at features[i * channels + c].
template <typename scalar_t, typename F, typename acc_t>
inline void interleaved_means(
    const scalar_t* __restrict__ features,
    int64_t channels,
    int64_t n,
    const F& f,
    acc_t* __restrict__ a
) {
  for (int64_t i = 0; i < n; i += kGroup) {
    const int pixels = static_cast<int>(std::min<int64_t>(kGroup, n - i));
    acc_t sums[kGroup][kLanes] = {};
    for (int pixel = 0; pixel < pixels; ++pixel) {
      const scalar_t* __restrict__ z = features + (i + pixel) * channels;
      acc_t* __restrict__ sum = sums[pixel];
      const auto add = [&](const auto* x, int64_t count) {
        int64_t c = 0;
        for (; c + kLanes <= count; c += kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) sum[lane] += f(static_cast<acc_t>(x[c + lane]));
        }
        for (int lane = 0; c < count; ++c, ++lane) sum[lane] += f(static_cast<acc_t>(x[c]));
      };
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        add(z, channels);
      } else { // converted apart, in a loop of its own, or the compiler does it one by one
        constexpr int64_t kRun = 16 * kLanes;
        acc_t converted[kRun];
        for (int64_t c = 0; c < channels; c += kRun) {
          const int64_t count = std::min(kRun, channels - c);
          for (int64_t k = 0; k < count; ++k) converted[k] = static_cast<acc_t>(z[c + k]);
          add(converted, count);
        }
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int pixel = 0; pixel < pixels; ++pixel) {
        for (int lane = 0; lane < half; ++lane) sums[pixel][lane] += sums[pixel][lane + half];
      }
    }
    for (int pixel = 0; pixel < pixels; ++pixel) {
      a[i + pixel] = sums[pixel][0] / static_cast<acc_t>(channels);
    }
  }
}

// The best window of one sample.
template <typename acc_t>
inline Best<acc_t> best_window(const Map& m, const acc_t* __restrict__ a /* [h, w] */) {
  std::vector<acc_t> buffer(m.width + m.columns());
  acc_t* __restrict__ column_sums = buffer.data(); // [w]
  acc_t* __restrict__ windows = column_sums + m.width; // [columns]
  const int64_t width = m.width, columns = m.columns(), k = m.k;
  const acc_t area = static_cast<acc_t>(k * k);
  Best<acc_t> best{0, -1};
  for (int64_t y = 0; y < m.rows(); ++y) {
    for_isa([&] {
      for (int64_t x = 0; x < width; ++x) column_sums[x] = a[y * width + x];
      for (int64_t i = 1; i < k; ++i) {
        for (int64_t x = 0; x < width; ++x) column_sums[x] += a[(y + i) * width + x];
      }
      for (int64_t x = 0; x < columns; ++x) windows[x] = column_sums[x];
      for (int64_t i = 1; i < k; ++i) {
        for (int64_t x = 0; x < columns; ++x) windows[x] += column_sums[x + i];
      }
      for (int64_t x = 0; x < columns; ++x) windows[x] /= area;
    });
    for (int64_t x = 0; x < columns; ++x) {
      const Best<acc_t> window{windows[x], y * columns + x};
      if (best.loses_to(window)) best = window;
    }
  }
  return best;
}

template <typename scalar_t, bool kSquare>
void find(
    const Map& m, const Tensor& features, double power, const Tensor& position, const Tensor& value
) {
  using acc_t = accumulator_t<scalar_t>;
  const auto* z = static_cast<const scalar_t*>(features.const_data_ptr()); // as m says
  auto* positions = static_cast<int64_t*>(position.mutable_data_ptr()); // [B, 2]
  auto* values = static_cast<acc_t*>(value.mutable_data_ptr()); // [B]
  const Tensor attention = torch::stable::new_empty(value, {m.batch, m.height, m.width});
  auto* a = static_cast<acc_t*>(attention.mutable_data_ptr()); // [B, h, w]

  const Magnitude<kSquare, acc_t> magnitude{static_cast<acc_t>(power)};
  const auto f = [magnitude](acc_t x) { return magnitude.value(x); };
  const int64_t pixels = m.pixels(), blocks = (pixels + kBlock - 1) / kBlock;
  const int64_t block_elements = std::max<int64_t>(1, std::min(kBlock, pixels) * m.channels);
  torch::stable::parallel_for(
      0, m.batch * blocks, std::max<int64_t>(1, kGrain / block_elements),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t sample = i / blocks, first = i % blocks * kBlock;
          const int64_t n = std::min(kBlock, pixels - first);
          const scalar_t* from = z + sample * m.channels * pixels;
          acc_t* to = a + sample * pixels + first;
          for_isa([=] {
            if (m.channels_last) {
              interleaved_means(from + first * m.channels, m.channels, n, f, to);
            } else {
              planar_means(from + first, m.channels, pixels, n, f, to);
            }
          });
        }
      }
  );
  torch::stable::parallel_for(
      0, m.batch, std::max<int64_t>(1, kGrain / (2 * m.k * pixels)),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Best<acc_t> best = best_window(m, a + i * pixels);
          positions[2 * i] = best.index / m.columns();
          positions[2 * i + 1] = best.index % m.columns();
          values[i] = best.value;
        }
      }
  );
}

// slope [n] holds the features, and gets the slope.
template <typename scalar_t, bool kSquare, typename acc_t>
void differentiate_in_place(
    const Magnitude<kSquare, acc_t>& magnitude,
    acc_t scale,
    int64_t n,
    scalar_t* __restrict__ slope,
    scalar_t* __restrict__ bend
) {
  for_isa([=] {
    for (int64_t i = 0; i < n; ++i) {
      const acc_t z = slope[i];
      slope[i] = static_cast<scalar_t>(magnitude.slope(z) * scale);
      bend[i] = static_cast<scalar_t>(magnitude.bend(z) * scale);
    }
  });
}

template <typename scalar_t, bool kSquare>
void differentiate(
    const window_crop::Crop& crop,
    const Tensor& features,
    const Tensor& position,
    double power,
    const Tensor& slope,
    const Tensor& bend
) {
  using acc_t = accumulator_t<scalar_t>;
  const auto* z = static_cast<const scalar_t*>(features.const_data_ptr()); // features' strides
  const auto* starts = static_cast<const int64_t*>(position.const_data_ptr()); // [B, 2]
  auto* slopes = static_cast<scalar_t*>(slope.mutable_data_ptr()); // [B, C, k, k], as the crop
  auto* bends = static_cast<scalar_t*>(bend.mutable_data_ptr()); // likewise
  const Magnitude<kSquare, acc_t> magnitude{static_cast<acc_t>(power)};
  const auto scale = static_cast<acc_t>(1.0 / (features.size(1) * crop.rows * crop.width));
  const int64_t length = crop.length(), rows = std::max<int64_t>(1, kBlock / length);
  torch::stable::parallel_for(
      0, crop.batch * crop.planes * crop.rows, std::max<int64_t>(1, kGrain / length),
      [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += rows) {
          const int64_t stop = std::min(end, row + rows);
          window_crop::gather_rows(crop, z, starts, scalar_t(0), slopes, row, stop);
          differentiate_in_place(
              magnitude, scale, (stop - row) * length, slopes + row * length, bends + row * length
          );
        }
      }
  );
}

// Calls run(zero, square): a zero of the element type, and whether the power is 2, as a constant.
template <typename Run>
void for_type_and_power(ScalarType dtype, double power, const Run& run) {
  const auto with_power = [&](auto zero) {
    power == 2 ? run(zero, std::true_type()) : run(zero, std::false_type());
  };
  THO_DISPATCH_SWITCH(
      dtype, "attention_window",
      THO_DISPATCH_CASE(ScalarType::Double, [&] { with_power(scalar_t{}); })
          THO_DISPATCH_CASE(ScalarType::Float, [&] { with_power(scalar_t{}); })
              THO_DISPATCH_CASE(ScalarType::BFloat16, [&] { with_power(scalar_t{}); })
                  THO_DISPATCH_CASE(ScalarType::Half, [&] { with_power(scalar_t{}); })
  );
}

std::tuple<Tensor, Tensor> attention_window_cpu(const Tensor& features, int64_t k, double power) {
  return allocate_and_find(
      features, k, power,
      [&](const Map& m, const Tensor& z, const Tensor& position, const Tensor& value) {
        for_type_and_power(z.scalar_type(), power, [&](auto zero, auto square) {
          find<decltype(zero), square>(m, z, power, position, value);
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
        for_type_and_power(features.scalar_type(), power, [&](auto zero, auto square) {
          differentiate<decltype(zero), square>(crop, features, at, power, slope, bend);
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
