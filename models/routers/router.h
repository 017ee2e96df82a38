// Which experts a token visits, and with what weight. One ragged list of (token, expert, weight) serves every kind of router, so
// that whatever moves and computes tokens knows none of them.
//
// A choice may depend on the tokens of other ranks (capacities, expert choice), so routing has two halves with one
// all-gather between them: Score makes this rank's scores and a summary that the other ranks need; Choose has the summaries
// of all. Both depend on the tokens of the whole part of the batch in their order, never on how many ranks share them.
//
// T tokens of this rank, D width, E experts, S (token, expert) pairs of this rank that stay after dropping. Tokens of a rank are
// cut into `pieces` (EvenPart) in order, because the pipeline sends them piece by piece. The choice is a constant to the backward
// pass; gradients flow through weights. Not thread-safe; kernels run on the stream given.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "models/model_config.h"
#include "models/optimizer/parameter_store.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/router.h"

namespace shoal {

// What a router did with tokens, as sums that it adds to; sums over ranks make auxiliary losses (balance.h). All in one row of f64
// (counts are exact in it), a view, which lives with the tensor that it is of.
class RoutingSums {
 public:
  static int64_t Width(int64_t experts) { return kCounts + 3 * experts; }
  // Where the counts of a row begin.
  static constexpr int64_t kCounts = 3;
  explicit RoutingSums(Tensor row) : row_(std::move(row)) {}  // [Width(E)] f64.
  // Of sums [layers, Width(E)].
  static RoutingSums Row(const Tensor& sums, int64_t layer) {
    return RoutingSums(sums.Rows(layer, 1).Reshape({sums.dim(1)}));
  }

  Tensor z() const { return row_.Rows(0, 1); }         // logsumexp(logits)^2 over tokens.
  Tensor seq_aux() const { return row_.Rows(1, 1); }   // The sequence-wise balance loss over sequences.
  Tensor unrouted() const { return row_.Rows(2, 1); }  // Tokens without any expert.
  Tensor counts() const { return OfExperts(0); }       // [E]: choices of each expert, before dropping.
  Tensor probs() const { return OfExperts(1); }        // [E]: router probability over tokens, of routers by softmax.
  Tensor dropped() const { return OfExperts(2); }      // [E]: choices refused for capacity.

 private:
  Tensor OfExperts(int64_t which) const {
    const int64_t experts = (row_.elements() - kCounts) / 3;
    return row_.Rows(kCounts + which * experts, experts);
  }

  Tensor row_;
};

// How auxiliary losses enter the backward pass of one layer.
struct RoutingGradient {
  Tensor dprob;             // [E] f32, where the stream computes: d loss / d probability, the same for every token; empty: none.
  float z_scale = 0;        // Coefficient of a token's logsumexp^2.
  float seq_aux_scale = 0;  // Coefficient of a sequence's balance loss.
};

// The ragged list, by token, and within a token by the order of its choices.
//   * Where choices may be refused the host knows it: `offset` and `expert` are in host memory, weights where the stream computes.
//   * Where every choice stays all is where the stream computes, and the host knows counts: `rows`, and there is the `tally` by which
//     rows get their order (kernels::OrderByShares). There is no offset, because every token has as many pairs.
//   * Or not even those: the order of rows by expert is there too (kernels::OrderByExpert).
struct RoutedTokens {
  Tensor offset;  // [T + 1] i32: the pairs of token t are [offset[t], offset[t + 1]).
  Tensor expert;  // [S] i32
  Tensor weight;  // [S] f32
  // Pairs that stay, of every rank, piece and expert: [ranks, pieces, E] row-major. The same on every rank. Empty where the host does
  // not know.
  std::vector<int64_t> rows;
  kernels::Tally tally;
  Tensor segments, slot, token;  // [E, 3], [S], [S] i32.
};

class Router {
 public:
  // Between the halves and for the backward pass; each kind has its own.
  struct Saved {
    virtual ~Saved() = default;
  };
  virtual ~Router() = default;

  struct Batch {
    int64_t seq = 0;                        // Tokens of a sequence; ranks hold whole sequences.
    std::vector<int64_t> tokens_of_rank;    // By rank.
    int rank = 0;
    int pieces = 1;
  };

  // Elements and type of the summary that a rank with `tokens` tokens gives.
  virtual int64_t SummaryElements(int64_t tokens, int pieces) const = 0;
  virtual DType SummaryType() const = 0;

  // normed_TD (f32 or bf16): the layer's normalised input, kept by reference until Backward. Writes the summary into `summary`, a
  // host tensor: on a device's stream it waits. Adds to `sums` (in host memory) unless null.
  //
  // Without a summary (no elements) it neither waits nor adds to `sums`: for a router without capacity, where the host knows all summaries
  // from before and there are no sums, or need not know them, as one rank with one piece. Then nobody but the stream learns what is chosen:
  // Choose is given no summaries either, and sums are where the stream computes.
  virtual std::unique_ptr<Saved> Score(const Tensor& normed, const Batch& batch, const Tensor& summary, const RoutingSums* sums,
                                       Stream& stream) = 0;
  // `summaries`: those of all ranks, in rank order; where the router has no capacity (ModelConfig::has_capacity) this rank's alone
  // will do, with tokens_of_rank of this rank alone. Adds to `sums` what Score did not.
  virtual RoutedTokens Choose(const Tensor& summaries, const Batch& batch, Saved& saved, const RoutingSums* sums, Stream& stream) = 0;

  // dweight_S (f32): gradient by the weights of the list that Choose returned. Adds to dnormed_TD (f32); gradients of
  // the router's matrices are overwritten or added to, those of vectors (DenseStore::ZeroVectorGradients) always added to.
  virtual void Backward(const Saved& saved, const Tensor& dweight, const RoutingGradient& routing,
                        kernels::Accumulate accumulate, const Tensor& dnormed, Stream& stream) = 0;

  // State that is no parameter (DeepSeek-V3's bias): empty for most. [E] f32, the same on every rank, in checkpoints under
  // `state_name`; in host memory. EndStep moves it, from the choices of the whole step: counts_E over all ranks and parts.
  virtual Tensor state() const { return Tensor(); }
  virtual std::string state_name() const { return ""; }
  virtual void EndStep(absl::Span<const int64_t> counts) { (void)counts; }
};

// The router that config.router names, with its parameters in `store` (views are resolved at each use).
std::unique_ptr<Router> MakeRouter(const ModelConfig& config, int layer, const ParameterStore& store);

}  // namespace shoal
