#include <algorithm>
#include <utility>

#include "models/routers/choices.h"
#include "models/routers/kinds.h"
#include "runtime/kernels/permute.h"
#include "runtime/kernels/router.h"

namespace shoal {
namespace {

using kernels::Renormalize;

struct SoftmaxSaved : Router::Saved {
  Tensor normed, probs, chosen, weights, logz;
  kernels::Tally tally;  // Until Choose.
  // In host memory, where there are capacities:
  Tensor choices;       // `chosen`.
  Tensor host_weights;  // `weights`.
  Tensor pair;          // [T, K] i32: where a choice stands in the list; refused ones behind its end. Empty: at its own place.
  std::unique_ptr<RouterLogits::Saved> logits;
};

class SoftmaxRouter : public Router {
 public:
  SoftmaxRouter(const ModelConfig& config, int layer, RouterParameters parameters)
      : config_(config), logits_(MakeRouterLogits(config, layer, std::move(parameters))) {}

  int64_t SummaryElements(int64_t, int pieces) const override {
    return int64_t{pieces} * experts() * (config_.has_capacity() ? choices() : 1);
  }
  DType SummaryType() const override { return DType::kI32; }

  std::unique_ptr<Saved> Score(const Tensor& normed, const Batch& batch, const Tensor& summary, const RoutingSums* sums,
                               Stream& stream) override {
    auto kept = std::make_unique<SoftmaxSaved>();
    const int64_t tokens = normed.dim(0);
    kept->normed = normed;
    const Tensor logits = logits_->Forward(normed, &kept->logits, stream);
    kept->probs = Empty({tokens, experts()}, DType::kF32, stream);
    kept->chosen = Empty({tokens, choices()}, DType::kI32, stream);
    kept->weights = Empty({tokens, choices()}, DType::kF32, stream);
    kept->logz = Empty({tokens}, DType::kF32, stream);
    const bool capacity = config_.has_capacity();
    if (!capacity || sums != nullptr) {
      kept->tally = kernels::MakeTally(tokens, experts(), batch.pieces,
                                       sums == nullptr ? kernels::TallySums::kNo : kernels::TallySums::kYes, stream);
    }
    kernels::TopKSoftmax(logits, renormalize(), kept->probs, kept->chosen, kept->weights, kept->logz, stream, kept->tally);
    if (summary.empty()) return kept;
    const std::vector<Tensor> host = AllToHost({kept->tally.counts.empty() ? Tensor() : TotalsOf(kept->tally, stream),
                                                capacity ? kept->chosen : Tensor(), capacity ? kept->weights : Tensor()},
                                               stream);
    if (capacity) {
      kept->choices = host[1];
      kept->host_weights = host[2];
      CountByPieceAndChoice(kept->choices, batch.pieces, experts(), summary);
    } else {
      CountsOf(host[0], summary);
    }
    if (sums != nullptr) AddTotals(host[0], batch.pieces, *sums);
    return kept;
  }

  RoutedTokens Choose(const Tensor& summaries, const Batch& batch, Saved& saved, const RoutingSums* sums, Stream& stream) override {
    SoftmaxSaved& kept = static_cast<SoftmaxSaved&>(saved);
    if (summaries.empty()) return ChooseOnStream(kept, sums, stream);
    if (!config_.has_capacity()) return KeepEveryChoice(kept.chosen, kept.weights, std::move(kept.tally), summaries);
    int64_t tokens = 0;
    for (int64_t count : batch.tokens_of_rank) tokens += count;
    const int64_t capacity = ExpertCapacity(config_.capacity_factor, tokens, experts());
    kept.pair = Empty(kept.choices.shape(), DType::kI32);
    Admission admission = Admit(summaries.span<int32_t>(), choices(), experts(), capacity, batch);
    RoutedTokens routed = KeepAdmitted(kept.choices, kept.host_weights, std::move(admission), experts(), kept.pair);
    routed.weight = ToDevice(routed.weight, stream);
    if (sums != nullptr) CountRefused(kept, routed, sums);
    return routed;
  }

  void Backward(const Saved& saved, const Tensor& dweight, const RoutingGradient& routing, kernels::Accumulate accumulate,
                const Tensor& dnormed, Stream& stream) override {
    const SoftmaxSaved& kept = static_cast<const SoftmaxSaved&>(saved);
    const Tensor dlogits = Empty(kept.probs.shape(), DType::kF32, stream);
    kernels::TopKSoftmaxBackward(kept.probs, kept.chosen, kept.weights, kept.logz, renormalize(), ByChoice(kept, dweight, stream),
                                 routing.dprob, routing.z_scale, dlogits, stream);
    logits_->Backward(kept.logits.get(), kept.normed, dlogits, accumulate, dnormed, stream);
  }

 private:
  int experts() const { return config_.num_local_experts; }
  int choices() const { return config_.num_experts_per_tok; }
  Renormalize renormalize() const {
    const bool raw = config_.router == RouterKind::kSwitch || !config_.norm_topk_prob;
    return raw ? Renormalize::kNo : Renormalize::kYes;
  }

  RoutedTokens ChooseOnStream(SoftmaxSaved& kept, const RoutingSums* sums, Stream& stream) const {
    SHOAL_CHECK(!config_.has_capacity()) << "capacities are shared out by the host";
    RoutedTokens routed = KeepEveryChoiceOnStream(kept.chosen, kept.weights, kept.tally, sums, stream);
    kept.tally = {};
    return routed;
  }

  void CountRefused(const SoftmaxSaved& kept, const RoutedTokens& routed, const RoutingSums* sums) const {
    double* dropped = sums->dropped().data<double>();
    const int64_t pairs = routed.expert.elements();
    for (int64_t i = 0; i < kept.pair.elements(); ++i) {
      if (kept.pair.data<int32_t>()[i] == pairs) ++dropped[kept.choices.data<int32_t>()[i]];
    }
    const int32_t* offset = routed.offset.data<int32_t>();
    for (int64_t t = 0; t < kept.chosen.dim(0); ++t) *sums->unrouted().data<double>() += offset[t] == offset[t + 1] ? 1 : 0;
  }

  // [T, K]: gradients by the choices' weights, 0 for those that were refused.
  static Tensor ByChoice(const SoftmaxSaved& kept, const Tensor& dweight, Stream& stream) {
    if (kept.pair.empty()) return dweight.Reshape(kept.chosen.shape());
    const int64_t pairs = dweight.elements(), all = kept.pair.elements();
    const Tensor by_pair = Empty({pairs + 1, 1}, DType::kF32, stream), by_choice = Empty({all, 1}, DType::kF32, stream);
    Copy(dweight, by_pair.Rows(0, pairs), stream);
    FillWithZeros(by_pair.Rows(pairs, 1), stream);
    kernels::GatherRows(by_pair, ToDevice(kept.pair.Reshape({all}), stream), by_choice, stream);
    return by_choice.Reshape(kept.chosen.shape());
  }

  ModelConfig config_;
  std::unique_ptr<RouterLogits> logits_;
};

}  // namespace

std::unique_ptr<Router> MakeSoftmaxRouter(const ModelConfig& config, int layer, RouterParameters parameters) {
  return std::make_unique<SoftmaxRouter>(config, layer, std::move(parameters));
}

}  // namespace shoal
