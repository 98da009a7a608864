// jacobian_match's device code under ctest, so that AddressSanitizer sees it too. The Python tests
// compare it with the reference in every dtype.

#include <cmath>
#include <cstdio>
#include <vector>

#include "jacobian_match.h"

namespace {

// js = 3 x and jt = x with x = 1, -1, 1, ...: raw, d = 2 x; normalised, no difference at all.
bool jacobian_match(int64_t batch, int64_t n, int64_t offset, bool normalize, uint64_t seed) {
  std::vector<float> js(batch * n + offset), jt(js.size()), v(js.size(), NAN), loss(batch, NAN);
  for (size_t i = 0; i < js.size(); ++i) {
    jt[i] = i % 2 ? -1.0f : 1.0f;
    js[i] = 3 * jt[i];
  }
  const auto at = [&](const std::vector<float>& x) {
    return reinterpret_cast<uintptr_t>(x.data() + offset);
  };
  run_jacobian_match(
      "float32", at(js), at(jt), at(v), reinterpret_cast<uintptr_t>(loss.data()), batch, n,
      normalize, 1e-12, seed
  );
  bool right = true;
  for (const float x : loss) right = right && (normalize ? std::abs(x) < 1e-12 : x == 4.0f * n);
  for (size_t i = offset; i < v.size(); ++i) {
    right = right && (normalize ? std::abs(v[i]) < 1e-6 : v[i] == 4 * jt[i]);
  }
  for (int64_t i = 0; i < offset; ++i) right = right && std::isnan(v[i]);
  return right;
}

} // namespace

int main() {
  int failures = 0;
  for (const int64_t n : {1, 3, 4, 255, 4096, 4097, 9000}) {
    for (const int64_t offset : {0, 1}) {
      for (const bool normalize : {true, false}) {
        for (const uint64_t seed : {1, 2}) {
          if (jacobian_match(3, n, offset, normalize, seed)) continue;
          ++failures;
          std::printf("FAILED: n = %d, offset %d, normalize %d\n", int(n), int(offset), normalize);
        }
      }
    }
  }
  return failures != 0;
}
