// Where the tensors that an operator gives are. For code that is bound to PyTorch; device code does not
// include it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include "checked_call.h"

namespace fastjac {

// From this size on, bytes, a map on a CPU has memory of malloc's.
constexpr int64_t kOwnMemory = 1 << 20;
constexpr int64_t kAlignment = 64; // what PyTorch gives

// On x's device. torch::stable::empty would look its operator up by name, at a microsecond.
inline torch::stable::Tensor empty_strided(
    const torch::stable::Tensor& x,
    torch::headeronly::ScalarType dtype,
    torch::headeronly::IntHeaderOnlyArrayRef sizes,
    torch::headeronly::IntHeaderOnlyArrayRef strides
) {
  int32_t device_type;
  AtenTensorHandle result;
  FASTJAC_CHECK_CALL(aoti_torch_get_device_type(x.get(), &device_type));
  FASTJAC_CHECK_CALL(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      x.get_device_index(), &result
  ));
  return torch::stable::Tensor(result);
}

// [B, C, H, W] of x's dtype and device.
//
// PyTorch aligns a CPU's tensors by posix_memalign. In glibc's heap a block so made is cut to its size,
// and once freed it has no room for the next of the same size and its alignment: maps that come and go
// leave holes, as large as what they hold. malloc's blocks can be had again; the room to align them is
// asked for with them.
inline torch::stable::Tensor empty_map(
    const torch::stable::Tensor& x,
    const int64_t (&sizes)[4],
    torch::headeronly::MemoryFormat format
) {
  const auto [batch, channels, height, width] = sizes;
  const int64_t bytes = batch * channels * height * width * static_cast<int64_t>(x.element_size());
  const bool last = format == torch::headeronly::MemoryFormat::ChannelsLast;
  // As PyTorch has it: where a contiguous map is empty, no dimension counts for less than one.
  const auto at_least_1 = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t row = last ? width * channels : at_least_1(width);
  const int64_t area = row * at_least_1(height);
  const int64_t strides[] = {
      last ? row * height : area * at_least_1(channels), last ? 1 : area, row, last ? channels : 1
  };
  if (!x.is_cpu() || bytes < kOwnMemory) return empty_strided(x, x.scalar_type(), sizes, strides);
  void* const block = std::malloc(bytes + kAlignment - 1);
  STD_TORCH_CHECK(block != nullptr, "no memory for a map of ", bytes, " bytes");
  const auto past = reinterpret_cast<uintptr_t>(block) + kAlignment - 1;
  return torch::stable::from_blob(
      reinterpret_cast<void*>(past - past % kAlignment), {sizes, 4}, {strides, 4}, x.device(),
      x.scalar_type(), [block](void*) { std::free(block); }
  );
}

} // namespace fastjac
