// A layer of experts on the device of tests, against the same on the CPU, and how often its host waits.
#include "models/layers/moe.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "collectives/communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/device/fake_device.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/elementwise.h"

namespace shoal {
namespace {
using kernels::testing::ExpectNear;
using kernels::testing::ExpectSameBits;
using kernels::testing::Random;
using kernels::testing::TestDevice;
using kernels::testing::TestStream;

constexpr kernels::testing::ToHostFunction kHost;
constexpr int64_t kSeq = 6, kTokens = 4 * kSeq;

ModelConfig ConfigOf(RouterKind kind) {
  ModelConfig config;
  config.vocab_size = 16;
  config.hidden_size = 24;
  config.intermediate_size = 20;
  config.shared_intermediate_size = 12;
  config.num_hidden_layers = 1;
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = 4;
  config.num_local_experts = 5;
  config.num_experts_per_tok = kind == RouterKind::kSwitch ? 1 : 2;
  config.router = kind;
  config.router_z_loss_coef = 0.1;
  config.router_dim = kind == RouterKind::kXMoe ? 4 : 0;
  if (kind == RouterKind::kSigmoidBias) {
    config.aux_loss = AuxLoss::kNone;
    config.router_z_loss_coef = 0;
    config.seq_aux_loss_coef = 0.02;
  }
  return config;
}

// One layer with what it stands on, of a world of one rank.
class Fixture {
 public:
  Fixture(const ModelConfig& config, DType compute, Stream& stream, Numerics numerics = Numerics::kFast)
      : stream_(stream), config_(config), world_(*ConnectWorld({})) {
    context_.topology = Topology::OneHost(1);
    context_.numerics = numerics;
    store_ = *ParameterStore::Create(ParameterSpecs(config), {GroupedPlacement(1, config.num_local_experts, 1, 1)[0]}, *world_,
                                     {.compute = compute, .stream = &stream});
    store_->InitializeOwned(3, 0.3, stream);
    EXPECT_TRUE(store_->GatherWeights(stream).ok());
    layer_ = std::make_unique<MoeLayer>(config, 0, *store_, context_);
    x_ = Upload(Random({kTokens, config.hidden_size}, DType::kF32, 1), stream);
    delta_ = Upload(Random({kTokens, config.hidden_size}, compute, 2), stream);
    routing_.z_scale = static_cast<float>(config.router_z_loss_coef);
    routing_.seq_aux_scale = config.seq_aux_loss_coef > 0 ? 0.5f : 0;
    if (config.aux_loss != AuxLoss::kNone) routing_.dprob = Upload(Random({config.num_local_experts}, DType::kF32, 5), stream);
  }

  // Forward and backward, every task in order. Waits for nothing that the layer does not wait for.
  void Run(MoeLayer::Chunks chunks) {
    sums = NewRoutingSums(config_, context_, 1, stream_);
    const RoutingSums of_layer = RoutingSums::Row(sums, 0);
    MoeLayer::Saved saved;
    layer_->Route(x_, delta_, {.seq = kSeq, .tokens_of_rank = {kTokens}}, chunks, &saved, &of_layer, stream_);
    EXPECT_TRUE(layer_->Exchange(&saved).ok());
    EXPECT_TRUE(layer_->Arrange(&saved, &of_layer, stream_).ok());
    const int64_t pairs = kTokens * config_.num_experts_per_tok;
    int64_t packed = 0, computed = 0, combined = 0, back = 0, weighed = 0;
    for (int chunk = 0; chunk < chunks.forward; ++chunk) packed += layer_->Pack(chunk, &saved, stream_);
    for (int chunk = 0; chunk < chunks.forward; ++chunk) computed += layer_->Experts(chunk, &saved, stream_);
    layer_->Shared(&saved, stream_);
    for (int chunk = 0; chunk < chunks.forward; ++chunk) combined += layer_->Combine(chunk, &saved, stream_);
    out = saved.out;
    // The loss is half the sum of squares.
    gradient = Empty(out.shape(), DType::kF32, stream_);
    kernels::Convert(out, gradient, stream_);
    store_->dense().ZeroVectorGradients(stream_);
    for (int chunk = 0; chunk < chunks.backward; ++chunk) {
      EXPECT_TRUE(layer_->PackBackward(chunk, gradient, &saved, stream_).ok());
      back += layer_->ExpertsBackward(chunk, &saved, stream_);
      weighed += layer_->ExpertsWeight(chunk, /*part=*/0, &saved, stream_);
    }
    layer_->SharedBackward(gradient, kernels::Accumulate::kOverwrite, &saved, stream_);
    layer_->RouteBackward(routing_, kernels::Accumulate::kOverwrite, gradient, &saved, stream_);
    for (int64_t rows : {packed, computed, combined, back, weighed}) EXPECT_EQ(rows, pairs);
  }

