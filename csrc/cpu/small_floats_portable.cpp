// The conversions of 16-bit numbers for any processor.
#define FASTJAC_TARGET_NAME portable
#define FASTJAC_VECTOR_BYTES 16
#include "small_floats_kernels.h"
