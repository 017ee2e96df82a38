#define SHOAL_ATTENTION_TABLE kAttentionAvx2
#include "runtime/kernels/cpu/attention_inner.inc"
