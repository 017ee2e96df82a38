#include "models/layers/feed_forward.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/swiglu.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

struct DenseSaved : FeedForward::Saved {
  Tensor normed, rstd, gate_up;
};

class DenseFeedForward : public FeedForward {
 public:
  DenseFeedForward(const ModelConfig& config, int layer, const ParameterStore& store)
      : width_(config.hidden_size),
        inner_(config.dense_intermediate_size),
        epsilon_(static_cast<float>(config.rms_norm_eps)) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const std::string norm = prefix + "post_attention_layernorm.weight";
    const std::string gate = prefix + "mlp.gate_proj.weight", down = prefix + "mlp.down_proj.weight";
    norm_ = store.Weight(norm, {width_});
    gate_up_ = store.Weight(gate, {2 * inner_, width_});
    down_ = store.Weight(down, {width_, inner_});
    if (!store.training()) return;
    norm_gradient_ = store.Gradient(norm, {width_});
    gate_up_gradient_ = store.Gradient(gate, {2 * inner_, width_});
    down_gradient_ = store.Gradient(down, {width_, inner_});
  }

  absl::StatusOr<Tensor> Forward(const Tensor& x, const Tensor& delta, std::unique_ptr<Saved>* saved, RoutingSums*,
                                 Stream& stream) override {
    auto kept = std::make_unique<DenseSaved>();
    const int64_t tokens = x.dim(0);
    const DType act = down_.dtype();
    kept->x = Empty(x.shape(), DType::kF32);
    kept->normed = Empty(x.shape(), act);
    kept->rstd = Empty({tokens}, DType::kF32);
    kernels::RmsNorm(x, delta, norm_, epsilon_, kept->x, kept->normed, kept->rstd, stream);
    kept->gate_up = Empty({tokens, 2 * inner_}, act);
    MatMul(kept->normed, Transpose::kNo, gate_up_, Transpose::kYes, Accumulate::kOverwrite, kept->gate_up, stream);
    const Tensor h = Empty({tokens, inner_}, act);
    kernels::SwiGlu(kept->gate_up, h, stream);
    const Tensor out = Empty(x.shape(), DType::kF32);
    kernels::Convert(kept->x, out, stream);
    MatMul(h, Transpose::kNo, down_, Transpose::kYes, Accumulate::kAdd, out, stream);
    *saved = std::move(kept);
    return out;
  }

  absl::Status Backward(std::unique_ptr<Saved> saved, const RoutingGradient&, Accumulate accumulate,
                        const Tensor& gradient, Stream& stream) override {
    DenseSaved& kept = static_cast<DenseSaved&>(*saved);
    const DType act = down_.dtype();
    Tensor dy = gradient;
    if (act != DType::kF32) {
      dy = Empty(gradient.shape(), act);
      kernels::Convert(gradient, dy, stream);
    }
    const Tensor dh = Empty({gradient.dim(0), inner_}, act);
    MatMul(dy, Transpose::kNo, down_, Transpose::kNo, Accumulate::kOverwrite, dh, stream);
    kernels::SwiGluBackward(dh, kept.gate_up, kept.gate_up, dh, stream);
    MatMul(dy, Transpose::kYes, dh, Transpose::kNo, accumulate, down_gradient_, stream);
    const Tensor dnormed = Empty(gradient.shape(), act);
    MatMul(kept.gate_up, Transpose::kNo, gate_up_, Transpose::kNo, Accumulate::kOverwrite, dnormed, stream);
    MatMul(kept.gate_up, Transpose::kYes, kept.normed, Transpose::kNo, accumulate, gate_up_gradient_, stream);
    kernels::RmsNormBackward(dnormed, kept.x, norm_, kept.rstd, gradient, norm_gradient_, stream);
    return absl::OkStatus();
  }

 private:
  int64_t width_, inner_;
  float epsilon_;
  Tensor norm_, gate_up_, down_;
  Tensor norm_gradient_, gate_up_gradient_, down_gradient_;
};

}  // namespace

std::unique_ptr<FeedForward> MakeDenseFeedForward(const ModelConfig& config, int layer, const ParameterStore& store) {
  return std::make_unique<DenseFeedForward>(config, layer, store);
}

}  // namespace shoal
