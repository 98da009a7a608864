// What device code may access, and who accessed it last.
//
// For each byte: the last write and the last reads, each stamped with the interval between barriers
// it fell into. Intervals are numbered through all launches, so that a stamp says by itself whether
// it is of this launch, of this block, and on this side of the last barrier.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "executor.h"

namespace executor {

// Who accesses.
struct Accessor {
  unsigned thread; // in the block
  unsigned warp_barriers; // that its warp has passed in this block
};

enum class Access { kRead, kWrite, kAtomic };

class Memory {
 public:
  // The buffers of a launch; shared memory is always there.
  void begin_launch(const std::vector<Buffer>& buffers, size_t dynamic_shared);
  void begin_block(unsigned block);
  void pass_barrier();

  // Empty, or what is wrong with it.
  std::string access(const void* address, size_t bytes, Access access, Accessor who);

 private:
  struct Stamp {
    uint32_t interval = 0;
    uint32_t thread : 11 = 0;
    uint32_t warp_barriers : 20 = 0;
    uint32_t atomic : 1 = 0;
  };
  struct Byte {
    Stamp write, read;
  };
  struct Region {
    std::string name;
    uintptr_t begin, end;
    bool writable, is_shared;
    std::vector<Byte> bytes;
  };

  Region* region_of(uintptr_t begin, uintptr_t end);
  std::string outside(uintptr_t address, size_t bytes, Access access) const;
  bool ordered(const Region& region, const Stamp& before, Accessor now) const;
  void note_read(Stamp& read, Accessor now) const;
  std::string race(const Region& region, size_t byte, const Stamp& before, bool wrote) const;

  std::vector<Region> regions_; // the first is shared memory
  size_t last_ = 0; // the region of the last access
  std::vector<uintptr_t> unavailable_; // begin, end, ...: dynamic shared memory not asked for
  uint32_t interval_ = 0, launch_begin_ = 0, block_begin_ = 0;
  std::vector<std::pair<uint32_t, unsigned>> blocks_; // the first interval of each, of this launch
};

} // namespace executor
