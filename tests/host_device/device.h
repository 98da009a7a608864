// A device of PyTorch's PrivateUse1 type without hardware: memory of the host under another name.
#pragma once

#include <string>

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

#include "memory.h"

namespace host_device {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

void set_current_device(int device);

// Memory of the current device.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t bytes) const override;
};
Allocator& allocator();

// The same memory, as the device's.
c10::DataPtr as_device_memory(c10::Storage host, c10::Device device);

// Raises where the host must not wait for the device.
void note_synchronisation(const std::string& what);

// A device's own generator, which torch.manual_seed does not share with the host's.
const at::Generator& default_generator(int device);
at::Generator new_generator(int device);
// The one of the host that draws its numbers.
at::Generator on_host(const at::Generator& generator);

} // namespace host_device
