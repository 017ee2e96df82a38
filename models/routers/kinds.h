// The kinds of routers behind MakeRouter. Definitions and papers: docs/routers.md.
#pragma once

#include <memory>

#include "models/routers/logits.h"
#include "models/routers/router.h"

namespace shoal {

// topk, switch, gshard, xmoe: softmax over all experts, the best K, in some kinds a capacity.
std::unique_ptr<Router> MakeSoftmaxRouter(const ModelConfig& config, int layer, RouterParameters parameters);
// sigmoid_bias.
std::unique_ptr<Router> MakeSigmoidRouter(const ModelConfig& config, int layer, RouterParameters parameters);
// expert_choice.
std::unique_ptr<Router> MakeExpertChoiceRouter(const ModelConfig& config, int layer, RouterParameters parameters);

// Any kind.
std::unique_ptr<Router> MakeRouter(const ModelConfig& config, int layer, RouterParameters parameters);

}  // namespace shoal
