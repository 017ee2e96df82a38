#include "models/routers/router.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "gtest/gtest.h"
#include "models/parameters.h"
#include "models/routers/choices.h"
#include "models/routers/kinds.h"
#include "parallel/placement/placement.h"
#include "runtime/kernels/testing.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::testing::As;
using kernels::testing::ExpectNear;
using kernels::testing::ExpectSameBits;
using kernels::testing::Get;
using kernels::testing::Random;

constexpr int64_t kSeq = 6;
constexpr char kPrefix[] = "model.layers.0.block_sparse_moe.";

ModelConfig ConfigOf(RouterKind kind, int experts, int choices) {
  ModelConfig config;
  config.hidden_size = 10;
  config.num_local_experts = experts;
  config.num_experts_per_tok = choices;
  config.router = kind;
  config.router_z_loss_coef = 0.1;
  return config;
}

// Every kind, with and without a capacity where that is a choice.
std::vector<ModelConfig> Configs() {
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

std::string NameOf(const ModelConfig& config) {
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
double CoefficientOf(int64_t token, int64_t expert) { return std::sin(static_cast<double>(token * 31 + expert * 7)); }
RoutingGradient GradientsOf(const ModelConfig& config) {
  RoutingGradient routing;
  routing.z_scale = static_cast<float>(config.router_z_loss_coef);
  routing.seq_aux_scale = config.seq_aux_loss_coef > 0 ? 0.5f : 0.0f;
  if (config.aux_loss != AuxLoss::kNone) routing.dprob = Random({config.num_local_experts}, DType::kF32, 5);
  return routing;
}

template <class T>
void AddTo(absl::Span<const T> values, std::vector<T>* sums) {
  sums->resize(std::max(sums->size(), values.size()));
  for (size_t i = 0; i < values.size(); ++i) (*sums)[i] += values[i];
}

// Routes `normed` as `tokens_of_rank.size()` ranks would, forward and backward. `parameters` get the sum of all gradients.
Outcome RouteOn(const ModelConfig& config, const Tensor& normed, const std::vector<int64_t>& tokens_of_rank, int pieces,
                Parameters& parameters, const Tensor& bias = Tensor()) {
  Stream stream;
  const size_t ranks = tokens_of_rank.size();
  std::vector<std::unique_ptr<Router>> routers;
  std::vector<std::unique_ptr<Router::Saved>> saved(ranks);
  std::vector<RoutingSums> sums(ranks);
  std::vector<Router::Batch> batches;
  std::vector<int64_t> first(ranks + 1), summary_begin(ranks + 1);
  for (size_t r = 0; r < ranks; ++r) {
    routers.push_back(MakeRouter(config, 0, parameters.View()));
    if (!bias.empty()) std::copy_n(bias.data<float>(), bias.elements(), routers[r]->state().data<float>());
    batches.push_back({.seq = kSeq, .tokens_of_rank = tokens_of_rank, .rank = static_cast<int>(r), .pieces = pieces});
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
    for (int64_t t = 0; t < tokens_of_rank[r]; ++t) {
      for (int32_t i = routed.offset.data<int32_t>()[t]; i < routed.offset.data<int32_t>()[t + 1]; ++i) {
        const Pair pair = {first[r] + t, routed.expert.data<int32_t>()[i], Get(routed.weight, i)};
        outcome.pairs.push_back(pair);
        dweight.data<float>()[i] = static_cast<float>(CoefficientOf(pair.token, pair.expert));
      }
    }
    AddTo<int64_t>(sums[r].counts.span<int64_t>(), &outcome.counts);
    if (!sums[r].dropped.empty()) AddTo<int64_t>(sums[r].dropped.span<int64_t>(), &outcome.dropped);
    if (!sums[r].prob_sums.empty()) AddTo<double>(sums[r].prob_sums.span<double>(), &outcome.prob_sums);
    outcome.z_sum += sums[r].z_sum;
    outcome.seq_aux_sum += sums[r].seq_aux_sum;
    outcome.unrouted += sums[r].unrouted;
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
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return by[static_cast<size_t>(a)] > by[static_cast<size_t>(b)]; });
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
    if (config_.router == RouterKind::kSwitch || config_.router == RouterKind::kExpertChoice || !config_.norm_topk_prob) return score;
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
        loss += f * static_cast<double>(E) / static_cast<double>(seq) / config_.num_experts_per_tok * share / static_cast<double>(seq);
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

Tensor BiasFor(const ModelConfig& config) {
  return config.router == RouterKind::kSigmoidBias ? Random({config.num_local_experts}, DType::kF32, 9, 0.1) : Tensor();
}

class RouterTest : public testing::TestWithParam<ModelConfig> {};

TEST_P(RouterTest, MatchesItsDefinition) {
  const ModelConfig& config = GetParam();
  ASSERT_TRUE(Validate(config).ok()) << Validate(config);
  Parameters parameters(config, DType::kF32);
  const Tensor normed = Random({8 * kSeq, config.hidden_size}, DType::kF32, 1), bias = BiasFor(config);
  const Outcome got = RouteOn(config, normed, {8 * kSeq}, 1, parameters, bias);
  Reference want(config, normed, parameters, bias);
  want.Score();
  want.Choose();
  size_t i = 0;
  std::vector<int64_t> counts(static_cast<size_t>(config.num_local_experts)), dropped = counts;
  std::vector<double> prob_sums(counts.size());
  int64_t unrouted = 0;
  for (size_t t = 0; t < want.kept().size(); ++t) {
    for (int expert : want.kept()[t]) {
      ASSERT_LT(i, got.pairs.size());
      EXPECT_EQ(got.pairs[i].token, static_cast<int64_t>(t));
      EXPECT_EQ(got.pairs[i].expert, expert) << "token " << t;
      EXPECT_NEAR(got.pairs[i++].weight, want.Weight(t, expert), 1e-5) << "token " << t;
    }
    for (int expert : want.chosen()[t]) {
      ++counts[static_cast<size_t>(expert)];
      const auto& kept = want.kept()[t];
      dropped[static_cast<size_t>(expert)] += std::find(kept.begin(), kept.end(), expert) == kept.end() ? 1 : 0;
    }
    unrouted += want.kept()[t].empty() ? 1 : 0;
    for (size_t e = 0; e < prob_sums.size(); ++e) prob_sums[e] += want.scores()[t][e];
  }
  EXPECT_EQ(i, got.pairs.size());
  EXPECT_EQ(got.counts, counts);
  const bool may_drop = config.has_capacity() && config.router != RouterKind::kExpertChoice;
  EXPECT_EQ(got.dropped, may_drop ? dropped : std::vector<int64_t>());
  EXPECT_EQ(got.unrouted, unrouted);
  if (may_drop) {
    EXPECT_GT(std::accumulate(dropped.begin(), dropped.end(), int64_t{0}), 0);
  }
  if (config.aux_loss != AuxLoss::kNone) {
    for (size_t e = 0; e < prob_sums.size(); ++e) EXPECT_NEAR(got.prob_sums[e], prob_sums[e], 1e-4);
  }
  if (config.router != RouterKind::kSigmoidBias) {
    EXPECT_NEAR(got.z_sum, want.ZSum(), 1e-5 * want.ZSum());
  }
  if (config.seq_aux_loss_coef > 0) {
    EXPECT_NEAR(got.seq_aux_sum, want.SequenceSum(), 1e-5 * want.SequenceSum());
  }
}

// Against central differences of the definition in double precision.
TEST_P(RouterTest, GradientsMatchFiniteDifferences) {
  const ModelConfig& config = GetParam();
  Parameters parameters(config, DType::kF32);
  const Tensor normed = Random({4 * kSeq, config.hidden_size}, DType::kF32, 2), bias = BiasFor(config);
  const Outcome got = RouteOn(config, normed, {4 * kSeq}, 2, parameters, bias);
  Reference want(config, normed, parameters, bias);
  want.Score();
  want.Choose();
  const auto check = [&](const Tensor& variable, const Tensor& gradient, double initial, const std::string& name) {
    constexpr double kStep = 1e-5;
    for (int64_t i = 0; i < variable.elements(); ++i) {
      const double value = variable.data<double>()[i];
      variable.data<double>()[i] = value + kStep;
      const double above = want.Loss();
      variable.data<double>()[i] = value - kStep;
      const double below = want.Loss();
      variable.data<double>()[i] = value;
      const double slope = (above - below) / (2 * kStep);
      ASSERT_NEAR(Get(gradient, i), initial + slope, 3e-5 * std::max(1.0, std::abs(slope))) << name << "[" << i << "]";
    }
  };
  check(want.normed(), got.dnormed, 0, "normed");
  for (const auto& [name, gradient] : parameters.gradients) check(want.weight(name), gradient, 1, name);
}

TEST_P(RouterTest, TheListDoesNotDependOnRanksAndPieces) {
  const ModelConfig& config = GetParam();
  const int64_t tokens = 10 * kSeq, experts = config.num_local_experts;
  const Tensor normed = Random({tokens, config.hidden_size}, DType::kF32, 3), bias = BiasFor(config);
  Parameters alone_parameters(config, DType::kF32);
  const Outcome alone = RouteOn(config, normed, {tokens}, 1, alone_parameters, bias);
  for (const std::vector<int64_t>& split : std::vector<std::vector<int64_t>>{
           {tokens}, {5 * kSeq, 5 * kSeq}, {4 * kSeq, 3 * kSeq, 3 * kSeq}, {0, tokens}, {9 * kSeq, 0, kSeq}}) {
    for (int pieces : {1, 2, 5}) {
      Parameters parameters(config, DType::kF32);
      const Outcome got = RouteOn(config, normed, split, pieces, parameters, bias);
      ASSERT_EQ(got.pairs.size(), alone.pairs.size());
      // Rows by their definition: pairs of each rank, piece and expert.
      std::vector<int64_t> rows;
      int64_t first = 0;
      for (int64_t count : split) {
        for (int piece = 0; piece < pieces; ++piece) {
          const int64_t end = first + EvenPart(count, pieces, piece).count;
          std::vector<int64_t> own(static_cast<size_t>(experts));
          for (const Pair& pair : got.pairs) own[static_cast<size_t>(pair.expert)] += pair.token >= first && pair.token < end ? 1 : 0;
          rows.insert(rows.end(), own.begin(), own.end());
          first = end;
        }
      }
      EXPECT_EQ(got.rows, rows);
      for (size_t i = 0; i < got.pairs.size(); ++i) {
        ASSERT_EQ(got.pairs[i].token, alone.pairs[i].token);
        ASSERT_EQ(got.pairs[i].expert, alone.pairs[i].expert);
        ASSERT_NEAR(got.pairs[i].weight, alone.pairs[i].weight, 1e-6);
      }
      EXPECT_EQ(got.counts, alone.counts);
      EXPECT_EQ(got.dropped, alone.dropped);
      EXPECT_EQ(got.unrouted, alone.unrouted);
      EXPECT_NEAR(got.seq_aux_sum, alone.seq_aux_sum, 1e-6 * std::abs(alone.seq_aux_sum));
      ExpectNear(got.dnormed, alone.dnormed, 1e-4, 1e-5, "dnormed");
      for (const auto& [name, gradient] : parameters.gradients) {
        ExpectNear(gradient, alone_parameters.gradients.at(name), 1e-4, 1e-4, name);
      }
    }
  }
}

TEST_P(RouterTest, TiesGoToTheFirst) {
  const ModelConfig& config = GetParam();
  if (config.router == RouterKind::kXMoe) GTEST_SKIP() << "cosines of equal embeddings differ by rounding";
  Parameters parameters(config, DType::kF32);
  Tensor& gate = parameters.weights.at(std::string(kPrefix) + "gate.weight");
  std::fill(gate.span<float>().begin(), gate.span<float>().end(), 0.0f);
  const int64_t tokens = 4 * kSeq;
  const Outcome got = RouteOn(config, Random({tokens, config.hidden_size}, DType::kF32, 1), {kSeq, 3 * kSeq}, 2, parameters);
  const int64_t capacity =
      config.has_capacity() ? ExpertCapacity(config.capacity_factor, tokens, config.num_local_experts) : tokens;
  std::vector<std::pair<int64_t, int>> want;
  const bool experts_choose = config.router == RouterKind::kExpertChoice;
  for (int64_t t = 0; t < std::min(tokens, capacity); ++t) {
    for (int e = 0; e < (experts_choose ? config.num_local_experts : config.num_experts_per_tok); ++e) want.push_back({t, e});
  }
  ASSERT_EQ(got.pairs.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(std::make_pair(got.pairs[i].token, got.pairs[i].expert), want[i]);
}

TEST_P(RouterTest, EvenABatchWithoutTokensRoutes) {
  const ModelConfig& config = GetParam();
  Parameters parameters(config, DType::kF32);
  const Outcome got = RouteOn(config, Empty({0, config.hidden_size}, DType::kF32), {0, 0}, 3, parameters);
  EXPECT_TRUE(got.pairs.empty());
  EXPECT_EQ(got.rows, std::vector<int64_t>(static_cast<size_t>(2 * 3 * config.num_local_experts)));
  for (const auto& [name, gradient] : parameters.gradients) {
    for (float value : gradient.span<float>()) EXPECT_EQ(value, 1.0f) << name;
  }
}

TEST_P(RouterTest, WeightsOfATokenSumToWhatTheyShould) {
  ModelConfig config = GetParam();
  if (config.router == RouterKind::kExpertChoice) GTEST_SKIP() << "experts choose: nothing to hold a token's sum to";
  Parameters parameters(config, DType::kF32);
  const int64_t tokens = 4 * kSeq;
  const Outcome got = RouteOn(config, Random({tokens, config.hidden_size}, DType::kF32, 1), {tokens}, 1, parameters, BiasFor(config));
  std::vector<double> sums(static_cast<size_t>(tokens));
  std::vector<int> kept(static_cast<size_t>(tokens));
  for (const Pair& pair : got.pairs) {
    EXPECT_GT(pair.weight, 0);
    sums[static_cast<size_t>(pair.token)] += pair.weight;
    ++kept[static_cast<size_t>(pair.token)];
  }
  const bool probabilities = config.router == RouterKind::kSwitch || !config.norm_topk_prob;
  for (size_t t = 0; t < sums.size(); ++t) {
    // What was refused is not made up for.
    if (probabilities || kept[t] < config.num_experts_per_tok) {
      EXPECT_LE(sums[t], 1.0);
    } else {
      EXPECT_NEAR(sums[t], config.routed_scaling_factor, 1e-5);
    }
  }
}

TEST_P(RouterTest, WithoutAnOrderAmongTokensNoneMatters) {
  const ModelConfig& config = GetParam();
  if (config.has_capacity() && config.router != RouterKind::kExpertChoice) GTEST_SKIP() << "tokens enter in the batch's order";
  const int64_t tokens = 4 * kSeq, width = config.hidden_size;
  const Tensor normed = Random({tokens, width}, DType::kF32, 1), reversed = Empty({tokens, width}, DType::kF32);
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(normed.data<float>() + t * width, width, reversed.data<float>() + (tokens - 1 - t) * width);
  }
  Parameters parameters(config, DType::kF32);
  Outcome forward = RouteOn(config, normed, {tokens}, 1, parameters), backward = RouteOn(config, reversed, {tokens}, 1, parameters);
  for (Pair& pair : backward.pairs) pair.token = tokens - 1 - pair.token;
  std::stable_sort(backward.pairs.begin(), backward.pairs.end(), [](const Pair& a, const Pair& b) { return a.token < b.token; });
  ASSERT_EQ(backward.pairs.size(), forward.pairs.size());
  for (size_t i = 0; i < forward.pairs.size(); ++i) {
    EXPECT_EQ(backward.pairs[i].token, forward.pairs[i].token);
    EXPECT_EQ(backward.pairs[i].expert, forward.pairs[i].expert);
    EXPECT_NEAR(backward.pairs[i].weight, forward.pairs[i].weight, 1e-6);
  }
}

TEST_P(RouterTest, ExpertsAreAllAlike) {
  const ModelConfig& config = GetParam();
  const int64_t tokens = 4 * kSeq, E = config.num_local_experts;
  const Tensor normed = Random({tokens, config.hidden_size}, DType::kF32, 1), bias = BiasFor(config);
  Parameters parameters(config, DType::kF32), reversed(config, DType::kF32);
  const Tensor gate = parameters.weights.at(std::string(kPrefix) + "gate.weight");
  const Tensor other = reversed.weights.at(std::string(kPrefix) + "gate.weight");
  const int64_t width = gate.dim(1);
  for (int64_t e = 0; e < E; ++e) std::copy_n(gate.data<float>() + e * width, width, other.data<float>() + (E - 1 - e) * width);
  const Tensor other_bias = bias.empty() ? Tensor() : Empty({E}, DType::kF32);
  for (int64_t e = 0; e < other_bias.elements(); ++e) other_bias.data<float>()[e] = bias.data<float>()[E - 1 - e];
  std::map<std::pair<int64_t, int64_t>, double> want, got;
  for (const Pair& pair : RouteOn(config, normed, {tokens}, 1, parameters, bias).pairs) want[{pair.token, pair.expert}] = pair.weight;
  for (const Pair& pair : RouteOn(config, normed, {tokens}, 1, reversed, other_bias).pairs) {
    got[{pair.token, E - 1 - pair.expert}] = pair.weight;
  }
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [pair, weight] : want) {
    ASSERT_TRUE(got.contains(pair)) << "token " << pair.first << ", expert " << pair.second;
    EXPECT_NEAR(got.at(pair), weight, 1e-6);
  }
}

TEST_P(RouterTest, OverwritesMatrixGradientsWhenAsked) {
  const ModelConfig& config = GetParam();
  Stream stream;
  Parameters added(config, DType::kF32), written(config, DType::kF32);
  const int64_t tokens = 2 * kSeq;
  const Tensor normed = Random({tokens, config.hidden_size}, DType::kF32, 1);
  const Outcome outcome = RouteOn(config, normed, {tokens}, 1, added);
  const std::unique_ptr<Router> router = MakeRouter(config, 0, written.View());
  const Router::Batch batch{.seq = kSeq, .tokens_of_rank = {tokens}};
  const Tensor summary = Empty({router->SummaryElements(tokens, 1)}, router->SummaryType());
  const auto saved = router->Score(normed, batch, summary, nullptr, stream);
  const RoutedTokens routed = router->Choose(summary, batch, *saved, nullptr, stream);
  const Tensor dweight = Empty(routed.weight.shape(), DType::kF32), dnormed = Zeros(normed.shape(), DType::kF32);
  for (size_t i = 0; i < outcome.pairs.size(); ++i) {
    dweight.data<float>()[i] = static_cast<float>(CoefficientOf(outcome.pairs[i].token, outcome.pairs[i].expert));
  }
  router->Backward(*saved, dweight, GradientsOf(config), Accumulate::kOverwrite, dnormed, stream);
  ExpectSameBits(dnormed, outcome.dnormed, "dnormed");
  for (const auto& [name, gradient] : written.gradients) {
    const bool vector = gradient.rank() == 1;
    for (int64_t i = 0; i < gradient.elements(); ++i) {
      EXPECT_NEAR(Get(added.gradients.at(name), i), Get(gradient, i) + (vector ? 0 : 1), 1e-5) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, RouterTest, testing::ValuesIn(Configs()), [](const auto& info) { return NameOf(info.param); });

TEST(GShardRouter, AllFirstChoicesEnterBeforeAnySecond) {
  ModelConfig config = ConfigOf(RouterKind::kGShard, 3, 2);
  config.hidden_size = 3;
  config.capacity_factor = 1;  // 2 of 6 tokens.
  Parameters parameters(config, DType::kF32);
  const Tensor normed = Zeros({6, 3}, DType::kF32);
  Tensor& gate = parameters.weights.at(std::string(kPrefix) + "gate.weight");
  for (int i = 0; i < 9; ++i) gate.data<float>()[i] = i % 4 == 0 ? 1.0f : 0.0f;  // Logits are the token.
  const int first[] = {1, 1, 0, 0, 0, 2}, second[] = {0, 0, 1, 2, 2, 0};
  for (int t = 0; t < 6; ++t) {
    normed.data<float>()[t * 3 + first[t]] = 2;
    normed.data<float>()[t * 3 + second[t]] = 1;
  }
  const Outcome got = RouteOn(config, normed, {2, 3, 1}, 2, parameters);
  std::vector<std::pair<int64_t, int>> pairs;
  for (const Pair& pair : got.pairs) pairs.push_back({pair.token, pair.expert});
  // Expert 0 goes to the first choices of tokens 2 and 3, though tokens 0 and 1 wanted it second; 4 finds room at its second.
  EXPECT_EQ(pairs, (std::vector<std::pair<int64_t, int>>{{0, 1}, {1, 1}, {2, 0}, {3, 0}, {3, 2}, {5, 2}}));
  EXPECT_EQ(got.counts, (std::vector<int64_t>{6, 3, 3}));
  EXPECT_EQ(got.dropped, (std::vector<int64_t>{4, 1, 1}));
  EXPECT_EQ(got.unrouted, 1);
  const double of_first = std::exp(2.0) / (std::exp(2.0) + std::exp(1.0));
  for (const Pair& pair : got.pairs) EXPECT_NEAR(pair.weight, pair.token == 3 && pair.expert == 2 ? 1 - of_first : of_first, 1e-6);
}

TEST(SigmoidRouter, TheBiasFollowsTheLoad) {
  ModelConfig config = ConfigOf(RouterKind::kSigmoidBias, 4, 2);
  config.bias_update_rate = 0.25;
  Parameters parameters(config, DType::kF32);
  const std::unique_ptr<Router> router = MakeRouter(config, 3, parameters.View());
  EXPECT_EQ(router->state_name(), "model.layers.3.block_sparse_moe.e_score_correction_bias");
  EXPECT_EQ(router->state().span<float>(), absl::Span<const float>({0, 0, 0, 0}));
  router->EndStep({3, 10, 5, 2});
  EXPECT_EQ(router->state().span<float>(), absl::Span<const float>({0.25f, -0.25f, 0, 0.25f}));
  router->EndStep({1, 1, 1, 0});  // The mean is no integer.
  EXPECT_EQ(router->state().span<float>(), absl::Span<const float>({0, -0.5f, -0.25f, 0.5f}));
  const std::unique_ptr<Router> other = MakeRouter(ConfigOf(RouterKind::kTopK, 4, 2), 3, parameters.View());
  EXPECT_EQ(other->state_name(), "");
  EXPECT_TRUE(other->state().empty());
}

TEST(ExpertCapacity, IsCountedInDoublesAndRoundedUp) {
  EXPECT_EQ(ExpertCapacity(1.75, 128, 4), 56);
  EXPECT_EQ(ExpertCapacity(1.0, 128, 4), 32);
  EXPECT_EQ(ExpertCapacity(1.0, 10, 4), 3);
  EXPECT_EQ(ExpertCapacity(1e-9, 10, 4), 1);
  EXPECT_EQ(ExpertCapacity(100, 10, 4), 10);
  EXPECT_EQ(ExpertCapacity(1.5, 0, 4), 0);
}

// Weights in bf16: the linear routers multiply in bf16, the cosine router in f32.
TEST(Routers, TakeBf16) {
  for (ModelConfig config : Configs()) {
    SCOPED_TRACE(NameOf(config));
    Parameters parameters(config, DType::kBF16);
    const int64_t tokens = 4 * kSeq;
    const Tensor normed = Random({tokens, config.hidden_size}, DType::kBF16, 1), bias = BiasFor(config);
    const Outcome got = RouteOn(config, normed, {tokens}, 2, parameters, bias);
    Reference want(config, normed, parameters, bias);
    want.Score();
    want.Choose();
    size_t i = 0;
    for (size_t t = 0; t < want.kept().size(); ++t) {
      for (int expert : want.kept()[t]) {
        ASSERT_LT(i, got.pairs.size());
        EXPECT_EQ(got.pairs[i].expert, expert) << "token " << t;
        EXPECT_NEAR(got.pairs[i++].weight, want.Weight(t, expert), 1e-5) << "token " << t;
      }
    }
  }
}

}  // namespace
}  // namespace shoal
