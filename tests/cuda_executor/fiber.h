// Threads of execution that hand over to each other by name.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <new>
#include <utility>

#include <sys/mman.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace executor {

class Fiber {
 public:
  static constexpr size_t kStack = 256 << 10; // reserved; a page counts when it is touched

  Fiber() {
    // The lowest page stays out of bounds, so that an overflow is no silent write elsewhere.
    stack_ = static_cast<char*>(
        mmap(nullptr, kStack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    );
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(stack_ + kGuard, kStack - kGuard, PROT_READ | PROT_WRITE) != 0) {
      munmap(stack_, kStack);
      throw std::bad_alloc();
    }
  }
  ~Fiber() {
    munmap(stack_, kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  bool holds(const void* address) const {
    return address >= stack_ && address < stack_ + kStack;
  }

  // The next resume() starts `entry`, which must not return. Whatever ran here before is dropped.
  void start(void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_ + kGuard, kStack - kGuard);
#endif
    getcontext(&context_);
    context_.uc_stack = {stack_ + kGuard, 0, kStack - kGuard};
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    started_ = false;
  }

  // Runs the fiber until it calls suspend(). From outside of any fiber.
  void resume() {
#ifdef __SANITIZE_ADDRESS__
    void* fake;
    __sanitizer_start_switch_fiber(&fake, stack_ + kGuard, kStack - kGuard);
    swapcontext(&outside_context_, &context_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    // A ucontext only to start on the new stack: it costs a system call each time.
    if (_setjmp(outside_) != 0) return;
    if (!std::exchange(started_, true)) setcontext(&context_);
    _longjmp(inside_, 1);
#endif
  }

  void suspend() {
#ifdef __SANITIZE_ADDRESS__
    void* fake;
    __sanitizer_start_switch_fiber(&fake, outside_stack_, outside_stack_size_);
    swapcontext(&context_, &outside_context_);
    entered();
    (void)fake;
#else
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
#endif
  }

  // First thing in `entry`.
  void entered() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &outside_stack_, &outside_stack_size_);
#endif
  }

 private:
  static constexpr size_t kGuard = 4096;

  char* stack_;
  ucontext_t context_;
  bool started_ = false;
#ifdef __SANITIZE_ADDRESS__
  ucontext_t outside_context_;
  const void* outside_stack_;
  size_t outside_stack_size_;
#else
  jmp_buf inside_, outside_;
#endif
};

} // namespace executor
