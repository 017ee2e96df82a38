// Causal grouped-query attention, over whole sequences or within the documents that they are packed from, blockwise with an
// online softmax: never a full S x S matrix (Dao et al., 2022, "FlashAttention", arXiv 2205.14135, and its 2023 sequel,
// 2307.08691, for the backward pass).
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// `rows` sequences of `seq` tokens. Token t's projections are one row of qkv: heads * dim of Q, then kv_heads * dim of
// K, then of V. Query head h reads KV head h / (heads / kv_heads).
struct AttentionShape {
  int64_t rows = 0;
  int64_t seq = 0;
  int heads = 0;
  int kv_heads = 0;
  int dim = 0;  // Of a head; any value >= 1, fast when a multiple of 16.
  int64_t q_width() const { return static_cast<int64_t>(heads) * dim; }
  int64_t kv_width() const { return static_cast<int64_t>(kv_heads) * dim; }
  int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
};

// out[T, heads*dim] = softmax(Q K^T / sqrt(dim), masked) V; T = rows * seq. lse[T, heads] f32: log of the softmax's
// denominator, which the backward pass needs. qkv and out are f32 or bf16 alike; sums and softmax are f32.
//
// Token t of a sequence sees the tokens first[t] ... t of it. first[T] (i32) counts from the sequence's beginning (documents.h
// computes it): 0 <= first[t] <= t, and it never decreases within a sequence, which is CHECKed on the CPU; on a device other
// values give other results, but touch no other memory. Empty: 0 everywhere, plain causal attention.
//
// Work: of the blocks of queries by blocks of keys that the mask leaves anything of: over documents of lengths L the sum of L^2 / 2
// pairs, and about T (queries + keys of a block) more: 48 and 64 on the CPU, at most 128 and 64 on GPUs.
void Attention(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out, const Tensor& lse,
               Stream& stream);

// dqkv[T, qkv_width], overwritten, from dout[T, heads*dim] (the type of qkv).
void AttentionBackward(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out, const Tensor& lse,
                       const Tensor& dout, const Tensor& dqkv, Stream& stream);

namespace ref {
void Attention(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out, const Tensor& lse,
               Stream& stream);
void AttentionBackward(const AttentionShape& shape, const Tensor& qkv, const Tensor& first, const Tensor& out, const Tensor& lse,
                       const Tensor& dout, const Tensor& dqkv, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
