// window_crop's host side, the same for every device: checks, layout, allocation, empty return.
// For code that is bound to PyTorch; device code does not include it.
#pragma once

#include <cstring>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "empty.h"
#include "layout.h"
#include "window_crop.h"

namespace fastjac::window_crop {

inline void check_map(const char* op, const char* name, const Tensor& x) {
  check_floating(op, name, x);
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must be [B, C, H, W], got ", describe(x.sizes()));
}

// One row and one column per sample of x.
inline void check_start(const char* op, const char* name, const Tensor& start, const Tensor& x) {
  STD_TORCH_CHECK(
      start.scalar_type() == ScalarType::Long, op, ": ", name, " must be Long, got ",
      torch::headeronly::toString(start.scalar_type())
  );
  STD_TORCH_CHECK(
      start.dim() == 2 && start.size(0) == x.size(0) && start.size(1) == 2, op, ": ", name,
      " must be [", x.size(0), ", 2], got ", describe(start.sizes())
  );
  STD_TORCH_CHECK(start.device() == x.device(), op, ": ", name, " must be on the map's device");
}

// Whether crops of x have the channels last: where they are closest in x. (Dimensions of size one
// have any stride, and a contiguous x gives contiguous crops.)
inline bool channels_last(const Tensor& x) {
  return !x.is_contiguous() && x.size(1) > 1 && x.stride(1) == 1;
}

inline Crop describe_crop(const Tensor& x, int64_t rows, int64_t width, bool adjoint) {
  const bool last = channels_last(x);
  const int64_t unit = last ? x.size(1) : 1;
  return {
      x.size(0),
      last ? 1 : x.size(1),
      rows,
      width,
      unit,
      x.size(2),
      x.size(3),
      x.stride(0),
      last ? 0 : x.stride(1),
      x.stride(2),
      x.size(3) > 1 ? x.stride(3) : unit,
      last ? x.stride(1) : 1,
      adjoint
  };
}

inline Tensor empty_crop(const Tensor& x, const Crop& g) {
  const int64_t sizes[] = {x.size(0), x.size(1), g.rows, g.width};
  const bool last = g.unit > 1;
  using torch::headeronly::MemoryFormat;
  return empty_map(x, sizes, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `value` in dtype, as bits_t, an unsigned integer of its size.
template <typename bits_t>
bits_t to_bits(double value, ScalarType dtype) {
  bits_t bits{};
  const auto copy = [&](auto x) {
    if constexpr (sizeof(x) == sizeof(bits)) std::memcpy(&bits, &x, sizeof(x));
  };
  switch (dtype) {
    case ScalarType::Double:
      copy(value);
      break;
    case ScalarType::Float:
      copy(static_cast<float>(value));
      break;
    case ScalarType::BFloat16:
      copy(torch::headeronly::BFloat16(static_cast<float>(value)));
      break;
    default:
      copy(torch::headeronly::Half(static_cast<float>(value)));
  }
  return bits;
}

// Calls run(geometry, x, start, fill, out) with pointers to unsigned integers of x's element size;
// not called where there is nothing to write. start is then contiguous.
template <typename Run>
Tensor allocate_and_run(
    const Tensor& x,
    const Tensor& start,
    int64_t height,
    int64_t width,
    double fill,
    bool adjoint,
    const Run& run
) {
  constexpr const char* op = "window_crop";
  check_map(op, "x", x);
  check_start(op, "start", start, x);
  STD_TORCH_CHECK(
      height >= 0 && width >= 0, op, ": size must not be negative, got ", height, "x", width
  );
  const Crop g = describe_crop(x, height, width, adjoint);
  Tensor out = empty_crop(x, g);
  if (out.numel() == 0) return out;
  const Tensor rows = as_contiguous(start);
  const auto* starts = static_cast<const int64_t*>(rows.const_data_ptr());
  const auto move = [&](auto zero) {
    using bits_t = decltype(zero);
    run(g, static_cast<const bits_t*>(x.const_data_ptr()), starts,
        to_bits<bits_t>(fill, x.scalar_type()), static_cast<bits_t*>(out.mutable_data_ptr()));
  };
  switch (x.element_size()) {
    case 8:
      move(uint64_t{});
      break;
    case 4:
      move(uint32_t{});
      break;
    default:
      move(uint16_t{});
  }
  return out;
}

} // namespace fastjac::window_crop
