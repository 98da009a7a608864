// norm_act_pool's passes on the CPU, for one instruction set (lanes.h says how it is compiled): what
// norm_act_pool_disjoint.h and norm_act_pool_unpooling.h do with segments, for ranges of chunks. The
// formulas are in common/norm_act_pool.h, the division of the work in norm_act_pool.h.
#pragma once

#include "norm_act_pool.h"
#include "norm_act_pool_disjoint.h"
#include "norm_act_pool_unpooling.h"
#include "stored_lanes.h"

namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME {
namespace {

// f(task's sums, image, channel, first segment, last segment, whether it is the task's last call) for
// tasks [begin, end).
template <bool kLast, typename F>
void each_range(const Maps& m, int64_t begin, int64_t end, const F& f) {
  const int64_t stride = kSums * m.padded_channels;
  const auto sums = [&](int64_t chunk) { return m.sums ? m.sums + chunk * stride : nullptr; };
  for (int64_t task = begin; task < end; ++task) {
    if constexpr (kLast) {
      int64_t at = task * m.chunk_segments;
      const int64_t stop = least(at + m.chunk_segments, m.batch * m.segments);
      while (at < stop) {
        const int64_t b = at / m.segments, first = at % m.segments;
        const int64_t last = least(m.segments, first + stop - at);
        at += last - first;
        f(sums(task), b, int64_t(0), first, last, at == stop);
      }
    } else {
      const int64_t parts = (m.segments + m.chunk_segments - 1) / m.chunk_segments;
      const int64_t part = task % parts, plane = task / parts;
      const int64_t b = plane / m.channels, c = plane % m.channels;
      const int64_t first = part * m.chunk_segments;
      f(sums(b * parts + part), b, c, first, least(m.segments, first + m.chunk_segments), true);
    }
  }
}

enum class Pass { kForward, kReduce, kPushforward, kWrite };

template <Pass kPass, typename scalar_t, int kKernel, bool kRelu, bool kLast>
void run(const Maps& m, int64_t begin, int64_t end) {
  constexpr bool kOverlap = kKernel == 3;
  using Overlaps =
      std::conditional_t<kLast, Scattering<scalar_t, kRelu>, Gathering<scalar_t, kRelu>>;
  using K = std::conditional_t<kOverlap, Overlaps, Disjoint<scalar_t, kKernel, kRelu, kLast>>;
  using acc_t = typename K::acc_t;
  K k(m);
  const bool sums = kPass == Pass::kReduce || (kPass == Pass::kPushforward && m.sums);
  Scratch<acc_t> lanes(sums ? kSums * k.lanes_size : 0);
  if (sums) k.lanes = lanes.data;
  const auto flush = [&](double* out, int64_t c) {
    if constexpr (kPass == Pass::kReduce) k.flush(out, c, 0, m.tu ? kSums : 2);
    if constexpr (kPass == Pass::kPushforward) k.flush(out, c, 2, 3); // of g tu alone
  };
  if constexpr (kOverlap) {
    Scratch<acc_t> kept(2 * K::kMostKept * (k.places / K::L));
    k.kept = kept.data;
    Scratch<acc_t> row_sums(sums ? kSums * k.lanes_size : 0);
    k.row_sums = row_sums.data;
    const typename K::Kept rows(k, kPass == Pass::kWrite);
    each_range<kLast>(
        m, begin, end, [&](double* out, int64_t b, int64_t c, int64_t first, int64_t last, bool) {
          if constexpr (!kLast) k.at_channel(c);
          if constexpr (kPass == Pass::kForward) k.forward(b, c, first, last);
          if constexpr (kPass == Pass::kReduce) k.reduce(b, c, first, last);
          if constexpr (kPass == Pass::kPushforward) k.pushforward(b, c, first, last);
          if constexpr (kPass == Pass::kWrite) k.write(b, c, first, last, rows);
          if (sums) flush(out, c);
        }
    );
  } else {
    const int64_t most_held = k.most_held();
    int64_t held = 0;
    each_range<kLast>(
        m, begin, end,
        [&](double* out, int64_t b, int64_t c, int64_t first, int64_t last, bool done) {
          if constexpr (!kLast) k.at_channel(c);
          for (int64_t i = first; i < last; ++i) {
            if constexpr (kPass == Pass::kForward) k.forward(b, c, i);
            if constexpr (kPass == Pass::kReduce) k.reduce(b, c, i);
            if constexpr (kPass == Pass::kPushforward) k.pushforward(b, c, i);
            if constexpr (kPass == Pass::kWrite) k.write(b, c, i);
            if (!sums || (++held < most_held && !(done && i == last - 1))) continue;
            flush(out, c);
            held = 0;
          }
        }
    );
  }
}

// f(a number of the storage type)
template <typename F>
void for_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kDouble:
      return f(double());
    case Storage::kFloat:
      return f(float());
    case Storage::kBFloat16:
      return f(BFloat16());
    case Storage::kHalf:
      return f(Half());
  }
}

template <Pass kPass>
void dispatch(const Maps& m, int64_t begin, int64_t end) {
  for_storage(m.storage, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto with_layout = [&](auto kernel, auto relu) {
      if (m.channels_last) {
        run<kPass, scalar_t, kernel(), relu(), true>(m, begin, end);
      } else {
        run<kPass, scalar_t, kernel(), relu(), false>(m, begin, end);
      }
    };
    const auto with_kernel = [&](auto relu) {
      switch (m.kernel) {
        case 1:
          return with_layout(std::integral_constant<int, 1>(), relu);
        case 2:
          return with_layout(std::integral_constant<int, 2>(), relu);
        default:
          return with_layout(std::integral_constant<int, 3>(), relu);
      }
    };
    // ReLU by itself where speed matters most: each is a third of a second to compile.
    constexpr bool kHot =
        FASTJAC_VECTOR_BYTES > 16 && sizeof(scalar_t) < 8 && !std::is_same_v<scalar_t, Half>;
    if constexpr (kHot) {
      if (m.activation == Activation::kRelu) return with_kernel(std::true_type());
    }
    with_kernel(std::false_type());
  });
}

} // namespace
} // namespace fastjac::norm_act_pool::FASTJAC_TARGET_NAME
