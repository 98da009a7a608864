// Runs CUDA device code on the CPU, so that a wrong index, a wrong reduction or a missing barrier
// fails a test where there is no GPU.
//
// Every thread of a block is a fiber with a stack of its own. Blocks run one after another, in an
// order that the seed shuffles; so do a block's threads, from one wait (barrier, shuffle, vote) to
// the next: by the seed, either warp by warp, each as far ahead of the others as the barriers let
// it, or in any order. A launch ends with a Fault, which names the thread, when
//
//   * a thread exits, or waits elsewhere, while others wait at a barrier or for it in their warp;
//   * an access is outside of every buffer, misaligned, or beyond an array's bounds; an index
//     overflows; a buffer that is an input is written;
//   * two threads access the same byte, at least one of them writes, and no barrier is between:
//     found from the barriers alone, whatever the order was. Shuffles order no memory. Threads of
//     different blocks are never ordered within a launch, __threadfence or not;
//   * shared memory is read that this block has not written.
//
// Shared memory holds NaN at the start of a block. The accesses are reported by the hooks of
// -fsanitize=thread, which device code is compiled with (memory.cpp has the hooks; no sanitizer's
// runtime is linked). Under FASTJAC_ASAN, AddressSanitizer takes their place: bounds alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace executor {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Device memory that kernels may access.
struct Buffer {
  std::string name;
  const void* data;
  size_t bytes;
  bool writable;
};

// Stands where csrc/cuda/stream.h has Stream: launches one kernel after another.
class Device {
 public:
  Device(uint64_t seed, std::vector<Buffer> buffers);

  template <typename... P, typename... A>
  void operator()(const fastjac::Geometry& geometry, void (*kernel)(P...), A... arguments) const {
    struct Call {
      void (*kernel)(P...);
      std::tuple<P...> arguments;
    } call{kernel, {static_cast<P>(arguments)...}};
    const auto invoke = [](void* p) {
      const Call& c = *static_cast<Call*>(p);
      std::apply(c.kernel, c.arguments);
    };
    run(geometry, reinterpret_cast<const void*>(kernel), invoke, &call, sizeof(call));
  }

 private:
  void run(
      const fastjac::Geometry& geometry,
      const void* kernel,
      void (*invoke)(void*),
      void* call,
      size_t call_bytes
  ) const;

  mutable uint64_t seed_; // another for each launch
  std::vector<Buffer> buffers_;
};

// The kernels launched since the last call, by their mangled names.
std::set<std::string> take_launched();

// The storage of `extern __shared__ type name[];`: state it in the namespace of the kernel. A
// launch may use as many bytes as its geometry asks for.
#define EXECUTOR_DYNAMIC_SHARED(type, name)                                    \
  alignas(16) thread_local type name[executor::kDynamicShared / sizeof(type)]; \
  static const bool name##_is_dynamic = executor::dynamic_shared([] { return (void*)name; })

constexpr size_t kDynamicShared = 64 << 10;
bool dynamic_shared(void* (*address)());

} // namespace executor
