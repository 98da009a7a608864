#include "isa.h"

#include <cstdlib>
#include <string_view>

namespace fastjac {
namespace {

#ifdef FASTJAC_ONLY_ISA
namespace built {
[[maybe_unused]] constexpr Isa portable = Isa::kPortable, avx2 = Isa::kAvx2, avx512 = Isa::kAvx512;
}

Isa chosen() {
  return built::FASTJAC_ONLY_ISA;
}
#else
Isa best() {
#ifdef FASTJAC_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa chosen() {
  const char* asked = std::getenv("FASTJAC_CPU_ISA");
  const std::string_view name = asked ? asked : "";
  const Isa limit = name == "portable" ? Isa::kPortable
                    : name == "avx2"   ? Isa::kAvx2
                                       : Isa::kAvx512;
  return best() < limit ? best() : limit;
}
#endif

} // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

} // namespace fastjac

// For `python -m fastjac.info`.
extern "C" __attribute__((visibility("default"))) const char* fastjac_cpu_isa() {
  switch (fastjac::isa()) {
    case fastjac::Isa::kAvx512:
      return "avx512";
    case fastjac::Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}
