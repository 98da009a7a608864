// What lets one header serve the host compiler and nvcc. Includes nothing of PyTorch.
#pragma once

#ifdef __CUDACC__
#define FASTJAC_HOST_DEVICE __host__ __device__
#else
#define FASTJAC_HOST_DEVICE
#endif
