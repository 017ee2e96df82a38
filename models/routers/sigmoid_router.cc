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
  Tensor choices;  // `chosen` in host memory.
  Tensor load;  // [sequences, E] f32, in host memory: choices of an expert in a sequence over its fair share; empty without the loss.
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
    const Tensor logits = logits_->Forward(normed, &kept->logits, stream);
    kept->scores = Empty({tokens, experts()}, DType::kF32, stream);
    kept->chosen = Empty({tokens, choices()}, DType::kI32, stream);
    kept->weights = Empty({tokens, choices()}, DType::kF32, stream);
    kernels::TopKSigmoid(logits, ToDevice(bias_, stream), scale_, kept->scores, kept->chosen, kept->weights, stream);
    kept->choices = ToHost(kept->chosen, stream);
    CountByPiece(kept->choices, batch.pieces, experts(), summary);
    if (config_.seq_aux_loss_coef > 0) kept->load = LoadOfSequences(kept->choices, batch.seq);
    if (sums == nullptr) return kept;
    CountChoices(kept->choices, sums->counts());
    if (!kept->load.empty()) *sums->seq_aux().data<double>() += SequenceLoss(*kept, batch.seq, stream);
    return kept;
  }

  RoutedTokens Choose(const Tensor& summaries, const Batch&, Saved& saved, const RoutingSums*, Stream&) override {
    const SigmoidSaved& kept = static_cast<const SigmoidSaved&>(saved);
    return KeepEveryChoice(kept.choices, kept.weights, summaries);
  }

  void Backward(const Saved& saved, const Tensor& dweight, const RoutingGradient& routing, kernels::Accumulate accumulate,
                const Tensor& dnormed, Stream& stream) override {
    const SigmoidSaved& kept = static_cast<const SigmoidSaved&>(saved);
    Tensor dshare;
    if (routing.seq_aux_scale != 0 && !kept.load.empty()) {
      dshare = Empty(kept.load.shape(), DType::kF32);
      const float by_token = routing.seq_aux_scale * static_cast<float>(kept.load.dim(0)) / static_cast<float>(kept.scores.dim(0));
      for (int64_t i = 0; i < dshare.elements(); ++i) dshare.data<float>()[i] = by_token * kept.load.data<float>()[i];
      dshare = ToDevice(dshare, stream);
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

  Tensor LoadOfSequences(const Tensor& chosen, int64_t seq) const {
    const int64_t tokens = chosen.dim(0), K = choices();
    SHOAL_CHECK(seq > 0 && tokens % seq == 0) << tokens << " tokens in sequences of " << seq;
    const Tensor load = Zeros({tokens / seq, experts()}, DType::kF32);
    for (int64_t i = 0; i < tokens * K; ++i) ++load.data<float>()[i / (seq * K) * experts() + chosen.data<int32_t>()[i]];
    const float fair = static_cast<float>(seq * K) / static_cast<float>(experts());
    for (float& value : load.span<float>()) value /= fair;
    return load;
  }

  // Summed over sequences: sum over experts of load times mean share.
  double SequenceLoss(const SigmoidSaved& kept, int64_t seq, Stream& stream) const {
    const Tensor summed = Empty(kept.load.shape(), DType::kF64, stream);
    kernels::SumShares(kept.scores, summed, stream);
    const Tensor shares = ToHost(summed, stream);
    double sum = 0;
    for (int64_t i = 0; i < shares.elements(); ++i) {
      sum += static_cast<double>(kept.load.data<float>()[i]) * shares.data<double>()[i];
    }
    return sum / static_cast<double>(seq);
  }

  ModelConfig config_;
  std::unique_ptr<RouterLogits> logits_;
  float scale_;
  Tensor bias_;
  std::string bias_name_;
};

}  // namespace

std::unique_ptr<Router> MakeSigmoidRouter(const ModelConfig& config, int layer, RouterParameters parameters) {
  return std::make_unique<SigmoidRouter>(config, layer, std::move(parameters));
}

}  // namespace shoal
