// The part of attention that one thread does for one (row, KV head), compiled three times (plain, AVX2,
// AVX-512). Raw pointers only. Included by files compiled for AVX-512: declarations only.
#pragma once

#include <cstdint>

namespace shoal::kernels {

// Tensors of runtime/kernels/attention.h; those that a function does not use may be null. bf16 is passed as
// uint16_t.
struct AttentionArgs {
  const void* qkv;
  const int32_t* first;  // Null: 0 everywhere.
  void* out;  // Written by forward, read by backward.
  float* lse;
  const void* dout;
  void* dqkv;
  int64_t seq;
  int64_t qkv_width;
  int heads;
  int kv_heads;
  int dim;
};

struct TokenRange {
  int64_t begin;
  int64_t end;
};

// Queries of a block: a multiple of all tile heights. Keys of a block: a panel of K^T, of V and of the
// probabilities are in L1 together for heads of 64.
constexpr int64_t kAttentionQueryBlock = 48;
constexpr int64_t kAttentionKeyBlock = 64;

// Scratch is 64-byte aligned and need not be initialised. Ranges begin at multiples of the block sizes above.
struct AttentionInner {
  // Floats of scratch for a sequence of `seq` tokens.
  int64_t (*forward_scratch)(int64_t seq, int dim);
  int64_t (*backward_scratch)(int64_t seq, int dim);
  // Outputs of all query heads of the KV head for these queries.
  void (*forward)(const AttentionArgs& args, int64_t row, int kv_head, TokenRange queries, float* scratch);
  // With both ranges the whole sequence: all gradients of the KV head and its query heads. Only `queries` of
  // the query heads (keys empty), or only `keys` of the KV head (queries empty), otherwise; the same bits
  // either way.
  void (*backward)(const AttentionArgs& args, int64_t row, int kv_head, TokenRange queries, TokenRange keys,
                   float* scratch);
};

// [0]: f32, [1]: bf16.
extern const AttentionInner kAttentionPlain[2];
extern const AttentionInner kAttentionAvx2[2];
extern const AttentionInner kAttentionAvx512[2];

}  // namespace shoal::kernels
