#define SHOAL_INNER_TABLE kInnerAvx512Bf16
#include "runtime/kernels/cpu/inner.inc"
