#include "runtime/kernels/documents.h"

#include "runtime/kernels/ref/access.h"

namespace shoal::kernels::ref {

void DocumentStarts(const Tensor& tokens, int32_t end_of_document, const Tensor& first, Stream&) {
  const int64_t rows = tokens.dim(0), seq = tokens.dim(1);
  for (int64_t token = 0; token < rows * seq; ++token) {
    // Back to the token behind the last end of a document.
    int64_t begin = token;
    while (begin % seq > 0 && GetIndex(tokens, begin - 1) != end_of_document) --begin;
    Set(first, token, static_cast<double>(begin % seq));
  }
}

}  // namespace shoal::kernels::ref
