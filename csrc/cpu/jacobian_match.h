// jacobian_match on the CPU. The formula is in common/jacobian_match.h.
//
// Layout: js, jt, v are [B, N] in memory; a sample's N elements may come in any order, the same for
// all three. A sample is cut into blocks of kBlock elements. A block's sums are kept in kLanes
// independent lanes of the accumulator type and added up as a tree; the blocks' sums are added up
// in order, in double. The blocks depend on N alone, so the bits do not depend on the number of
// threads.
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
#include <vector>

#include "../common/jacobian_match.h"
#include "isa.h"
#include "small_floats.h"

namespace fastjac::jacobian_match {

constexpr int64_t kBlock = 1024; // three of fp32 leave room in an L1 cache
constexpr int kLanes =
    32; // two AVX-512 registers of fp32 per sum: enough to hide an addition's latency
constexpr int64_t kGrain = 32768; // elements below which another thread costs more than it brings

// Both sums of terms(i) over i in [0, n).
template <typename acc_t, typename F>
inline Sums<acc_t> lane_sums(int64_t n, const F& terms) {
  acc_t first[kLanes] = {}, second[kLanes] = {};
  const auto add = [&](int64_t i, int lane) {
    const Sums<acc_t> x = terms(i);
    first[lane] += x.first;
    second[lane] += x.second;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i < n; ++i, ++lane) add(i, lane);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      first[lane] += first[lane + half];
      second[lane] += second[lane + half];
    }
  }
  return {first[0], second[0]};
}

// A block's numbers, where a plain loop finds them: where they lie in memory, or widened.
template <typename scalar_t>
struct Block {
  using number_t = scalar_t;

  const scalar_t* of(const scalar_t* x, int64_t) {
    return x;
  }
  scalar_t* begin_write(scalar_t* x) {
    return x;
  }
  void end_write(scalar_t*, int64_t) {}
};
template <>
struct Block<Half> {
  using number_t = float;
  float numbers[kBlock];

  const float* of(const Half* x, int64_t n) {
    widen(x, n, numbers);
    return numbers;
  }
  float* begin_write(Half*) {
    return numbers;
  }
  void end_write(Half* x, int64_t n) {
    narrow(numbers, n, x);
  }
};

template <typename scalar_t>
struct Sample {
  using acc_t = accumulator_t<scalar_t>;
  using number_t = typename Block<scalar_t>::number_t;

  const scalar_t* js; // [N]
  const scalar_t* jt; // [N]
  scalar_t* v; // [N]

  Sums<acc_t> squared_norms(int64_t begin, int64_t n) const {
    Block<scalar_t> blocks[2];
    const number_t *s = blocks[0].of(js + begin, n), *t = blocks[1].of(jt + begin, n);
    Sums<acc_t> sums;
    for_isa([&] {
      sums = lane_sums<acc_t>(n, [&](int64_t i) -> Sums<acc_t> {
        const acc_t x = s[i], y = t[i];
        return {x * x, y * y};
      });
    });
    return sums;
  }

  // sum d^2 and <d, u>
  template <bool kNormalize>
  Sums<acc_t> difference(int64_t begin, int64_t n, Scales<acc_t> k) const {
    Block<scalar_t> blocks[2];
    const number_t *s = blocks[0].of(js + begin, n), *t = blocks[1].of(jt + begin, n);
    Sums<acc_t> sums;
    for_isa([&] {
      sums = lane_sums<acc_t>(n, [&](int64_t i) -> Sums<acc_t> {
        const Element<kNormalize, acc_t> e(s[i], t[i], k);
        return {e.d * e.d, kNormalize ? e.d * e.u : acc_t(0)};
      });
    });
    return sums;
  }

  template <bool kNormalize>
  void write_gradient(int64_t begin, int64_t n, Scales<acc_t> k, acc_t along) const {
    Block<scalar_t> blocks[3];
    const number_t* __restrict__ s = blocks[0].of(js + begin, n);
    const number_t* __restrict__ t = blocks[1].of(jt + begin, n);
    number_t* __restrict__ out = blocks[2].begin_write(v + begin);
    for_isa([=] {
      for (int64_t i = 0; i < n; ++i) {
        out[i] =
            static_cast<number_t>(Element<kNormalize, acc_t>(s[i], t[i], k).gradient(k, along));
      }
    });
    blocks[2].end_write(v + begin, n);
  }
};

// One sample: writes its v and returns its loss. `each_block(count, f)` calls f(begin, end) on
// ranges of blocks.
template <typename scalar_t, typename acc_t, typename EachBlock>
acc_t match_sample(
    Sample<scalar_t> x, int64_t n, bool normalize, acc_t eps, const EachBlock& each_block
) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<Sums<acc_t>> partial(blocks);
  const auto for_blocks = [&](const auto& f) {
    each_block(blocks, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b, b * kBlock, std::min(kBlock, n - b * kBlock));
    });
  };
  const auto total = [&]() -> Sums<acc_t> {
    double first = 0, second = 0;
    for (const Sums<acc_t>& p : partial) {
      first += p.first;
      second += p.second;
    }
    return {static_cast<acc_t>(first), static_cast<acc_t>(second)};
  };

  if (!normalize) {
    for_blocks([&](int64_t b, int64_t begin, int64_t count) {
      partial[b] = x.template difference<false>(begin, count, {});
      x.template write_gradient<false>(begin, count, {}, 0);
    });
    return total().first;
  }
  for_blocks([&](int64_t b, int64_t begin, int64_t count) {
    partial[b] = x.squared_norms(begin, count);
  });
  const Scales<acc_t> k = scales(total(), eps);
  for_blocks([&](int64_t b, int64_t begin, int64_t count) {
    partial[b] = x.template difference<true>(begin, count, k);
  });
  const Sums<acc_t> sums = total();
  const acc_t along = k.a_is_norm ? sums.second : acc_t(0);
  for_blocks([&](int64_t, int64_t begin, int64_t count) {
    x.template write_gradient<true>(begin, count, k, along);
  });
  return sums.first;
}

} // namespace fastjac::jacobian_match
