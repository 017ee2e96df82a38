#include "models/routers/logits.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/router.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::MatMul;
using kernels::Transpose;

Tensor AsType(const Tensor& x, DType dtype, Stream& stream) {
  if (x.dtype() == dtype) return x;
  const Tensor converted = Empty(x.shape(), dtype, stream);
  kernels::Convert(x, converted, stream);
  return converted;
}

// x gate^T, in the type of both.
class LinearLogits : public RouterLogits {
 public:
  LinearLogits(const ModelConfig& config, int layer, RouterParameters parameters)
      : parameters_(std::move(parameters)),
        gate_(absl::StrCat("model.layers.", layer, ".block_sparse_moe.gate.weight")),
        shape_({config.num_local_experts, config.hidden_size}) {}

  Tensor Forward(const Tensor& normed, std::unique_ptr<Saved>*, Stream& stream) const override {
    const Tensor logits = Empty({normed.dim(0), shape_[0]}, DType::kF32, stream);
    MatMul(normed, Transpose::kNo, parameters_.weight(gate_, shape_), Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    return logits;
  }

  void Backward(const Saved*, const Tensor& normed, const Tensor& dlogits, Accumulate accumulate, const Tensor& dnormed,
                Stream& stream) const override {
    const Tensor d = AsType(dlogits, normed.dtype(), stream);
    MatMul(d, Transpose::kNo, parameters_.weight(gate_, shape_), Transpose::kNo, Accumulate::kAdd, dnormed, stream);
    MatMul(d, Transpose::kYes, normed, Transpose::kNo, accumulate, parameters_.gradient(gate_, shape_), stream);
  }

 private:
  RouterParameters parameters_;
  std::string gate_;
  Shape shape_;
};

// P width of the routing space. `directions` are the experts' embeddings as unit vectors, over the temperature.
struct CosineSaved : RouterLogits::Saved {
  Tensor token_units, token_norms;                     // [T, P], [T]
  Tensor expert_units, expert_norms, directions;       // [E, P], [E], [E, P]
};

// cos(projection x, embedding_e) / temperature, in f32 whatever the type of x.
class CosineLogits : public RouterLogits {
 public:
  CosineLogits(const ModelConfig& config, int layer, RouterParameters parameters)
      : parameters_(std::move(parameters)),
        prefix_(absl::StrCat("model.layers.", layer, ".block_sparse_moe.")),
        gate_shape_({config.num_local_experts, config.router_dim}),
        projection_shape_({config.router_dim, config.hidden_size}) {}

  Tensor Forward(const Tensor& normed, std::unique_ptr<Saved>* saved, Stream& stream) const override {
    auto kept = std::make_unique<CosineSaved>();
    const int64_t T = normed.dim(0), E = gate_shape_[0], P = gate_shape_[1];
    const Tensor gate = AsType(parameters_.weight(prefix_ + "gate.weight", gate_shape_), DType::kF32, stream);
    kept->token_units = Empty({T, P}, DType::kF32, stream);
    kept->token_norms = Empty({T}, DType::kF32, stream);
    MatMul(AsType(normed, DType::kF32, stream), Transpose::kNo, Projection(stream), Transpose::kYes, Accumulate::kOverwrite,
           kept->token_units, stream);
    kernels::NormalizeRows(kept->token_units, kept->token_units, kept->token_norms, stream);
    kept->expert_units = Empty({E, P}, DType::kF32, stream);
    kept->expert_norms = Empty({E}, DType::kF32, stream);
    kernels::NormalizeRows(gate, kept->expert_units, kept->expert_norms, stream);
    kept->directions = Empty({E, P}, DType::kF32, stream);
    kernels::DivideBy(kept->expert_units, Temperature(), kept->directions, stream);
    const Tensor logits = Empty({T, E}, DType::kF32, stream);
    MatMul(kept->token_units, Transpose::kNo, kept->directions, Transpose::kYes, Accumulate::kOverwrite, logits, stream);
    *saved = std::move(kept);
    return logits;
  }

  void Backward(const Saved* saved, const Tensor& normed, const Tensor& dlogits, Accumulate accumulate, const Tensor& dnormed,
                Stream& stream) const override {
    const CosineSaved& kept = static_cast<const CosineSaved&>(*saved);
    const Tensor dtokens = Empty(kept.token_units.shape(), DType::kF32, stream);
    MatMul(dlogits, Transpose::kNo, kept.directions, Transpose::kNo, Accumulate::kOverwrite, dtokens, stream);
    kernels::NormalizeRowsBackward(dtokens, kept.token_units, kept.token_norms, dtokens, stream);
    MatMul(dtokens, Transpose::kNo, Projection(stream), Transpose::kNo, Accumulate::kAdd, dnormed, stream);
    MatMul(dtokens, Transpose::kYes, AsType(normed, DType::kF32, stream), Transpose::kNo, accumulate,
           parameters_.gradient(prefix_ + "router_proj.weight", projection_shape_), stream);

    const Tensor ddirections = Empty(gate_shape_, DType::kF32, stream);
    MatMul(dlogits, Transpose::kYes, kept.token_units, Transpose::kNo, Accumulate::kOverwrite, ddirections, stream);
    // Gradients of vectors are always added to: they are zeroed together.
    kernels::DivideByBackward(ddirections, kept.directions, Temperature(), parameters_.gradient(prefix_ + "router_temperature", {1}),
                              stream);
    const Tensor dgate = Empty(gate_shape_, DType::kF32, stream);
    kernels::DivideBy(ddirections, Temperature(), dgate, stream);
    kernels::NormalizeRowsBackward(dgate, kept.expert_units, kept.expert_norms, dgate, stream);
    const Tensor gradient = parameters_.gradient(prefix_ + "gate.weight", gate_shape_);
    if (accumulate == Accumulate::kOverwrite) {
      kernels::Convert(dgate, gradient, stream);
    } else {
      kernels::AddTo(dgate, gradient, stream);
    }
  }

 private:
  // Not kept from pass to pass: weights may be elsewhere meanwhile.
  Tensor Projection(Stream& stream) const {
    return AsType(parameters_.weight(prefix_ + "router_proj.weight", projection_shape_), DType::kF32, stream);
  }
  Tensor Temperature() const { return parameters_.weight(prefix_ + "router_temperature", {1}); }

  RouterParameters parameters_;
  std::string prefix_;
  Shape gate_shape_, projection_shape_;
};

}  // namespace

std::unique_ptr<RouterLogits> MakeRouterLogits(const ModelConfig& config, int layer, RouterParameters parameters) {
  if (config.router == RouterKind::kXMoe) return std::make_unique<CosineLogits>(config, layer, std::move(parameters));
  return std::make_unique<LinearLogits>(config, layer, std::move(parameters));
}

}  // namespace shoal
