// The passes of norm_act_pool's backward on the CPU, for one instruction set.
#pragma once

#include "norm_act_pool_passes.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {

void reduce(const Maps& m, int64_t begin, int64_t end) {
  dispatch<Pass::kReduce>(m, begin, end);
}

void write(const Maps& m, int64_t begin, int64_t end) {
  dispatch<Pass::kWrite>(m, begin, end);
}

} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
