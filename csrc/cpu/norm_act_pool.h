// What norm_act_pool.cpp asks of the kernels of one instruction set. Includes nothing of PyTorch.
//
// A map's *segment* is what one step of a kernel covers. With a pool: a row of its output, and the
// input rows that it owns (the first `stride` of its windows; the last segment has the rest). Without:
// a run of pixels. Segments are counted within an image; a *chunk* is a range of them, and has its own
// sums. Channels-last: a chunk covers all channels, and the range runs over the batch; contiguous: one
// channel of one image. Chunks depend on the shape alone, so the sums do not depend on the threads.
#pragma once

#include <cstdint>

#include "../common/norm_act_pool.h"

namespace fastjac::norm_act_pool {

enum class Storage { kDouble, kFloat, kBFloat16, kHalf };

constexpr int kSums = 5; // Sums' members: g, gd, gt, t, td
constexpr int kParameters = 7; // scale, shift, mean, of_g, of_tu, of_d, constant
constexpr int kRunLanes = 64; // a contiguous row is summed in that many lanes
constexpr int kPadding = 16; // vectors [C] are allocated up to a multiple of it

// Several vectors [C] lie in blocks, [padded C / kPadding, rows, kPadding]: one address for all that a kernel
// asks of some channels. Where row 0 has channel c; row i is i * kPadding further.
inline int64_t in_blocks(int64_t c, int rows) {
  return (c & -kPadding) * rows + (c & (kPadding - 1));
}

struct Maps {
  int64_t batch, channels, height, width, out_height, out_width;
  int kernel, stride, padding;
  bool channels_last;
  Storage storage;
  Activation activation;
  double slope;
  int64_t segments; // of an image
  int64_t run; // pixels of a segment, without a pool
  int64_t chunk_segments; // of a chunk
  int64_t padded_channels;

  // [B, H, W, C] or [B, C, H, W]; null where there is none.
  const void *u = nullptr, *residual = nullptr, *tu = nullptr, *tresidual = nullptr;
  const void* curvature = nullptr;
  const void* gy = nullptr; // [B, h, w, C] or [B, C, h, w]
  void *gu = nullptr, *gresidual = nullptr; // like u; gu also where a kernel writes kappa
  void* y = nullptr; // like gy; y, or its tangent
  // Like gy, or null: which tap each 3x3 window chose, and -1 where act' is 0 there (else it is 1). The
  // reduce pass leaves it for the write pass.
  int8_t* chosen = nullptr;

  // [kParameters, C] in blocks, in the accumulator type; for the statistics [padded C], near the mean.
  const void* parameters = nullptr;
  bool adds_d = true; // else neither of_d d nor the constant is added

  double* sums = nullptr; // [chunks of a channel, kSums, padded C]
  int64_t chunks = 0; // tasks: all chunks
};

// Each runs tasks [begin, end). The sums are those of common/norm_act_pool.h.
struct Kernels {
  using Run = void (*)(const Maps&, int64_t begin, int64_t end);
  Run statistics; // sums[0], sums[1] = sum (u - near), sum (u - near)^2
  Run forward; // y
  Run reduce; // the sums: g and gd; where tu is given, all
  Run pushforward; // y's tangent; where sums is given, also gt
  Run write; // gu, gresidual
};

namespace avx512 {
extern const Kernels kernels;
void reduce(const Maps&, int64_t begin, int64_t end);
void write(const Maps&, int64_t begin, int64_t end);
} // namespace avx512
namespace avx2 {
extern const Kernels kernels;
void reduce(const Maps&, int64_t begin, int64_t end);
void write(const Maps&, int64_t begin, int64_t end);
} // namespace avx2
namespace portable {
extern const Kernels kernels;
void reduce(const Maps&, int64_t begin, int64_t end);
void write(const Maps&, int64_t begin, int64_t end);
} // namespace portable

} // namespace fastjac::norm_act_pool
