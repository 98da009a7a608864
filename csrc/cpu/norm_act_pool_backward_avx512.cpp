// The passes of norm_act_pool's backward for AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#pragma GCC optimize("no-tree-slp-vectorize") // of no use here, and GCC 12 dies in it
#define FASTJAC_TARGET_NAME avx512
#define FASTJAC_VECTOR_BYTES 64
#include "norm_act_pool_backward.h"
#endif
