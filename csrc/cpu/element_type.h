// From PyTorch's name of an element type to the type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "small_floats.h"

namespace fastjac {

// f(a zero of the type). Of the four that operators take: their host side has seen to it.
template <typename F>
void for_element_type(torch::headeronly::ScalarType type, const F& f) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(Half());
  }
}

} // namespace fastjac
