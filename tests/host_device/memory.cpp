#include "memory.h"

#include "device.h"

#include <condition_variable>
#include <cstring>
#include <future>
#include <map>
#include <mutex>
#include <queue>
#include <thread>

#include <c10/core/CPUAllocator.h>

namespace host_device {
namespace {

struct Block {
  c10::Storage host;
  int device;
};

struct Blocks {
  std::mutex mutex;
  std::map<const void*, Block> of_address;
};

// Never destroyed: tensors may outlive it.
Blocks& blocks() {
  static auto* value = new Blocks;
  return *value;
}

void release(void* data) {
  c10::Storage host; // freed when the lock is
  const std::lock_guard lock(blocks().mutex);
  host = std::move(blocks().of_address.extract(data).mapped().host);
}

thread_local int current = 0;

// Runs what it is given, one after another.
class Worker {
 public:
  Worker() {
    std::thread([this] { work(); }).detach();
  }

  void run(const std::function<void()>& kernel) {
    std::packaged_task<void()> task(kernel);
    std::future<void> done = task.get_future();
    {
      const std::lock_guard lock(mutex_);
      tasks_.push(std::move(task));
    }
    waiting_.notify_one();
    done.get(); // and throws what the kernel threw
  }

 private:
  void work() {
    while (true) {
      std::unique_lock lock(mutex_);
      waiting_.wait(lock, [this] { return !tasks_.empty(); });
      std::packaged_task<void()> task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable waiting_;
  std::queue<std::packaged_task<void()>> tasks_;
};

} // namespace

std::vector<Allocation> allocations(int device) {
  const std::lock_guard lock(blocks().mutex);
  std::vector<Allocation> found;
  for (const auto& [data, block] : blocks().of_address) {
    if (block.device == device) found.push_back({data, block.host.nbytes()});
  }
  return found;
}

int current_device() {
  return current;
}

void run(const std::function<void()>& kernel) {
  static auto* worker = new Worker; // its thread ends with the process
  worker->run(kernel);
}

void set_current_device(int device) {
  TORCH_CHECK(
      device >= 0 && device < kDevices, "the index of a device must be from 0 to ", kDevices - 1,
      ", got ", device
  );
  current = device;
}

c10::DataPtr as_device_memory(c10::Storage host, c10::Device device) {
  void* const data = host.mutable_data();
  if (data == nullptr) return {nullptr, device};
  const std::lock_guard lock(blocks().mutex);
  blocks().of_address.insert_or_assign(data, Block{std::move(host), device.index()});
  return {data, data, &release, device};
}

c10::DataPtr Allocator::allocate(size_t bytes) {
  const c10::Device device(c10::DeviceType::PrivateUse1, c10::DeviceIndex(current_device()));
  c10::Storage host(
      c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), bytes, c10::GetCPUAllocator(), true
      )
  );
  // NaN in every floating-point type: what is read before it is written shows.
  if (bytes > 0) std::memset(host.mutable_data(), 0xff, bytes);
  return as_device_memory(std::move(host), device);
}

c10::DeleterFnPtr Allocator::raw_deleter() const {
  return &release;
}

void Allocator::copy_data(void* to, const void* from, size_t bytes) const {
  default_copy_data(to, from, bytes);
}

Allocator& allocator() {
  static auto* value = new Allocator;
  return *value;
}

namespace {

REGISTER_ALLOCATOR(kType, &allocator())

} // namespace
} // namespace host_device
