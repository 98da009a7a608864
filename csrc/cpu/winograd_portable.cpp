// winograd's kernels for any processor.
#define FASTJAC_TARGET_NAME portable
#define FASTJAC_VECTOR_BYTES 16
#include "winograd_kernels.h"
