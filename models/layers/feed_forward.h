// The feed-forward half of a decoder layer, dense or a mixture of experts: x + f(norm(x)). Both kinds share one interface, so
// that a decoder is a list of layers. T tokens, D width, E experts, K experts per token.
#pragma once

#include <memory>

#include "models/model_config.h"
#include "models/optimizer/parameter_store.h"
#include "models/routers/router.h"
#include "parallel/expert/token_exchange.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/matmul.h"

namespace shoal {

class FeedForward {
 public:
  // What the backward pass needs; each kind of layer has its own.
  struct Saved {
    virtual ~Saved() = default;
    Tensor x;  // [T, D] f32: the sum that was normalised.
  };
  virtual ~FeedForward() = default;

  // Returns x + delta + f(norm(x + delta)) [T, D] f32, with x f32 and delta of the compute type. May be collective over the
  // expert group: ABORTED when the epoch is over. `sums` is left empty by a dense layer.
  virtual absl::StatusOr<Tensor> Forward(const Tensor& x, const Tensor& delta, std::unique_ptr<Saved>* saved,
                                         RoutingSums* sums, Stream& stream) = 0;
  // gradient_TD (f32): by the output on entry, by x + delta on return. Consumes `saved`.
  virtual absl::Status Backward(std::unique_ptr<Saved> saved, const RoutingGradient& routing,
                                kernels::Accumulate accumulate, const Tensor& gradient, Stream& stream) = 0;
};

std::unique_ptr<FeedForward> MakeDenseFeedForward(const ModelConfig& config, int layer, const ParameterStore& store);
// Borrows `exchange` for life.
std::unique_ptr<FeedForward> MakeMoeFeedForward(const ModelConfig& config, int layer, const ParameterStore& store,
                                                TokenExchange& exchange);

}  // namespace shoal
