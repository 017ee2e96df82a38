// Routers whose choices stay on a stream, all of them (no summary) or all but their counts, on the device of tests and on the CPU, against
// the CPU with a summary.
#include <tuple>

#include "models/routers/testing.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/cuda/emulator.h"

namespace shoal {
namespace {
using namespace router_testing;  // NOLINT: the vocabulary of these tests.
using kernels::testing::TestDevice;
using kernels::testing::TestStream;

constexpr kernels::testing::ToHostFunction kHost;

std::vector<ModelConfig> ConfigsWithoutCapacity() {
  std::vector<ModelConfig> configs;
  for (const ModelConfig& config : Configs()) {
    if (!config.has_capacity()) configs.push_back(config);
  }
  return configs;
}

class StreamRouterTest : public testing::TestWithParam<std::tuple<ModelConfig, bool>> {
 protected:
  const ModelConfig& config() const { return std::get<0>(GetParam()); }
  Stream& stream() { return std::get<1>(GetParam()) ? *device_ : cpu_; }
  Parameters Copied(const Parameters& host) {
    Parameters copied = host;
    for (auto* tensors : {&copied.weights, &copied.gradients}) {
      for (auto& [name, tensor] : *tensors) tensor = Upload(tensor, stream());
    }
    return copied;
  }

