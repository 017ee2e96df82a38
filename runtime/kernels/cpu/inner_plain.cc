#define SHOAL_INNER_TABLE kInnerPlain
#include "runtime/kernels/cpu/inner.inc"
