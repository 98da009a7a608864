#include "memory.h"

#include <algorithm>
#include <cstring>

#include <link.h>

#include "device.h"
#include "running.h"

namespace executor {
namespace {

constexpr unsigned kWarp = 32;
// In a stamp of reads: several lanes of warp w, or threads of several warps.
constexpr unsigned kLanesOfWarp = 1024, kManyWarps = 2047;

// Makes the segment of this library's thread_local variables, which is the shared memory, exist.
thread_local volatile char first_of_shared;

struct Range {
  uintptr_t begin, end;
  bool holds(uintptr_t b, uintptr_t e) const {
    return begin <= b && e <= end;
  }
};

template <typename T>
Range range_of(const T& x) {
  const auto begin = reinterpret_cast<uintptr_t>(&x);
  return {begin, begin + sizeof(x)};
}

// This library: its shared memory, and what a kernel may read beside its buffers.
struct Image {
  Range shared{};
  std::vector<Range> constants;

  Image() {
    first_of_shared = 0;
    constants = {range_of(threadIdx), range_of(blockIdx), range_of(blockDim), range_of(gridDim)};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          return static_cast<Image*>(self)->read(*info);
        },
        this
    );
  }

  int read(const dl_phdr_info& info) {
    std::vector<Range> loaded;
    Range tls{};
    bool ours = false;
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const auto& header = info.dlpi_phdr[i];
      if (header.p_type == PT_LOAD) {
        const uintptr_t begin = info.dlpi_addr + header.p_vaddr;
        if (!(header.p_flags & PF_W)) loaded.push_back({begin, begin + header.p_memsz});
        const uintptr_t here = range_of(threadIdx).begin;
        ours |= begin <= here && here < begin + header.p_memsz;
      } else if (header.p_type == PT_TLS) {
        const auto begin = reinterpret_cast<uintptr_t>(info.dlpi_tls_data);
        tls = {begin, begin + header.p_memsz};
      }
    }
    if (!ours) return 0;
    shared = tls;
    constants.insert(constants.end(), loaded.begin(), loaded.end());
    return 1;
  }
};

const Image& image() {
  static const Image value;
  return value;
}

std::vector<void* (*)()>& dynamic_arrays() {
  static std::vector<void* (*)()> arrays;
  return arrays;
}

const char* verb(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
}

} // namespace

bool dynamic_shared(void* (*address)()) {
  dynamic_arrays().push_back(address);
  return true;
}

void Memory::begin_launch(const std::vector<Buffer>& buffers, size_t dynamic_shared) {
  if (regions_.empty()) {
    const Range shared = image().shared;
    regions_.push_back({"shared memory", shared.begin, shared.end, true, true, {}});
    regions_[0].bytes.resize(shared.end - shared.begin);
  }
  regions_.resize(1 + buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& b = buffers[i];
    Region& r = regions_[1 + i];
    r.name = b.name;
    r.begin = reinterpret_cast<uintptr_t>(b.data);
    r.end = r.begin + b.bytes;
    r.writable = b.writable;
  }
  last_ = 0;
  unavailable_.clear();
  for (const auto& array : dynamic_arrays()) {
    const auto begin = reinterpret_cast<uintptr_t>(array());
    unavailable_.push_back(begin + dynamic_shared);
    unavailable_.push_back(begin + kDynamicShared);
  }
  launch_begin_ = ++interval_;
  blocks_.clear();
}

void Memory::begin_block(unsigned block) {
  block_begin_ = ++interval_;
  blocks_.emplace_back(block_begin_, block);
  // All ones: NaN in every floating-point type.
  const Region& shared = regions_[0];
  std::memset(reinterpret_cast<void*>(shared.begin), 0xff, shared.end - shared.begin);
}

void Memory::pass_barrier() {
  ++interval_;
}

bool Memory::ordered(const Region& region, const Stamp& before, Accessor now) const {
  if (before.interval < (region.is_shared ? block_begin_ : launch_begin_)) return true;
  if (before.interval < block_begin_) return false; // another block
  if (before.interval < interval_ || before.thread == now.thread) return true;
  const unsigned warp =
      before.thread >= kLanesOfWarp ? before.thread - kLanesOfWarp : before.thread / kWarp;
  return before.thread != kManyWarps && warp == now.thread / kWarp &&
         before.warp_barriers < now.warp_barriers;
}

void Memory::note_read(Stamp& read, Accessor now) const {
  unsigned thread = now.thread;
  if (read.interval == interval_ && read.thread != now.thread) {
    const unsigned warp = now.thread / kWarp;
    if (read.thread < kLanesOfWarp ? read.thread / kWarp == warp
                                   : read.thread == kLanesOfWarp + warp) {
      if (read.warp_barriers == now.warp_barriers) thread = kLanesOfWarp + warp;
    } else {
      thread = kManyWarps;
    }
  } else if (read.interval >= launch_begin_ && read.interval < block_begin_) {
    return; // another block's: no later write of this launch may meet it
  }
  read.interval = interval_;
  read.thread = thread;
  read.warp_barriers = now.warp_barriers;
}

std::string Memory::race(const Region& region, size_t byte, const Stamp& before, bool wrote) const {
  const auto block =
      std::prev(std::upper_bound(blocks_.begin(), blocks_.end(), std::pair(before.interval, ~0u)));
  std::string who = before.thread < kLanesOfWarp  ? "thread " + std::to_string(before.thread)
                    : before.thread == kManyWarps ? "several threads"
                                                  : "several lanes";
  return " byte " + std::to_string(byte) + " of " + region.name + ", which " + who + " of block " +
         std::to_string(block->second) + (wrote ? " has written" : " has read") +
         ", with no barrier between: a race";
}

