// winograd's kernels, compiled once per instruction set (see lanes.h, winograd.h).
//
// The products are the time. A step of multiply() keeps kRows x 2 registers of sums, loads a row of a
// panel (two registers) and broadcasts kRows numbers: loads are a quarter of the arithmetic. Every sum
// runs over one index in order, so a result depends on neither the block that it is in nor the threads.
#pragma once

#include "stored_lanes.h"
#include "winograd.h"

namespace fastjac::winograd::FASTJAC_TARGET_NAME {

using namespace fastjac::FASTJAC_TARGET_NAME;

template <typename T>
constexpr int kPanel = 2 * kLanes<T>;
constexpr int kRows = FASTJAC_VECTOR_BYTES == 64 ? 12 : 6; // what the registers hold
constexpr int kStep = kRows / 3;

template <typename T>
using Vector = Lanes<T, kLanes<T>>;

// f(i, how many lanes) over [0, n).
template <typename T, typename F>
inline void by_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// out[r, :] (+)= sum over i < n of a[i * a_next + r * a_row] b[i, :], for kCount rows r and one panel.
template <int kCount, bool kAdd, typename T>
inline void multiply(
    const T* a, int64_t a_row, int64_t a_next, const T* b, int64_t n, T* out, int64_t out_row
) {
  constexpr int N = kLanes<T>;
  Vector<T> sums[kCount][2] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Vector<T> left = load<N>(b + i * 2 * N), right = load<N>(b + i * 2 * N + N);
#pragma GCC unroll 12
    for (int r = 0; r < kCount; ++r) {
      const Vector<T> x = a[i * a_next + r * a_row] - Vector<T>{};
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    }
  }
  for (int r = 0; r < kCount; ++r) {
    T* y = out + r * out_row;
    store(y, kAdd ? load<N>(y) + sums[r][0] : sums[r][0]);
    store(y + N, kAdd ? load<N>(y + N) + sums[r][1] : sums[r][1]);
  }
}

// Indices of a sum that are added up before the next are: over channels, and over tiles, which can be
// many, so that nearer the truth is worth some time.
template <typename T>
constexpr int kChannelRun = 512 / sizeof(T);
template <typename T>
constexpr int kTileRun = 256 / sizeof(T);

// The same for any number of rows that is a multiple of kStep, kRun indices at a time: a panel of that
// length stays in the first cache for all rows.
template <int kRun, bool kAdd, typename T>
inline void multiply_rows(
    int64_t rows,
    const T* a,
    int64_t a_row,
    int64_t a_next,
    const T* b,
    int64_t n,
    T* out,
    int64_t out_row
) {
  const auto add = [&](auto adding, int64_t i, int64_t count) {
    constexpr bool kToo = decltype(adding)::value;
    int64_t r = 0;
    const auto next = [&](auto multiplied, int taken) {
      multiplied(
          a + r * a_row + i * a_next, a_row, a_next, b + i * kPanel<T>, count, out + r * out_row,
          out_row
      );
      r += taken;
    };
    while (r + kRows <= rows) next(multiply<kRows, kToo, T>, kRows);
    if (r + 2 * kStep <= rows) next(multiply<2 * kStep, kToo, T>, 2 * kStep);
    if (r + kStep <= rows) next(multiply<kStep, kToo, T>, kStep);
  };
  const auto run = [&](int64_t i) { return n - i < kRun ? n - i : kRun; };
  add(std::bool_constant<kAdd>{}, 0, run(0));
  for (int64_t i = kRun; i < n; i += kRun) add(std::true_type{}, i, run(i));
}

// Where tile t stands.
struct Tile {
  int64_t image, row, col; // of its first output
  Tile(const Problem& p, int64_t t)
      : image(t / (p.tile_rows() * p.tile_cols())),
        row(t / p.tile_cols() % p.tile_rows() * 2),
        col(t % p.tile_cols() * 2) {}
};

// f(c, lanes, d) for each vector of channels, d[4][4] being the tile's inputs.
template <typename T, typename F>
inline void each_input(const Problem& p, const T* x, int64_t t, const F& f) {
  const Tile tile(p, t);
  const T* at[4][4];
  bool inside = true;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t h = tile.row - p.top + i, w = tile.col - p.left + j;
      const bool there = h >= 0 && h < p.height && w >= 0 && w < p.width;
      at[i][j] = there ? x + ((tile.image * p.height + h) * p.width + w) * p.channels : nullptr;
      inside &= there;
    }
  }
  by_vectors<T>(p.channels, [&](int64_t c, auto lanes) {
    Vector<T> d[4][4];
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        d[i][j] = inside || at[i][j] ? load<kLanes<T>>(at[i][j] + c, lanes) : Vector<T>{};
      }
    }
    f(c, lanes, d);
  });
}

