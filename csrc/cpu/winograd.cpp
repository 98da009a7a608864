// winograd and its weight's gradient on the CPU: checks, allocation, blocks and threads. What is
// computed, and how, is in winograd.h and winograd_kernels.h.

#include "winograd.h"

#include <algorithm>
#include <memory>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/checks.h"
#include "../common/empty.h"
#include "../common/layout.h"
#include "isa.h"

namespace fastjac::winograd {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kTiles = 36; // of a block: their places stay in a core's cache,
constexpr int64_t kMostTiles = 288; // unless the filters are more than that
constexpr int64_t kRun = 128; // tiles of a block of the weight's gradient
constexpr int64_t kMostParts = 16; // of it that have sums of their own,
constexpr int64_t kMostSums = 1 << 24; // and the bytes of these, if one part has no more

const Kernels& kernels() {
  return FASTJAC_KERNELS;
}

int64_t divide_up(int64_t a, int64_t b) {
  return padded(a, b) / b;
}

void check_type(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double, op,
      ": x must be Float or Double, got ", torch::headeronly::toString(type)
  );
}

void check_map(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must be [B, C, H, W], got ", describe(x.sizes()));
  STD_TORCH_CHECK(x.numel() == 0 || is_channels_last(x), op, ": ", name, " must be channels-last");
}

void check_kind(
    const char* op, const char* name, const Tensor& x, const char* other_name, const Tensor& other
) {
  STD_TORCH_CHECK(
      x.scalar_type() == other.scalar_type(), op, ": ", name, " must have ", other_name,
      "'s dtype, ", torch::headeronly::toString(other.scalar_type()), ", got ",
      torch::headeronly::toString(x.scalar_type())
  );
  STD_TORCH_CHECK(
      x.device() == other.device(), op, ": ", name, " must be on ", other_name, "'s device"
  );
}

void check_weight(const char* op, const Tensor& weight, int64_t height, int64_t width) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
      ": weight must be [K, C, 3, 3], got ", describe(weight.sizes())
  );
  STD_TORCH_CHECK(
      height >= 0 && height <= 2 && width >= 0 && width <= 2, op,
      ": the padding must be 0, 1 or 2, got ", height, " and ", width
  );
}

void check_sizes(const char* op, const Problem& p) {
  STD_TORCH_CHECK(
      p.out_height >= 1 && p.out_width >= 1, op, ": maps of ", p.height, "x", p.width,
      " are too small"
  );
}

// f(begin, end) on ranges of [0, n), by all threads.
struct Parallel {
  template <typename F>
  void operator()(int64_t n, const F& f) const {
    torch::stable::parallel_for(0, n, 1, f);
  }
};

struct Serial {
  template <typename F>
  void operator()(int64_t n, const F& f) const {
    f(0, n);
  }
};

int64_t size_of(const Problem& p) {
  return p.is_double ? sizeof(double) : sizeof(float);
}

// By the calling thread, for all: other threads' heaps would keep what they once had.
std::unique_ptr<char[]> bytes(int64_t n) {
  return std::unique_ptr<char[]>(new char[n]);
}

Tensor winograd_cpu(
    const Tensor& x,
    const Tensor& weight,
    const MaybeTensor& bias,
    int64_t pad_height,
    int64_t pad_width,
    bool adjoint
) {
  constexpr const char* op = "winograd";
  check_type(op, x);
  check_map(op, "x", x);
  check_weight(op, weight, pad_height, pad_width);
  check_kind(op, "weight", weight, "x", x);
  const int64_t from = adjoint ? 0 : 1; // the weight's axis of x's channels
  STD_TORCH_CHECK(
      x.size(1) == weight.size(from), op, ": x must have ", weight.size(from), " channels, got ",
      x.size(1)
  );
  const int64_t top = adjoint ? 2 - pad_height : pad_height;
  const int64_t left = adjoint ? 2 - pad_width : pad_width;
  const Problem p{
      x.size(0),
      x.size(2),
      x.size(3),
      x.size(1),
      x.size(2) + 2 * top - 2,
      x.size(3) + 2 * left - 2,
      weight.size(1 - from),
      top,
      left,
      x.scalar_type() == ScalarType::Double
  };
  check_sizes(op, p);
  if (bias) {
    check_kind(op, "bias", *bias, "x", x);
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == p.filters && bias->is_contiguous(), op,
        ": bias must be contiguous [", p.filters, "], got ", describe(bias->sizes())
    );
  }
  const int64_t sizes[] = {p.batch, p.filters, p.out_height, p.out_width};
  Tensor y = empty_map(x, sizes, torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;

  // The adjoint correlates with the filters turned by half a turn, in- and outputs exchanged.
  Weight w{
      const_cast<void*>(weight.const_data_ptr()), weight.stride(1 - from), weight.stride(from),
      weight.stride(2), weight.stride(3)
  };
  const int64_t size = size_of(p);
  if (adjoint) {
    w.data = static_cast<char*>(w.data) + 2 * (w.row + w.col) * size;
    w.row = -w.row, w.col = -w.col;
  }
  const Kernels& k = kernels();
  const int64_t panels = divide_up(p.filters, k.panel(p));
  const auto places = bytes(kPlaces * panels * k.panel(p) * p.channels * size);
  const Parallel each;
  each(panels * divide_up(p.channels, k.group), [&](int64_t begin, int64_t end) {
    k.filters(p, w, places.get(), begin, end);
  });

  // The more filters there are to read, the more tiles read them at a time.
  const int64_t tiles = p.tiles(), row = p.input_row() + panels * k.panel(p);
  const int64_t most = std::clamp(p.channels * p.filters / 2048, kTiles, kMostTiles);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = divide_up(divide_up(tiles, most), threads); // of each thread
  const int64_t block = padded(divide_up(tiles, blocks * threads), k.step);
  const int64_t needed = kPlaces * block * row * size;
  const auto scratch = bytes(threads * needed);
  each(threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * blocks; b < end * blocks; ++b) {
      const int64_t first = b * block, last = std::min(tiles, first + block);
      if (first >= last) return;
      k.convolve(
          p, x.const_data_ptr(), places.get(), bias ? bias->const_data_ptr() : nullptr,
          y.mutable_data_ptr(), scratch.get() + b / blocks * needed, first, last
      );
    }
  });
  return y;
}

