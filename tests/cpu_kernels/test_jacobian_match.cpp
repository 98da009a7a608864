// jacobian_match's CPU kernel against its equation in long double, on the instruction set that
// FASTJAC_CPU_ISA names. Each size is allocated exactly, for AddressSanitizer.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/jacobian_match.h"

namespace {

using namespace fastjac::jacobian_match;

struct Expected {
  long double loss;
  std::vector<long double> v;
};

template <typename T>
Expected equation(const std::vector<T>& s, const std::vector<T>& t, bool normalize, double eps) {
  long double a = 0, b = 0, along = 0;
  for (const long double x : s) a += x * x;
  for (const long double x : t) b += x * x;
  const bool a_is_norm = std::sqrt(a) >= eps;
  a = normalize ? std::max(std::sqrt(a), (long double)eps) : 1;
  b = normalize ? std::max(std::sqrt(b), (long double)eps) : 1;
  Expected expected{0, std::vector<long double>(s.size())};
  for (size_t i = 0; i < s.size(); ++i) {
    const long double d = s[i] / a - t[i] / b;
    expected.loss += d * d;
    along += d * s[i] / a;
  }
  if (!normalize || !a_is_norm) along = 0;
  for (size_t i = 0; i < s.size(); ++i) {
    expected.v[i] = 2 / a * (s[i] / a - t[i] / b - along * s[i] / a);
  }
  return expected;
}

// Blocks one at a time, from the last.
struct Backwards {
  template <typename F>
  void operator()(int64_t blocks, const F& f) const {
    for (int64_t b = blocks; b-- > 0;) f(b, b + 1);
  }
};

template <typename T>
int failures_at(int64_t n, bool normalize, double eps) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::normal_distribution<T> normal;
  std::vector<T> s(n), t(n), v(n, std::numeric_limits<T>::quiet_NaN());
  for (T& x : s) x = normal(random);
  for (T& x : t) x = normal(random);

  const T loss =
      match_sample<T, T>({s.data(), t.data(), v.data()}, n, normalize, T(eps), Backwards{});
  const Expected expected = equation(s, t, normalize, eps);
  long double off = 0, size = 0;
  for (int64_t i = 0; i < n; ++i) {
    off += (v[i] - expected.v[i]) * (v[i] - expected.v[i]);
    size += expected.v[i] * expected.v[i];
  }
  // One element has the same direction as another or the opposite: v is zero but for rounding.
  const long double tolerance = 50 * std::numeric_limits<T>::epsilon();
  const long double scale = std::max(std::sqrt(size), (long double)1e-2);
  const bool right = std::abs(loss - expected.loss) <= tolerance * std::max(expected.loss, 1e-2L) &&
                     std::sqrt(off) <= tolerance * scale;
  if (!right) {
    std::printf(
        "FAILED: n = %lld, %zu bytes, normalize = %d, eps = %g: loss %.17g, expected %.17Lg; v off "
        "by %Lg of %Lg\n",
        static_cast<long long>(n), sizeof(T), normalize, eps, double(loss), expected.loss,
        std::sqrt(off), std::sqrt(size)
    );
  }
  return !right;
}

} // namespace

int main() {
  int failures = 0, checked = 0;
  for (const int64_t n : {1, 2, 31, 32, 33, 1000, 4095, 4096, 4097, 30001}) {
    for (const bool normalize : {true, false}) {
      for (const double eps : {1e-12, 40.0}) {
        failures += failures_at<float>(n, normalize, eps) + failures_at<double>(n, normalize, eps);
        checked += 2;
      }
    }
  }
  std::printf("%d of %d passed\n", checked - failures, checked);
  return failures != 0;
}