  // Until rows have their places.
  absl::Status Arrange() {
    MoeLayer::Saved saved;
    layer_->Route(x_, delta_, {.seq = kSeq, .tokens_of_rank = {kTokens}}, {1, 1}, &saved, nullptr, stream_);
    return layer_->Arrange(&saved, nullptr, stream_);
  }

  // As one of several ranks, until rows have their places; then again, as where little is kept. Waits for nothing that the layer does not
  // wait for. Returns the waits of either.
  std::pair<int64_t, int64_t> ArrangeTwice(MoeLayer::Chunks chunks, MoeLayer::Saved* first, MoeLayer::Saved* again) {
    context_.control = world_.get();
    const auto arrange = [&](MoeLayer::Saved* saved) {
      const int64_t waits = TestDevice().waits().waits;
      layer_->Route(x_, delta_, {.seq = kSeq, .tokens_of_rank = {kTokens}}, chunks, saved, nullptr, stream_);
      if (saved == first) {
        EXPECT_TRUE(layer_->Exchange(saved).ok());
      }
      EXPECT_EQ(layer_->Arrange(saved, nullptr, stream_), absl::OkStatus());
      return TestDevice().waits().waits - waits;
    };
    const int64_t before = arrange(first);
    again->summaries = first->summaries;
    return {before, arrange(again)};
  }

  // Of the layer's parameters.
  std::vector<std::pair<std::string, Tensor>> Gradients() const {
    std::vector<std::pair<std::string, Tensor>> gradients;
    for (const OwnedPart& part : store_->owned()) {
      const bool layer = part.name.find("block_sparse_moe") != std::string::npos || part.name.find("mlp") != std::string::npos ||
                         part.name.find("post_attention") != std::string::npos;
      if (layer) gradients.push_back({part.name, kHost(part.gradient, stream_)});
    }
    return gradients;
  }

  Tensor out, gradient, sums;

