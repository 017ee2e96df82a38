#include <cstring>
#include <utility>
#include <vector>

#include "models/routers/choices.h"
#include "models/routers/kinds.h"
#include "parallel/placement/placement.h"
#include "runtime/kernels/router.h"

namespace shoal {
namespace {

struct ExpertChoiceSaved : Router::Saved {
  Tensor normed, probs, logz;
  Tensor seen;            // `probs` in host memory.
  Tensor offset, expert;  // The list that was chosen.
  std::unique_ptr<RouterLogits::Saved> logits;
};

// The worst (probability, token) that each expert still takes.
struct Cutoffs {
  Tensor prob;   // [E] f32
  Tensor token;  // [E] i64, by the token's place in the whole batch.
  bool Take(int64_t e, float value, int64_t place) const {
    const float worst = prob.data<float>()[e];
    return value > worst || (value == worst && place <= token.data<int64_t>()[e]);
  }
};

class ExpertChoiceRouter : public Router {
 public:
  ExpertChoiceRouter(const ModelConfig& config, int layer, RouterParameters parameters)
      : config_(config), logits_(MakeRouterLogits(config, layer, std::move(parameters))) {}

  // Every rank sees the probabilities of all tokens.
  int64_t SummaryElements(int64_t tokens, int) const override { return tokens * experts(); }
  DType SummaryType() const override { return DType::kF32; }

  std::unique_ptr<Saved> Score(const Tensor& normed, const Batch&, const Tensor& summary, const RoutingSums* sums,
                               Stream& stream) override {
    auto kept = std::make_unique<ExpertChoiceSaved>();
    kept->normed = normed;
    const Tensor logits = logits_->Forward(normed, &kept->logits, stream);
    kept->probs = Empty(logits.shape(), DType::kF32, stream);
    kept->logz = Empty({normed.dim(0)}, DType::kF32, stream);
    kernels::Softmax(logits, kept->probs, kept->logz, stream);
    SHOAL_CHECK_EQ(summary.elements(), kept->probs.elements());
    const std::vector<Tensor> host = AllToHost({kept->probs, sums == nullptr ? Tensor() : kept->logz}, stream);
    kept->seen = host[0];
    if (!summary.empty()) std::memcpy(summary.data<float>(), kept->seen.raw(), static_cast<size_t>(kept->seen.bytes()));
    if (sums != nullptr) *sums->z().data<double>() += SumOfSquares(host[1]);
    return kept;
  }

  RoutedTokens Choose(const Tensor& summaries, const Batch& batch, Saved& saved, const RoutingSums* sums, Stream& stream) override {
    ExpertChoiceSaved& kept = static_cast<ExpertChoiceSaved&>(saved);
    int64_t tokens = 0;
    for (int64_t count : batch.tokens_of_rank) tokens += count;
    Cutoffs cutoffs{Empty({experts()}, DType::kF32, stream), Empty({experts()}, DType::kI64, stream)};
    const Tensor probs = summaries.Reshape({tokens, experts()});
    kernels::TopTokens(ToDevice(probs, stream), ExpertCapacity(config_.capacity_factor, tokens, experts()), cutoffs.prob, cutoffs.token,
                       stream);
    const std::vector<Tensor> host = AllToHost({cutoffs.prob, cutoffs.token}, stream);
    cutoffs = {host[0], host[1]};
    RoutedTokens routed = ListOf(kept.seen, FirstTokenOf(batch, batch.rank), cutoffs);
    routed.weight = ToDevice(routed.weight, stream);
    routed.rows = RowsOf(probs, batch, cutoffs);
    kept.offset = routed.offset;
    kept.expert = routed.expert;
    if (sums == nullptr) return routed;
    CountChoices(routed.expert, sums->counts());
    const int32_t* offset = routed.offset.data<int32_t>();
    for (int64_t t = 0; t < kept.probs.dim(0); ++t) *sums->unrouted().data<double>() += offset[t] == offset[t + 1] ? 1 : 0;
    return routed;
  }

