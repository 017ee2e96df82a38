#define SHOAL_ATTENTION_TABLE kAttentionPlain
#include "runtime/kernels/cpu/attention_inner.inc"
