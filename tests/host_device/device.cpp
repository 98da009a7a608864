// The device, registered with PyTorch: its guard, hooks and generators, and what tests ask of it.

#include "device.h"

#include <atomic>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace host_device {
namespace {

std::atomic<bool> refuses_synchronisation = false;
std::atomic<uint64_t> launches = 0;

// Faults that a test plants.
std::atomic<bool> ignores_guards = false, launches_wrongly = false;

// All that a device does is done when its call returns: streams and events have nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    if (!ignores_guards) setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return {kType, c10::DeviceIndex(current_device())};
  }
  void setDevice(c10::Device device) const override {
    set_current_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    set_current_device(device.index());
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }
  void record(
      void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag
  ) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    note_synchronisation("synchronize");
  }
  void synchronizeEvent(void*) const override {
    note_synchronisation("synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    note_synchronisation("synchronize");
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Another device's name for a generator of the host.
class Generator final : public c10::GeneratorImpl {
 public:
  Generator(at::Generator host, int device)
      : GeneratorImpl(
            c10::Device(kType, c10::DeviceIndex(device)),
            c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)
        ),
        host(std::move(host)) {}

  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    host.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host.get_offset();
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }

  at::Generator host;

 private:
  Generator* clone_impl() const override {
    return new Generator(host.clone(), device().index());
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return kDevices;
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    set_current_device(device);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return c10::DeviceIndex(current_device());
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const int before = current_device();
    set_current_device(device);
    return c10::DeviceIndex(before);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device < 0 ? current_device() : device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return new_generator(device < 0 ? current_device() : device);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

TORCH_LIBRARY(host_device, m) {
  m.def("current_device", [] { return int64_t(current_device()); });
  m.def("set_device", [](int64_t device) { set_current_device(int(device)); });
  m.def("device_count", [] { return int64_t(kDevices); });
  // Gives what it was.
  m.def("refuse_synchronisation", [](bool refuse) {
    return refuses_synchronisation.exchange(refuse);
  });
  m.def("launches", [] { return int64_t(launches); });
  m.def("ignore_guards", [](bool ignore) { ignores_guards = ignore; });
  m.def("launch_wrongly", [](bool wrongly) { launches_wrongly = wrongly; });
  m.def("seed", [](int64_t device, int64_t seed) {
    at::Generator(default_generator(int(device))).set_current_seed(uint64_t(seed));
  });
  m.def("get_rng_state", [](int64_t device) { return default_generator(int(device)).get_state(); });
  m.def("set_rng_state", [](int64_t device, at::Tensor state) {
    at::Generator(default_generator(int(device))).set_state(state);
  });
}

} // namespace

uint64_t count_launch() {
  return launches++;
}

void plant_wrong_launch(unsigned& threads) {
  if (launches_wrongly) threads *= 2;
}

void note_synchronisation(const std::string& what) {
  TORCH_CHECK(!refuses_synchronisation, what, ": the host would wait for the device");
}

const at::Generator& default_generator(int device) {
  static const auto* all =
      new std::array<at::Generator, kDevices>{new_generator(0), new_generator(1)};
  return all->at(device);
}

at::Generator new_generator(int device) {
  return at::make_generator<Generator>(at::detail::createCPUGenerator(), device);
}

at::Generator on_host(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

} // namespace host_device
