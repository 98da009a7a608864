// jacobian_match on the CPU: threads and registration. The kernels, and what they do, are in
// jacobian_match.h.

#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/jacobian_match_host.h"
#include "element_type.h"
#include "jacobian_match.h"

namespace fastjac::jacobian_match {
namespace {

struct Serial {
  template <typename F>
  void operator()(int64_t blocks, const F& f) const {
    f(0, blocks);
  }
};

struct Parallel {
  template <typename F>
  void operator()(int64_t blocks, const F& f) const {
    torch::stable::parallel_for(0, blocks, kGrain / kBlock, f);
  }
};

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
  const int64_t batch = js.size(0), n = js.numel() / batch;
  const auto* s = static_cast<const scalar_t*>(js.const_data_ptr()); // [B, N]
  const auto* t = static_cast<const scalar_t*>(jt.const_data_ptr()); // [B, N]
  auto* out = static_cast<scalar_t*>(v.mutable_data_ptr()); // [B, N]
  auto* losses = static_cast<acc_t*>(loss.mutable_data_ptr()); // [B]

  const auto sample = [&](int64_t i, const auto& each_block) {
    losses[i] = match_sample<scalar_t, acc_t>(
        {s + i * n, t + i * n, out + i * n}, n, normalize, acc_t(eps), each_block
    );
  };
  if (batch >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(
        0, batch, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) sample(i, Serial());
        }
    );
  } else {
    for (int64_t i = 0; i < batch; ++i) sample(i, Parallel());
  }
}

std::tuple<Tensor, Tensor> jacobian_match_cpu(
    const Tensor& js, const Tensor& jt, bool normalize, double eps
) {
  return allocate_and_run(
      js, jt, eps, [&](const Tensor& s, const Tensor& t, const Tensor& v, const Tensor& loss) {
        for_element_type(s.scalar_type(), [&](auto zero) {
          match<decltype(zero)>(s, t, v, loss, normalize, eps);
        });
      }
  );
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("jacobian_match", TORCH_BOX(&jacobian_match_cpu));
}

} // namespace fastjac::jacobian_match
