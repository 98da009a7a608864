// window_crop's device code and its adjoint's under ctest, so that AddressSanitizer sees them too. The
// Python tests compare them with the references, for every element size and any strides.

#include <cstring>

#include "checking.h"
#include "window_crop.h"

namespace {

using namespace checking;

void check(const Map& from, int64_t rows, int64_t columns, bool adjoint, uint64_t seed) {
  // Inside, over each edge, touching from outside, and as far as there is.
  const std::vector<int64_t> start{0,           0, 2, 1,        -2,        1, 1, -3,
                                   from.height, 0, 0, -columns, INT64_MAX, 1, 0, INT64_MIN};
  std::mt19937 make(seed);
  const Map to{from.batch, from.channels, rows, columns, from.channels_last};
  const auto source = multiples<float>(from.size(), 1.0f, 1000, make);
  auto out = unwritten<float>(to.size());
  const float fill = adjoint ? 0.0f : -1e9f;
  uint32_t bits;
  std::memcpy(&bits, &fill, sizeof(bits));
  const int64_t unit = from.channels_last ? from.channels : 1;
  const int64_t area = from.height * from.width;
  const bool fits = run_window_crop(
      4, address(source), from.size(), address(start), bits, address(out),
      {from.batch, from.channels / unit, rows, columns, unit, from.height, from.width,
       from.channels * area, from.channels_last ? 0 : area, from.width * unit, unit, 1, adjoint},
      seed
  );
  std::vector<double> expected(to.size(), fill);
  for (int64_t b = 0; b < to.batch; ++b) {
    for (int64_t c = 0; c < to.channels; ++c) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const __int128 sign = adjoint ? -1 : 1;
          const __int128 row = sign * start[2 * b] + i, column = sign * start[2 * b + 1] + j;
          if (row < 0 || row >= from.height || column < 0 || column >= from.width) continue;
          expected[to.at(b, c, i, j)] = source[from.at(b, c, int64_t(row), int64_t(column))];
        }
      }
    }
  }
  const std::string what = (adjoint ? "adjoint" : "crop") +
                           std::string(to.channels_last ? ", channels-last" : "") + ", channels " +
                           std::to_string(to.channels) + ", width " + std::to_string(columns);
  expect(fits, what);
  expect_near(out, expected, what);
}

} // namespace

int main() {
  for (const int64_t channels : {1, 3, 8}) {
    for (const int64_t columns : {1, 5, 8, 37}) {
      for (const bool last : {false, true}) {
        for (const bool adjoint : {false, true}) {
          check({8, channels, 7, 9, last}, 3, columns, adjoint, uint64_t(channels + columns));
        }
      }
    }
  }
  return failures != 0;
}