 private:
  std::unique_ptr<Stream> device_ = TestStream();
  Stream cpu_;
};

void ExpectPairs(const RoutedTokens& routed, const std::vector<Pair>& want, Stream& stream) {
  const Tensor expert = kHost(routed.expert, stream), weight = kHost(routed.weight, stream), offset = kHost(routed.offset, stream);
  ASSERT_EQ(expert.elements(), static_cast<int64_t>(want.size()));
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(expert.data<int32_t>()[i], want[i].expert) << i;
    EXPECT_NEAR(weight.data<float>()[i], want[i].weight, 1e-6) << i;
    EXPECT_LE(offset.data<int32_t>()[want[i].token], static_cast<int32_t>(i));
    EXPECT_GT(offset.data<int32_t>()[want[i].token + 1], static_cast<int32_t>(i));
  }
}

TEST_P(StreamRouterTest, NothingWaitsAndAllIsAsWithTheHost) {
  const int64_t tokens = 4 * kSeq;
  const Tensor normed = Random({tokens, config().hidden_size}, DType::kF32, 1), bias = BiasFor(config());
  Parameters host_parameters(config(), DType::kF32), parameters = Copied(host_parameters);
  const Outcome want = RouteOn(config(), normed, {tokens}, 1, host_parameters, bias);
  const Tensor by_pair = Empty({static_cast<int64_t>(want.pairs.size())}, DType::kF32);
  for (size_t i = 0; i < want.pairs.size(); ++i) {
    by_pair.data<float>()[i] = static_cast<float>(CoefficientOf(want.pairs[i].token, want.pairs[i].expert));
  }
  const std::unique_ptr<Router> router = MakeRouter(config(), 0, parameters.View());
  if (!bias.empty()) std::copy_n(bias.data<float>(), bias.elements(), router->state().data<float>());
  const Tensor x = Upload(normed, stream()), dweight = Upload(by_pair, stream()), dnormed = Zeros(normed.shape(), DType::kF32, stream());
  const Tensor rows = Zeros({1, RoutingSums::Width(config().num_local_experts)}, DType::kF64, stream());
  RoutingGradient routing = GradientsOf(config());
  if (!routing.dprob.empty()) routing.dprob = Upload(routing.dprob, stream());
  const Router::Batch batch{.seq = kSeq, .tokens_of_rank = {tokens}};
  const int64_t waits = TestDevice().waits().waits;
  const RoutingSums sums = RoutingSums::Row(rows, 0);
  RoutedTokens routed;
  for (const RoutingSums* to : {static_cast<const RoutingSums*>(nullptr), &sums, &sums}) {  // Computed again, and two waves.
    const auto saved = router->Score(x, batch, Tensor(), to, stream());
    routed = router->Choose(Tensor(), batch, *saved, to, stream());
    if (to == nullptr) router->Backward(*saved, dweight, routing, Accumulate::kAdd, dnormed, stream());
  }
  EXPECT_EQ(TestDevice().waits().waits, waits);
  EXPECT_TRUE(routed.rows.empty());
  ExpectPairs(routed, want.pairs, stream());
  const RoutingSums got(kHost(rows, stream()).Reshape({rows.dim(1)}));
  for (int e = 0; e < config().num_local_experts; ++e) {
    const size_t at = static_cast<size_t>(e);
    EXPECT_EQ(got.counts().data<double>()[e], 2.0 * static_cast<double>(want.counts[at])) << e;
    EXPECT_NEAR(got.probs().data<double>()[e], 2 * want.prob_sums[at], 1e-5) << e;
    EXPECT_EQ(got.dropped().data<double>()[e], 0) << e;
  }
  EXPECT_NEAR(*got.z().data<double>(), 2 * want.z_sum, 1e-5 * want.z_sum);
  EXPECT_NEAR(*got.seq_aux().data<double>(), 2 * want.seq_aux_sum, 1e-5 * want.seq_aux_sum);
  EXPECT_EQ(*got.unrouted().data<double>(), 0);
  ExpectNear(kHost(dnormed, stream()), want.dnormed, 1e-4, 1e-5, "dnormed");
  for (const auto& [name, gradient] : parameters.gradients) {
    ExpectNear(kHost(gradient, stream()), host_parameters.gradients.at(name), 1e-4, 1e-4, name);
  }
}

// As one of several ranks would: the host waits once, for counts and sums, and what is as long as tokens stays where it is.
TEST_P(StreamRouterTest, TheHostLearnsCountsAlone) {
  const int64_t tokens = 4 * kSeq, experts = config().num_local_experts;
  constexpr int kPieces = 3;
  const Tensor normed = Random({tokens, config().hidden_size}, DType::kF32, 1), bias = BiasFor(config());
  Parameters host_parameters(config(), DType::kF32), parameters = Copied(host_parameters);
  const Outcome want = RouteOn(config(), normed, {tokens}, kPieces, host_parameters, bias);
  const std::unique_ptr<Router> router = MakeRouter(config(), 0, parameters.View());
  if (!bias.empty()) std::copy_n(bias.data<float>(), bias.elements(), router->state().data<float>());
  const Router::Batch batch{.seq = kSeq, .tokens_of_rank = {tokens}, .pieces = kPieces};
  const Tensor summary = Empty({router->SummaryElements(tokens, kPieces)}, router->SummaryType());
  const Tensor rows = Zeros({1, RoutingSums::Width(config().num_local_experts)}, DType::kF64), x = Upload(normed, stream());
  const RoutingSums sums = RoutingSums::Row(rows, 0);
  const int64_t waits = TestDevice().waits().waits;
  const auto saved = router->Score(x, batch, summary, &sums, stream());
  const RoutedTokens routed = router->Choose(summary, batch, *saved, &sums, stream());
  EXPECT_EQ(TestDevice().waits().waits - waits, stream().device() == nullptr ? 0 : 1);
  EXPECT_EQ(routed.rows, want.rows);
  EXPECT_TRUE(routed.offset.empty() && routed.slot.empty());
  const Tensor expert = kHost(routed.expert, stream()), weight = kHost(routed.weight, stream());
  const Tensor counts = kHost(routed.tally.counts, stream());
  ASSERT_EQ(expert.elements(), static_cast<int64_t>(want.pairs.size()));
  for (size_t i = 0; i < want.pairs.size(); ++i) {
    EXPECT_EQ(expert.data<int32_t>()[i], want.pairs[i].expert) << i;
    EXPECT_NEAR(weight.data<float>()[i], want.pairs[i].weight, 1e-6) << i;
  }
  for (int64_t e = 0; e < experts; ++e) {
    int64_t counted = 0;
    for (int64_t block = 0; block < counts.dim(0); ++block) counted += counts.data<int32_t>()[block * experts + e];
    EXPECT_EQ(counted, want.counts[static_cast<size_t>(e)]);
    EXPECT_EQ(sums.counts().data<double>()[e], static_cast<double>(counted));
    EXPECT_NEAR(sums.probs().data<double>()[e], want.prob_sums[static_cast<size_t>(e)], 1e-5);
  }
  EXPECT_NEAR(*sums.z().data<double>(), want.z_sum, 1e-5 * want.z_sum);
  EXPECT_NEAR(*sums.seq_aux().data<double>(), want.seq_aux_sum, 1e-5 * want.seq_aux_sum);
}

INSTANTIATE_TEST_SUITE_P(Kinds, StreamRouterTest, testing::Combine(testing::ValuesIn(ConfigsWithoutCapacity()), testing::Bool()),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + (std::get<1>(info.param) ? "_device" : "_cpu");
                         });