Memory::Region* Memory::region_of(uintptr_t begin, uintptr_t end) {
  const auto inside = [&](const Region& r) { return r.begin <= begin && end <= r.end; };
  if (last_ < regions_.size() && inside(regions_[last_])) return &regions_[last_];
  for (last_ = 0; last_ < regions_.size(); ++last_) {
    if (inside(regions_[last_])) return &regions_[last_];
  }
  return nullptr;
}

std::string Memory::outside(uintptr_t address, size_t bytes, Access access) const {
  std::string text = std::string(verb(access)) + " " + std::to_string(bytes) + " bytes outside of ";
  const Region* nearest = nullptr;
  uintptr_t distance = 4096;
  bool after = false;
  for (const Region& r : regions_) {
    if (address + bytes > r.end && address + bytes - r.end < distance) {
      nearest = &r;
      distance = address + bytes - r.end;
      after = true;
    }
    if (address < r.begin && r.begin - address < distance) {
      nearest = &r;
      distance = r.begin - address;
      after = false;
    }
  }
  if (nearest == nullptr) return text + "every buffer";
  return text + nearest->name + ", up to byte " + std::to_string(distance) +
         (after ? " after its end" : " before its beginning");
}

std::string Memory::access(const void* address, size_t bytes, Access access, Accessor who) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  Region* region = region_of(begin, end);
  if (region == nullptr) {
    if (access == Access::kRead) {
      for (const Range& r : image().constants) {
        if (r.holds(begin, end)) return {};
      }
    }
    return outside(begin, bytes, access);
  }
  if (access != Access::kRead && !region->writable) {
    return std::string(verb(access)) + " " + region->name + ", which is an input";
  }
  for (size_t i = 0; region->is_shared && i < unavailable_.size(); i += 2) {
    if (end > unavailable_[i] && begin < unavailable_[i + 1]) {
      return std::string(verb(access)) + " more dynamic shared memory than the launch asks for";
    }
  }
  // Many are never accessed. What stamps it has are of earlier launches, and count for nothing.
  if (region->bytes.size() < region->end - region->begin) {
    region->bytes.resize(region->end - region->begin);
  }
  const size_t first = begin - region->begin;
  for (size_t i = first; i < first + bytes; ++i) {
    Byte& b = region->bytes[i];
    const bool both_atomic = access == Access::kAtomic && b.write.atomic;
    if (region->is_shared && access == Access::kRead && b.write.interval < block_begin_) {
      return "reads shared memory that its block has not written";
    }
    if (!both_atomic && !ordered(*region, b.write, who)) {
      return verb(access) + race(*region, i, b.write, true);
    }
    if (access == Access::kRead) {
      note_read(b.read, who);
      continue;
    }
    if (!ordered(*region, b.read, who)) return verb(access) + race(*region, i, b.read, false);
    b.write.interval = interval_;
    b.write.thread = who.thread;
    b.write.warp_barriers = who.warp_barriers;
    b.write.atomic = access == Access::kAtomic;
  }
  return {};
}

} // namespace executor

// The hooks that -fsanitize=thread and -fsanitize=alignment,... call. Outside of a launch they do
// nothing.
extern "C" {

#ifndef __SANITIZE_ADDRESS__ // which knows these names
#define EXECUTOR_HOOKS(bytes)                                  \
  void __tsan_read##bytes(void* p) {                           \
    executor::note_access(p, bytes, executor::Access::kRead);  \
  }                                                            \
  void __tsan_write##bytes(void* p) {                          \
    executor::note_access(p, bytes, executor::Access::kWrite); \
  }                                                            \
  void __tsan_unaligned_read##bytes(void* p) {                 \
    executor::note_access(p, bytes, executor::Access::kRead);  \
  }                                                            \
  void __tsan_unaligned_write##bytes(void* p) {                \
    executor::note_access(p, bytes, executor::Access::kWrite); \
  }                                                            \
  void __tsan_volatile_read##bytes(void* p) {                  \
    executor::note_access(p, bytes, executor::Access::kRead);  \
  }                                                            \
  void __tsan_volatile_write##bytes(void* p) {                 \
    executor::note_access(p, bytes, executor::Access::kWrite); \
  }
EXECUTOR_HOOKS(1)
EXECUTOR_HOOKS(2)
EXECUTOR_HOOKS(4)
EXECUTOR_HOOKS(8)
EXECUTOR_HOOKS(16)
#undef EXECUTOR_HOOKS

void __tsan_read_range(void* p, unsigned long bytes) {
  executor::note_access(p, bytes, executor::Access::kRead);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  executor::note_access(p, bytes, executor::Access::kWrite);
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
#endif

void __ubsan_handle_type_mismatch_v1(void*, void* address) {
  executor::fail(address == nullptr ? "follows a null pointer" : "makes a misaligned access");
}
void __ubsan_handle_out_of_bounds(void*, void*) {
  executor::fail("indexes beyond the bounds of an array");
}
void __ubsan_handle_add_overflow(void*, void*, void*) {
  executor::fail("overflows a signed integer");
}
void __ubsan_handle_sub_overflow(void*, void*, void*) {
  executor::fail("overflows a signed integer");
}
void __ubsan_handle_mul_overflow(void*, void*, void*) {
  executor::fail("overflows a signed integer");
}
void __ubsan_handle_negate_overflow(void*, void*) {
  executor::fail("overflows a signed integer");
}
void __ubsan_handle_divrem_overflow(void*, void*, void*) {
  executor::fail("divides by zero");
}
void __ubsan_handle_shift_out_of_bounds(void*, void*, void*) {
  executor::fail("shifts by more than the width, or by less than zero");
}
}
