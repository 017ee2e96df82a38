#define SHOAL_INNER_TABLE kInnerAvx2
#include "runtime/kernels/cpu/inner.inc"
