// The device's memory, which is the host's: what is allocated on each device, and which one is current.
// Includes nothing of PyTorch, for both libraries to share: the device, and fastjac's operators for it.
#pragma once

#include <cstddef>
#include <vector>

namespace host_device {

constexpr int kDevices = 2;

struct Allocation {
  const void* data;
  size_t bytes;
};

std::vector<Allocation> allocations(int device);
int current_device(); // of this thread

} // namespace host_device
