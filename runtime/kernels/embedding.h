// Embedding look-up. T tokens, V vocabulary, D width.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// out_TD (f32) = table_VD[ids_T]; table f32 or bf16, ids i32 in [0, V).
void Embedding(const Tensor& table, const Tensor& ids, const Tensor& out, Stream& stream);
// dtable_VD (f32) [ids_T] += dout_TD (f32), tokens in ascending order whatever the number of threads.
void EmbeddingBackward(const Tensor& dout, const Tensor& ids, const Tensor& dtable, Stream& stream);

namespace ref {
void Embedding(const Tensor& table, const Tensor& ids, const Tensor& out, Stream& stream);
void EmbeddingBackward(const Tensor& dout, const Tensor& ids, const Tensor& dtable, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
