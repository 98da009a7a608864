// attention_window's kernels for any processor.
#define FASTJAC_TARGET_NAME portable
#define FASTJAC_VECTOR_BYTES 16
#include "attention_window_kernels.h"
