#include "runtime/kernels/documents.h"

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {

void DocumentStarts(const Tensor& tokens, int32_t end_of_document, const Tensor& first, Stream& stream) {
  const int64_t rows = tokens.dim(0), seq = tokens.dim(1);
  CheckTensor(tokens, DType::kI32, {rows, seq}, "tokens");
  CheckTensor(first, DType::kI32, {rows * seq}, "first");
  if (Offloaded(stream, &DeviceKernels::document_starts, tokens, end_of_document, first)) return;
  ParallelFor(rows, GrainOfRows(seq), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const int32_t* ids = tokens.data<int32_t>() + row * seq;
      int32_t* to = first.data<int32_t>() + row * seq;
      int32_t begin = 0;
      for (int32_t t = 0; t < seq; ++t) {
        to[t] = begin;
        if (ids[t] == end_of_document) begin = t + 1;
      }
    }
  });
}

}  // namespace shoal::kernels
