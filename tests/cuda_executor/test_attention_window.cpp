// attention_window's device code and its slope's under ctest, so that AddressSanitizer sees them too.
// The Python tests compare them with the references in every dtype.

#include "attention_window.h"
#include "checking.h"

namespace {

using namespace checking;

template <typename T>
void check(const Map& m, int64_t k, int power, uint64_t seed) {
  std::mt19937 make(seed);
  const auto z = multiples<T>(m.size(), T(0.25), 8, make);
  std::vector<int64_t> position(2 * m.batch, -9);
  auto value = unwritten<T>(m.batch);
  bool fits = run_attention_window(
      dtype<T>(), address(z), address(position), address(value),
      {m.batch, m.channels, m.height, m.width, k, m.channels_last}, power, seed
  );

  const double scale = 1 / double(m.channels * k * k);
  std::vector<double> highest(m.batch, -1);
  std::vector<int64_t> first(2 * m.batch);
  for (int64_t b = 0; b < m.batch; ++b) {
    for (int64_t i = 0; i + k <= m.height; ++i) {
      for (int64_t j = 0; j + k <= m.width; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < m.channels * k * k; ++t) {
          sum += std::pow(std::abs(z[m.at(b, t / (k * k), i + t / k % k, j + t % k)]), power);
        }
        if (sum <= highest[b]) continue; // the first of equals
        highest[b] = sum;
        first[2 * b] = i;
        first[2 * b + 1] = j;
      }
    }
    highest[b] *= scale;
  }

  // The second sample's window leaves the map, where features count as 0.
  std::vector<int64_t> start = first;
  if (m.batch > 1) start[2] = -1, start[3] = m.width - k + 1;
  const Map window{m.batch, m.channels, k, k, m.channels_last};
  auto slope = unwritten<T>(window.size()), bend = slope;
  const int64_t unit = m.channels_last ? m.channels : 1, area = m.height * m.width;
  fits &= run_attention_window_slope(
      dtype<T>(), address(z), m.size(), address(start), address(slope), address(bend),
      {m.batch, m.channels / unit, k, k, unit, m.height, m.width, m.channels * area,
       m.channels_last ? 0 : area, m.width * unit, unit, 1, 0},
      m.channels, power, seed
  );
  std::vector<double> slopes(window.size()), bends(window.size());
  for (int64_t b = 0; b < m.batch; ++b) {
    for (int64_t t = 0; t < m.channels * k * k; ++t) {
      const int64_t c = t / (k * k), i = t / k % k, j = t % k;
      const int64_t row = start[2 * b] + i, column = start[2 * b + 1] + j;
      const bool inside = row >= 0 && row < m.height && column >= 0 && column < m.width;
      const double x = inside ? z[m.at(b, c, row, column)] : 0;
      const double sign = (x > 0) - (x < 0);
      slopes[window.at(b, c, i, j)] = scale * power * sign * std::pow(std::abs(x), power - 1);
      bends[window.at(b, c, i, j)] =
          power == 1 ? 0 : scale * power * (power - 1) * std::pow(std::abs(x), power - 2);
    }
  }
  const std::string of = " of [" + std::to_string(m.batch) + ", " + std::to_string(m.channels) +
                         ", " + std::to_string(m.height) + ", " + std::to_string(m.width) + "], " +
                         dtype<T>() + ", power " + std::to_string(power) +
                         (m.channels_last ? ", channels-last" : "");
  expect(fits, "grid" + of);
  expect(position == first, "position" + of);
  expect_near(value, highest, "value" + of);
  expect_near(slope, slopes, "slope" + of);
  expect_near(bend, bends, "bend" + of);
}

} // namespace

int main() {
  // [B, C, h, w, k]
  const std::vector<std::vector<int64_t>> shapes{
      {3, 5, 1, 1, 1}, {2, 7, 9, 5, 3}, {2, 16, 8, 16, 8}, {1, 33, 6, 17, 2}, {1, 2, 4, 300, 3}
  };
  for (const auto& n : shapes) {
    for (const bool last : {false, true}) {
      for (const int power : {1, 2, 3}) {
        const Map m{n[0], n[1], n[2], n[3], last};
        check<float>(m, n[4], power, uint64_t(power));
        check<double>(m, n[4], power, uint64_t(power));
      }
    }
  }
  return failures != 0;
}
