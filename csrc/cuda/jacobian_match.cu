// jacobian_match on CUDA: launches and registration. The device code, and what it does, is in
// jacobian_match.cuh.

#include <algorithm>
#include <limits>
#include <tuple>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/jacobian_match_host.h"
#include "jacobian_match.cuh"
#include "stream.h"

namespace fastjac::jacobian_match {
namespace {

Chunking chunking(int64_t n) {
  constexpr int64_t step = kThreads * kElementsPerThread;
  const int64_t steps = (n + step - 1) / step;
  const int64_t steps_per_chunk = (steps + kMaxChunks - 1) / kMaxChunks;
  return {n, steps_per_chunk * step, (steps + steps_per_chunk - 1) / steps_per_chunk};
}

template <typename scalar_t, int kVector>
void launch(
    const Tensor& js,
    const Tensor& jt,
    const Tensor& v,
    const Tensor& loss,
    bool normalize,
    double eps
) {
  using acc_t = typename Accumulator<scalar_t>::type;
  const int64_t batch = js.size(0);
  const Chunking c = chunking(js.numel() / batch);
  STD_TORCH_CHECK(
      batch <= std::numeric_limits<int32_t>::max() / c.chunks,
      "jacobian_match: js must have at most ", std::numeric_limits<int32_t>::max() / c.chunks,
      " samples of this size on CUDA, got ", batch
  );

  const auto* s = static_cast<const scalar_t*>(js.const_data_ptr()); // [B, N]
  const auto* t = static_cast<const scalar_t*>(jt.const_data_ptr()); // [B, N]
  auto* out = static_cast<scalar_t*>(v.mutable_data_ptr()); // [B, N]
  auto* losses = static_cast<acc_t*>(loss.mutable_data_ptr()); // [B]
  Tensor partial = torch::stable::new_empty(loss, {2, batch, c.chunks, 2});
  auto* norms = static_cast<Sums<acc_t>*>(partial.mutable_data_ptr()); // [B, chunks]
  auto* differences = norms + batch * c.chunks; // [B, chunks]

  const auto blocks = static_cast<unsigned>(batch * c.chunks);
  const cudaStream_t stream = current_stream(js);
  if (normalize) {
    sum_squares<kVector><<<blocks, kThreads, 0, stream>>>(s, t, norms, c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sum_difference<kVector>
        <<<blocks, kThreads, 0, stream>>>(s, t, norms, differences, acc_t(eps), c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    write_gradient<kVector>
        <<<blocks, kThreads, 0, stream>>>(s, t, norms, differences, out, losses, acc_t(eps), c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    match_raw<kVector><<<blocks, kThreads, 0, stream>>>(s, t, out, differences, c);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    write_loss<<<static_cast<unsigned>(batch), kThreads, 0, stream>>>(
        differences, losses, c.chunks
    );
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename scalar_t>
void match(
    const Tensor& js,
    const Tensor& jt,
    const Tensor& v,
    const Tensor& loss,
    bool normalize,
    double eps
) {
  constexpr int kVector = 16 / sizeof(scalar_t);
  const auto aligned = [](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  };
  const bool whole_vectors = (js.numel() / js.size(0)) % kVector == 0;
  if (whole_vectors && aligned(js) && aligned(jt) && aligned(v)) {
    launch<scalar_t, kVector>(js, jt, v, loss, normalize, eps);
  } else {
    launch<scalar_t, 1>(js, jt, v, loss, normalize, eps);
  }
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
