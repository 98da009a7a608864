// PyTorch's current stream, on which kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/checked_call.h"
#include "launch.h"

namespace fastjac {

// The current stream of x's device.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& x) {
    void* stream = nullptr;
    FASTJAC_CHECK_CALL(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... P, typename... A>
  void operator()(const Geometry& g, void (*kernel)(P...), A... arguments) const {
    kernel<<<g.blocks, g.threads, g.shared, stream_>>>(static_cast<P>(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  cudaStream_t stream_;
};

} // namespace fastjac
