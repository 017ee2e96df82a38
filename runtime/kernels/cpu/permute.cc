#include "runtime/kernels/permute.h"

#include <algorithm>
#include <cstring>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

// That these may be pairs of T tokens.
void CheckPairShapes(const Tensor& offset, const Tensor& slot, int64_t T) {
  CheckTensor(offset, DType::kI32, {T + 1}, "offset");
  CheckTensor(slot, DType::kI32, {slot.dim(0)}, "slot");
}

// That they are, with slots among R rows.
void CheckPairs(const Tensor& offset, const Tensor& slot, int64_t T, int64_t R) {
  const int64_t S = slot.dim(0);
  CheckIds(slot.span<int32_t>(), R, "slot");
  const int32_t* begin = offset.data<int32_t>();
  SHOAL_CHECK(begin[0] == 0 && begin[T] == S) << "offsets from " << begin[0] << " to " << begin[T] << ", want 0 to " << S;
  for (int64_t t = 0; t < T; ++t) SHOAL_CHECK_LE(begin[t], begin[t + 1]) << "offset[" << t << "]";
}

// For a loop over tokens that touches `rows` rows of D elements in all.
int64_t GrainOfTokens(int64_t T, int64_t rows, int64_t D) {
  return GrainOfRows(rows / std::max<int64_t>(T, 1) * D);
}

}  // namespace

void GatherRows(const Tensor& x, const Tensor& token, const Tensor& rows, Stream& stream) {
  const int64_t T = x.dim(0), D = x.dim(1), R = token.dim(0);
  const InnerAct act = CheckAct(x, {T, D}, "x");
  SHOAL_CHECK_EQ(CheckAct(rows, {R, D}, "rows"), act);
  CheckTensor(token, DType::kI32, {R}, "token");
  if (Offloaded(stream, &DeviceKernels::gather_rows, x, token, rows)) return;
  CheckIds(token.span<int32_t>(), T, "token");
  const int64_t row_bytes = D * SizeOf(x.dtype());
  const int32_t* from = token.data<int32_t>();
  ParallelFor(R, GrainOfRows(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(static_cast<char*>(rows.raw()) + r * row_bytes,
                  static_cast<const char*>(x.raw()) + from[r] * row_bytes, static_cast<size_t>(row_bytes));
    }
  });
}

void SumSlots(const Tensor& drows, const Tensor& offset, const Tensor& slot, const Tensor& dx, Stream& stream) {
  const int64_t T = dx.dim(0), D = dx.dim(1), R = drows.dim(0), S = slot.dim(0);
  const InnerAct from = CheckAct(drows, {R, D}, "drows"), to = CheckAct(dx, {T, D}, "dx");
  CheckPairShapes(offset, slot, T);
  if (Offloaded(stream, &DeviceKernels::sum_slots, drows, offset, slot, dx)) return;
  CheckPairs(offset, slot, T, R);
  const CombineArgs args = {.residual = nullptr,
                            .y = drows.raw(),
                            .offset = offset.data<int32_t>(),
                            .slot = slot.data<int32_t>(),
                            .weight = nullptr,
                            .out = dx.raw(),
                            .width = D};
  const auto rows = Inner().combine[from][to];
  ParallelFor(T, GrainOfTokens(T, S + T, D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                  const Tensor& out, Stream& stream) {
  const int64_t T = out.dim(0), D = out.dim(1), R = y.dim(0), S = slot.dim(0);
  const InnerAct act = CheckAct(y, {R, D}, "y");
  CheckTensor(residual, DType::kF32, {T, D}, "residual");
  CheckTensor(weight, DType::kF32, {S}, "weight");
  CheckTensor(out, DType::kF32, {T, D}, "out");
  CheckPairShapes(offset, slot, T);
  if (Offloaded(stream, &DeviceKernels::combine_slots, residual, y, offset, slot, weight, out)) return;
  CheckPairs(offset, slot, T, R);
  const CombineArgs args = {.residual = residual.data<float>(),
                            .y = y.raw(),
                            .offset = offset.data<int32_t>(),
                            .slot = slot.data<int32_t>(),
                            .weight = weight.data<float>(),
                            .out = out.raw(),
                            .width = D};
  const auto rows = Inner().combine[act][kInnerF32];
  ParallelFor(T, GrainOfTokens(T, S + 2 * T, D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& offset, const Tensor& slot, const Tensor& weight,
                          const Tensor& dy, const Tensor& dweight, Stream& stream) {
  const int64_t T = dout.dim(0), D = dout.dim(1), R = y.dim(0), S = slot.dim(0);
  const InnerAct act = CheckAct(y, {R, D}, "y");
  SHOAL_CHECK_EQ(CheckAct(dy, {R, D}, "dy"), act);
  CheckTensor(dout, DType::kF32, {T, D}, "dout");
  CheckTensor(weight, DType::kF32, {S}, "weight");
  CheckTensor(dweight, DType::kF32, {S}, "dweight");
  CheckPairShapes(offset, slot, T);
  if (Offloaded(stream, &DeviceKernels::combine_slots_backward, dout, y, offset, slot, weight, dy, dweight)) return;
  CheckPairs(offset, slot, T, R);
  const CombineBackwardArgs args = {.dout = dout.data<float>(),
                                    .y = y.raw(),
                                    .offset = offset.data<int32_t>(),
                                    .slot = slot.data<int32_t>(),
                                    .weight = weight.data<float>(),
                                    .dy = dy.raw(),
                                    .dweight = dweight.data<float>(),
                                    .width = D};
  const auto rows = Inner().combine_backward[act];
  ParallelFor(T, GrainOfTokens(T, 2 * S + T, D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace shoal::kernels
