// The conversions of 16-bit numbers on this processor.
#include "small_floats.h"

#include "isa.h"

namespace fastjac {
namespace small_floats {

static const Kernels& kernels() {
  return FASTJAC_KERNELS;
}

} // namespace small_floats

void widen(const Half* from, int64_t n, float* to) {
  small_floats::kernels().widen(from, n, to);
}
void narrow(const float* from, int64_t n, Half* to) {
  small_floats::kernels().narrow(from, n, to);
}

} // namespace fastjac
