#include "runtime/kernels/embedding.h"

#include <cstring>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {
constexpr int64_t kFloatsPerCacheLine = 16;
}  // namespace

void Embedding(const Tensor& table, const Tensor& ids, const Tensor& out, Stream& stream) {
  const int64_t V = table.dim(0), D = table.dim(1), T = ids.dim(0);
  const InnerAct act = CheckAct(table, {V, D}, "table");
  CheckTensor(ids, DType::kI32, {T}, "ids");
  CheckTensor(out, DType::kF32, {T, D}, "out");
  if (Offloaded(stream, &DeviceKernels::embedding, table, ids, out)) return;
  CheckIds(ids.span<int32_t>(), V, "ids");
  const auto to_f32 = Inner().to_f32;
  ParallelFor(T, GrainOfRows(D), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = ids.data<int32_t>()[t] * D;
      float* to = out.data<float>() + t * D;
      if (act == kInnerF32) {
        std::memcpy(to, table.data<float>() + from, static_cast<size_t>(D) * sizeof(float));
      } else {
        to_f32(static_cast<const uint16_t*>(table.raw()) + from, to, D);
      }
    }
  });
}

// Each thread owns columns and walks all tokens in order: no two write one element, whatever the ids.
void EmbeddingBackward(const Tensor& dout, const Tensor& ids, const Tensor& dtable, Stream& stream) {
  const int64_t V = dtable.dim(0), D = dtable.dim(1), T = ids.dim(0);
  CheckTensor(dtable, DType::kF32, {V, D}, "dtable");
  CheckTensor(ids, DType::kI32, {T}, "ids");
  CheckTensor(dout, DType::kF32, {T, D}, "dout");
  if (Offloaded(stream, &DeviceKernels::embedding_backward, dout, ids, dtable)) return;
  CheckIds(ids.span<int32_t>(), V, "ids");
  const auto add_to = Inner().add_to[kInnerF32];
  const int64_t lines = (D + kFloatsPerCacheLine - 1) / kFloatsPerCacheLine;
  ParallelFor(lines, GrainOfRows(T * kFloatsPerCacheLine), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kFloatsPerCacheLine, count = std::min(end * kFloatsPerCacheLine, D) - first;
    for (int64_t t = 0; t < T; ++t) {
      add_to(dout.data<float>() + t * D + first, dtable.data<float>() + ids.data<int32_t>()[t] * D + first,
             count);
    }
  });
}

}  // namespace shoal::kernels
