#define SHOAL_INNER_TABLE kInnerAvx512
#include "runtime/kernels/cpu/inner.inc"
