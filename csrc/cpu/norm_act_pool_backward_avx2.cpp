// The passes of norm_act_pool's backward for AVX2.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#pragma GCC optimize("no-tree-slp-vectorize") // of no use here, and GCC 12 dies in it
#define FASTJAC_TARGET_NAME avx2
#define FASTJAC_VECTOR_BYTES 32
#include "norm_act_pool_backward.h"
#endif
