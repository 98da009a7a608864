// Calls of PyTorch's C functions, which return a status. For code that is bound to PyTorch; device code
// does not include it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

// PyTorch 2.11's check says which call failed, and later ones also why.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define FASTJAC_CHECK_CALL(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define FASTJAC_CHECK_CALL(call) TORCH_ERROR_CODE_CHECK(call)
#endif
