// What this library was built for. fastjac/ops/_cuda_build.py reads it in the file, before loading it.

#include <cuda_runtime_api.h>

// A macro's value as a string.
#define FASTJAC_QUOTE(...) #__VA_ARGS__
#define FASTJAC_STRING(...) FASTJAC_QUOTE(__VA_ARGS__)

extern "C" {

// Exported, so that the linker keeps it. The architectures are setup.py's.
__attribute__((visibility("default"))) extern const char fastjac_cuda_build[];
const char fastjac_cuda_build[] =
    "fastjac CUDA build: " FASTJAC_STRING(CUDART_VERSION FASTJAC_CUDA_ARCHITECTURES);

} // extern "C"
