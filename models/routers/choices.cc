#include "models/routers/choices.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "parallel/placement/placement.h"

namespace shoal {

void CountByPieceAndChoice(const Tensor& chosen, int pieces, int experts, const Tensor& summary) {
  const int64_t T = chosen.dim(0), K = chosen.dim(1);
  SHOAL_CHECK_EQ(summary.elements(), pieces * K * experts);
  int32_t* counts = summary.data<int32_t>();
  std::fill_n(counts, summary.elements(), 0);
  const int32_t* choice = chosen.data<int32_t>();
  for (int piece = 0; piece < pieces; ++piece, counts += K * experts) {
    const Range tokens = EvenPart(T, pieces, piece);
    for (int64_t t = 0; t < tokens.count; ++t) {
      for (int64_t k = 0; k < K; ++k) ++counts[k * experts + *choice++];
    }
  }
}

void CountChoices(const Tensor& chosen, const Tensor& counts) {
  for (int32_t expert : chosen.span<int32_t>()) ++counts.data<double>()[expert];
}

void AddSums(const Tensor& from, const Tensor& to) {
  for (int64_t i = 0; i < to.elements(); ++i) to.data<double>()[i] += from.data<double>()[i];
}

double SumOfSquares(const Tensor& logz) {
  double sum = 0;
  for (float value : logz.span<float>()) sum += static_cast<double>(value) * static_cast<double>(value);
  return sum;
}

std::vector<Tensor> AllToHost(std::vector<Tensor> tensors, Stream& stream) {
  if (stream.device() == nullptr) return tensors;
  std::vector<Tensor> host;
  for (const Tensor& tensor : tensors) {
    host.push_back(tensor.empty() ? tensor : EmptyHost(tensor.shape(), tensor.dtype(), stream));
    if (!tensor.empty()) Copy(tensor, host.back(), stream);
  }
  if (stream.Wait().ok()) return host;
  for (Tensor& tensor : tensors) tensor = Zeros(tensor.shape(), tensor.dtype());
  return tensors;
}

Tensor TotalsOf(const kernels::Tally& tally, Stream& stream) {
  const int64_t experts = tally.counts.dim(1);
  Tensor totals = Empty({tally.pieces * experts + (tally.sums.empty() ? 0 : experts + 1)}, DType::kF64, stream);
  kernels::SumTally(tally, totals, stream);
  return totals;
}

void CountsOf(const Tensor& totals, const Tensor& summary) {
  for (int64_t i = 0; i < summary.elements(); ++i) summary.data<int32_t>()[i] = static_cast<int32_t>(totals.data<double>()[i]);
}

void AddTotals(const Tensor& totals, int pieces, const RoutingSums& sums) {
  const int64_t experts = sums.counts().elements(), counts = pieces * experts;
  for (int piece = 0; piece < pieces; ++piece) AddSums(totals.Rows(piece * experts, experts), sums.counts());
  if (totals.elements() == counts) return;
  AddSums(totals.Rows(counts, experts), sums.probs());
  AddSums(totals.Rows(counts + experts, 1), sums.z());
}

RoutedTokens KeepEveryChoice(const Tensor& chosen, const Tensor& weights, kernels::Tally tally, const Tensor& summaries) {
  const int64_t pairs = chosen.elements();
  const absl::Span<const int32_t> counts = summaries.span<int32_t>();
  tally.sums = Tensor();
  return {.offset = {},
          .expert = chosen.Reshape({pairs}),
          .weight = weights.Reshape({pairs}),
          .rows = {counts.begin(), counts.end()},
          .tally = std::move(tally)};
}

RoutedTokens KeepEveryChoiceOnStream(const Tensor& chosen, const Tensor& weights, const kernels::Tally& tally, const RoutingSums* sums,
                                     Stream& stream) {
  const int64_t T = chosen.dim(0), pairs = chosen.elements(), experts = tally.counts.dim(1);
  RoutedTokens routed{.offset = Empty({T + 1}, DType::kI32, stream),
                      .expert = chosen.Reshape({pairs}),
                      .weight = weights.Reshape({pairs}),
                      .rows = {},
                      .segments = Empty({experts, 3}, DType::kI32, stream),
                      .slot = Empty({pairs}, DType::kI32, stream),
                      .token = Empty({pairs}, DType::kI32, stream)};
  kernels::TallyTotals totals;
  if (sums != nullptr) totals = {.counts = sums->counts(), .probs = sums->probs(), .z = sums->z()};
  kernels::OrderByExpert(chosen, tally, routed.offset, routed.segments, routed.slot, routed.token, totals, stream);
  return routed;
}

int64_t ExpertCapacity(double factor, int64_t tokens, int experts) {
  const double room = std::ceil(factor * static_cast<double>(tokens) / experts);
  return room < static_cast<double>(tokens) ? static_cast<int64_t>(room) : tokens;
}

Admission Admit(absl::Span<const int32_t> summaries, int choices, int experts, int64_t capacity, const Router::Batch& batch) {
  const size_t K = static_cast<size_t>(choices), E = static_cast<size_t>(experts);
  const size_t ranks = batch.tokens_of_rank.size(), pieces = static_cast<size_t>(batch.pieces);
  SHOAL_CHECK_EQ(summaries.size(), ranks * pieces * K * E);
  Admission admission{.rows = std::vector<int64_t>(ranks * pieces * E), .own = std::vector<int64_t>(K * E)};
  std::vector<int64_t> room(E, capacity);
  for (size_t k = 0; k < K; ++k) {
    for (size_t part = 0; part < ranks * pieces; ++part) {
      const bool own = part / pieces == static_cast<size_t>(batch.rank);
      for (size_t e = 0; e < E; ++e) {
        const int64_t taken = std::min<int64_t>(summaries[(part * K + k) * E + e], room[e]);
        room[e] -= taken;
        admission.rows[part * E + e] += taken;
        if (own) admission.own[k * E + e] += taken;
      }
    }
  }
  return admission;
}

RoutedTokens KeepAdmitted(const Tensor& chosen, const Tensor& weights, Admission admission, int experts, const Tensor& pair) {
  const int64_t T = chosen.dim(0), K = chosen.dim(1);
  int64_t pairs = 0;
  for (int64_t count : admission.own) pairs += count;
  RoutedTokens routed{.offset = Empty({T + 1}, DType::kI32),
                      .expert = Empty({pairs}, DType::kI32),
                      .weight = Empty({pairs}, DType::kF32),
                      .rows = std::move(admission.rows)};
  std::vector<int64_t>& room = admission.own;
  int32_t next = 0;
  for (int64_t t = 0, i = 0; t < T; ++t) {
    routed.offset.data<int32_t>()[t] = next;
    for (int64_t k = 0; k < K; ++k, ++i) {
      const int32_t expert = chosen.data<int32_t>()[i];
      const bool stays = room[static_cast<size_t>(k * experts + expert)]-- > 0;
      pair.data<int32_t>()[i] = stays ? next : static_cast<int32_t>(pairs);
      if (!stays) continue;
      routed.expert.data<int32_t>()[next] = expert;
      routed.weight.data<float>()[next++] = weights.data<float>()[i];
    }
  }
  routed.offset.data<int32_t>()[T] = next;
  SHOAL_CHECK_EQ(next, pairs);
  return routed;
}

}  // namespace shoal
