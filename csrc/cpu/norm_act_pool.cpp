// norm_act_pool and its derivatives on the CPU: checks, allocation, and the passes over memory that
// norm_act_pool_kernels.h makes. The formulas are in common/norm_act_pool.h.
//
// Sums are kept in the accumulator type over some hundred values, and in float64 from there on; the
// chunks are added up in order.

#include "norm_act_pool.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/norm_act_pool_host.h"
#include "isa.h"

namespace fastjac::norm_act_pool {
namespace {

constexpr int64_t kGrain = 32768; // elements below which another thread costs more than it brings
// Of sums: enough for the threads, few enough to add up. At a chunk's first row 3x3 windows are seen twice.
constexpr int64_t kMostChunks = 256, kMostChunksOf3x3 = 64;

const Kernels& kernels() {
  return FASTJAC_KERNELS;
}

Storage storage(const Tensor& u) {
  switch (u.scalar_type()) {
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      return Storage::kHalf;
  }
}

const void* data(const MaybeTensor& x) {
  return x ? x->const_data_ptr() : nullptr;
}

// The same, and a NaN with no more bits than bfloat16's: what is computed with it rounds to a NaN.
template <typename T>
T quiet(T x) {
  return std::isnan(x) ? std::numeric_limits<T>::quiet_NaN() : x;
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The maps of a call, cut into segments and chunks.
Maps cut(const Tensor& u, const Geometry& g, Activation activation, double slope) {
  Maps m{};
  m.batch = g.batch, m.channels = g.channels;
  m.height = g.height, m.width = g.width;
  m.out_height = g.out_height, m.out_width = g.out_width;
  m.kernel = g.pool.kernel, m.stride = g.pool.stride, m.padding = g.pool.padding;
  m.channels_last = g.channels_last;
  m.storage = storage(u);
  m.activation = activation, m.slope = quiet(slope);
  m.padded_channels = divide_up(g.channels, kPadding) * kPadding;
  m.u = u.const_data_ptr();

  m.run = g.channels_last ? 256 : 4096;
  m.segments = g.pool.kernel == 1 ? divide_up(g.pixels(), m.run) : g.out_height;
  const int64_t pixels = g.pool.kernel == 1 ? std::min(m.run, g.pixels()) : 2 * g.width;
  const int64_t elements = pixels * (g.channels_last ? g.channels : 1);
  const int64_t all = m.segments * (g.channels_last ? g.batch : 1);
  m.chunk_segments = std::clamp<int64_t>(divide_up(kGrain, elements), 1, all);
  if (g.channels_last) {
    const int64_t most = m.kernel == 3 ? kMostChunksOf3x3 : kMostChunks;
    m.chunk_segments = std::max(m.chunk_segments, divide_up(all, most));
    m.chunks = divide_up(all, m.chunk_segments);
  } else {
    m.chunks = g.batch * g.channels * divide_up(all, m.chunk_segments);
  }
  return m;
}

void run(Kernels::Run kernel, const Maps& m) {
  const int64_t elements = m.batch * m.channels * m.height * m.width / m.chunks;
  torch::stable::parallel_for(
      0, m.chunks, std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)),
      [&](int64_t begin, int64_t end) { kernel(m, begin, end); }
  );
}

// A pass that writes maps and keeps no sums may be cut otherwise: a few chunks for each thread.
void run_write(Maps m) {
  if (m.channels_last) {
    const int64_t all = m.batch * m.segments;
    m.chunk_segments =
        std::max(m.chunk_segments, divide_up(all, 8 * int64_t(torch::stable::get_num_threads())));
    m.chunks = divide_up(all, m.chunk_segments);
  }
  m.sums = nullptr;
  m.y = nullptr;
  run(kernels().write, m);
}

// The chunks' sums, [chunks of a channel, kSums, padded C].
struct ChunkSums {
  std::vector<double> values;
  int64_t chunks, channels;

  explicit ChunkSums(Maps& m)
      : chunks(m.channels_last ? m.chunks : m.chunks / m.channels), channels(m.padded_channels) {
    values.assign(chunks * kSums * channels, 0);
    m.sums = values.data();
  }

