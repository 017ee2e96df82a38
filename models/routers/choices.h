// From choices to the list of pairs that stay, for the routers of this folder. Pure, in integers: every rank computes the same
// from the counts of all. Tensors are in host memory unless said otherwise.
//
// A rank's summary is its counts of choices, [pieces, E] or, where the choices' order decides who finds room, [pieces, K, E] (i32).
#pragma once

#include <cstdint>
#include <vector>

#include "models/routers/router.h"

namespace shoal {

// Counts chosen_TK (i32) by piece, choice and expert into `summary`, [pieces, K, E] flat.
void CountByPieceAndChoice(const Tensor& chosen, int pieces, int experts, const Tensor& summary);
// Adds the choices of all tokens to counts_E (f64).
void CountChoices(const Tensor& chosen, const Tensor& counts);
// to += from, both f64.
void AddSums(const Tensor& from, const Tensor& to);
// The sum of the squares of logz_T (f32), in order.
double SumOfSquares(const Tensor& logz);

// What lies where the stream computes, in host memory; empty tensors stay. On a device's stream it waits once for all; zeros when the
// stream has failed.
std::vector<Tensor> AllToHost(std::vector<Tensor> tensors, Stream& stream);

// The totals of a tally (kernels::SumTally), in memory of the stream.
Tensor TotalsOf(const kernels::Tally& tally, Stream& stream);
// From such totals in host memory: the choices by piece and expert, [pieces, E] flat, into `summary`; and all that they have into `sums`.
void CountsOf(const Tensor& totals, const Tensor& summary);
void AddTotals(const Tensor& totals, int pieces, const RoutingSums& sums);

// The list in which every choice of chosen_TK and weights_TK, where the stream computes, stays, with `tally` of them. `summaries`: counts
// by piece of all ranks.
RoutedTokens KeepEveryChoice(const Tensor& chosen, const Tensor& weights, kernels::Tally tally, const Tensor& summaries);

// The same where the host does not know the counts: with the order of its rows. Adds to `sums`, unless null, what `tally` has.
RoutedTokens KeepEveryChoiceOnStream(const Tensor& chosen, const Tensor& weights, const kernels::Tally& tally, const RoutingSums* sums,
                                     Stream& stream);

// Tokens that an expert takes of a whole part of the batch: ceil(factor * tokens / experts), at most all.
int64_t ExpertCapacity(double factor, int64_t tokens, int experts);

// Which choices find room at an expert that takes `capacity` of them: they enter by choice (all first choices, of all ranks,
// before any second), then by token in the batch's order.
struct Admission {
  std::vector<int64_t> rows;  // [ranks, pieces, E]: choices that stay.
  std::vector<int64_t> own;   // [K, E]: of `rank`'s tokens; the first so many of them.
};
Admission Admit(absl::Span<const int32_t> summaries, int choices, int experts, int64_t capacity, const Router::Batch& batch);

// The list of the choices that `admission` admits. pair_TK (i32): the pair of each choice; of those that were refused the number of pairs.
RoutedTokens KeepAdmitted(const Tensor& chosen, const Tensor& weights, Admission admission, int experts, const Tensor& pair);

}  // namespace shoal
