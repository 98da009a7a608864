// Memory layouts of batched tensors, for kernels that see each sample as n consecutive elements in
// any order. For code that is bound to PyTorch; device code does not include it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastjac {

using torch::stable::Tensor;

inline bool same_strides(const Tensor& x, const Tensor& y) {
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) > 1 && x.stride(i) != y.stride(i)) return false;
  }
  return true;
}

// x itself where it is contiguous, without the call that PyTorch's would be.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// x itself where its strides are those of `like`, else a copy that has them.
inline Tensor with_layout_of(const Tensor& like, const Tensor& x) {
  if (same_strides(like, x)) return x;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

// Whether sample i of a dense x [B, ...] is x's i-th run of numel / B elements.
inline bool batch_is_outermost(const Tensor& x) {
  return x.size(0) <= 1 || x.numel() == 0 || x.stride(0) == x.numel() / x.size(0);
}

// Whether x [B, C, H, W] has the strides of a dense tensor with the channels last, or of a contiguous
// one. Dimensions of size one have any stride; both can hold.
inline bool is_channels_last(const Tensor& x) {
  const int64_t order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int64_t i : order) {
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

} // namespace fastjac
