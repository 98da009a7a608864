// csrc/cuda/attention_window.cuh, run by the executor.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "executor.h"

// Addresses of features, of `dtype`, and of position [B, 2] and value [B]; `map` is batch, channels,
// height, width, k, and whether the channels are last. Gives whether the grids hold the map.
bool run_attention_window(
    const std::string& dtype,
    uintptr_t features,
    uintptr_t position,
    uintptr_t value,
    std::array<int64_t, 6> map,
    double power,
    uint64_t seed
);

// Addresses of features (`elements` from the first to the last), position [B, 2], slope and bend;
// `crop` has fastjac::window_crop::Crop's members in order.
bool run_attention_window_slope(
    const std::string& dtype,
    uintptr_t features,
    int64_t elements,
    uintptr_t position,
    uintptr_t slope,
    uintptr_t bend,
    std::array<int64_t, 13> crop,
    int64_t channels,
    double power,
    uint64_t seed
);
