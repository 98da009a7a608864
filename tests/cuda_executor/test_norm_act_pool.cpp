// norm_act_pool's device code under ctest, so that AddressSanitizer sees it too: against the equations
// of csrc/common/norm_act_pool.h, on values so few that windows have ties and z falls on the kink.
// The Python tests compare it with the references in every dtype.

#include "checking.h"
#include "norm_act_pool.h"

namespace {

using namespace checking;

constexpr int kLeakyRelu = 3;
constexpr double kSlope = 0.25;

struct Shape {
  Map u;
  std::vector<int> pool; // kernel, stride, padding
  bool residual;

  int64_t output(int64_t size) const {
    return (size + 2 * pool[2] - pool[0]) / pool[1] + 1;
  }
  Map y() const {
    return {u.batch, u.channels, output(u.height), output(u.width), u.channels_last};
  }
};

template <typename T>
class Case {
 public:
  Case(const Shape& shape, uint64_t seed)
      : s(shape),
        seed(seed),
        make(seed),
        y(s.y()),
        u(map(s.u)),
        residual(map(s.u)),
        gy(map(y)),
        tu(map(s.u)),
        tresidual(map(s.u)),
        curvature(map(s.u)),
        mean(of_channels()),
        bias(of_channels()),
        coefficient(of_channels()),
        weight(of_channels()),
        invstd(s.u.channels) {
    for (T& r : invstd) r = T(1 << make() % 3) / 2;
  }

  void check() {
    normalise();
    statistics();
    forward();
    for (const bool flag : {false, true}) {
      for (const bool more : {false, true}) {
        backward(flag, more);
        if (flag || !more) pushforward(flag, more);
      }
    }
  }

 private:
  using Vector = std::vector<T>;
  using Exact = std::vector<double>;

  Vector map(const Map& m) {
    return multiples<T>(m.size(), T(0.5), 4, make);
  }
  Vector of_channels() {
    return multiples<T>(s.u.channels, T(0.5), 3, make);
  }

  // f(channel, element of u)
  template <typename F>
  void for_each(const F& f) const {
    for (int64_t b = 0; b < s.u.batch; ++b) {
      for (int64_t c = 0; c < s.u.channels; ++c) {
        for (int64_t i = 0; i < s.u.height; ++i) {
          for (int64_t j = 0; j < s.u.width; ++j) f(c, s.u.at(b, c, i, j));
        }
      }
    }
  }
  double derivative(int64_t at) const {
    return z[at] > 0 ? 1 : kSlope;
  }

  // z, what each window chooses (the first of equals), and g.
  void normalise() {
    z.resize(s.u.size());
    for_each([&](int64_t c, int64_t at) {
      z[at] = double(weight[c]) * invstd[c] * (u[at] - mean[c]) + bias[c];
      if (s.residual) z[at] += residual[at];
    });
    chosen.resize(y.size());
    g.assign(s.u.size(), 0);
    for (int64_t b = 0; b < y.batch; ++b) {
      for (int64_t c = 0; c < y.channels; ++c) {
        for (int64_t i = 0; i < y.height; ++i) {
          for (int64_t j = 0; j < y.width; ++j) choose(b, c, i, j);
        }
      }
    }
  }
  void choose(int64_t b, int64_t c, int64_t i, int64_t j) {
    int64_t best = -1;
    for (int tap = 0; tap < s.pool[0] * s.pool[0]; ++tap) {
      const int64_t row = i * s.pool[1] - s.pool[2] + tap / s.pool[0];
      const int64_t column = j * s.pool[1] - s.pool[2] + tap % s.pool[0];
      if (row < 0 || row >= s.u.height || column < 0 || column >= s.u.width) continue;
      const int64_t at = s.u.at(b, c, row, column);
      if (best < 0 || z[at] > z[best]) best = at;
    }
    chosen[y.at(b, c, i, j)] = best;
    g[best] += derivative(best) * gy[y.at(b, c, i, j)];
  }

  // The mean over each channel of f(channel, element).
  template <typename F>
  Exact means(const F& f) const {
    Exact sums(s.u.channels);
    for_each([&](int64_t c, int64_t at) { sums[c] += f(c, at); });
    for (double& x : sums) x /= double(s.u.size() / s.u.channels);
    return sums;
  }
  double xhat(int64_t c, int64_t at) const {
    return (double(u[at]) - mean[c]) * invstd[c];
  }
  // P(x), or x itself
  template <typename X>
  Exact project(const X& x, bool batch) const {
    const Exact m = means([&](int64_t, int64_t at) { return x[at]; });
    const Exact along = means([&](int64_t c, int64_t at) { return x[at] * xhat(c, at); });
    Exact projected(s.u.size());
    for_each([&](int64_t c, int64_t at) {
      projected[at] = x[at] - (batch ? m[c] + xhat(c, at) * along[c] : 0);
    });
    return projected;
  }

  void run(
      const std::string& op, std::map<std::string, uintptr_t> tensors, bool flag = false
  ) const {
    tensors["u"] = address(u);
    if (op != "statistics") {
      tensors.insert(
          {{"weight", address(weight)},
           {"bias", address(bias)},
           {"mean", address(mean)},
           {"invstd", address(invstd)}}
      );
      if (s.residual) tensors["residual"] = address(residual);
    }
    run_norm_act_pool(
        {op,
         dtype<T>(),
         {s.u.batch, s.u.channels, s.u.height, s.u.width},
         s.u.channels_last,
         kLeakyRelu,
         kSlope,
         op == "statistics" ? std::vector<int>{1, 1, 0} : s.pool,
         flag,
         tensors,
         seed}
    );
  }

