// Run-time choice of the instruction set: kernels are compiled once for each (lanes.h says how).
//
// FASTJAC_CPU_ISA=portable|avx2|avx512 asks for less than the best.
#pragma once

namespace fastjac {

enum class Isa { kPortable, kAvx2, kAvx512 };

Isa isa();

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTJAC_X86
#endif

// The table of kernels of this processor's instruction set, where the compiler is one that makes them.
// FASTJAC_ONLY_ISA: the one that was built (setup.py's FASTJAC_BUILD_FOR=here).
#if defined(FASTJAC_ONLY_ISA)
#define FASTJAC_KERNELS FASTJAC_ONLY_ISA::kernels
#elif defined(FASTJAC_X86) && !defined(__clang__)
#define FASTJAC_KERNELS                    \
  (isa() == Isa::kAvx512 ? avx512::kernels \
   : isa() == Isa::kAvx2 ? avx2::kernels   \
                         : portable::kernels)
#else
#define FASTJAC_KERNELS portable::kernels
#endif

} // namespace fastjac
