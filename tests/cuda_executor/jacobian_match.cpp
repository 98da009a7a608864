#include "jacobian_match.h"

#include <cstring>
#include <vector>

#include "device.h"
#include "dtypes.h"

#include "../../csrc/cuda/jacobian_match.cuh"

int64_t run_jacobian_match(
    const std::string& dtype,
    uintptr_t js,
    uintptr_t jt,
    uintptr_t v,
    uintptr_t loss,
    int64_t batch,
    int64_t n,
    bool normalize,
    double eps,
    uint64_t seed
) {
  using namespace fastjac::jacobian_match;
  const Chunking c = chunking(n);
  executor::for_dtype(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = fastjac::accumulator_t<scalar_t>;
    std::vector<Sums<acc_t>> partial(2 * batch * c.chunks);
    std::memset(partial.data(), 0xff, partial.size() * sizeof(partial[0])); // NaN
    const Operands<scalar_t> operands{
        reinterpret_cast<const scalar_t*>(js),
        reinterpret_cast<const scalar_t*>(jt),
        reinterpret_cast<scalar_t*>(v),
        reinterpret_cast<acc_t*>(loss),
        partial.data(),
        batch
    };
    const size_t bytes = batch * n * sizeof(scalar_t);
    const executor::Device device(
        seed, {{"js", operands.js, bytes, false},
               {"jt", operands.jt, bytes, false},
               {"v", operands.v, bytes, true},
               {"loss", operands.loss, batch * sizeof(acc_t), true},
               {"partial", partial.data(), partial.size() * sizeof(partial[0]), true}}
    );
    match(device, operands, c, normalize, eps);
  });
  return c.chunks;
}