  void statistics() const {
    Vector m = unwritten<T>(s.u.channels), var = m;
    run("statistics", {{"mean", address(m)}, {"var", address(var)}});
    const Exact mu = means([&](int64_t, int64_t at) { return double(u[at]); });
    expect_near(m, mu, "mean");
    expect_near(
        var, means([&](int64_t c, int64_t at) { return (u[at] - mu[c]) * (u[at] - mu[c]); }), "var"
    );
  }

  void forward() const {
    Vector out = unwritten<T>(y.size());
    run("forward", {{"y", address(out)}});
    Exact expected(y.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = z[chosen[i]] * derivative(chosen[i]);
    }
    expect_near(out, expected, "y");
  }

  void backward(bool training, bool injected) const {
    Vector gu = unwritten<T>(s.u.size()), gresidual = gu;
    Vector gweight = unwritten<T>(s.u.channels), gbias = gweight;
    std::map<std::string, uintptr_t> tensors{
        {"gy", address(gy)},
        {"gu", address(gu)},
        {"gweight", address(gweight)},
        {"gbias", address(gbias)}
    };
    if (s.residual) tensors["gresidual"] = address(gresidual);
    if (injected) {
      tensors["coefficient"] = address(coefficient);
      tensors["curvature"] = address(curvature);
    }
    run("backward", tensors, training);
    const double count = double(s.u.size() / s.u.channels);
    Exact expected = project(g, training);
    for_each([&](int64_t c, int64_t at) {
      expected[at] *= double(weight[c]) * invstd[c];
      if (injected) expected[at] += coefficient[c] * xhat(c, at) + curvature[at];
    });
    expect_near(gu, expected, "gu");
    if (s.residual) expect_near(gresidual, g, "gresidual");
    Exact sums = means([&](int64_t c, int64_t at) { return g[at] * xhat(c, at) * count; });
    expect_near(gweight, sums, "gweight");
    sums = means([&](int64_t, int64_t at) { return g[at] * count; });
    expect_near(gbias, sums, "gbias");
  }

  void pushforward(bool batch, bool curved) const {
    Vector ty = unwritten<T>(y.size()), kappa = unwritten<T>(s.u.size());
    Vector total = unwritten<T>(s.u.channels), along = total;
    std::map<std::string, uintptr_t> tensors{
        {"tu", address(tu)},
        {"gy", address(gy)},
        {"ty", address(ty)},
        {"total", address(total)},
        {"coefficient", address(along)}
    };
    if (s.residual) tensors["tresidual"] = address(tresidual);
    if (curved) tensors["kappa"] = address(kappa);
    run("pushforward", tensors, batch);

    const Exact pg = project(g, batch), pt = project(tu, batch);
    const auto scale = [&](int64_t c) { return double(weight[c]) * invstd[c]; };
    Exact tn(s.u.size()), expected(y.size()), bent(s.u.size());
    for_each([&](int64_t c, int64_t at) { tn[at] = scale(c) * pt[at]; });
    for (size_t i = 0; i < expected.size(); ++i) {
      const int64_t at = chosen[i];
      expected[i] = derivative(at) * (tn[at] + (s.residual ? tresidual[at] : 0));
    }
    expect_near(ty, expected, "ty");
    const Exact mean_total =
        means([&](int64_t c, int64_t at) { return invstd[c] * pg[at] * tu[at]; });
    Exact totals = mean_total, coefficients = mean_total;
    for (int64_t c = 0; c < s.u.channels; ++c) {
      totals[c] *= double(s.u.size() / s.u.channels);
      coefficients[c] *= -scale(c);
    }
    expect_near(total, totals, "total");
    expect_near(along, coefficients, "coefficient");
    if (!curved) return;
    const Exact with_t = means([&](int64_t c, int64_t at) { return tu[at] * xhat(c, at); });
    const Exact with_g = means([&](int64_t c, int64_t at) { return g[at] * xhat(c, at); });
    for_each([&](int64_t c, int64_t at) {
      bent[at] = -invstd[c] * (scale(c) * pg[at] * with_t[c] + tn[at] * with_g[c]);
    });
    expect_near(kappa, bent, "kappa");
  }

  const Shape s;
  const uint64_t seed;
  std::mt19937 make;
  const Map y;
  const Vector u, residual, gy, tu, tresidual, curvature; // of u's shape, gy of y's
  const Vector mean, bias, coefficient, weight;
  Vector invstd;
  Exact z, g;
  std::vector<int64_t> chosen; // by each of y, among u's elements
};

} // namespace

int main() {
  // Odd; one channel; as wide as vectors; vectors of channels; more cells than a block has threads.
  const std::vector<std::vector<int64_t>> shapes{
      {2, 3, 5, 7}, {3, 1, 3, 3}, {1, 4, 6, 16}, {2, 12, 7, 5}, {1, 2, 33, 35}
  };
  const std::vector<std::vector<int>> pools{{1, 1, 0}, {2, 2, 0}, {3, 2, 1}, {3, 2, 0}};
  for (const auto& n : shapes) {
    for (const auto& pool : pools) {
      for (const bool last : {false, true}) {
        const int before = failures;
        const uint64_t seed = uint64_t(n[1] + pool[0] + pool[2]);
        const Shape shape{{n[0], n[1], n[2], n[3], last}, pool, bool(seed % 2) != last};
        Case<float>(shape, seed).check();
        Case<double>(shape, seed).check();
        if (failures == before) continue;
        std::printf(
            "of [%d, %d, %d, %d], pool %dx%d by %d, padding %d, channels-last %d, residual %d\n",
            int(n[0]), int(n[1]), int(n[2]), int(n[3]), pool[0], pool[0], pool[1], pool[2], last,
            shape.residual
        );
      }
    }
  }
  return failures != 0;
}
