#include "runtime/kernels/permute.h"

#include <cstring>
#include <vector>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"

namespace shoal::kernels {

// A counting sort on one thread: 4096 slots take about 10 us.
void SortByExpert(const Tensor& chosen, const Tensor& counts, const Tensor& slot, const Tensor& token,
                  Stream&) {
  const int64_t T = chosen.dim(0), K = chosen.dim(1), E = counts.dim(0);
  CheckTensor(chosen, DType::kI32, {T, K}, "chosen");
  CheckTensor(counts, DType::kI64, {E}, "counts");
  CheckTensor(slot, DType::kI32, {T, K}, "slot");
  CheckTensor(token, DType::kI32, {T * K}, "token");
  const int32_t* choice = chosen.data<int32_t>();
  CheckIds(chosen.span<int32_t>(), E, "chosen");
  int64_t* count = counts.data<int64_t>();
  std::fill_n(count, E, 0);
  for (int64_t i = 0; i < T * K; ++i) ++count[choice[i]];
  std::vector<int32_t> next(static_cast<size_t>(E));
  int64_t begin = 0;
  for (int64_t expert = 0; expert < E; ++expert) {
    next[static_cast<size_t>(expert)] = static_cast<int32_t>(begin);
    begin += count[expert];
  }
  int32_t* slots = slot.data<int32_t>();
  int32_t* tokens = token.data<int32_t>();
  for (int64_t t = 0, i = 0; t < T; ++t) {
    for (int64_t k = 0; k < K; ++k, ++i) {
      slots[i] = next[static_cast<size_t>(choice[i])]++;
      tokens[slots[i]] = static_cast<int32_t>(t);
    }
  }
}

void GatherRows(const Tensor& x, const Tensor& token, const Tensor& slots, Stream&) {
  const int64_t T = x.dim(0), D = x.dim(1), S = token.dim(0);
  const InnerAct act = CheckAct(x, {T, D}, "x");
  SHOAL_CHECK_EQ(CheckAct(slots, {S, D}, "slots"), act);
  CheckTensor(token, DType::kI32, {S}, "token");
  CheckIds(token.span<int32_t>(), T, "token");
  const int64_t row_bytes = D * SizeOf(x.dtype());
  const int32_t* from = token.data<int32_t>();
  ParallelFor(S, GrainOfRows(D), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      std::memcpy(static_cast<char*>(slots.raw()) + s * row_bytes,
                  static_cast<const char*>(x.raw()) + from[s] * row_bytes, static_cast<size_t>(row_bytes));
    }
  });
}

void SumSlots(const Tensor& dslots, const Tensor& slot, const Tensor& dx, Stream&) {
  const int64_t T = slot.dim(0), K = slot.dim(1), D = dx.dim(1);
  const InnerAct from = CheckAct(dslots, {T * K, D}, "dslots"), to = CheckAct(dx, {T, D}, "dx");
  CheckTensor(slot, DType::kI32, {T, K}, "slot");
  CheckIds(slot.span<int32_t>(), T * K, "slot");
  const CombineArgs args = {.residual = nullptr,
                            .y = dslots.raw(),
                            .slot = slot.data<int32_t>(),
                            .weights = nullptr,
                            .out = dx.raw(),
                            .width = D,
                            .choices = static_cast<int>(K)};
  const auto rows = Inner().combine[from][to];
  ParallelFor(T, GrainOfRows((K + 1) * D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

void CombineSlots(const Tensor& residual, const Tensor& y, const Tensor& slot, const Tensor& weights,
                  const Tensor& out, Stream&) {
  const int64_t T = slot.dim(0), K = slot.dim(1), D = out.dim(1);
  const InnerAct act = CheckAct(y, {T * K, D}, "y");
  CheckTensor(residual, DType::kF32, {T, D}, "residual");
  CheckTensor(slot, DType::kI32, {T, K}, "slot");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(out, DType::kF32, {T, D}, "out");
  CheckIds(slot.span<int32_t>(), T * K, "slot");
  const CombineArgs args = {.residual = residual.data<float>(),
                            .y = y.raw(),
                            .slot = slot.data<int32_t>(),
                            .weights = weights.data<float>(),
                            .out = out.raw(),
                            .width = D,
                            .choices = static_cast<int>(K)};
  const auto rows = Inner().combine[act][kInnerF32];
  ParallelFor(T, GrainOfRows((K + 2) * D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

void CombineSlotsBackward(const Tensor& dout, const Tensor& y, const Tensor& slot, const Tensor& weights,
                          const Tensor& dy, const Tensor& dweights, Stream&) {
  const int64_t T = slot.dim(0), K = slot.dim(1), D = dout.dim(1);
  const InnerAct act = CheckAct(y, {T * K, D}, "y");
  SHOAL_CHECK_EQ(CheckAct(dy, {T * K, D}, "dy"), act);
  CheckTensor(dout, DType::kF32, {T, D}, "dout");
  CheckTensor(slot, DType::kI32, {T, K}, "slot");
  CheckTensor(weights, DType::kF32, {T, K}, "weights");
  CheckTensor(dweights, DType::kF32, {T, K}, "dweights");
  CheckIds(slot.span<int32_t>(), T * K, "slot");
  const CombineBackwardArgs args = {.dout = dout.data<float>(),
                                    .y = y.raw(),
                                    .slot = slot.data<int32_t>(),
                                    .weights = weights.data<float>(),
                                    .dy = dy.raw(),
                                    .dweights = dweights.data<float>(),
                                    .width = D,
                                    .choices = static_cast<int>(K)};
  const auto rows = Inner().combine_backward[act];
  ParallelFor(T, GrainOfRows((2 * K + 1) * D), [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace shoal::kernels
