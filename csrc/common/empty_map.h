// Where the maps that an operator gives are. For code that is bound to PyTorch; device code does not
// include it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

namespace fastjac {

// From this size on, bytes, a map on a CPU has memory of malloc's.
constexpr int64_t kOwnMemory = 1 << 20;
constexpr int64_t kAlignment = 64; // what PyTorch gives
constexpr int64_t kHugePage = 1 << 21; // Linux's, on most processors

// Asks for huge pages where `bytes` from p on cover some. Where a large map is new memory, as it is each
// time beyond malloc's greatest threshold, its page faults can cost several times the arithmetic. A
// system that has none, or refuses, gives what it gives without: nothing else depends on it.
inline void ask_for_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
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
  const int64_t n = batch * channels * height * width;
  const int64_t bytes = n * static_cast<int64_t>(x.element_size());
  if (!x.is_cpu() || bytes < kOwnMemory) {
    return torch::stable::empty(
        {sizes, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format
    );
  }
  void* const block = std::malloc(bytes + kAlignment - 1);
  STD_TORCH_CHECK(block != nullptr, "no memory for a map of ", bytes, " bytes");
  const auto past = reinterpret_cast<uintptr_t>(block) + kAlignment - 1;
  ask_for_huge_pages(block, bytes);
  const bool last = format == torch::headeronly::MemoryFormat::ChannelsLast;
  const int64_t area = height * width;
  const int64_t strides[] = {
      channels * area, last ? 1 : area, last ? width * channels : width, last ? channels : 1
  };
  return torch::stable::from_blob(
      reinterpret_cast<void*>(past - past % kAlignment), {sizes, 4}, {strides, 4}, x.device(),
      x.scalar_type(), [block](void*) { std::free(block); }
  );
}

} // namespace fastjac
