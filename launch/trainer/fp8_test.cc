// Training with train.matmul: fp8: what it computes does not depend on where, and it is not far from bf16.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "launch/trainer/session.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using kernels::testing::TestDevice;

constexpr int64_t kRows = 4, kSeq = 8, kSteps = 5;

struct Variant {
  std::string matmul = "fp8", dense = "replicated";
  int expert = 1, parts = 1;
  bool on_device = false, graphs = false, recompute = false;
};

// Widths beside and above a block of 128.
Config ConfigOf(const Variant& variant) {
  Config config;
  Model& model = *config.mutable_model();
  model.set_hidden_size(48);
  model.set_num_attention_heads(2);
  model.set_num_hidden_layers(2);
  model.set_intermediate_size(136);
  model.set_shared_intermediate_size(128);
  model.set_num_local_experts(4);
  model.add_dense_layers(1);
  config.mutable_parallel()->set_dense(variant.dense);
  config.mutable_parallel()->set_expert(variant.expert);
  Train& train = *config.mutable_train();
  train.set_precision("bf16");
  train.set_matmul(variant.matmul);
  train.set_seq_length(kSeq);
  train.set_global_batch_size(kRows);
  train.set_gradient_accumulation_steps(variant.parts);
  train.set_recompute(variant.recompute);
  StepSchedule& schedule = *config.mutable_schedule();
  schedule.set_chunks_forward(1);
  schedule.set_chunks_backward(1);
  schedule.set_waves(1);
  schedule.set_gradient_slices("plain");
  schedule.set_device_graphs(variant.graphs ? "auto" : "off");
  ResolveConfig(&config);
  return config;
}

std::vector<double> Train(const Variant& variant, int ranks) {
  std::vector<double> losses(kSteps);
  RunRanks(ranks, "auto", [&](Communicator& world) {
    const Config config = ConfigOf(variant);
    auto created = RankModel::Create(config, ModelConfigOf(config), world, {.device = variant.on_device ? &TestDevice() : nullptr});
    ASSERT_TRUE(created.ok()) << created.status();
    RankModel& model = **created;
    ASSERT_EQ(LoadWeights({.seed = 4}, model), absl::OkStatus());
    for (int64_t step = 0; step < kSteps; ++step) {
      std::vector<Tensor> tokens;
      const int64_t rows = kRows / variant.parts;
      const Range mine = model.RowsOf(rows);
      for (int part = 0; part < variant.parts; ++part) {
        const Tensor own = Empty({mine.count, kSeq + 1}, DType::kI32);
        for (int64_t i = 0; i < own.elements(); ++i) {
          const int64_t place = (part * rows + mine.begin) * (kSeq + 1) + i;
          own.data<int32_t>()[i] = static_cast<int32_t>((97 * place + 31 * step) % 256);
        }
        tokens.push_back(own);
      }
      const absl::StatusOr<StepResult> result = model.Train(tokens, 1e-3, step + 1);
      ASSERT_TRUE(result.ok()) << result.status();
      if (world.index() == 0) losses[static_cast<size_t>(step)] = result->loss;
    }
  });
  return losses;
}

// The first losses differ in the order of sums alone, on a GPU by the bits that its tensor cores drop of them; later ones also in roundings
// to bf16, and to fp8, of numbers that differ so.
void ExpectNear(const std::vector<double>& got, const std::vector<double>& want) {
  const double first = kernels::testing::OnRealDevice() ? 1e-3 : 1e-4;
  for (size_t step = 0; step < kSteps; ++step) {
    EXPECT_NEAR(got[step], want[step], (step == 0 ? first : 5e-3) * want[step]) << step;
  }
}

TEST(Fp8Training, IsNearBf16ButNotTheSame) {
  const std::vector<double> bf16 = Train({.matmul = "same"}, 1), fp8 = Train({}, 1);
  EXPECT_GT(std::abs(fp8[0] - bf16[0]), 1e-6);
  for (size_t step = 0; step < kSteps; ++step) EXPECT_NEAR(fp8[step], bf16[step], 0.02 * bf16[step]) << step;
}

TEST(Fp8Training, RanksAndTheirPlacementMakeNoDifference) {
  const std::vector<double> alone = Train({}, 1);
  ExpectNear(Train({}, 2), alone);
  ExpectNear(Train({.expert = 2}, 2), alone);
  ExpectNear(Train({.dense = "sharded", .recompute = true}, 2), alone);
  ExpectNear(Train({.parts = 2}, 1), alone);
}

TEST(Fp8Training, ADeviceMakesNoDifference) {
  const std::vector<double> processor = Train({}, 1), device = Train({.on_device = true}, 1);
  ExpectNear(device, processor);
  EXPECT_EQ(Train({.on_device = true, .graphs = true}, 1), device);  // Steps that are recorded quantise weights too.
  ExpectNear(Train({.expert = 2, .on_device = true}, 2), processor);
}

}  // namespace
}  // namespace shoal
