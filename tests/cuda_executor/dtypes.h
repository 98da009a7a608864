// The element types that operators are instantiated for, by the names that PyTorch gives them.
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace executor {

// Calls run(zero) with a zero of the type.
template <typename Run>
void for_dtype(const std::string& dtype, const Run& run) {
  if (dtype == "float64") return run(double{});
  if (dtype == "float32") return run(float{});
  if (dtype == "bfloat16") return run(__nv_bfloat16{});
  if (dtype == "float16") return run(__half{});
  throw std::invalid_argument("no kernel takes " + dtype);
}

} // namespace executor
