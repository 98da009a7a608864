// What the hooks of an access see of the launch that is running.
#pragma once

#include <cstddef>

#include "memory.h"

namespace executor {

void note_access(const void* address, size_t bytes, Access access);
[[noreturn]] void fail(const char* what);

} // namespace executor
