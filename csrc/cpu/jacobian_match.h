// jacobian_match on the CPU. The formula is in common/jacobian_match.h.
//
// Layout: js, jt, v are [B, N] in memory; a sample's N elements may come in any order, the same for
// all three. A sample is cut into blocks of kBlock elements, whose sums (jacobian_match_kernels.h) are
// added up in order, in double. The blocks depend on N alone, so the bits do not depend on the number
// of threads.
//
// Each sample needs three passes (norms; difference; v), or raw, one. With at least as many samples
// as threads, a thread takes whole samples, so that the second and third pass find them in its
// cache; else the threads share the blocks of one sample at a time. Must move 3 N elements per
// sample: js and jt in, v out.
//
// Includes nothing of PyTorch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/jacobian_match.h"
#include "isa.h"
#include "small_floats.h"

namespace fastjac::jacobian_match {

constexpr int64_t kBlock = 2048; // three of fp32 fit an L1 cache
constexpr int64_t kGrain = 32768; // elements below which another thread costs more than it brings

// What is done with n elements of a type. Numbers are passed as float64, which holds the accumulator's
// type exactly. The arrays are indexed by whether the Jacobians are normalised.
struct Kernels {
  // sum s^2 and sum t^2
  Sums<double> (*squared_norms)(const void* js, const void* jt, int64_t n);
  // sum d^2 and <d, u>
  Sums<double> (*difference[2])(
      const void* js, const void* jt, int64_t n, const Scales<double>& scales
  );
  void (*write_gradient[2])(
      const void* js, const void* jt, void* v, int64_t n, const Scales<double>& scales, double along
  );
};
struct Table {
  Kernels of_double, of_float, of_bfloat16, of_half;
};

namespace avx512 {
extern const Table kernels;
}
namespace avx2 {
extern const Table kernels;
}
namespace portable {
extern const Table kernels;
}

template <typename scalar_t>
const Kernels& kernels() {
  const Table& table = FASTJAC_KERNELS;
  if constexpr (std::is_same_v<scalar_t, double>) return table.of_double;
  if constexpr (std::is_same_v<scalar_t, float>) return table.of_float;
  if constexpr (std::is_same_v<scalar_t, BFloat16>) return table.of_bfloat16;
  if constexpr (std::is_same_v<scalar_t, Half>) return table.of_half;
}

template <typename scalar_t>
struct Sample {
  const scalar_t* js; // [N]
  const scalar_t* jt; // [N]
  scalar_t* v; // [N]
};

// One sample: writes its v and returns its loss. `each_block(count, f)` calls f(begin, end) on
// ranges of blocks.
template <typename scalar_t, typename acc_t, typename EachBlock>
acc_t match_sample(
    Sample<scalar_t> x, int64_t n, bool normalize, acc_t eps, const EachBlock& each_block
) {
  const Kernels& kernel = kernels<scalar_t>();
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<Sums<double>> partial(blocks);
  const auto for_blocks = [&](const auto& f) {
    each_block(blocks, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * kBlock;
        f(partial[b], x.js + at, x.jt + at, x.v + at, std::min(kBlock, n - at));
      }
    });
  };
  const auto total = [&]() -> Sums<acc_t> {
    double first = 0, second = 0;
    for (const Sums<double>& p : partial) {
      first += p.first;
      second += p.second;
    }
    return {static_cast<acc_t>(first), static_cast<acc_t>(second)};
  };
  using In = const scalar_t*;

  if (!normalize) {
    for_blocks([&](Sums<double>& sums, In js, In jt, scalar_t* v, int64_t count) {
      sums = kernel.difference[0](js, jt, count, {});
      kernel.write_gradient[0](js, jt, v, count, {}, 0);
    });
    return total().first;
  }
  for_blocks([&](Sums<double>& sums, In js, In jt, scalar_t*, int64_t count) {
    sums = kernel.squared_norms(js, jt, count);
  });
  const Scales<acc_t> exact = scales(total(), eps);
  const Scales<double> k = {exact.inv_a, exact.inv_b, exact.a_is_norm};
  for_blocks([&](Sums<double>& sums, In js, In jt, scalar_t*, int64_t count) {
    sums = kernel.difference[1](js, jt, count, k);
  });
  const Sums<acc_t> sums = total();
  const acc_t along = k.a_is_norm ? sums.second : acc_t(0);
  for_blocks([&](Sums<double>&, In js, In jt, scalar_t* v, int64_t count) {
    kernel.write_gradient[1](js, jt, v, count, k, along);
  });
  return sums.first;
}

} // namespace fastjac::jacobian_match
