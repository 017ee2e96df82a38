#include <cstring>
#include <utility>

#include "models/parameters.h"
#include "models/routers/choices.h"
#include "models/routers/kinds.h"
#include "runtime/kernels/router.h"

namespace shoal {
namespace {

struct SigmoidSaved : Router::Saved {
  Tensor normed, scores, chosen, weights;
  kernels::Tally tally;  // Until Choose.
  int64_t seq = 0;
  std::unique_ptr<RouterLogits::Saved> logits;
};

class SigmoidRouter : public Router {
 public:
  SigmoidRouter(const ModelConfig& config, int layer, RouterParameters parameters)
      : config_(config),
        logits_(MakeRouterLogits(config, layer, std::move(parameters))),
        scale_(static_cast<float>(config.routed_scaling_factor)),
        bias_(Zeros({config.num_local_experts}, DType::kF32)),
        bias_name_(RouterStateName(config, layer)) {}

  int64_t SummaryElements(int64_t, int pieces) const override { return int64_t{pieces} * experts(); }
  DType SummaryType() const override { return DType::kI32; }

  std::unique_ptr<Saved> Score(const Tensor& normed, const Batch& batch, const Tensor& summary, const RoutingSums* sums,
                               Stream& stream) override {
    auto kept = std::make_unique<SigmoidSaved>();
    const int64_t tokens = normed.dim(0);
    kept->normed = normed;
    kept->seq = batch.seq;
    const Tensor logits = logits_->Forward(normed, &kept->logits, stream);
    kept->scores = Empty({tokens, experts()}, DType::kF32, stream);
    kept->chosen = Empty({tokens, choices()}, DType::kI32, stream);
    kept->weights = Empty({tokens, choices()}, DType::kF32, stream);
    kept->tally = kernels::MakeTally(tokens, experts(), batch.pieces, kernels::TallySums::kNo, stream);
    kernels::TopKSigmoid(logits, BiasFor(stream), scale_, kept->scores, kept->chosen, kept->weights, stream, kept->tally);
    if (summary.empty()) return kept;
    const Tensor loss = Zeros({1}, DType::kF64, stream);
    if (sums != nullptr) AddSequenceLoss(*kept, loss, stream);
    const std::vector<Tensor> host = AllToHost({TotalsOf(kept->tally, stream), loss}, stream);
    CountsOf(host[0], summary);
    if (sums == nullptr) return kept;
    AddTotals(host[0], batch.pieces, *sums);
    AddSums(host[1], sums->seq_aux());
    return kept;
  }

  RoutedTokens Choose(const Tensor& summaries, const Batch&, Saved& saved, const RoutingSums* sums, Stream& stream) override {
    SigmoidSaved& kept = static_cast<SigmoidSaved&>(saved);
    if (!summaries.empty()) return KeepEveryChoice(kept.chosen, kept.weights, std::move(kept.tally), summaries);
    RoutedTokens routed = KeepEveryChoiceOnStream(kept.chosen, kept.weights, kept.tally, sums, stream);
    kept.tally = {};
    if (sums != nullptr) AddSequenceLoss(kept, sums->seq_aux(), stream);
    return routed;
  }

  void Backward(const Saved& saved, const Tensor& dweight, const RoutingGradient& routing, kernels::Accumulate accumulate,
                const Tensor& dnormed, Stream& stream) override {
    const SigmoidSaved& kept = static_cast<const SigmoidSaved&>(saved);
    Tensor dshare;
    if (routing.seq_aux_scale != 0 && config_.seq_aux_loss_coef > 0) {
      dshare = Loads(kept, routing.seq_aux_scale / static_cast<float>(kept.seq), stream);
    }
    const Tensor dlogits = Empty(kept.scores.shape(), DType::kF32, stream);
    kernels::TopKSigmoidBackward(kept.scores, kept.chosen, kept.weights, scale_, dweight.Reshape(kept.chosen.shape()), dshare,
                                 dlogits, stream);
    logits_->Backward(kept.logits.get(), kept.normed, dlogits, accumulate, dnormed, stream);
  }

  Tensor state() const override { return bias_; }
  std::string state_name() const override { return bias_name_; }

  void EndStep(absl::Span<const int64_t> counts) override {
    SHOAL_CHECK_EQ(counts.size(), static_cast<size_t>(experts()));
    int64_t total = 0;
    for (int64_t count : counts) total += count;
    const float rate = static_cast<float>(config_.bias_update_rate);
    for (size_t e = 0; e < counts.size(); ++e) {
      const int64_t load = counts[e] * experts();  // Against the total, so that the mean needs no rounding.
      bias_.data<float>()[e] += load < total ? rate : load > total ? -rate : 0.0f;
    }
  }

 private:
  int experts() const { return config_.num_local_experts; }
  int choices() const { return config_.num_experts_per_tok; }

  // The bias where the stream computes. A device copies it from memory that stays the router's, so that recorded copies have what it
  // is when they are done.
  Tensor BiasFor(Stream& stream) {
    if (stream.device() == nullptr) return bias_;
    if (!pinned_) {
      const Tensor pinned = EmptyHost(bias_.shape(), DType::kF32, stream);
      if (!stream.status().ok()) return bias_;
      std::memcpy(pinned.raw(), bias_.raw(), static_cast<size_t>(bias_.bytes()));
      bias_ = pinned;
      pinned_ = true;
    }
    const Tensor bias = Empty(bias_.shape(), DType::kF32, stream);
    Copy(bias_, bias, stream);
    return bias;
  }

  // [sequences, E] f32: scale * choices of an expert in a sequence over its fair share.
  Tensor Loads(const SigmoidSaved& kept, float scale, Stream& stream) const {
    const int64_t tokens = kept.scores.dim(0);
    SHOAL_CHECK(kept.seq > 0 && tokens % kept.seq == 0) << tokens << " tokens in sequences of " << kept.seq;
    Tensor loads = Empty({tokens / kept.seq, experts()}, DType::kF32, stream);
    kernels::SequenceLoads(kept.chosen, scale, loads, stream);
    return loads;
  }

  // Adds what sequences lose, if they do: summed over experts, load times mean share.
  void AddSequenceLoss(const SigmoidSaved& kept, const Tensor& loss, Stream& stream) const {
    if (config_.seq_aux_loss_coef <= 0) return;
    const Tensor loads = Loads(kept, 1, stream), shares = Empty(loads.shape(), DType::kF64, stream);
    kernels::SumShares(kept.scores, shares, stream);
    kernels::AddSequenceLoss(loads, shares, 1.0 / static_cast<double>(kept.seq), loss, stream);
  }

  ModelConfig config_;
  std::unique_ptr<RouterLogits> logits_;
  float scale_;
  Tensor bias_;
  bool pinned_ = false;  // bias_ is memory that a device's streams copy from.
  std::string bias_name_;
};

}  // namespace

std::unique_ptr<Router> MakeSigmoidRouter(const ModelConfig& config, int layer, RouterParameters parameters) {
  return std::make_unique<SigmoidRouter>(config, layer, std::move(parameters));
}

}  // namespace shoal