  // Added up in order, [kSums, padded C].
  std::vector<double> total() const {
    std::vector<double> result(kSums * channels, 0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* x = values.data() + chunk * kSums * channels;
      for (int64_t i = 0; i < kSums * channels; ++i) result[i] += x[i];
    }
    return result;
  }
};

// Has the reduce pass keep for the write pass what it can of the 3x3 windows that gy is of.
std::unique_ptr<int8_t[]> keep_chosen(Maps& m, const Tensor& gy) {
  const bool steps = m.activation == Activation::kNone || m.activation == Activation::kRelu ||
                     m.activation == Activation::kRelu6; // act' is 0 or 1
  if (m.kernel != 3 || !steps) return nullptr;
  std::unique_ptr<int8_t[]> chosen(new int8_t[gy.numel()]);
  m.chosen = chosen.get();
  return chosen;
}

// The vectors of parameters, in blocks.
template <typename acc_t>
class Parameters {
 public:
  Parameters(
      Maps& m,
      const MaybeTensor& weight,
      const MaybeTensor& bias,
      const Tensor& mean,
      const Tensor& invstd
  )
      : channels_(m.channels), values_(kParameters * m.padded_channels, acc_t(0)) {
    const auto* w = static_cast<const acc_t*>(data(weight)); // [C]
    const auto* b = static_cast<const acc_t*>(data(bias)); // [C]
    const auto* mu = static_cast<const acc_t*>(mean.const_data_ptr()); // [C]
    invstd_ = static_cast<const acc_t*>(invstd.const_data_ptr()); // [C]
    for (int64_t c = 0; c < channels_; ++c) {
      const acc_t scale = (w ? w[c] : acc_t(1)) * invstd_[c];
      at(0, c) = quiet(scale);
      at(1, c) = quiet((b ? b[c] : acc_t(0)) - mu[c] * scale);
      at(2, c) = quiet(mu[c]);
    }
    m.parameters = values_.data();
  }

  double scale(int64_t c) const {
    return values_[in_blocks(c, kParameters)];
  }
  double invstd(int64_t c) const {
    return invstd_[c];
  }

  void set(int64_t c, const Affine<double>& k) {
    const double of[] = {k.of_g, k.of_tu, k.of_d, k.constant};
    for (int i = 0; i < 4; ++i) at(3 + i, c) = quiet(static_cast<acc_t>(of[i]));
  }

 private:
  acc_t& at(int row, int64_t c) {
    return values_[in_blocks(c, kParameters) + row * kPadding];
  }

  int64_t channels_;
  std::vector<acc_t> values_;
  const acc_t* invstd_;
};

Sums<double> channel(const std::vector<double>& sums, int64_t padded, int64_t c) {
  return {
      sums[c], sums[padded + c], sums[2 * padded + c], sums[3 * padded + c], sums[4 * padded + c]
  };
}

// f(a number of u's accumulator type)
template <typename F>
void with_accumulator(const Tensor& u, const F& f) {
  if (u.scalar_type() == ScalarType::Double) {
    f(double());
  } else {
    f(float());
  }
}

template <typename F>
void with_storage(const Tensor& u, const F& f) {
  switch (u.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16());
    default:
      return f(torch::headeronly::Half());
  }
}

// Something near each channel's mean, so that deviations from it are small: the mean of a few pixels.
template <typename acc_t>
std::vector<acc_t> near_mean(const Tensor& u, const Geometry& g, int64_t padded) {
  std::vector<acc_t> result(padded, 0);
  const int64_t n = std::min<int64_t>(16, g.pixels());
  const int64_t pixel = g.channels_last ? g.channels : 1;
  const int64_t next = g.channels_last ? 1 : g.pixels();
  with_storage(u, [&](auto zero) {
    const auto* x = static_cast<const decltype(zero)*>(u.const_data_ptr());
    for (int64_t c = 0; c < g.channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[c * next + i * pixel]);
      if (std::isfinite(sum)) result[c] = static_cast<acc_t>(sum / n);
    }
  });
  return result;
}

