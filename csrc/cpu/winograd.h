// What winograd.cpp asks of the kernels of one instruction set. Includes nothing of PyTorch.
//
// A 3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016): a tile of 2x2 outputs reads 4x4 inputs and
// takes 16 products per channel and filter, not 36.
//
//   y  = A^T [(B^T x B) . (G w G^T), summed over channels] A
//   gw = G^T [(B^T x B) . (A gy A^T), summed over tiles] G
//
// Each of the 16 places of a tile is a product of matrices: [tiles, C] by [C, K] for y, [C, tiles] by
// [tiles, K] for gw. Images are channels-last, [B, H, W, C]. Tiles are counted over the batch.
#pragma once

#include <cstdint>

namespace fastjac::winograd {

constexpr int kPlaces = 16; // of a tile

inline int64_t padded(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

struct Problem {
  int64_t batch, height, width, channels; // of x
  int64_t out_height, out_width, filters; // of y
  int64_t top, left; // padding
  bool is_double;

  int64_t tile_rows() const {
    return (out_height + 1) / 2;
  }
  int64_t tile_cols() const {
    return (out_width + 1) / 2;
  }
  int64_t tiles() const {
    return batch * tile_rows() * tile_cols();
  }
  // Numbers from one row of transformed inputs to the next: not a power of two, which would put the
  // rows into one set of a cache.
  int64_t input_row() const {
    return padded(channels, 16) + 16;
  }
};

// w[k, c, i, j] is at data + k * filter + c * channel + i * row + j * col.
struct Weight {
  void* data;
  int64_t filter, channel, row, col;
};

// A panel is a group of `panel` filters; K is padded to whole panels, tiles to
// multiples of `step`.
struct Kernels {
  int64_t (*panel)(const Problem&);
  int64_t step, group;

  // places [16, panels, C, panel] = G w G^T, for groups [begin, end) of a panel and `group` channels
  void (*filters)(const Problem&, const Weight&, void* places, int64_t begin, int64_t end);
  // y of tiles [begin, end); `scratch` has 16 * (end - begin, padded) * (input row + padded K) numbers
  void (*convolve)(
      const Problem&,
      const void* x,
      const void* places,
      const void* bias,
      void* y,
      void* scratch,
      int64_t begin,
      int64_t end
  );

  // Of a block of `tiles` tiles from `first` on, tiles [begin, end) of it:
  // v [16, tiles, input row] = B^T x B
  void (*inputs)(
      const Problem&,
      const void* x,
      void* v,
      int64_t first,
      int64_t tiles,
      int64_t begin,
      int64_t end
  );
  // d [16, panels, tiles, panel] = A gy A^T
  void (*gradients)(
      const Problem&,
      const void* gy,
      void* d,
      int64_t first,
      int64_t tiles,
      int64_t begin,
      int64_t end
  );
  // sums [16, panels, input row, panel] += v^T d, for places and panels [begin, end) of 16 * panels
  void (*accumulate)(
      const Problem&,
      const void* v,
      const void* d,
      void* sums,
      int64_t tiles,
      int64_t begin,
      int64_t end
  );
  // w = G^T sums G, the sums of `parts` added up, for groups [begin, end)
  void (*finish)(
      const Problem&, const void* sums, int64_t parts, const Weight&, int64_t begin, int64_t end
  );
};

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

} // namespace fastjac::winograd
