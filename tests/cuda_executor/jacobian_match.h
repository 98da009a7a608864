// csrc/cuda/jacobian_match.cuh, run by the executor.
#pragma once

#include <cstdint>
#include <string>

#include "executor.h"

// Addresses of js, jt and v [B, N], of `dtype`, and of loss [B]; as the operator launches it. Gives
// the number of chunks of a sample.
int64_t run_jacobian_match(
    const std::string& dtype,
    uintptr_t js,
    uintptr_t jt,
    uintptr_t v,
    uintptr_t loss,
    int64_t batch,
    int64_t n,
    bool normalize,
    double eps,
    uint64_t seed
);
