// For the tests of routers: random parameters, routing as several ranks would, and the definitions in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "models/parameters.h"
#include "models/routers/kinds.h"
#include "runtime/kernels/testing.h"

namespace shoal {
namespace router_testing {

using kernels::Accumulate;
using kernels::testing::As;
using kernels::testing::ExpectNear;
using kernels::testing::ExpectSameBits;
using kernels::testing::Get;
using kernels::testing::Random;

constexpr int64_t kSeq = 6;
constexpr char kPrefix[] = "model.layers.0.block_sparse_moe.";

inline ModelConfig ConfigOf(RouterKind kind, int experts, int choices) {
  ModelConfig config;
  config.hidden_size = 10;
  config.num_local_experts = experts;
  config.num_experts_per_tok = choices;
  config.router = kind;
  config.router_z_loss_coef = 0.1;
  return config;
}

// Every kind, with and without a capacity where that is a choice.
inline std::vector<ModelConfig> Configs() {
  std::vector<ModelConfig> configs;
  configs.push_back(ConfigOf(RouterKind::kTopK, 8, 2));
  configs.push_back(ConfigOf(RouterKind::kTopK, 5, 3));
  configs.back().norm_topk_prob = false;
  for (double factor : {0.0, 1.0}) {
    configs.push_back(ConfigOf(RouterKind::kSwitch, 4, 1));
    configs.back().capacity_factor = factor;
    configs.push_back(ConfigOf(RouterKind::kGShard, 4, 2));
    configs.back().capacity_factor = factor * 1.5;
  }
  configs.push_back(ConfigOf(RouterKind::kSigmoidBias, 8, 3));
  configs.back().aux_loss = AuxLoss::kNone;
  configs.back().router_z_loss_coef = 0;
  configs.back().routed_scaling_factor = 2.5;
  configs.back().seq_aux_loss_coef = 0.02;
  configs.push_back(ConfigOf(RouterKind::kXMoe, 6, 2));
  configs.back().router_dim = 4;
  configs.push_back(ConfigOf(RouterKind::kExpertChoice, 4, 2));
  configs.back().aux_loss = AuxLoss::kNone;
  configs.back().capacity_factor = 1.5;
  return configs;
}

inline std::string NameOf(const ModelConfig& config) {
  std::string name(Name(config.router));
  if (!config.norm_topk_prob) name += "_unnormalised";
  if (config.has_capacity()) name += "_capacity";
  return name;
}

// A layer's router parameters by their last name, random, with gradients that start at 1.
struct Parameters {
  std::map<std::string, Tensor> weights, gradients;

