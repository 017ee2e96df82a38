#include "models/layers/feed_forward.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/permute.h"
#include "runtime/kernels/router.h"
#include "runtime/kernels/swiglu.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Renormalize;
using kernels::Transpose;

// S rows of this rank (token, choice), sorted by expert; R rows that arrived here for its experts.
struct MoeSaved : FeedForward::Saved {
  Tensor normed, rstd;
  Tensor probs, chosen, weights, logz;  // The router's.
  Tensor slot, token;                   // Where each choice went, and the token of each slot.
  TokenExchange::Plan plan;
  Tensor arrived, gate_up;  // [R, D], [R, 2F]
  Tensor y;                 // [S, D]: the experts' results, back home.
};

class MoeFeedForward : public FeedForward {
 public:
  MoeFeedForward(const ModelConfig& config, int layer, const ParameterStore& store, TokenExchange& exchange)
      : exchange_(&exchange),
        width_(config.hidden_size),
        inner_(config.intermediate_size),
        experts_(config.num_local_experts),
        choices_(config.num_experts_per_tok),
        renormalize_(config.norm_topk_prob ? Renormalize::kYes : Renormalize::kNo),
        epsilon_(static_cast<float>(config.rms_norm_eps)) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const std::string norm = prefix + "post_attention_layernorm.weight";
    const std::string gate = prefix + "block_sparse_moe.gate.weight";
    norm_ = store.Weight(norm, {width_});
    gate_ = store.Weight(gate, {experts_, width_});
    if (store.training()) {
      norm_gradient_ = store.Gradient(norm, {width_});
      gate_gradient_ = store.Gradient(gate, {experts_, width_});
    }
    const Range mine = exchange.local_experts();
    for (int64_t e = mine.begin; e < mine.begin + mine.count; ++e) {
      const std::string expert = absl::StrCat(prefix, "block_sparse_moe.experts.", e);
      gate_up_.push_back(store.Weight(expert + ".w1.weight", {2 * inner_, width_}));
      down_.push_back(store.Weight(expert + ".w2.weight", {width_, inner_}));
      if (!store.training()) continue;
      gate_up_gradient_.push_back(store.Gradient(expert + ".w1.weight", {2 * inner_, width_}));
      down_gradient_.push_back(store.Gradient(expert + ".w2.weight", {width_, inner_}));
    }
  }

  absl::StatusOr<Tensor> Forward(const Tensor& x, const Tensor& delta, std::unique_ptr<Saved>* saved, RoutingSums* sums,
                                 Stream& stream) override {
    auto kept = std::make_unique<MoeSaved>();
    kept->x = Empty(x.shape(), DType::kF32);
    kept->normed = Empty(x.shape(), gate_.dtype());
    kept->rstd = Empty({x.dim(0)}, DType::kF32);
    kernels::RmsNorm(x, delta, norm_, epsilon_, kept->x, kept->normed, kept->rstd, stream);
    const Tensor counts = Route(kept.get(), sums, stream);
    SHOAL_ASSIGN_OR_RETURN(kept->plan, exchange_->MakePlan(counts));
    SHOAL_RETURN_IF_ERROR(RunExperts(kept.get(), stream));
    const Tensor out = Empty(x.shape(), DType::kF32);
    kernels::CombineSlots(kept->x, kept->y, kept->slot, kept->weights, out, stream);
    *saved = std::move(kept);
    return out;
  }

  absl::Status Backward(std::unique_ptr<Saved> saved, const RoutingGradient& routing, Accumulate accumulate,
                        const Tensor& gradient, Stream& stream) override {
    MoeSaved& kept = static_cast<MoeSaved&>(*saved);
    const Tensor dweights = Empty(kept.weights.shape(), DType::kF32);
    SHOAL_ASSIGN_OR_RETURN(const Tensor dslots, ExpertsBackward(kept, gradient, dweights, accumulate, stream));
    const Tensor dnormed = Empty(gradient.shape(), DType::kF32);
    kernels::SumSlots(dslots, kept.slot, dnormed, stream);
    RouterBackward(kept, routing, dweights, accumulate, dnormed, stream);
    kernels::RmsNormBackward(dnormed, kept.x, norm_, kept.rstd, gradient, norm_gradient_, stream);
    return absl::OkStatus();
  }

 private:
  // Returns counts_E of this rank's slots.
  Tensor Route(MoeSaved* kept, RoutingSums* sums, Stream& stream) const {
    const int64_t tokens = kept->x.dim(0);
    const Tensor logits = Empty({tokens, experts_}, DType::kF32);
    MatMul(kept->normed, Transpose::kNo, gate_, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    kept->probs = Empty({tokens, experts_}, DType::kF32);
    kept->chosen = Empty({tokens, choices_}, DType::kI32);
    kept->weights = Empty({tokens, choices_}, DType::kF32);
    kept->logz = Empty({tokens}, DType::kF32);
    kernels::TopKSoftmax(logits, renormalize_, kept->probs, kept->chosen, kept->weights, kept->logz, stream);
    const Tensor counts = Empty({experts_}, DType::kI64);
    kept->slot = Empty({tokens, choices_}, DType::kI32);
    kept->token = Empty({tokens * choices_}, DType::kI32);
    kernels::SortByExpert(kept->chosen, counts, kept->slot, kept->token, stream);
    if (sums != nullptr) {
      sums->counts = counts;
      sums->prob_sums = Zeros({experts_}, DType::kF64);
      kernels::SumOverTokens(kept->probs, sums->prob_sums, stream);
      for (float logz : kept->logz.span<float>()) sums->z_sum += static_cast<double>(logz) * logz;
    }
    return counts;
  }

  absl::Status RunExperts(MoeSaved* kept, Stream& stream) {
    const TokenExchange::Plan& plan = kept->plan;
    const DType act = gate_.dtype();
    SHOAL_ASSIGN_OR_RETURN(const Tensor slots,
                           exchange_->SendBuffer(TokenExchange::Use::kDispatch, plan.sent, width_, act));
    kernels::GatherRows(kept->normed, kept->token, slots, stream);
    SHOAL_ASSIGN_OR_RETURN(kept->arrived, exchange_->Dispatch(plan, slots));
    kept->gate_up = Empty({plan.arrived, 2 * inner_}, act);
    kernels::GroupedMatMul(kept->arrived, gate_up_, plan.segments, kept->gate_up, stream);
    const Tensor h = Empty({plan.arrived, inner_}, act);
    kernels::SwiGlu(kept->gate_up, h, stream);
    SHOAL_ASSIGN_OR_RETURN(const Tensor results,
                           exchange_->SendBuffer(TokenExchange::Use::kReturn, plan.arrived, width_, act));
    kernels::GroupedMatMul(h, down_, plan.segments, results, stream);
    SHOAL_ASSIGN_OR_RETURN(kept->y, exchange_->Return(plan, results));
    return absl::OkStatus();
  }

  // Gradients by the slots [S, D] and by the combine weights (into dweights).
  absl::StatusOr<Tensor> ExpertsBackward(MoeSaved& kept, const Tensor& gradient, const Tensor& dweights,
                                         Accumulate accumulate, Stream& stream) {
    const TokenExchange::Plan& plan = kept.plan;
    const DType act = gate_.dtype();
    SHOAL_ASSIGN_OR_RETURN(const Tensor dy_home,
                           exchange_->SendBuffer(TokenExchange::Use::kDispatch, plan.sent, width_, act));
    kernels::CombineSlotsBackward(gradient, kept.y, kept.slot, kept.weights, dy_home, dweights, stream);
    SHOAL_ASSIGN_OR_RETURN(const Tensor dy, exchange_->Dispatch(plan, dy_home));
    const Tensor dh = Empty({plan.arrived, inner_}, act);
    kernels::GroupedMatMulGradInput(dy, down_, plan.segments, dh, stream);
    kernels::SwiGluBackward(dh, kept.gate_up, kept.gate_up, dh, stream);  // gate_up: its gradient; dh: h.
    kernels::GroupedMatMulGradWeight(dy, dh, plan.segments, accumulate, down_gradient_, stream);
    SHOAL_ASSIGN_OR_RETURN(const Tensor dslots,
                           exchange_->SendBuffer(TokenExchange::Use::kReturn, plan.arrived, width_, act));
    kernels::GroupedMatMulGradInput(kept.gate_up, gate_up_, plan.segments, dslots, stream);
    kernels::GroupedMatMulGradWeight(kept.gate_up, kept.arrived, plan.segments, accumulate, gate_up_gradient_, stream);
    return exchange_->Return(plan, dslots);
  }

  void RouterBackward(const MoeSaved& kept, const RoutingGradient& routing, const Tensor& dweights,
                      Accumulate accumulate, const Tensor& dnormed, Stream& stream) const {
    Tensor dlogits = Empty(kept.probs.shape(), DType::kF32);
    kernels::TopKSoftmaxBackward(kept.probs, kept.chosen, kept.weights, kept.logz, renormalize_, dweights, routing.dprob,
                                 routing.z_scale, dlogits, stream);
    if (gate_.dtype() != DType::kF32) {
      const Tensor narrow = Empty(dlogits.shape(), gate_.dtype());
      kernels::Convert(dlogits, narrow, stream);
      dlogits = narrow;
    }
    MatMul(dlogits, Transpose::kNo, gate_, Transpose::kNo, Accumulate::kAdd, dnormed, stream);
    MatMul(dlogits, Transpose::kYes, kept.normed, Transpose::kNo, accumulate, gate_gradient_, stream);
  }

  TokenExchange* exchange_;
  int64_t width_, inner_, experts_, choices_;
  Renormalize renormalize_;
  float epsilon_;
  Tensor norm_, gate_, norm_gradient_, gate_gradient_;
  std::vector<Tensor> gate_up_, down_, gate_up_gradient_, down_gradient_;
};

}  // namespace

std::unique_ptr<FeedForward> MakeMoeFeedForward(const ModelConfig& config, int layer, const ParameterStore& store,
                                                TokenExchange& exchange) {
  return std::make_unique<MoeFeedForward>(config, layer, store, exchange);
}

}  // namespace shoal
