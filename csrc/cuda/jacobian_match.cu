// jacobian_match on CUDA: registration. The device code, what it does, and how it is launched are in
// jacobian_match.cuh.

#include <limits>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/jacobian_match_host.h"
#include "jacobian_match.cuh"
#include "stream.h"

namespace fastjac::jacobian_match {
namespace {

template <typename scalar_t>
void match(
    const Tensor& js,
    const Tensor& jt,
    const Tensor& v,
    const Tensor& loss,
    bool normalize,
    double eps
) {
  using acc_t = accumulator_t<scalar_t>;
  const int64_t batch = js.size(0);
  const Chunking c = chunking(js.numel() / batch);
  STD_TORCH_CHECK(
      batch <= std::numeric_limits<int32_t>::max() / c.chunks,
      "jacobian_match: js must have at most ", std::numeric_limits<int32_t>::max() / c.chunks,
      " samples of this size on CUDA, got ", batch
  );
  Tensor partial = torch::stable::new_empty(loss, {2, batch, c.chunks, 2});
  const Operands<scalar_t> operands{
      static_cast<const scalar_t*>(js.const_data_ptr()),
      static_cast<const scalar_t*>(jt.const_data_ptr()),
      static_cast<scalar_t*>(v.mutable_data_ptr()),
      static_cast<acc_t*>(loss.mutable_data_ptr()),
      static_cast<Sums<acc_t>*>(partial.mutable_data_ptr()),
      batch
  };
  match(Stream(js), operands, c, normalize, eps);
}

std::tuple<Tensor, Tensor> jacobian_match_cuda(
    const Tensor& js, const Tensor& jt, bool normalize, double eps
) {
  return allocate_and_run(
      js, jt, eps, [&](const Tensor& s, const Tensor& t, const Tensor& v, const Tensor& loss) {
        const torch::stable::accelerator::DeviceGuard guard(s.get_device_index());
        switch (s.scalar_type()) {
          case ScalarType::Double:
            return match<double>(s, t, v, loss, normalize, eps);
          case ScalarType::Float:
            return match<float>(s, t, v, loss, normalize, eps);
          case ScalarType::BFloat16:
            return match<__nv_bfloat16>(s, t, v, loss, normalize, eps);
          default:
            return match<__half>(s, t, v, loss, normalize, eps);
        }
      }
  );
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m) {
  m.impl("jacobian_match", TORCH_BOX(&jacobian_match_cuda));
}

} // namespace fastjac::jacobian_match