// f(channel, mean, biased variance); u is not empty.
template <typename acc_t, typename F>
void for_moments(const Tensor& u, const Geometry& g, const F& f) {
  Maps m = cut(u, g, Activation::kNone, 0);
  const std::vector<acc_t> shift = near_mean<acc_t>(u, g, m.padded_channels);
  m.parameters = shift.data();
  ChunkSums chunks(m);
  run(kernels().statistics, m);
  const std::vector<double> sums = chunks.total();
  const double count = static_cast<double>(g.count());
  for (int64_t c = 0; c < g.channels; ++c) {
    const double first = sums[c] / count, second = sums[m.padded_channels + c] / count;
    const double variance = second - first * first;
    f(c, shift[c] + first, variance < 0 ? 0 : variance); // keeps a NaN
  }
}

std::tuple<Tensor, Tensor> channel_statistics_cpu(const Tensor& u) {
  const Geometry g = check_input("channel_statistics", u, {1, 1, 0});
  Tensor mean = channels_of(u), var = channels_of(u);
  if (u.numel() == 0) return {mean, var};
  with_accumulator(u, [&](auto zero) {
    using acc_t = decltype(zero);
    auto* means = static_cast<acc_t*>(mean.mutable_data_ptr()); // [C]
    auto* vars = static_cast<acc_t*>(var.mutable_data_ptr()); // [C]
    for_moments<acc_t>(u, g, [&](int64_t c, double m, double v) {
      means[c] = static_cast<acc_t>(m);
      vars[c] = static_cast<acc_t>(v);
    });
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_statistics_cpu(
    const Tensor& u,
    const MaybeTensor& running_mean,
    const MaybeTensor& running_var,
    bool training,
    double momentum,
    double eps
) {
  const Geometry g = check_statistics(u, running_mean, running_var, training);
  Tensor mean = channels_of(u), invstd = channels_of(u);
  with_accumulator(u, [&](auto zero) {
    using acc_t = decltype(zero);
    const auto channels = [](const MaybeTensor& x) { // [C], or null
      return x ? static_cast<acc_t*>(x->mutable_data_ptr()) : nullptr;
    };
    const Statistics<acc_t> out{channels(mean),        nullptr,
                                channels(invstd),      channels(running_mean),
                                channels(running_var), momentum,
                                unbiased(g.count()),   eps};
    if (!training) {
      for (int64_t c = 0; c < g.channels; ++c) out.copy_running(c);
    } else if (u.numel() == 0) {
      for (int64_t c = 0; c < g.channels; ++c) out.write(c, 0, 0, false);
    } else {
      for_moments<acc_t>(u, g, [&](int64_t c, double m, double v) { out.write(c, m, v, true); });
    }
  });
  return {mean, invstd};
}

void check_parameters(
    const char* op,
    const Tensor& u,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd
) {
  check_channels(op, "weight", weight, u);
  check_channels(op, "bias", bias, u);
  check_channels(op, "mean", mean, u);
  check_channels(op, "invstd", invstd, u);
}

Tensor norm_act_pool_cpu(
    const Tensor& u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool
) {
  constexpr const char* op = "norm_act_pool";
  const Geometry g = check_input(op, u, parse_pool(op, pool));
  check_map(op, "residual", residual, u, g);
  check_parameters(op, u, weight, bias, mean, invstd);
  const Activation act = parse_activation(op, activation);
  Tensor y = empty_output_like(u, g);
  if (u.numel() == 0) return y;

  Maps m = cut(u, g, act, slope);
  m.residual = data(residual);
  m.y = y.mutable_data_ptr();
  with_accumulator(u, [&](auto zero) {
    const Parameters<decltype(zero)> parameters(m, weight, bias, mean, invstd);
    run(kernels().forward, m);
  });
  return y;
}

// `op` is norm_act_pool_backward; or norm_act_pool_backward_, and u then `to`, which becomes gu.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_to(
    const char* op,
    MaybeTensor to,
    const Tensor& gy,
    const Tensor& u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool,
    bool training,
    const MaybeTensor& coefficient,
    const MaybeTensor& curvature,
    const std::vector<bool>& mask
) {
  const Geometry g = check_input(op, u, parse_pool(op, pool));
  check_map(op, "gy", gy, u, g, true);
  check_map(op, "residual", residual, u, g);
  check_map(op, "curvature", curvature, u, g);
  check_parameters(op, u, weight, bias, mean, invstd);
  check_channels(op, "coefficient", coefficient, u);
  STD_TORCH_CHECK(mask.size() == 4, op, ": mask must have 4 entries, got ", mask.size());
  const Activation act = parse_activation(op, activation);
  Tensor gu = !mask[0] ? nothing(u) : to ? *to : empty_input_like(u, g);
  Tensor gresidual = mask[1] ? empty_input_like(u, g) : nothing(u);
  Tensor gweight = mask[2] ? channels_of(u) : nothing(u);
  Tensor gbias = mask[3] ? channels_of(u) : nothing(u);
  if (u.numel() == 0) return {gu, gresidual, gweight, gbias};

  Maps m = cut(u, g, act, slope);
  m.residual = data(residual);
  m.gy = gy.const_data_ptr();
  with_accumulator(u, [&](auto zero) {
    using acc_t = decltype(zero);
    Parameters<acc_t> parameters(m, weight, bias, mean, invstd);
    const auto* added = static_cast<const acc_t*>(data(coefficient)); // [C]
    auto* gw = mask[2] ? static_cast<acc_t*>(gweight.mutable_data_ptr()) : nullptr; // [C]
    auto* gb = mask[3] ? static_cast<acc_t*>(gbias.mutable_data_ptr()) : nullptr; // [C]
    std::vector<double> sums(kSums * m.padded_channels, 0);
    std::unique_ptr<int8_t[]> chosen;
    if ((training && mask[0]) || mask[2] || mask[3]) {
      if (mask[0] || mask[1]) chosen = keep_chosen(m, gy);
      ChunkSums chunks(m);
      run(kernels().reduce, m);
      sums = chunks.total();
    }
    for (int64_t c = 0; c < g.channels; ++c) {
      const Sums<double> s = channel(sums, m.padded_channels, c);
      const double r = parameters.invstd(c), count = static_cast<double>(g.count());
      const double extra = added ? static_cast<double>(added[c]) : 0.0;
      parameters.set(c, backward(s, parameters.scale(c), r, count, training, extra));
      if (gw) gw[c] = static_cast<acc_t>(r * s.gd);
      if (gb) gb[c] = static_cast<acc_t>(s.g);
    }
    if (!mask[0] && !mask[1]) return;
    // A window that shares its pixels is looked at once more after some of them are written.
    const bool apart = to && mask[0] && g.pool.kernel == 3 && m.chosen == nullptr;
    if (apart) gu = empty_input_like(u, g);
    if (!training && added == nullptr) m.adds_d = false;
    m.curvature = data(curvature);
    m.gu = mask[0] ? gu.mutable_data_ptr() : nullptr;
    m.gresidual = mask[1] ? gresidual.mutable_data_ptr() : nullptr;
    run_write(m);
    if (apart) torch::stable::copy_(*to, gu);
  });
  return {gu, gresidual, gweight, gbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_pool_backward_cpu(
    const Tensor& gy,
    const Tensor& u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool,
    bool training,
    const MaybeTensor& coefficient,
    const MaybeTensor& curvature,
    const std::vector<bool>& mask
) {
  return backward_to(
      "norm_act_pool_backward", std::nullopt, gy, u, residual, weight, bias, mean, invstd,
      activation, slope, pool, training, coefficient, curvature, mask
  );
}

std::tuple<Tensor, Tensor, Tensor> norm_act_pool_backward_in_place_cpu(
    const Tensor& gy,
    Tensor u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool,
    bool training,
    const MaybeTensor& coefficient,
    const MaybeTensor& curvature,
    const std::vector<bool>& mask
) {
  auto [gu, gresidual, gweight, gbias] = backward_to(
      "norm_act_pool_backward_", u, gy, u, residual, weight, bias, mean, invstd, activation, slope,
      pool, training, coefficient, curvature, mask
  );
  return {gresidual, gweight, gbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_pool_pushforward_cpu(
    const Tensor& tu,
    const MaybeTensor& tresidual,
    const Tensor& gy,
    const Tensor& u,
    const MaybeTensor& residual,
    const MaybeTensor& weight,
    const MaybeTensor& bias,
    const Tensor& mean,
    const Tensor& invstd,
    const std::string& activation,
    double slope,
    const std::string& pool,
    const std::string& statistics,
    bool with_curvature
) {
  constexpr const char* op = "norm_act_pool_pushforward";
  const Geometry g = check_input(op, u, parse_pool(op, pool));
  check_map(op, "tu", tu, u, g, false);
  check_map(op, "tresidual", tresidual, u, g);
  check_map(op, "gy", gy, u, g, true);
  check_map(op, "residual", residual, u, g);
  check_parameters(op, u, weight, bias, mean, invstd);
  const Activation act = parse_activation(op, activation);
  STD_TORCH_CHECK(
      act != Activation::kSilu, op, ": activation must be piecewise linear, got 'silu'"
  );
  const bool batch = parse_batch_statistics(op, statistics);
  STD_TORCH_CHECK(
      batch || !with_curvature, op, ": curvature=True needs statistics='batch', got 'fixed'"
  );
  Tensor ty = empty_output_like(u, g), gweight = channels_of(u), coefficient = channels_of(u);
  Tensor kappa = with_curvature ? empty_input_like(u, g) : nothing(u);
  if (u.numel() == 0) return {ty, gweight, coefficient, kappa};

  Maps m = cut(u, g, act, slope);
  m.residual = data(residual);
  m.gy = gy.const_data_ptr();
  m.tu = tu.const_data_ptr();
  m.tresidual = data(tresidual);
  m.y = ty.mutable_data_ptr();
  with_accumulator(u, [&](auto zero) {
    using acc_t = decltype(zero);
    Parameters<acc_t> parameters(m, weight, bias, mean, invstd);
    const double count = static_cast<double>(g.count());
    const auto each_channel = [&](const std::vector<double>& sums, const auto& f) {
      for (int64_t c = 0; c < g.channels; ++c) {
        f(c, channel(sums, m.padded_channels, c), parameters.scale(c), parameters.invstd(c));
      }
    };
    const auto set_tangent = [&](int64_t c, const Sums<double>& s, double scale, double r) {
      parameters.set(c, tangent(s, scale, r, count, batch));
    };
    std::vector<double> sums(kSums * m.padded_channels, 0);
    ChunkSums chunks(m);
    std::unique_ptr<int8_t[]> chosen;
    if (batch) {
      if (with_curvature) chosen = keep_chosen(m, gy);
      run(kernels().reduce, m);
      sums = chunks.total();
      m.sums = nullptr;
    }
    each_channel(sums, set_tangent);
    if (!batch) m.adds_d = false;
    run(kernels().pushforward, m);
    if (!batch) sums = chunks.total();

    auto* gw = static_cast<acc_t*>(gweight.mutable_data_ptr()); // [C]
    auto* k = static_cast<acc_t*>(coefficient.mutable_data_ptr()); // [C]
    each_channel(sums, [&](int64_t c, const Sums<double>& s, double scale, double r) {
      const double t = total(s, r, count, batch);
      gw[c] = static_cast<acc_t>(t);
      k[c] = static_cast<acc_t>(-scale * t / count);
      if (with_curvature) parameters.set(c, curvature(s, scale, r, count));
    });
    if (!with_curvature) return;
    m.gu = kappa.mutable_data_ptr();
    run_write(m);
  });
  return {ty, gweight, coefficient, kappa};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&channel_statistics_cpu));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics_cpu));
  m.impl("norm_act_pool", TORCH_BOX(&norm_act_pool_cpu));
  m.impl("norm_act_pool_backward", TORCH_BOX(&norm_act_pool_backward_cpu));
  m.impl("norm_act_pool_backward_", TORCH_BOX(&norm_act_pool_backward_in_place_cpu));
  m.impl("norm_act_pool_pushforward", TORCH_BOX(&norm_act_pool_pushforward_cpu));
}

} // namespace fastjac::norm_act_pool