// B^T d B
template <typename V, typename F>
inline void input_places(const V (&d)[4][4], const F& emit) {
  V half[4][4];
  for (int j = 0; j < 4; ++j) {
    half[0][j] = d[0][j] - d[2][j];
    half[1][j] = d[1][j] + d[2][j];
    half[2][j] = d[2][j] - d[1][j];
    half[3][j] = d[1][j] - d[3][j];
  }
  for (int i = 0; i < 4; ++i) {
    emit(4 * i, half[i][0] - half[i][2]);
    emit(4 * i + 1, half[i][1] + half[i][2]);
    emit(4 * i + 2, half[i][2] - half[i][1]);
    emit(4 * i + 3, half[i][1] - half[i][3]);
  }
}

// v [16, rows, padded C] of tiles [begin, end), from row `to` on.
template <typename T>
void transform_inputs(
    const Problem& p, const T* x, T* v, int64_t rows, int64_t to, int64_t begin, int64_t end
) {
  const int64_t row = p.input_row(), place = rows * row;
  for (int64_t t = begin; t < end; ++t) {
    T* out = v + (to + t - begin) * row;
    for (int i = 0; i < kPlaces; ++i) {
      for (int64_t c = p.channels; c < padded(p.channels, kStep); ++c) out[i * place + c] = 0;
    }
    each_input(p, x, t, [&](int64_t c, auto lanes, const auto& d) {
      input_places(d, [&](int i, const Vector<T>& value) {
        store(out + i * place + c, value, lanes);
      });
    });
  }
}

// A^T m A and the bias, to the outputs that are there.
template <typename T>
void write_outputs(
    const Problem& p, const T* m, const T* bias, T* y, int64_t rows, int64_t begin, int64_t end
) {
  constexpr int N = kLanes<T>;
  const int64_t row = padded(p.filters, kPanel<T>), place = rows * row;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile(p, t);
    const T* from = m + (t - begin) * row;
    const int down = tile.row + 1 < p.out_height ? 2 : 1;
    const int right = tile.col + 1 < p.out_width ? 2 : 1;
    T* to = y + ((tile.image * p.out_height + tile.row) * p.out_width + tile.col) * p.filters;
    by_vectors<T>(p.filters, [&](int64_t k, auto lanes) {
      Vector<T> half[2][4];
      for (int j = 0; j < 4; ++j) {
        const auto at = [&](int i) { return load<N>(from + (4 * i + j) * place + k); };
        half[0][j] = at(0) + at(1) + at(2);
        half[1][j] = at(1) - at(2) - at(3);
      }
      const Vector<T> shift = bias ? load<N>(bias + k, lanes) : Vector<T>{};
      for (int i = 0; i < down; ++i) {
        T* out = to + i * p.out_width * p.filters + k;
        store(out, half[i][0] + half[i][1] + half[i][2] + shift, lanes);
        if (right == 2) {
          store(out + p.filters, half[i][1] - half[i][2] - half[i][3] + shift, lanes);
        }
      }
    });
  }
}

// The filters of one panel and a group of channels, with the filters innermost. A weight has them
// outermost: a line of its memory is taken whole while it is in the cache.
constexpr int kGroup = 16;
template <typename T>
using Group = T[kGroup][9][kPanel<T>];

// f(element of the group, element of the weight) for all that are there.
template <typename T, typename F>
inline void each_weight(
    const Problem& p, const Weight& w, int64_t first_filter, int64_t first_channel, Group<T>& g, F f
) {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t filters = least(kPanel<T>, p.filters - first_filter);
  const int64_t channels = least(kGroup, p.channels - first_channel);
  for (int64_t k = 0; k < filters; ++k) {
    for (int i = 0; i < 9; ++i) {
      T* at = static_cast<T*>(w.data) + (first_filter + k) * w.filter + first_channel * w.channel +
              i / 3 * w.row + i % 3 * w.col;
      for (int64_t c = 0; c < channels; ++c) f(g[c][i][k], at[c * w.channel]);
    }
  }
}

