// jacobian_match's kernels for any processor.
#define FASTJAC_TARGET_NAME portable
#define FASTJAC_VECTOR_BYTES 16
#include "jacobian_match_kernels.h"
