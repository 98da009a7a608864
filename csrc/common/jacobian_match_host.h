// jacobian_match's host side, the same for every device: checks, layout, allocation, empty return.
#pragma once

#include <limits>
#include <tuple>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "empty.h"
#include "layout.h"

namespace fastjac::jacobian_match {

// js, jt: [B, ...]. Calls run(js, jt, v, loss) with tensors whose sample i is the i-th run of N
// elements, in the same order for js, jt and v; not called where there are no elements. Returns
// loss [B], in the accumulator dtype, and v with the strides that empty_like(js) has.
template <typename Run>
std::tuple<Tensor, Tensor> allocate_and_run(
    const Tensor& js, const Tensor& jt, double eps, const Run& run
) {
  constexpr const char* op = "jacobian_match";
  check_floating(op, "js", js);
  STD_TORCH_CHECK(js.dim() >= 1, op, ": js must be [B, ...], got a tensor with no dimensions");
  check_same_kind(op, "jt", jt, "js", js);
  STD_TORCH_CHECK(
      eps >= std::numeric_limits<float>::min() && eps <= std::numeric_limits<float>::max(), op,
      ": eps must be positive, and a normal number in float32, got ", eps
  );

  const ScalarType dtype = accumulator(js.scalar_type());
  if (js.numel() == 0) {
    return {torch::stable::new_zeros(js, {js.size(0)}, dtype), torch::stable::empty_like(js)};
  }
  Tensor loss = empty_strided(js, dtype, {js.size(0)}, {1});
  Tensor v = js.is_contiguous() ? empty_strided(js, js.scalar_type(), js.sizes(), js.strides())
                                : torch::stable::empty_like(js);
  if (batch_is_outermost(v)) {
    run(with_layout_of(v, js), with_layout_of(v, jt), v, loss);
  } else {
    Tensor js_rows = as_contiguous(js), jt_rows = as_contiguous(jt);
    Tensor v_rows = torch::stable::empty_like(js_rows);
    run(js_rows, jt_rows, v_rows, loss);
    torch::stable::copy_(v, v_rows);
  }
  return {loss, v};
}

} // namespace fastjac::jacobian_match