template <typename T>
void filters_of(const Problem& p, const Weight& w, T* places, int64_t begin, int64_t end) {
  constexpr int N = kLanes<T>, P = kPanel<T>;
  const int64_t place = padded(p.filters, P) * p.channels;
  const T half = T(0.5);
  alignas(64) Group<T> group = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t groups = padded(p.channels, kGroup) / kGroup, panel = task / groups;
    const int64_t first = task % groups * kGroup;
    each_weight<T>(p, w, panel * P, first, group, [](T& g, const T& weight) { g = weight; });
    for (int64_t c = first; c < first + kGroup && c < p.channels; ++c) {
      const auto& g = group[c - first];
      T* out = places + (panel * p.channels + c) * P;
      for (int k = 0; k < P; k += N) {
        Vector<T> rows[4][3];
        for (int j = 0; j < 3; ++j) {
          const Vector<T> a = load<N>(g[j] + k), b = load<N>(g[3 + j] + k);
          const Vector<T> d = load<N>(g[6 + j] + k);
          rows[0][j] = a;
          rows[1][j] = (a + d + b) * half;
          rows[2][j] = (a + d - b) * half;
          rows[3][j] = d;
        }
        for (int i = 0; i < 4; ++i) {
          const Vector<T>(&r)[3] = rows[i];
          store(out + (4 * i) * place + k, r[0]);
          store(out + (4 * i + 1) * place + k, Vector<T>((r[0] + r[2] + r[1]) * half));
          store(out + (4 * i + 2) * place + k, Vector<T>((r[0] + r[2] - r[1]) * half));
          store(out + (4 * i + 3) * place + k, r[2]);
        }
      }
    }
  }
}

template <typename T>
void convolve_tiles(
    const Problem& p,
    const T* x,
    const T* places,
    const T* bias,
    T* y,
    T* scratch,
    int64_t begin,
    int64_t end
) {
  constexpr int P = kPanel<T>;
  const int64_t rows = padded(end - begin, kStep), c_row = p.input_row();
  const int64_t k_row = padded(p.filters, P);
  T *v = scratch, *m = scratch + kPlaces * rows * c_row;
  transform_inputs(p, x, v, rows, 0, begin, end);
  for (int i = 0; i < kPlaces; ++i) { // rows that no tile is in
    T* rest = v + (i * rows + end - begin) * c_row;
    for (int64_t n = 0; n < (rows - (end - begin)) * c_row; ++n) rest[n] = 0;
  }
  for (int i = 0; i < kPlaces; ++i) {
    for (int64_t k = 0; k < k_row; k += P) {
      const T* panel = places + (i * k_row + k) * p.channels;
      multiply_rows<kChannelRun<T>, false>(
          rows, v + i * rows * c_row, c_row, 1, panel, p.channels, m + i * rows * k_row + k, k_row
      );
    }
  }
  write_outputs(p, m, bias, y, rows, begin, end);
}

// d [16, panels, tiles, panel] of tiles [begin, end) of a block.
template <typename T>
void transform_gradients(
    const Problem& p, const T* gy, T* d, int64_t first, int64_t tiles, int64_t begin, int64_t end
) {
  constexpr int N = kLanes<T>, P = kPanel<T>;
  const int64_t place = padded(p.filters, P) * tiles;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile(p, first + t);
    const bool down = tile.row + 1 < p.out_height, right = tile.col + 1 < p.out_width;
    const T* from =
        gy + ((tile.image * p.out_height + tile.row) * p.out_width + tile.col) * p.filters;
    const auto emit = [&](int64_t k, auto lanes) {
      const auto at = [&](int i, int j) {
        const bool there = (i == 0 || down) && (j == 0 || right);
        return there ? load<N>(from + (i * p.out_width + j) * p.filters + k, lanes) : Vector<T>{};
      };
      T* out = d + (k / P * tiles + t) * P + k % P;
      const Vector<T> g[2][2] = {{at(0, 0), at(0, 1)}, {at(1, 0), at(1, 1)}};
      Vector<T> half[4][2];
      for (int j = 0; j < 2; ++j) {
        half[0][j] = g[0][j];
        half[1][j] = g[0][j] + g[1][j];
        half[2][j] = g[0][j] - g[1][j];
        half[3][j] = -g[1][j];
      }
      for (int i = 0; i < 4; ++i) {
        store(out + (4 * i) * place, half[i][0]);
        store(out + (4 * i + 1) * place, Vector<T>(half[i][0] + half[i][1]));
        store(out + (4 * i + 2) * place, Vector<T>(half[i][0] - half[i][1]));
        store(out + (4 * i + 3) * place, Vector<T>(-half[i][1]));
      }
    };
    by_vectors<T>(p.filters, emit);
    for (int64_t k = padded(p.filters, N); k < padded(p.filters, P); k += N) {
      T* out = d + (k / P * tiles + t) * P + k % P;
      for (int i = 0; i < kPlaces; ++i) store(out + i * place, Vector<T>{});
    }
  }
}

template <typename T>
void accumulate_places(
    const Problem& p, const T* v, const T* d, T* sums, int64_t tiles, int64_t begin, int64_t end
) {
  constexpr int P = kPanel<T>;
  const int64_t panels = padded(p.filters, P) / P, row = p.input_row();
  const int64_t channels = padded(p.channels, kStep);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t place = task / panels;
    multiply_rows<kTileRun<T>, true>(
        channels, v + place * tiles * row, 1, row, d + task * tiles * P, tiles,
        sums + task * row * P, P
    );
  }
}

