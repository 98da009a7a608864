// Every operator's schema. The kernels of a device register themselves in their own shared object,
// so that the CUDA one stays out of a PyTorch that has no CUDA.
//
// fastjac/ops/<operator>.py states the same schema: it declares the operator where this library is
// absent, and refuses a library that was built from another one.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastjac, m) {
  m.def(
      "jacobian_match(Tensor js, Tensor jt, bool normalize, float eps) -> (Tensor loss, Tensor v)"
  );
}
