// norm_act_pool's host side, the same for every device: names to enums, checks, layout, allocation.
// For code that is bound to PyTorch; device code does not include it.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include "checks.h"
#include "empty.h"
#include "layout.h"
#include "norm_act_pool.h"

namespace fastjac::norm_act_pool {

using MaybeTensor = std::optional<Tensor>;

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(
      false, op, ": activation must be 'none', 'relu', 'relu6', 'leaky_relu' or 'silu', got '",
      name, "'"
  );
}

inline Pool parse_pool(const char* op, const std::string& name) {
  if (name == "none") return {1, 1, 0};
  if (name == "2x2") return {2, 2, 0};
  if (name == "3x3") return {3, 2, 1};
  if (name == "3x3-unpadded") return {3, 2, 0};
  STD_TORCH_CHECK(
      false, op, ": pool must be 'none', '2x2', '3x3' or '3x3-unpadded', got '", name, "'"
  );
}

inline bool parse_batch_statistics(const char* op, const std::string& name) {
  STD_TORCH_CHECK(
      name == "fixed" || name == "batch", op, ": statistics must be 'fixed' or 'batch', got '",
      name, "'"
  );
  return name == "batch";
}

// The maps of one call: shape [B, C, H, W] in, [B, C, h, w] out, and where their elements are.
struct Geometry {
  int64_t batch, channels, height, width, out_height, out_width;
  Pool pool;
  // Whether kernels see [B, H, W, C]. With one pixel both orders are the same, and this one has the
  // longer runs.
  bool channels_last;
  torch::headeronly::MemoryFormat format; // of what is allocated

  int64_t pixels() const {
    return height * width;
  }
  int64_t count() const {
    return batch * pixels();
  } // values per channel
  int64_t out_pixels() const {
    return out_height * out_width;
  }
};

inline Geometry check_input(const char* op, const Tensor& u, Pool pool) {
  check_floating(op, "u", u);
  STD_TORCH_CHECK(u.dim() == 4, op, ": u must be [B, C, H, W], got ", describe(u.sizes()));
  const bool contiguous = u.is_contiguous(), last = is_channels_last(u);
  STD_TORCH_CHECK(
      u.numel() == 0 || contiguous || last, op, ": u must be contiguous or channels-last"
  );
  const int64_t height = u.size(2), width = u.size(3);
  const int64_t least = pool.kernel - 2 * pool.padding;
  STD_TORCH_CHECK(
      pool.kernel == 1 || (height >= least && width >= least), op,
      ": the pool needs a map of at least ", least, "x", least, ", got ", height, "x", width
  );
  return {
      u.size(0),
      u.size(1),
      height,
      width,
      pool.output(height),
      pool.output(width),
      pool,
      last && (!contiguous || height * width == 1),
      contiguous || u.numel() == 0 ? torch::headeronly::MemoryFormat::Contiguous
                                   : torch::headeronly::MemoryFormat::ChannelsLast
  };
}

// A map of u's shape (or y's) beside u: its dtype, device and layout.
inline void check_map(
    const char* op,
    const char* name,
    const Tensor& x,
    const Tensor& u,
    const Geometry& g,
    bool output
) {
  STD_TORCH_CHECK(
      x.scalar_type() == u.scalar_type(), op, ": ", name, " must have u's dtype, ",
      torch::headeronly::toString(u.scalar_type()), ", got ",
      torch::headeronly::toString(x.scalar_type())
  );
  STD_TORCH_CHECK(x.device() == u.device(), op, ": ", name, " must be on u's device");
  const int64_t h = output ? g.out_height : g.height, w = output ? g.out_width : g.width;
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(0) == g.batch && x.size(1) == g.channels && x.size(2) == h &&
          x.size(3) == w,
      op, ": ", name, " must have ", output ? "y" : "u", "'s shape, [", g.batch, ", ", g.channels,
      ", ", h, ", ", w, "], got ", describe(x.sizes())
  );
  const bool laid_out = g.format == torch::headeronly::MemoryFormat::ChannelsLast
                            ? is_channels_last(x)
                            : x.is_contiguous();
  STD_TORCH_CHECK(x.numel() == 0 || laid_out, op, ": ", name, " must have u's layout");
}

inline void check_map(
    const char* op, const char* name, const MaybeTensor& x, const Tensor& u, const Geometry& g
) {
  if (x) check_map(op, name, *x, u, g, false);
}

// A vector [C], in the accumulator dtype.
inline void check_channels(const char* op, const char* name, const Tensor& x, const Tensor& u) {
  const ScalarType expected = accumulator(u.scalar_type());
  STD_TORCH_CHECK(
      x.scalar_type() == expected, op, ": ", name, " must be ",
      torch::headeronly::toString(expected), ", got ", torch::headeronly::toString(x.scalar_type())
  );
  STD_TORCH_CHECK(x.device() == u.device(), op, ": ", name, " must be on u's device");
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == u.size(1) && x.is_contiguous(), op, ": ", name,
      " must be a contiguous [", u.size(1), "], got ", describe(x.sizes())
  );
}

inline void check_channels(
    const char* op, const char* name, const MaybeTensor& x, const Tensor& u
) {
  if (x) check_channels(op, name, *x, u);
}

inline Tensor empty_input_like(const Tensor& u, const Geometry& g) {
  const int64_t sizes[] = {g.batch, g.channels, g.height, g.width};
  return empty_map(u, sizes, g.format);
}

inline Tensor empty_output_like(const Tensor& u, const Geometry& g) {
  const int64_t sizes[] = {g.batch, g.channels, g.out_height, g.out_width};
  return empty_map(u, sizes, g.format);
}

// [count], on u's device.
inline Tensor empty_vector(const Tensor& u, ScalarType dtype, int64_t count) {
  const int64_t sizes[] = {count}, strides[] = {1};
  return empty_strided(u, dtype, sizes, strides);
}

// [C], in the accumulator dtype: to be overwritten, or zeros where u has no values.
inline Tensor channels_of(const Tensor& u) {
  const ScalarType dtype = accumulator(u.scalar_type());
  if (u.numel() == 0) return torch::stable::new_zeros(u, {u.size(1)}, dtype);
  return empty_vector(u, dtype, u.size(1));
}

// What stands for a result that is not wanted.
inline Tensor nothing(const Tensor& u) {
  return empty_vector(u, u.scalar_type(), 0);
}

// Checks batch_norm_statistics' arguments.
inline Geometry check_statistics(
    const Tensor& u, const MaybeTensor& running_mean, const MaybeTensor& running_var, bool training
) {
  constexpr const char* op = "batch_norm_statistics";
  const Geometry g = check_input(op, u, {1, 1, 0});
  check_channels(op, "running_mean", running_mean, u);
  check_channels(op, "running_var", running_var, u);
  STD_TORCH_CHECK(
      training || (running_mean && running_var), op,
      ": training=False needs running_mean and running_var"
  );
  return g;
}

} // namespace fastjac::norm_act_pool