template <typename T>
void finish_groups(
    const Problem& p, const T* sums, int64_t parts, const Weight& w, int64_t begin, int64_t end
) {
  constexpr int N = kLanes<T>, P = kPanel<T>;
  const int64_t row = p.input_row(), place = padded(p.filters, P) * row;
  const T half = T(0.5);
  alignas(64) Group<T> group;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t groups = padded(p.channels, kGroup) / kGroup, panel = task / groups;
    const int64_t first = task % groups * kGroup;
    for (int64_t c = first; c < first + kGroup && c < p.channels; ++c) {
      auto& g = group[c - first];
      const T* from = sums + (panel * row + c) * P;
      for (int k = 0; k < P; k += N) {
        Vector<T> rows[3][4];
        for (int j = 0; j < 4; ++j) {
          Vector<T> s[4] = {};
          for (int64_t part = 0; part < parts; ++part) {
            for (int i = 0; i < 4; ++i) {
              s[i] += load<N>(from + (part * kPlaces + 4 * i + j) * place + k);
            }
          }
          const Vector<T> both = s[1] + s[2];
          rows[0][j] = s[0] + both * half;
          rows[1][j] = (s[1] - s[2]) * half;
          rows[2][j] = both * half + s[3];
        }
        for (int i = 0; i < 3; ++i) {
          const Vector<T>(&r)[4] = rows[i];
          const Vector<T> both = r[1] + r[2];
          store(g[3 * i] + k, Vector<T>(r[0] + both * half));
          store(g[3 * i + 1] + k, Vector<T>((r[1] - r[2]) * half));
          store(g[3 * i + 2] + k, Vector<T>(both * half + r[3]));
        }
      }
    }
    each_weight<T>(p, w, panel * P, first, group, [](const T& g, T& weight) { weight = g; });
  }
}

// f(zero) with a zero of the problem's type.
template <typename F>
inline auto for_type(const Problem& p, const F& f) {
  return p.is_double ? f(double{}) : f(float{});
}

extern const Kernels kernels;
const Kernels kernels = {
    [](const Problem& p) -> int64_t {
      return for_type(p, [](auto zero) -> int64_t { return kPanel<decltype(zero)>; });
    },
    kStep,
    kGroup,
    [](const Problem& p, const Weight& w, void* places, int64_t begin, int64_t end) {
      for_type(p, [&](auto zero) {
        filters_of(p, w, static_cast<decltype(zero)*>(places), begin, end);
      });
    },
    [](const Problem& p,
       const void* x,
       const void* places,
       const void* bias,
       void* y,
       void* scratch,
       int64_t begin,
       int64_t end) {
      for_type(p, [&](auto zero) {
        using T = decltype(zero);
        convolve_tiles<T>(
            p, static_cast<const T*>(x), static_cast<const T*>(places), static_cast<const T*>(bias),
            static_cast<T*>(y), static_cast<T*>(scratch), begin, end
        );
      });
    },
    [](const Problem& p,
       const void* x,
       void* v,
       int64_t first,
       int64_t tiles,
       int64_t begin,
       int64_t end) {
      for_type(p, [&](auto zero) {
        using T = decltype(zero);
        transform_inputs(
            p, static_cast<const T*>(x), static_cast<T*>(v), tiles, begin, first + begin,
            first + end
        );
      });
    },
    [](const Problem& p,
       const void* gy,
       void* d,
       int64_t first,
       int64_t tiles,
       int64_t begin,
       int64_t end) {
      for_type(p, [&](auto zero) {
        using T = decltype(zero);
        transform_gradients(
            p, static_cast<const T*>(gy), static_cast<T*>(d), first, tiles, begin, end
        );
      });
    },
    [](const Problem& p,
       const void* v,
       const void* d,
       void* sums,
       int64_t tiles,
       int64_t begin,
       int64_t end) {
      for_type(p, [&](auto zero) {
        using T = decltype(zero);
        accumulate_places(
            p, static_cast<const T*>(v), static_cast<const T*>(d), static_cast<T*>(sums), tiles,
            begin, end
        );
      });
    },
    [](const Problem& p,
       const void* sums,
       int64_t parts,
       const Weight& w,
       int64_t begin,
       int64_t end) {
      for_type(p, [&](auto zero) {
        finish_groups(p, static_cast<const decltype(zero)*>(sums), parts, w, begin, end);
      });
    },
};

} // namespace fastjac::winograd::FASTJAC_TARGET_NAME
