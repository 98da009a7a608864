// csrc/cuda/norm_act_pool_*.cuh, run by the executor.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "executor.h"

struct NormActPoolCall {
  std::string op; // statistics, forward, backward or pushforward
  std::string dtype;
  std::vector<int64_t> shape; // of u
  bool channels_last;
  int activation;
  double slope;
  std::vector<int> pool; // kernel, stride, padding
  bool flag; // backward: training; pushforward: batch statistics
  std::map<std::string, uintptr_t> tensors; // addresses, by the names of the operator's arguments
  uint64_t seed;
};

// As the operator launches it. Gives the lanes of an access, the chunks, and the tiles of channels.
std::vector<int64_t> run_norm_act_pool(const NormActPoolCall& call);
