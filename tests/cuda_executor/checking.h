// What the C++ tests of device code share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace checking {

inline int failures = 0;

template <typename T>
std::string dtype() {
  return std::is_same_v<T, double> ? "float64" : "float32";
}

// Exactly as long as the operator may access: AddressSanitizer sees the first element past the end.
template <typename T>
uintptr_t address(const std::vector<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data());
}

// Multiples of `unit`, from -limit to limit: few, and exact in every dtype.
template <typename T>
std::vector<T> multiples(int64_t count, T unit, int limit, std::mt19937& make) {
  std::vector<T> x(count);
  for (T& value : x) value = unit * (int(make() % (2 * limit + 1)) - limit);
  return x;
}

// For results, which are to be overwritten.
template <typename T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(count, T(NAN));
}

// A map's layout; all are dense.
struct Map {
  int64_t batch, channels, height, width;
  bool channels_last;

  int64_t size() const {
    return batch * channels * height * width;
  }
  int64_t at(int64_t b, int64_t c, int64_t i, int64_t j) const {
    return channels_last ? ((b * height + i) * width + j) * channels + c
                         : ((b * channels + c) * height + i) * width + j;
  }
};

inline void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// To rounding of T.
template <typename T>
void expect_near(
    const std::vector<T>& got, const std::vector<double>& expected, const std::string& what
) {
  const double tolerance = std::is_same_v<T, double> ? 1e-13 : 2e-5;
  bool right = got.size() == expected.size();
  for (size_t i = 0; right && i < got.size(); ++i) {
    right = std::abs(got[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])); // not NaN
  }
  expect(right, what);
}

} // namespace checking
