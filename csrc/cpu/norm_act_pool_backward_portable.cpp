// The passes of norm_act_pool's backward for any processor.
#define FASTJAC_TARGET_NAME portable
#define FASTJAC_VECTOR_BYTES 16
#include "norm_act_pool_backward.h"
