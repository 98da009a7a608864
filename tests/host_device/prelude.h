// Comes before each of csrc/cuda's sources: what nvcc and the CUDA toolkit would give.
#pragma once

// Before device.h, which has them take a device's branches.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda_executor/device.h"

// The operators register for this device's type.
#define CUDA PrivateUse1
