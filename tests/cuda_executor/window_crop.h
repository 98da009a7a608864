// csrc/cuda/window_crop.cuh, run by the executor.
#pragma once

#include <array>
#include <cstdint>

#include "executor.h"

// Addresses of the source (`source_elements` from the first to the last), of start [batch, 2] and of
// out, with elements of `element_bytes`; `crop` has fastjac::window_crop::Crop's members in order.
// Gives whether the grid holds the output.
bool run_window_crop(
    int element_bytes,
    uintptr_t source,
    int64_t source_elements,
    uintptr_t start,
    uint64_t fill,
    uintptr_t out,
    std::array<int64_t, 13> crop,
    uint64_t seed
);
