#include "launch/trainer/routing_sums.h"

#include <cmath>

#include "gtest/gtest.h"
#include "runtime/kernels/cuda/device_testing.h"

namespace shoal {
namespace {
using kernels::testing::Random;
using kernels::testing::TestDevice;
using kernels::testing::TestStream;

constexpr kernels::testing::ToHostFunction kHost;
constexpr int64_t kSequences = 3, kSeq = 8;
constexpr int kParts = 2;

ModelConfig ConfigWith(AuxLoss kind) {
  ModelConfig config;
  config.num_hidden_layers = 3;
  config.dense_layers = {false, true, false};
  config.num_local_experts = 5;
  config.num_experts_per_tok = 2;
  config.aux_loss = kind;
  config.router_aux_loss_coef = 0.5;
  config.router_z_loss_coef = 0.1;
  return config;
}

// What two layers did with the tokens of a part.
Tensor SumsOf(const ModelConfig& config, int part) {
  const Tensor sums = Zeros({2, RoutingSums::Width(config.num_local_experts)}, DType::kF64);
  for (int64_t layer = 0; layer < 2; ++layer) {
    const RoutingSums of = RoutingSums::Row(sums, layer);
    *of.z().data<double>() = 100.0 + static_cast<double>(layer);
    *of.unrouted().data<double>() = part;
    for (int e = 0; e < 5; ++e) {
      of.counts().data<double>()[e] = 3 * e + static_cast<double>(layer) + part;
      of.probs().data<double>()[e] = 4.75 - 0.5 * e;
    }
  }
  return sums;
}

// The loss of a step by a token's probability of an expert: of its part's mean.
double SlopeOf(const ModelConfig& config, const Tensor& sums, int64_t layer, int e) {
  const double tokens = kSequences * kSeq, coefficient = config.router_aux_loss_coef * 5 / kParts;
  const auto count = [&](int64_t of) { return RoutingSums::Row(sums, of).counts().data<double>()[e]; };
  if (config.aux_loss == AuxLoss::kHf) return coefficient * (count(0) + count(1)) / (2 * tokens) / (2 * tokens);
  return coefficient * count(layer) / (2 * tokens) / tokens;
}

class StepRoutingTest : public testing::TestWithParam<AuxLoss> {};
INSTANTIATE_TEST_SUITE_P(Losses, StepRoutingTest, testing::Values(AuxLoss::kHf, AuxLoss::kSwitch),
                         [](const auto& info) { return info.param == AuxLoss::kHf ? "pooled" : "by_layer"; });

TEST_P(StepRoutingTest, ADeviceHasTheGradientsAndLossesOfTheHostWithoutWaiting) {
  const ModelConfig config = ConfigWith(GetParam());
  const std::unique_ptr<Stream> stream = TestStream();
  StepRouting host(config, kParts, kSequences, kSeq), device(config, kParts, kSequences, kSeq);
  for (int part = 0; part < kParts; ++part) {
    const Tensor sums = SumsOf(config, part), on_device = Upload(sums, *stream);
    ASSERT_TRUE(host.Sum(sums, /*control=*/nullptr, Order::kFast).ok());
    const int64_t waits = TestDevice().waits().waits;
    device.SumOnStream(on_device, *stream);
    const std::vector<RoutingGradient> gradients = device.Gradients(*stream), with_host = host.Gradients(*stream);
    EXPECT_EQ(TestDevice().waits().waits, waits);
    ASSERT_EQ(gradients.size(), 2u);
    for (size_t layer = 0; layer < 2; ++layer) {
      const Tensor got = kHost(gradients[layer].dprob, *stream), same = kHost(with_host[layer].dprob, *stream);
      EXPECT_FLOAT_EQ(gradients[layer].z_scale, 0.1f / (kSequences * kSeq) / kParts);
      for (int e = 0; e < 5; ++e) {
        EXPECT_FLOAT_EQ(got.data<float>()[e], static_cast<float>(SlopeOf(config, sums, static_cast<int64_t>(layer), e)));
        EXPECT_FLOAT_EQ(same.data<float>()[e], got.data<float>()[e]);
      }
    }
  }
  ASSERT_EQ(stream->Wait(), absl::OkStatus());
  RoutingReport got, want;
  device.Finish(&got);
  host.Finish(&want);
  EXPECT_EQ(got.aux, want.aux);
  EXPECT_EQ(got.z, want.z);
  EXPECT_NEAR(got.z, 201.0 / (kSequences * kSeq), 1e-12);
  EXPECT_EQ(got.unrouted, (std::vector<int64_t>{1, 1}));
  EXPECT_EQ(got.expert_counts, (std::vector<std::vector<int64_t>>{{1, 7, 13, 19, 25}, {3, 9, 15, 21, 27}}));
  EXPECT_EQ(got.expert_counts, want.expert_counts);
  EXPECT_TRUE(got.dropped.empty());
}

TEST(StepRouting, WithoutAnAuxiliaryLossNoProbabilityHasAGradient) {
  const ModelConfig config = ConfigWith(AuxLoss::kNone);
  StepRouting routing(config, kParts, kSequences, kSeq);
  for (const RoutingGradient& gradient : routing.GradientsWithoutSums()) {
    EXPECT_TRUE(gradient.dprob.empty());
    EXPECT_FLOAT_EQ(gradient.z_scale, 0.1f / (kSequences * kSeq) / kParts);
  }
}

}  // namespace
}  // namespace shoal
