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
  m.def("channel_statistics(Tensor u) -> (Tensor mean, Tensor var)");
  m.def(
      "batch_norm_statistics(Tensor u, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "bool training, float momentum, float eps) -> (Tensor mean, Tensor invstd)"
  );
  m.def(
      "norm_act_pool(Tensor u, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, str activation, float slope, str pool) -> Tensor y"
  );
  m.def(
      "norm_act_pool_backward(Tensor gy, Tensor u, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor invstd, str activation, float slope, str pool, bool training, "
      "Tensor? coefficient, Tensor? curvature, bool[] mask) "
      "-> (Tensor gu, Tensor gresidual, Tensor gweight, Tensor gbias)"
  );
  m.def(
      "norm_act_pool_backward_(Tensor gy, Tensor(a!) u, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor invstd, str activation, float slope, str pool, "
      "bool training, Tensor? coefficient, Tensor? curvature, bool[] mask) "
      "-> (Tensor gresidual, Tensor gweight, Tensor gbias)"
  );
  m.def(
      "norm_act_pool_pushforward(Tensor tu, Tensor? tresidual, Tensor gy, Tensor u, "
      "Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "str activation, float slope, str pool, str statistics, bool curvature) "
      "-> (Tensor ty, Tensor gweight, Tensor coefficient, Tensor kappa)"
  );
  m.def(
      "window_crop(Tensor x, Tensor start, int height, int width, float fill, bool adjoint) "
      "-> Tensor crop"
  );
  m.def("attention_window(Tensor features, int k, float power) -> (Tensor position, Tensor value)");
  m.def(
      "attention_window_slope(Tensor features, Tensor position, int k, float power) "
      "-> (Tensor slope, Tensor bend)"
  );
  m.def(
      "winograd(Tensor x, Tensor weight, Tensor? bias, int pad_height, int pad_width, bool "
      "adjoint) "
      "-> Tensor y"
  );
  m.def(
      "winograd_weight(Tensor gy, Tensor x, Tensor weight, int pad_height, int pad_width) "
      "-> Tensor gweight"
  );
}
