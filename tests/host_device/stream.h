// Stands where csrc/cuda/stream.h does: the operators' launches run on the CPU, by the executor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda_executor/executor.h"
#include "host_device/memory.h"

namespace fastjac {

class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& x) : device_(x.get_device_index()) {}

  template <typename... P, typename... A>
  void operator()(Geometry g, void (*kernel)(P...), A... arguments) const {
    const int current = host_device::current_device();
    STD_TORCH_CHECK(
        current == device_, "a kernel is launched on device ", current, ", for tensors of device ",
        device_
    );
    host_device::plant_wrong_launch(g.threads.x);
    // A kernel may access all that is allocated on its device, and nothing else.
    std::vector<executor::Buffer> buffers;
    for (const host_device::Allocation& a : host_device::allocations(device_)) {
      buffers.push_back({"the device's memory", a.data, a.bytes, true});
    }
    host_device::run([&] {
      executor::Device(host_device::count_launch(), buffers)(g, kernel, arguments...);
    });
  }

 private:
  int device_;
};

} // namespace fastjac
