#include "window_crop.h"

#include <stdexcept>

#include "device.h"

#include "../../csrc/cuda/window_crop.cuh"

namespace {

template <typename T>
bool run(
    uintptr_t source_address,
    int64_t source_elements,
    uintptr_t start_address,
    uint64_t fill,
    uintptr_t out_address,
    const fastjac::window_crop::Crop& g,
    uint64_t seed
) {
  const auto* source = reinterpret_cast<const T*>(source_address);
  const auto* start = reinterpret_cast<const int64_t*>(start_address);
  auto* out = reinterpret_cast<T*>(out_address);
  const size_t elements = g.batch * g.planes * g.rows * g.length();
  const executor::Device device(
      seed, {{"source", source, source_elements * sizeof(T), false},
             {"start", start, 2 * g.batch * sizeof(int64_t), false},
             {"out", out, elements * sizeof(T), true}}
  );
  return fastjac::window_crop::crop(device, g, source, start, static_cast<T>(fill), out);
}

} // namespace

bool run_window_crop(
    int element_bytes,
    uintptr_t source,
    int64_t source_elements,
    uintptr_t start,
    uint64_t fill,
    uintptr_t out,
    std::array<int64_t, 13> c,
    uint64_t seed
) {
  const fastjac::window_crop::Crop g{c[0], c[1], c[2], c[3],  c[4],  c[5],      c[6],
                                     c[7], c[8], c[9], c[10], c[11], c[12] != 0};
  switch (element_bytes) {
    case 2:
      return run<uint16_t>(source, source_elements, start, fill, out, g, seed);
    case 4:
      return run<uint32_t>(source, source_elements, start, fill, out, g, seed);
    case 8:
      return run<uint64_t>(source, source_elements, start, fill, out, g, seed);
    default:
      throw std::invalid_argument("no kernel moves elements of that size");
  }
}