  void Backward(const Saved& saved, const Tensor& dweight, const RoutingGradient& routing, kernels::Accumulate accumulate,
                const Tensor& dnormed, Stream& stream) override {
    const ExpertChoiceSaved& kept = static_cast<const ExpertChoiceSaved&>(saved);
    SHOAL_CHECK(routing.dprob.empty()) << "expert choice has no auxiliary loss";
    const Tensor dprobs = Zeros(kept.probs.shape(), DType::kF32), by_pair = ToHost(dweight, stream);
    const int32_t* offset = kept.offset.data<int32_t>();
    for (int64_t t = 0; t < kept.probs.dim(0); ++t) {
      for (int32_t pair = offset[t]; pair < offset[t + 1]; ++pair) {
        dprobs.data<float>()[t * experts() + kept.expert.data<int32_t>()[pair]] = by_pair.data<float>()[pair];
      }
    }
    const Tensor dlogits = Empty(kept.probs.shape(), DType::kF32, stream);
    kernels::SoftmaxBackward(kept.probs, kept.logz, ToDevice(dprobs, stream), routing.z_scale, dlogits, stream);
    logits_->Backward(kept.logits.get(), kept.normed, dlogits, accumulate, dnormed, stream);
  }

 private:
  int experts() const { return config_.num_local_experts; }

  static int64_t FirstTokenOf(const Batch& batch, int rank) {
    int64_t first = 0;
    for (int before = 0; before < rank; ++before) first += batch.tokens_of_rank[static_cast<size_t>(before)];
    return first;
  }

  // The pairs of probs_TE, whose first token stands at `first` in the batch.
  RoutedTokens ListOf(const Tensor& probs, int64_t first, const Cutoffs& cutoffs) const {
    const int64_t T = probs.dim(0), E = experts();
    std::vector<int32_t> expert;
    std::vector<float> weight;
    RoutedTokens routed;
    routed.offset = Empty({T + 1}, DType::kI32);
    for (int64_t t = 0; t < T; ++t) {
      routed.offset.data<int32_t>()[t] = static_cast<int32_t>(expert.size());
      for (int64_t e = 0; e < E; ++e) {
        const float prob = probs.data<float>()[t * E + e];
        if (!cutoffs.Take(e, prob, first + t)) continue;
        expert.push_back(static_cast<int32_t>(e));
        weight.push_back(prob);
      }
    }
    routed.offset.data<int32_t>()[T] = static_cast<int32_t>(expert.size());
    routed.expert = Empty({static_cast<int64_t>(expert.size())}, DType::kI32);
    routed.weight = Empty({static_cast<int64_t>(expert.size())}, DType::kF32);
    std::copy(expert.begin(), expert.end(), routed.expert.data<int32_t>());
    std::copy(weight.begin(), weight.end(), routed.weight.data<float>());
    return routed;
  }

  // [ranks, pieces, E] of all tokens.
  std::vector<int64_t> RowsOf(const Tensor& probs, const Batch& batch, const Cutoffs& cutoffs) const {
    const int64_t E = experts();
    std::vector<int64_t> rows(batch.tokens_of_rank.size() * static_cast<size_t>(batch.pieces * E));
    int64_t* own = rows.data();
    int64_t place = 0;
    for (int64_t tokens : batch.tokens_of_rank) {
      for (int piece = 0; piece < batch.pieces; ++piece, own += E) {
        const int64_t end = place + EvenPart(tokens, batch.pieces, piece).count;
        for (; place < end; ++place) {
          for (int64_t e = 0; e < E; ++e) own[e] += cutoffs.Take(e, probs.data<float>()[place * E + e], place) ? 1 : 0;
        }
      }
    }
    return rows;
  }

  ModelConfig config_;
  std::unique_ptr<RouterLogits> logits_;
};

}  // namespace

std::unique_ptr<Router> MakeExpertChoiceRouter(const ModelConfig& config, int layer, RouterParameters parameters) {
  return std::make_unique<ExpertChoiceRouter>(config, layer, std::move(parameters));
}

}  // namespace shoal
