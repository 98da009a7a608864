// What the device shares with fastjac's operators for it: its memory, which is the host's, and where
// kernels run. Includes nothing of PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace host_device {

constexpr int kDevices = 2;

struct Allocation {
  const void* data;
  size_t bytes;
};

std::vector<Allocation> allocations(int device);
int current_device(); // of this thread

// On the one thread that runs kernels, whose thread_local variables are the shared memory.
void run(const std::function<void()>& kernel);

// How many kernels were launched before.
uint64_t count_launch();

// Where a test has asked for it, launches with other threads than the operator wants.
void plant_wrong_launch(unsigned& threads);

} // namespace host_device
