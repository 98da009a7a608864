// attention_window's host side, the same for every device: checks, layout, allocation, empty return.
// For code that is bound to PyTorch; device code does not include it.
#pragma once

#include <cstring>
#include <tuple>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention_window.h"
#include "checks.h"
#include "layout.h"
#include "window_crop_host.h"

namespace fastjac::attention_window {

inline void check_features(const char* op, const Tensor& features, int64_t k, double power) {
  window_crop::check_map(op, "features", features);
  STD_TORCH_CHECK(
      k >= 1 && k <= features.size(2) && k <= features.size(3), op,
      ": k must be from 1 to the map's height and width, ", features.size(2), "x", features.size(3),
      ", got ", k
  );
  STD_TORCH_CHECK(power == 1 || power >= 2, op, ": power must be 1 or at least 2, got ", power);
}

// Calls run(map, features, position, value) with features in one of the map's two layouts; not
// called for an empty batch. Returns position [B, 2] and value [B], in the accumulator dtype.
template <typename Run>
std::tuple<Tensor, Tensor> allocate_and_find(
    const Tensor& features, int64_t k, double power, const Run& run
) {
  check_features("attention_window", features, k, power);
  const int64_t batch = features.size(0), channels = features.size(1), width = features.size(3);
  Tensor position = torch::stable::new_empty(features, {batch, 2}, ScalarType::Long);
  Tensor value = torch::stable::new_empty(features, {batch}, accumulator(features.scalar_type()));
  if (batch == 0) return {position, value};
  const bool last = window_crop::channels_last(features) && features.stride(3) == channels &&
                    features.stride(2) == width * channels &&
                    features.stride(0) == features.size(2) * width * channels;
  const Map map{batch, channels, features.size(2), width, k, last};
  run(map, last ? features : as_contiguous(features), position, value);
  return {position, value};
}

// Calls run(crop, position, slope, bend), with the crop that slope and bend are of features; not
// called where they are empty. position is then contiguous.
template <typename Run>
std::tuple<Tensor, Tensor> allocate_and_differentiate(
    const Tensor& features, const Tensor& position, int64_t k, double power, const Run& run
) {
  constexpr const char* op = "attention_window_slope";
  check_features(op, features, k, power);
  window_crop::check_start(op, "position", position, features);
  const window_crop::Crop crop = window_crop::describe_crop(features, k, k, false);
  Tensor slope = window_crop::empty_crop(features, crop);
  Tensor bend = window_crop::empty_crop(features, crop);
  if (slope.numel() > 0) run(crop, as_contiguous(position), slope, bend);
  return {slope, bend};
}

} // namespace fastjac::attention_window
