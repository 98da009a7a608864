// How an operator's kernels are launched. Its launches are written as a function of a `launch` that
// is called as launch(geometry, kernel, arguments...): on a GPU that is a Stream (stream.h), and
// where there is none the tests run the same launches on the CPU.
//
// Includes nothing of PyTorch.
#pragma once

#include <cstddef>

#include <vector_types.h>

namespace fastjac {

struct Geometry {
  dim3 blocks, threads;
  size_t shared = 0; // bytes of dynamic shared memory, per block
};

} // namespace fastjac