Tensor winograd_weight_cpu(
    const Tensor& gy, const Tensor& x, const Tensor& weight, int64_t pad_height, int64_t pad_width
) {
  constexpr const char* op = "winograd_weight";
  check_type(op, x);
  check_map(op, "x", x);
  check_map(op, "gy", gy);
  check_weight(op, weight, pad_height, pad_width);
  check_kind(op, "gy", gy, "x", x);
  check_kind(op, "weight", weight, "x", x);
  const Problem p{
      x.size(0),
      x.size(2),
      x.size(3),
      x.size(1),
      x.size(2) + 2 * pad_height - 2,
      x.size(3) + 2 * pad_width - 2,
      weight.size(0),
      pad_height,
      pad_width,
      x.scalar_type() == ScalarType::Double
  };
  check_sizes(op, p);
  STD_TORCH_CHECK(
      weight.size(1) == p.channels, op, ": weight must have x's channels, ", p.channels, ", got ",
      weight.size(1)
  );
  STD_TORCH_CHECK(
      gy.size(0) == p.batch && gy.size(1) == p.filters && gy.size(2) == p.out_height &&
          gy.size(3) == p.out_width,
      op, ": gy must be [", p.batch, ", ", p.filters, ", ", p.out_height, ", ", p.out_width,
      "], got ", describe(gy.sizes())
  );
  Tensor gweight = torch::stable::empty_like(weight);
  if (gweight.numel() == 0 || p.batch == 0) {
    torch::stable::zero_(gweight);
    return gweight;
  }

  // Parts of the tiles have sums of their own, and depend on the shape alone: the bits do not depend on
  // the threads.
  const Kernels& k = kernels();
  const int64_t panels = divide_up(p.filters, k.panel(p)), k_row = panels * k.panel(p);
  const int64_t c_row = p.input_row(), size = size_of(p);
  const int64_t runs = divide_up(p.tiles(), kRun), sums_size = kPlaces * k_row * c_row * size;
  int64_t parts = 1;
  while (parts < kMostParts && 2 * parts <= runs && 2 * parts * sums_size <= kMostSums) parts *= 2;
  const int64_t part_tiles = divide_up(runs, parts) * kRun;
  const auto sums = bytes(parts * sums_size);

  const int64_t of_inputs = kPlaces * kRun * c_row * size;
  const int64_t needed = of_inputs + kPlaces * kRun * k_row * size;
  const auto add_up = [&](int64_t part, char* v, const auto& each) {
    char *d = v + of_inputs, *part_sums = sums.get() + part * sums_size;
    const int64_t last = std::min(p.tiles(), (part + 1) * part_tiles);
    const int64_t of_panel = c_row * k.panel(p) * size;
    each(kPlaces * panels, [&](int64_t begin, int64_t end) {
      std::fill(part_sums + begin * of_panel, part_sums + end * of_panel, 0);
    });
    for (int64_t first = part * part_tiles; first < last; first += kRun) {
      const int64_t tiles = std::min(kRun, last - first);
      each(tiles, [&](int64_t begin, int64_t end) {
        k.inputs(p, x.const_data_ptr(), v, first, tiles, begin, end);
        k.gradients(p, gy.const_data_ptr(), d, first, tiles, begin, end);
      });
      each(kPlaces * panels, [&](int64_t begin, int64_t end) {
        k.accumulate(p, v, d, part_sums, tiles, begin, end);
      });
    }
  };
  const Parallel each;
  const int64_t threads = torch::stable::get_num_threads();
  if (parts >= threads) {
    const auto scratch = bytes(threads * needed);
    const int64_t share = divide_up(parts, threads);
    each(threads, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin * share; part < std::min(parts, end * share); ++part) {
        add_up(part, scratch.get() + part / share * needed, Serial());
      }
    });
  } else {
    const auto scratch = bytes(needed);
    for (int64_t part = 0; part < parts; ++part) add_up(part, scratch.get(), each);
  }

  const Weight w{
      gweight.mutable_data_ptr(), weight.stride(0), weight.stride(1), weight.stride(2),
      weight.stride(3)
  };
  each(panels * divide_up(p.channels, k.group), [&](int64_t begin, int64_t end) {
    k.finish(p, sums.get(), parts, w, begin, end);
  });
  return gweight;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("winograd", TORCH_BOX(&winograd_cpu));
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight_cpu));
}

} // namespace fastjac::winograd
