#define SHOAL_ATTENTION_TABLE kAttentionAvx512
#include "runtime/kernels/cpu/attention_inner.inc"
