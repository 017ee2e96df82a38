#include "runtime/kernels/embedding.h"

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void Embedding(const Tensor& table, const Tensor& ids, const Tensor& out, Stream&) {
  const int64_t T = ids.dim(0), D = table.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t d = 0; d < D; ++d) Set(out, t * D + d, Get(table, GetIndex(ids, t) * D + d));
  }
}

void EmbeddingBackward(const Tensor& dout, const Tensor& ids, const Tensor& dtable, Stream&) {
  const int64_t T = ids.dim(0), D = dtable.dim(1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t d = 0; d < D; ++d) AddAt(dtable, GetIndex(ids, t) * D + d, Get(dout, t * D + d));
  }
}

}  // namespace shoal::kernels::ref