  Parameters(const ModelConfig& config, DType dtype) {
    for (const ParameterSpec& spec : ParameterSpecs(config)) {
      if (spec.name.rfind(std::string(kPrefix) + "experts", 0) == 0) break;
      if (spec.name.rfind(kPrefix, 0) != 0) continue;
      const bool vector = spec.shape.size() == 1;
      weights[spec.name] = vector ? Empty(spec.shape, DType::kF32) : Random(spec.shape, dtype, 77 + weights.size(), 0.6);
      if (vector) weights[spec.name].data<float>()[0] = static_cast<float>(spec.initial);
      gradients[spec.name] = Empty(spec.shape, DType::kF32);
      std::fill(gradients[spec.name].span<float>().begin(), gradients[spec.name].span<float>().end(), 1.0f);
    }
  }
  RouterParameters View() {
    return {.weight = [this](const std::string& name, Shape shape) { return weights.at(name).Reshape(std::move(shape)); },
            .gradient = [this](const std::string& name, Shape shape) { return gradients.at(name).Reshape(std::move(shape)); }};
  }
};

struct Pair {
  int64_t token;
  int expert;
  double weight;
};

// What the routers of all ranks made of one batch.
struct Outcome {
  std::vector<Pair> pairs;  // By token of the batch.
  std::vector<int64_t> rows, counts, dropped;
  std::vector<double> prob_sums;
  double z_sum = 0, seq_aux_sum = 0;
  int64_t unrouted = 0;
  Tensor dnormed;  // [T, D]
};

// Gradients of a loss that is linear in weights and auxiliary sums: of the weight of (token, expert), and of probabilities.
inline double CoefficientOf(int64_t token, int64_t expert) { return std::sin(static_cast<double>(token * 31 + expert * 7)); }
inline RoutingGradient GradientsOf(const ModelConfig& config) {
  RoutingGradient routing;
  routing.z_scale = static_cast<float>(config.router_z_loss_coef);
  routing.seq_aux_scale = config.seq_aux_loss_coef > 0 ? 0.5f : 0.0f;
  if (config.aux_loss != AuxLoss::kNone) routing.dprob = Random({config.num_local_experts}, DType::kF32, 5);
  return routing;
}

template <class T>
void AddTo(const Tensor& values, std::vector<T>* sums) {
  sums->resize(static_cast<size_t>(values.elements()));
  for (size_t i = 0; i < sums->size(); ++i) (*sums)[i] += static_cast<T>(values.data<double>()[i]);
}

// Routes `normed` as `tokens_of_rank.size()` ranks would, forward and backward. `parameters` get the sum of all gradients.
inline Outcome RouteOn(const ModelConfig& config, const Tensor& normed, const std::vector<int64_t>& tokens_of_rank, int pieces,
                Parameters& parameters, const Tensor& bias = Tensor()) {
  Stream stream;
  const size_t ranks = tokens_of_rank.size();
  std::vector<std::unique_ptr<Router>> routers;
  std::vector<std::unique_ptr<Router::Saved>> saved(ranks);
  const int64_t width = RoutingSums::Width(config.num_local_experts);
  const Tensor rows_of_sums = Zeros({static_cast<int64_t>(ranks), width}, DType::kF64);
  std::vector<RoutingSums> sums;
  std::vector<Router::Batch> batches;
  std::vector<int64_t> first(ranks + 1), summary_begin(ranks + 1);
  for (size_t r = 0; r < ranks; ++r) {
    routers.push_back(MakeRouter(config, 0, parameters.View()));
    if (!bias.empty()) std::copy_n(bias.data<float>(), bias.elements(), routers[r]->state().data<float>());
    batches.push_back({.seq = kSeq, .tokens_of_rank = tokens_of_rank, .rank = static_cast<int>(r), .pieces = pieces});
    sums.push_back(RoutingSums::Row(rows_of_sums, static_cast<int64_t>(r)));
    first[r + 1] = first[r] + tokens_of_rank[r];
    summary_begin[r + 1] = summary_begin[r] + routers[r]->SummaryElements(tokens_of_rank[r], pieces);
  }
  const Tensor summaries = Empty({summary_begin[ranks]}, routers[0]->SummaryType());
  for (size_t r = 0; r < ranks; ++r) {
    const Tensor summary = summaries.Elements(summary_begin[r], {summary_begin[r + 1] - summary_begin[r]});
    saved[r] = routers[r]->Score(normed.Rows(first[r], tokens_of_rank[r]), batches[r], summary, &sums[r], stream);
  }
  Outcome outcome;
  outcome.dnormed = Zeros(normed.shape(), DType::kF32);
  for (size_t r = 0; r < ranks; ++r) {
    const RoutedTokens routed = routers[r]->Choose(summaries, batches[r], *saved[r], &sums[r], stream);
    EXPECT_TRUE(outcome.rows.empty() || outcome.rows == routed.rows) << "ranks disagree";
    outcome.rows = routed.rows;
    const Tensor dweight = Empty(routed.weight.shape(), DType::kF32);
    const auto first_of = [&](int64_t t) {
      return routed.offset.empty() ? t * config.num_experts_per_tok : routed.offset.data<int32_t>()[t];
    };
    for (int64_t t = 0; t < tokens_of_rank[r]; ++t) {
      for (int64_t i = first_of(t); i < first_of(t + 1); ++i) {
        const Pair pair = {first[r] + t, routed.expert.data<int32_t>()[i], Get(routed.weight, i)};
        outcome.pairs.push_back(pair);
        dweight.data<float>()[i] = static_cast<float>(CoefficientOf(pair.token, pair.expert));
      }
    }
    AddTo(sums[r].counts(), &outcome.counts);
    AddTo(sums[r].dropped(), &outcome.dropped);
    AddTo(sums[r].probs(), &outcome.prob_sums);
    outcome.z_sum += *sums[r].z().data<double>();
    outcome.seq_aux_sum += *sums[r].seq_aux().data<double>();
    outcome.unrouted += static_cast<int64_t>(*sums[r].unrouted().data<double>());
    routers[r]->Backward(*saved[r], dweight, GradientsOf(config), Accumulate::kAdd,
                         outcome.dnormed.Rows(first[r], tokens_of_rank[r]), stream);
  }
  return outcome;
}

// The definitions, in double precision and without any of the routers' code.
class Reference {
 public:
  Reference(const ModelConfig& config, const Tensor& normed, const Parameters& parameters, const Tensor& bias)
      : config_(config), normed_(As(normed, DType::kF64)), bias_(bias) {
    for (const auto& [name, weight] : parameters.weights) weights_[name] = As(weight, DType::kF64);
  }

