// The conversions of 16-bit numbers, for one instruction set (lanes.h says how it is compiled).
#pragma once

#include "lanes.h"
#include "small_floats.h"

namespace fastjac::small_floats::FASTJAC_TARGET_NAME {
namespace {

using namespace fastjac::FASTJAC_TARGET_NAME;

// What follows will be asked for next: too short a run for the processor to foresee it.
void widen(const Half* from, int64_t n, float* to) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    __builtin_prefetch(from + i + n);
    store(to + i, load<L>(from + i));
  }
  if (i < n) store(to + i, load<L>(from + i, Part{n - i}), Part{n - i});
}

void narrow(const float* from, int64_t n, Half* to) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, load<L>(from + i));
  if (i < n) store(to + i, load<L>(from + i, Part{n - i}), Part{n - i});
}

} // namespace

const Kernels kernels = {widen, narrow};

} // namespace fastjac::small_floats::FASTJAC_TARGET_NAME
