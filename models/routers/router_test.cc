#include "models/routers/router.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "models/routers/choices.h"
#include "models/routers/testing.h"
#include "parallel/placement/placement.h"

namespace shoal {
namespace {
using namespace router_testing;  // NOLINT: the vocabulary of these tests.

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
  EXPECT_EQ(got.dropped, dropped);
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
          for (const Pair& pair : got.pairs) {
            own[static_cast<size_t>(pair.expert)] += pair.token >= first && pair.token < end ? 1 : 0;
          }
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
  const Tensor normed = Random({tokens, config.hidden_size}, DType::kF32, 1);
  const Outcome got = RouteOn(config, normed, {tokens}, 1, parameters, BiasFor(config));
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
  for (const Pair& pair : RouteOn(config, normed, {tokens}, 1, parameters, bias).pairs) {
    want[{pair.token, pair.expert}] = pair.weight;
  }
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