  void Score() {
    const int64_t T = normed_.dim(0), E = config_.num_local_experts, D = config_.hidden_size;
    logits_.assign(static_cast<size_t>(T), std::vector<double>(static_cast<size_t>(E)));
    scores_ = logits_;
    for (int64_t t = 0; t < T; ++t) {
      const std::vector<double> x = Row(normed_, t, D);
      std::vector<double>& logit = logits_[static_cast<size_t>(t)];
      for (int64_t e = 0; e < E; ++e) logit[static_cast<size_t>(e)] = Logit(x, e);
      double sum = 0;
      for (double l : logit) sum += std::exp(l);
      for (size_t e = 0; e < logit.size(); ++e) {
        const bool sigmoid = config_.router == RouterKind::kSigmoidBias;
        scores_[static_cast<size_t>(t)][e] = sigmoid ? 1 / (1 + std::exp(-logit[e])) : std::exp(logit[e]) / sum;
      }
    }
  }

  // Fills chosen_ (before dropping) and kept_, by token in the order of choices.
  void Choose() {
    const size_t T = scores_.size(), E = static_cast<size_t>(config_.num_local_experts);
    chosen_.assign(T, {});
    kept_.assign(T, {});
    const size_t capacity =
        std::min(T, static_cast<size_t>(std::ceil(config_.capacity_factor * static_cast<double>(T) / static_cast<double>(E))));
    if (config_.router == RouterKind::kExpertChoice) {
      for (size_t e = 0; e < E; ++e) {
        std::vector<size_t> order(T);
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores_[a][e] > scores_[b][e]; });
        for (size_t i = 0; i < capacity; ++i) chosen_[order[i]].push_back(static_cast<int>(e));
      }
      kept_ = chosen_;
      return;
    }
    for (size_t t = 0; t < T; ++t) {
      std::vector<double> by = scores_[t];
      if (!bias_.empty()) for (size_t e = 0; e < E; ++e) by[e] += Get(bias_, static_cast<int64_t>(e));
      std::vector<int> order(E);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return by[static_cast<size_t>(a)] > by[static_cast<size_t>(b)]; });
      chosen_[t].assign(order.begin(), order.begin() + config_.num_experts_per_tok);
    }
    std::vector<size_t> load(E);
    for (size_t k = 0; k < static_cast<size_t>(config_.num_experts_per_tok); ++k) {
      for (size_t t = 0; t < T; ++t) {
        const int expert = chosen_[t][k];
        if (config_.capacity_factor == 0 || load[static_cast<size_t>(expert)]++ < capacity) kept_[t].push_back(expert);
      }
    }
  }

  double Weight(size_t t, int expert) const {
    const double score = scores_[t][static_cast<size_t>(expert)];
    const bool raw = config_.router == RouterKind::kSwitch || config_.router == RouterKind::kExpertChoice;
    if (raw || !config_.norm_topk_prob) return score;
    double sum = 0;
    for (int other : chosen_[t]) sum += scores_[t][static_cast<size_t>(other)];
    return (config_.router == RouterKind::kSigmoidBias ? config_.routed_scaling_factor : 1.0) * score / sum;
  }

  double ZSum() const {
    double sum = 0;
    for (const std::vector<double>& logit : logits_) {
      double exps = 0;
      for (double l : logit) exps += std::exp(l);
      sum += std::pow(std::log(exps), 2);
    }
    return sum;
  }

  double SequenceSum() const {
    const size_t E = static_cast<size_t>(config_.num_local_experts), seq = static_cast<size_t>(kSeq);
    double loss = 0;
    for (size_t begin = 0; begin + seq <= scores_.size(); begin += seq) {
      for (size_t e = 0; e < E; ++e) {
        double f = 0, share = 0;
        for (size_t t = begin; t < begin + seq; ++t) {
          f += static_cast<double>(std::count(chosen_[t].begin(), chosen_[t].end(), static_cast<int>(e)));
          share += scores_[t][e] / std::accumulate(scores_[t].begin(), scores_[t].end(), 0.0);
        }
        const double fair = static_cast<double>(seq) * config_.num_experts_per_tok / static_cast<double>(E);
        loss += f / fair * share / static_cast<double>(seq);
      }
    }
    return loss;
  }

  // The loss whose gradients RouteOn asks for.
  double Loss() {
    Score();
    const RoutingGradient routing = GradientsOf(config_);
    double loss = static_cast<double>(routing.z_scale) * ZSum();
    if (routing.seq_aux_scale > 0) loss += static_cast<double>(routing.seq_aux_scale) * SequenceSum();
    for (size_t t = 0; t < kept_.size(); ++t) {
      for (int expert : kept_[t]) loss += CoefficientOf(static_cast<int64_t>(t), expert) * Weight(t, expert);
      for (int64_t e = 0; e < routing.dprob.elements() * (routing.dprob.empty() ? 0 : 1); ++e) {
        loss += Get(routing.dprob, e) * scores_[t][static_cast<size_t>(e)];
      }
    }
    return loss;
  }

  const std::vector<std::vector<int>>& chosen() const { return chosen_; }
  const std::vector<std::vector<int>>& kept() const { return kept_; }
  const std::vector<std::vector<double>>& scores() const { return scores_; }
  const Tensor& normed() const { return normed_; }
  const Tensor& weight(const std::string& name) const { return weights_.at(name); }

 private:
  static std::vector<double> Row(const Tensor& x, int64_t row, int64_t width) {
    std::vector<double> out;
    for (int64_t i = 0; i < width; ++i) out.push_back(Get(x, row * width + i));
    return out;
  }
  static double DotOf(const std::vector<double>& a, const std::vector<double>& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  }
  double Logit(const std::vector<double>& x, int64_t expert) const {
    const Tensor& gate = weights_.at(std::string(kPrefix) + "gate.weight");
    const std::vector<double> own = Row(gate, expert, gate.dim(1));
    if (config_.router != RouterKind::kXMoe) return DotOf(x, own);
    std::vector<double> projected;
    for (int64_t i = 0; i < config_.router_dim; ++i) {
      projected.push_back(DotOf(x, Row(weights_.at(std::string(kPrefix) + "router_proj.weight"), i, config_.hidden_size)));
    }
    return DotOf(projected, own) / std::sqrt(DotOf(projected, projected) * DotOf(own, own)) /
           Get(weights_.at(std::string(kPrefix) + "router_temperature"), 0);
  }

  ModelConfig config_;
  Tensor normed_, bias_;
  std::map<std::string, Tensor> weights_;
  std::vector<std::vector<double>> logits_, scores_;
  std::vector<std::vector<int>> chosen_, kept_;
};

inline Tensor BiasFor(const ModelConfig& config) {
  return config.router == RouterKind::kSigmoidBias ? Random({config.num_local_experts}, DType::kF32, 9, 0.1) : Tensor();
}

}  // namespace router_testing
}  // namespace shoal
