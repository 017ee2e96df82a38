#include "models/routers/router.h"

#include <utility>

#include "models/routers/kinds.h"

namespace shoal {

std::unique_ptr<Router> MakeRouter(const ModelConfig& config, int layer, RouterParameters parameters) {
  if (config.router == RouterKind::kSigmoidBias) return MakeSigmoidRouter(config, layer, std::move(parameters));
  if (config.router == RouterKind::kExpertChoice) return MakeExpertChoiceRouter(config, layer, std::move(parameters));
  return MakeSoftmaxRouter(config, layer, std::move(parameters));
}

std::unique_ptr<Router> MakeRouter(const ModelConfig& config, int layer, const ParameterStore& store) {
  RouterParameters parameters;
  parameters.weight = [&store](const std::string& name, Shape shape) { return store.Weight(name, std::move(shape)); };
  parameters.gradient = [&store](const std::string& name, Shape shape) { return store.Gradient(name, std::move(shape)); };
  return MakeRouter(config, layer, std::move(parameters));
}

}  // namespace shoal