 private:
  Stream& stream_;
  ModelConfig config_;
  std::unique_ptr<Communicator> world_;
  ExpertContext context_;
  std::unique_ptr<ParameterStore> store_;
  std::unique_ptr<MoeLayer> layer_;
  Tensor x_, delta_;
  RoutingGradient routing_;
};

class DeviceMoe : public testing::TestWithParam<RouterKind> {};
INSTANTIATE_TEST_SUITE_P(Routers, DeviceMoe,
                         testing::Values(RouterKind::kTopK, RouterKind::kSwitch, RouterKind::kSigmoidBias, RouterKind::kXMoe),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(DeviceMoe, ComputesWhatTheCpuComputes) {
  const ModelConfig config = ConfigOf(GetParam());
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  Fixture want(config, DType::kF32, cpu), got(config, DType::kF32, *stream);
  want.Run({1, 1});
  for (const MoeLayer::Chunks chunks : {MoeLayer::Chunks{1, 1}, MoeLayer::Chunks{3, 2}}) {
    got.Run(chunks);
    ExpectNear(kHost(got.out, *stream), want.out, 1e-5, 1e-5, "out");
    ExpectNear(kHost(got.gradient, *stream), want.gradient, 1e-4, 1e-4, "gradient");
    ExpectNear(kHost(got.sums, *stream), want.sums, 1e-6, 1e-6, "sums");
    const auto gradients = got.Gradients(), wanted = want.Gradients();
    ASSERT_EQ(gradients.size(), wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) ExpectNear(gradients[i].second, wanted[i].second, 1e-4, 1e-4, wanted[i].first);
  }
}

TEST_P(DeviceMoe, NothingWaitsForTheDevice) {
  for (const DType compute : {DType::kF32, DType::kBF16}) {
    const std::unique_ptr<Stream> stream = TestStream();
    Fixture fixture(ConfigOf(GetParam()), compute, *stream);
    for (int pass = 0; pass < 2; ++pass) {
      fixture.Run({1, 1});
      ASSERT_EQ(stream->Wait(), absl::OkStatus());
    }
    const DeviceWaits before = TestDevice().waits();
    fixture.Run({1, 1});
    EXPECT_EQ(TestDevice().waits().waits, before.waits);
    EXPECT_EQ(TestDevice().waits().allocations, before.allocations);
    ASSERT_EQ(stream->Wait(), absl::OkStatus());
  }
}

TEST_P(DeviceMoe, WhatAllRanksCountedIsNotWaitedForAgain) {
  const std::unique_ptr<Stream> stream = TestStream();
  Fixture fixture(ConfigOf(GetParam()), DType::kF32, *stream);
  for (const MoeLayer::Chunks chunks : {MoeLayer::Chunks{1, 1}, MoeLayer::Chunks{3, 2}}) {
    MoeLayer::Saved first, again;
    EXPECT_EQ(fixture.ArrangeTwice(chunks, &first, &again), std::pair(int64_t{1}, int64_t{0}));
    for (const auto tensor : {&MoeLayer::Saved::slot, &MoeLayer::Saved::token, &MoeLayer::Saved::offset}) {
      ExpectSameBits(kHost(again.*tensor, *stream), kHost(first.*tensor, *stream), "order of rows");
    }
    EXPECT_EQ(again.routed.rows, first.routed.rows);
  }
}

// What a rank of several does for its own rows, too.
TEST(PinnedDeviceMoe, CountsComeToTheHostAndSharesGoBack) {
  if (kernels::testing::OnRealDevice()) GTEST_SKIP() << "copies are counted by the fake device";
  const std::unique_ptr<Stream> stream = TestStream();
  Fixture fixture(ConfigOf(RouterKind::kTopK), DType::kF32, *stream, Numerics::kPinned);
  ASSERT_EQ(stream->Wait(), absl::OkStatus());
  const int64_t copies = FakeDevice::Current().Calls("copy"), waits = TestDevice().waits().waits;
  ASSERT_EQ(fixture.Arrange(), absl::OkStatus());
  EXPECT_EQ(FakeDevice::Current().Calls("copy") - copies, 2);
  EXPECT_EQ(TestDevice().waits().waits - waits, 1);
  ASSERT_EQ(stream->Wait(), absl::OkStatus());
}

TEST(PinnedDeviceMoe, AnErrorOfTheDeviceIsMetWhereRowsArePlanned) {
  if (kernels::testing::OnRealDevice()) GTEST_SKIP() << "makes calls of the fake device fail";
  const std::unique_ptr<Stream> stream = TestStream();
  Fixture fixture(ConfigOf(RouterKind::kTopK), DType::kF32, *stream, Numerics::kPinned);
  ASSERT_EQ(fixture.Arrange(), absl::OkStatus());
  ASSERT_EQ(stream->Wait(), absl::OkStatus());
  FakeDevice::Current().FailCall("kernel", 1, DeviceResult::Code::kFailed, "an illegal address was met");
  EXPECT_THAT(std::string(fixture.Arrange().message()), testing::HasSubstr("an illegal address was met"));
}

TEST(DeviceMatrixList, WhatAGraphUploadsIsNotKept) {
  const std::unique_ptr<Stream> stream = TestStream();
  const std::vector<Tensor> matrices = {Zeros({2, 3}, DType::kF32, *stream)};
  KeptMatrixList kept;
  ASSERT_EQ(stream->BeginCapture(), absl::OkStatus());
  (void)kept.Of(matrices, *stream);
  EXPECT_EQ(stream->EndCapture().status(), absl::OkStatus());  // Never launched.
  const Tensor list = kept.Of(matrices, *stream);
  EXPECT_EQ(kHost(list, *stream).data<int64_t>()[0], reinterpret_cast<int64_t>(matrices[0].raw()));
  ASSERT_EQ(stream->BeginCapture(), absl::OkStatus());
  EXPECT_EQ(kept.Of(matrices, *stream).raw(), list.raw());
  EXPECT_EQ(stream->EndCapture().status(), absl::OkStatus());
}

TEST(RoutesOnStream, NotWithCapacitiesNorRanks) {
  ModelConfig config = ConfigOf(RouterKind::kSwitch);
  const ExpertContext alone{.topology = Topology::OneHost(1)};
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  EXPECT_TRUE(RoutesOnStream(config, alone, *stream));
  EXPECT_FALSE(RoutesOnStream(config, alone, cpu));
  EXPECT_FALSE(RoutesOnStream(config, {.topology = Topology::OneHost(2)}, *stream));
  config.capacity_factor = 1;
  EXPECT_FALSE(RoutesOnStream(config, alone, *stream));
}

}  // namespace
}  // namespace shoal
