// What lets one header serve the host compiler and nvcc. Includes nothing of PyTorch.
#pragma once

#ifdef __CUDACC__
#define FASTJAC_HOST_DEVICE __host__ __device__
#else
#define FASTJAC_HOST_DEVICE
#endif

// Inlined everywhere: the CPU's kernels are compiled for several instruction sets, and a function
// that is not inlined would be kept for one of them.
#if defined(__GNUC__)
#define FASTJAC_ALWAYS_INLINE FASTJAC_HOST_DEVICE inline __attribute__((always_inline))
#else
#define FASTJAC_ALWAYS_INLINE FASTJAC_HOST_DEVICE inline
#endif
