// Router logits [T, E] (f32) of normalised tokens [T, D] (f32 or bf16): their products with the gate, or X-MoE's cosines (Chi et
// al., 2022, "On the representation collapse of sparse mixture of experts", arXiv 2204.09179). For the routers of this folder.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "models/model_config.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/matmul.h"

namespace shoal {

// Where a router finds its parameters and their gradients; asked at each use.
struct RouterParameters {
  std::function<Tensor(const std::string& name, Shape shape)> weight, gradient;
};

class RouterLogits {
 public:
  // What Backward needs beside `normed`.
  struct Saved {
    virtual ~Saved() = default;
  };
  virtual ~RouterLogits() = default;

  virtual Tensor Forward(const Tensor& normed, std::unique_ptr<Saved>* saved, Stream& stream) const = 0;
  // dlogits_TE (f32). As Router::Backward.
  virtual void Backward(const Saved* saved, const Tensor& normed, const Tensor& dlogits, kernels::Accumulate accumulate,
                        const Tensor& dnormed, Stream& stream) const = 0;
};

std::unique_ptr<RouterLogits> MakeRouterLogits(const ModelConfig& config, int layer, RouterParameters parameters);

}  // namespace shoal
