#include "attention_window.h"

#include <cstring>
#include <type_traits>
#include <vector>

#include "device.h"
#include "dtypes.h"

#include "../../csrc/cuda/attention_window.cuh"

using namespace fastjac::attention_window;

namespace {

template <typename Run>
void for_dtype_and_power(const std::string& dtype, double power, const Run& run) {
  executor::for_dtype(dtype, [&](auto zero) {
    power == 2 ? run(zero, std::true_type()) : run(zero, std::false_type());
  });
}

} // namespace

bool run_attention_window(
    const std::string& dtype,
    uintptr_t features,
    uintptr_t position,
    uintptr_t value,
    std::array<int64_t, 6> map,
    double power,
    uint64_t seed
) {
  const Map m{map[0], map[1], map[2], map[3], map[4], map[5] != 0};
  bool fits = false;
  for_dtype_and_power(dtype, power, [&](auto zero, auto square) {
    using scalar_t = decltype(zero);
    using acc_t = fastjac::accumulator_t<scalar_t>;
    const auto poisoned = [](int64_t elements) {
      std::vector<acc_t> room(elements);
      std::memset(room.data(), 0xff, elements * sizeof(acc_t)); // NaN
      return room;
    };
    const int64_t rows = m.batch * m.rows();
    std::vector<acc_t> attention = poisoned(m.batch * m.pixels()), sums = poisoned(rows * m.width),
                       row_values = poisoned(rows);
    std::vector<int64_t> row_indices(rows, -1);
    const Operands<scalar_t> x{
        reinterpret_cast<const scalar_t*>(features),
        reinterpret_cast<int64_t*>(position),
        reinterpret_cast<acc_t*>(value),
        attention.data(),
        sums.data(),
        row_values.data(),
        row_indices.data()
    };
    const executor::Device device(
        seed,
        {{"features", x.features, m.batch * m.channels * m.pixels() * sizeof(scalar_t), false},
         {"position", x.position, 2 * m.batch * sizeof(int64_t), true},
         {"value", x.value, m.batch * sizeof(acc_t), true},
         {"attention", x.attention, attention.size() * sizeof(acc_t), true},
         {"sums", x.sums, sums.size() * sizeof(acc_t), true},
         {"row_values", x.row_values, row_values.size() * sizeof(acc_t), true},
         {"row_indices", x.row_indices, row_indices.size() * sizeof(int64_t), true}}
    );
    fits = find_window<square>(device, m, x, power);
  });
  return fits;
}

bool run_attention_window_slope(
    const std::string& dtype,
    uintptr_t features,
    int64_t elements,
    uintptr_t position,
    uintptr_t slope,
    uintptr_t bend,
    std::array<int64_t, 13> c,
    int64_t channels,
    double power,
    uint64_t seed
) {
  const fastjac::window_crop::Crop g{c[0], c[1], c[2], c[3],  c[4],  c[5],      c[6],
                                     c[7], c[8], c[9], c[10], c[11], c[12] != 0};
  bool fits = false;
  for_dtype_and_power(dtype, power, [&](auto zero, auto square) {
    using scalar_t = decltype(zero);
    const auto* from = reinterpret_cast<const scalar_t*>(features);
    const auto* at = reinterpret_cast<const int64_t*>(position);
    auto* slopes = reinterpret_cast<scalar_t*>(slope);
    auto* bends = reinterpret_cast<scalar_t*>(bend);
    const size_t bytes = g.batch * g.planes * g.rows * g.length() * sizeof(scalar_t);
    std::memset(&zero, 0, sizeof(zero));
    const executor::Device device(
        seed, {{"features", from, elements * sizeof(scalar_t), false},
               {"position", at, 2 * g.batch * sizeof(int64_t), false},
               {"slope", slopes, bytes, true},
               {"bend", bends, bytes, true}}
    );
    fits = find_slope<square>(device, g, channels, from, at, zero, power, slopes, bends);
  });
  return fits;
}
