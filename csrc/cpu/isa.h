// Run-time choice of the instruction set, without intrinsics.
//
// for_isa(body) runs `body` inside a function that is compiled for the best instruction set of this
// processor: `flatten` inlines the body's loops there, and the compiler vectorises them for it.
// Write plain loops over arrays of independent lanes. Since products are not contracted
// (-ffp-contract=off) and the lanes are the same for all, every instruction set gives the same
// bits.
//
// FASTJAC_CPU_ISA=portable|avx2|avx512 asks for less than the best.
#pragma once

namespace fastjac {

enum class Isa { kPortable, kAvx2, kAvx512 };

Isa isa();

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTJAC_X86
#define FASTJAC_TARGET(features) __attribute__((target(features), flatten, noinline))

template <typename F>
FASTJAC_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
void run_avx512(const F& body) {
  body();
}

template <typename F>
FASTJAC_TARGET("avx2,fma,f16c")
void run_avx2(const F& body) {
  body();
}
#endif

template <typename F>
inline void for_isa(const F& body) {
#ifdef FASTJAC_X86
  switch (isa()) {
    case Isa::kAvx512:
      return run_avx512(body);
    case Isa::kAvx2:
      return run_avx2(body);
    case Isa::kPortable:
      break;
  }
#endif
  body();
}

// The table of kernels of this processor's instruction set, where there is one for each (lanes.h) and
// the compiler is one that makes them.
#if defined(FASTJAC_X86) && !defined(__clang__)
#define FASTJAC_KERNELS                    \
  (isa() == Isa::kAvx512 ? avx512::kernels \
   : isa() == Isa::kAvx2 ? avx2::kernels   \
                         : portable::kernels)
#else
#define FASTJAC_KERNELS portable::kernels
#endif

} // namespace fastjac
