// Argument checks: each names the operator, the argument, what was expected and what came.
// For code that is bound to PyTorch; device code does not include it.
#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace fastjac {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

inline void check_floating(const char* op, const char* name, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      op, ": ", name, " must be Double, Float, BFloat16 or Half, got ",
      torch::headeronly::toString(dtype)
  );
}

inline void check_same_kind(
    const char* op, const char* name, const Tensor& x, const char* other_name, const Tensor& other
) {
  STD_TORCH_CHECK(
      x.scalar_type() == other.scalar_type(), op, ": ", name, " must have ", other_name,
      "'s dtype, ", torch::headeronly::toString(other.scalar_type()), ", got ",
      torch::headeronly::toString(x.scalar_type())
  );
  STD_TORCH_CHECK(
      x.device() == other.device(), op, ": ", name, " must be on ", other_name, "'s device"
  );
  STD_TORCH_CHECK(
      x.sizes().equals(other.sizes()), op, ": ", name, " must have ", other_name, "'s shape, ",
      describe(other.sizes()), ", got ", describe(x.sizes())
  );
}

// The dtype that sums over elements of `dtype` are kept in.
inline ScalarType accumulator(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

} // namespace fastjac