// One that reads the logits, and one that needs all choices to order them.
TEST(StreamSoftmaxRouter, TakesTwoLaunches) {
  if (kernels::testing::OnRealDevice()) GTEST_SKIP() << "launches are counted by the emulator";
  const std::unique_ptr<Stream> stream = TestStream();
  const ModelConfig config = ConfigOf(RouterKind::kTopK, 8, 2);
  Parameters parameters(config, DType::kF32);
  for (auto& [name, tensor] : parameters.weights) tensor = Upload(tensor, *stream);
  const std::unique_ptr<Router> router = MakeRouter(config, 0, parameters.View());
  const Tensor x = Upload(Random({kSeq, config.hidden_size}, DType::kF32, 1), *stream);
  const Tensor rows = Zeros({1, RoutingSums::Width(8)}, DType::kF64, *stream);
  const RoutingSums sums = RoutingSums::Row(rows, 0);
  const Router::Batch batch{.seq = kSeq, .tokens_of_rank = {kSeq}};
  ASSERT_EQ(stream->Wait(), absl::OkStatus());
  const int64_t launches = cuda::emulator::Launches();
  const auto saved = router->Score(x, batch, Tensor(), &sums, *stream);
  router->Choose(Tensor(), batch, *saved, &sums, *stream);
  ASSERT_EQ(stream->Wait(), absl::OkStatus());
  EXPECT_EQ(cuda::emulator::Launches() - launches, 2) << "the logits themselves are a product of the CPU's";
}

// Also by choices that were recorded before it moved.
TEST(StreamSigmoidRouter, ABiasThatMovedIsUsed) {
  const std::unique_ptr<Stream> stream = TestStream();
  ModelConfig config = ConfigOf(RouterKind::kSigmoidBias, 4, 1);
  config.bias_update_rate = 1;  // More than all scores differ by.
  Parameters parameters(config, DType::kF32);
  for (auto& [name, tensor] : parameters.weights) tensor = Upload(tensor, *stream);
  const std::unique_ptr<Router> router = MakeRouter(config, 0, parameters.View());
  const Tensor x = Upload(Random({kSeq, config.hidden_size}, DType::kF32, 1), *stream);
  const Router::Batch batch{.seq = kSeq, .tokens_of_rank = {kSeq}};
  const auto favour = [&](int wanted) {
    for (int e = 0; e < 4; ++e) router->state().data<float>()[e] = 0;
    std::vector<int64_t> counts(4, 100);
    counts[static_cast<size_t>(wanted)] = 0;
    for (int step = 0; step < 3; ++step) router->EndStep(counts);
  };
  const auto choose = [&] {
    const auto saved = router->Score(x, batch, Tensor(), nullptr, *stream);
    return router->Choose(Tensor(), batch, *saved, nullptr, *stream).expert;
  };
  const auto expect = [&](const Tensor& expert, int wanted) {
    const Tensor host = kHost(expert, *stream);
    for (int32_t chosen : host.span<int32_t>()) EXPECT_EQ(chosen, wanted);
  };
  for (int wanted : {2, 0}) {
    favour(wanted);
    expect(choose(), wanted);
  }
  ASSERT_EQ(stream->BeginCapture(), absl::OkStatus());
  const Tensor recorded = choose();
  const absl::StatusOr<CapturedGraph> graph = stream->EndCapture();
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int wanted : {3, 1}) {
    favour(wanted);
    stream->Launch(*graph);
    expect(recorded, wanted);
  }
}

}  // namespace
}  // namespace shoal
