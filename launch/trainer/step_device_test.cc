// What the host of a device waits for in a step, and steps recorded as graphs: on TestDevice(), emulated or a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "launch/trainer/session.h"
#include "launch/trainer/testing.h"
#include "runtime/device/fake_device.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using kernels::testing::OnRealDevice;
using kernels::testing::TestDevice;

constexpr int64_t kRows = 4, kSeq = 8;

Config SmallConfig(const std::string& router, bool graphs) {
  Config config = testing::TinyConfig(kRows, kSeq);
  Model& model = *config.mutable_model();
  const bool fp8 = router == "fp8";  // Weights are quantised once a pass, which a recorded step must do as often.
  config.mutable_train()->set_precision(fp8 ? "bf16" : "fp32");
  config.mutable_train()->set_matmul(fp8 ? "fp8" : "same");
  model.set_router(router == "none" || fp8 ? "topk" : router);
  if (router == "none") {
    for (int layer = 0; layer < 2; ++layer) model.add_dense_layers(layer);
    model.set_aux_loss("none");
  } else if (router == "sigmoid_bias") {
    model.set_seq_aux_loss_coef(0.01);
    model.set_bias_update_rate(0.5);  // Moves choices from one step to the next.
    model.set_shared_intermediate_size(16);
  } else {
    model.set_router_z_loss_coef(0.01);
  }
  config.mutable_schedule()->set_gradient_slices("plain");
  config.mutable_schedule()->set_device_graphs(graphs ? "auto" : "off");
  return config;
}

std::unique_ptr<RankModel> NewModel(Config config, Communicator& world, Device* device = &TestDevice()) {
  ResolveConfig(&config);
  auto model = RankModel::Create(config, ModelConfigOf(config), world, {.device = device});
  SHOAL_CHECK(model.ok()) << model.status().ToString();
  const absl::Status loaded = LoadWeights({.seed = 4}, **model);
  SHOAL_CHECK(loaded.ok()) << loaded.ToString();
  return *std::move(model);
}

Tensor TokensOf(int64_t step, int64_t begin, int64_t rows) {
  const Tensor tokens = Empty({rows, kSeq + 1}, DType::kI32);
  for (int64_t i = 0; i < tokens.elements(); ++i) {
    tokens.data<int32_t>()[i] = static_cast<int32_t>((97 * (i + begin * (kSeq + 1)) + 31 * step) % 256);
  }
  return tokens;
}

absl::StatusOr<StepResult> Train(int64_t step, RankModel& model, int parts = 1) {
  std::vector<Tensor> tokens;
  const Range mine = model.RowsOf(kRows / parts);
  for (int part = 0; part < parts; ++part) tokens.push_back(TokensOf(step, part * kRows / parts + mine.begin, mine.count));
  return model.Train(tokens, 1e-2 / static_cast<double>(step + 1), step + 1);
}

StepResult TrainOne(int64_t step, RankModel& model, int parts = 1) {
  absl::StatusOr<StepResult> result = Train(step, model, parts);
  SHOAL_CHECK(result.ok()) << result.status().ToString();
  return *std::move(result);
}

std::vector<Tensor> StateOf(RankModel& model) {
  std::vector<Tensor> state;
  for (const OwnedPart& part : model.store().owned()) {
    for (const Tensor& tensor : {part.master, part.exp_avg, part.exp_avg_sq}) state.push_back(ToHost(tensor, model.stream()));
  }
  return state;
}

int64_t TensorsThatDiffer(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  int64_t differ = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    differ += std::memcmp(a[i].raw(), b[i].raw(), static_cast<size_t>(a[i].bytes())) != 0;
  }
  return differ;
}

// All that makes the host wait, also where nobody asked for it: allocations, copies of memory that is not pinned.
int64_t Waits() {
  const DeviceWaits waits = TestDevice().waits();
  return OnRealDevice() ? waits.waits + waits.allocations : FakeDevice::Current().Waits();
}
int64_t Launches() { return OnRealDevice() ? 0 : FakeDevice::Current().Calls("launch_graph"); }

// With the first wait at its end, the host has put all of the step's work there before: it can be a step ahead.
TEST(DeviceStep, OfOneRankWaitsOnceAndAllocatesNothing) {
  RunRanks(1, "auto", [](Communicator& world) {
    for (const char* router : {"topk", "sigmoid_bias"}) {
      for (const bool graphs : {false, true}) {
        SCOPED_TRACE(std::string(router) + (graphs ? " as graphs" : ""));
        const auto model = NewModel(SmallConfig(router, graphs), world);
        for (int64_t step = 0; step < 5; ++step) {
          const int64_t waits_before = TestDevice().waits().waits, before = Waits();
          TrainOne(step, *model);
          EXPECT_EQ(TestDevice().waits().waits - waits_before, 1) << step;
          if (step >= 2) {
            EXPECT_EQ(Waits() - before, 1) << step;
          }
        }
      }
    }
  });
}

// Where a rank of two waits for its device, by what the graph says: a task of communication for what it sends (once for each lane of
// streams that it depends on), rows on their way for their copies before and behind the exchange, routers once for choices and sums, which
// the other rank needs, and the step for its end. The group of ranks that read each other's memory waits at most once in each operation:
// for what it reads, if that is anything.
TEST(DeviceStep, OfTwoRanksWaitsForWhatTheOtherOneNeeds) {
  if (OnRealDevice()) GTEST_SKIP() << "there, ranks that read each other's memory are processes of their own";
  setenv("SHOAL_DEVICE_GROUP", "peers", 1);
  RunRanks(2, "auto", [](Communicator& world) {
    Config config = SmallConfig("topk", /*graphs=*/true);
    config.mutable_parallel()->set_expert(2);
    const auto model = NewModel(config, world);
    int64_t own = 1, operations = 0;
    for (const Task& task : model->graph().tasks) {
      if (task.lane == Lane::kCompute && task.op == Op::kRoute && task.phase == Phase::kForward) own += 1;
      if (task.lane == Lane::kCompute || task.lane == Lane::kCopy) continue;
      std::set<Lane> streams;
      for (const int before : task.after) {
        const Lane lane = model->graph().tasks[static_cast<size_t>(before)].lane;
        if (lane == Lane::kCompute || lane == Lane::kCopy) streams.insert(lane);
      }
      own += static_cast<int64_t>(streams.size());
      if (task.op == Op::kDispatch || task.op == Op::kReturn) own += 2;
      if (task.lane == Lane::kIntra) ++operations;
    }
    for (int64_t step = 0; step < 5; ++step) {
      // Between barriers nobody waits for the device.
      ASSERT_TRUE(world.Barrier({.label = "before"}).Await().ok());
      const DeviceWaits before = TestDevice().waits();
      ASSERT_TRUE(world.Barrier({.label = "begin"}).Await().ok());
      TrainOne(step, *model);
      ASSERT_TRUE(world.Barrier({.label = "end"}).Await().ok());
      const int64_t waits = TestDevice().waits().waits - before.waits;
      if (step < 3) continue;  // Buffers for rows grow.
      EXPECT_GE(waits, 2 * own) << step;
      EXPECT_LE(waits, 2 * (own + operations)) << step;
    }
  });
  unsetenv("SHOAL_DEVICE_GROUP");
}

// Also behind evaluations, and behind steps in which somebody looks at the gradients, which run as they did before.
class RecordedDeviceStep : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Routers, RecordedDeviceStep, ::testing::Values("topk", "sigmoid_bias", "none", "fp8"),
                         [](const auto& info) { return info.param; });

TEST_P(RecordedDeviceStep, HasTheBitsOfOneThatIsNot) {
  RunRanks(1, "auto", [](Communicator& world) {
    for (const int parts : {1, 2}) {
      if (parts == 2 && GetParam() == "fp8") continue;  // Slow on the emulator.
      SCOPED_TRACE(parts);
      Config plain = SmallConfig(GetParam(), /*graphs=*/false), graphs = SmallConfig(GetParam(), /*graphs=*/true);
      for (Config* config : {&plain, &graphs}) config->mutable_train()->set_gradient_accumulation_steps(parts);
      const auto want = NewModel(plain, world), got = NewModel(graphs, world);
      const int64_t launched = Launches();
      for (int64_t step = 0; step < 5; ++step) {
        const StepResult a = TrainOne(step, *want, parts), b = TrainOne(step, *got, parts);
        EXPECT_EQ(a.loss, b.loss) << step;
        EXPECT_EQ(a.grad_norm, b.grad_norm) << step;
        EXPECT_EQ(a.aux, b.aux);
        EXPECT_EQ(a.z, b.z);
        EXPECT_EQ(a.seq_aux, b.seq_aux);
        EXPECT_EQ(a.expert_counts, b.expert_counts);
        if (step == 2) {
          EXPECT_EQ(*want->Evaluate(TokensOf(9, 0, 3), 3), *got->Evaluate(TokensOf(9, 0, 3), 3));
        }
      }
      EXPECT_EQ(TensorsThatDiffer(StateOf(*want), StateOf(*got)), 0);
      EXPECT_EQ(Launches() - launched, OnRealDevice() ? 0 : 4) << "all steps but the first";
    }
  });
}

TEST(DeviceStep, OfAnotherShapeIsRunAndThenRecordedAnew) {
  if (OnRealDevice()) GTEST_SKIP() << "counts calls of the fake device";
  RunRanks(1, "auto", [](Communicator& world) {
    const auto model = NewModel(SmallConfig("topk", /*graphs=*/true), world);
    const auto other = NewModel(SmallConfig("topk", /*graphs=*/false), world);
    const auto step = [&](int64_t number, int64_t rows, int64_t launches) {
      const int64_t launched = Launches();
      std::vector<double> losses;
      for (RankModel* one : {model.get(), other.get()}) {
        const auto result = one->Train({TokensOf(number, 0, rows)}, 1e-2, number + 1);
        ASSERT_TRUE(result.ok()) << result.status();
        losses.push_back(result->loss);
      }
      EXPECT_EQ(Launches() - launched, launches) << number;
      EXPECT_EQ(losses[0], losses[1]) << number;
    };
    step(0, 4, 0);
    step(1, 4, 1);
    step(2, 3, 0);
    step(3, 3, 1);
    step(4, 3, 1);
    const int64_t launched = Launches();
    int64_t seen = 0;
    const auto result = model->Train({TokensOf(5, 0, 3)}, 1e-2, 6, [&](const ParameterStore& store) {
      seen = static_cast<int64_t>(store.owned().size());
    });
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_GT(seen, 0);
    EXPECT_EQ(Launches(), launched) << "gradients are looked at by the host";
  });
}

TEST(DeviceStep, ThatCannotBeRecordedRunsAllTheSame) {
  if (OnRealDevice()) GTEST_SKIP() << "makes calls of the fake device fail";
  RunRanks(1, "auto", [](Communicator& world) {
    const auto want = NewModel(SmallConfig("topk", /*graphs=*/false), world);
    const auto got = NewModel(SmallConfig("topk", /*graphs=*/true), world);
    for (int64_t step = 0; step < 4; ++step) {
      const double loss = TrainOne(step, *want).loss;
      if (step == 1) FakeDevice::Current().FailCall("end_capture", 1, DeviceResult::Code::kFailed, "no graphs here");
      EXPECT_EQ(TrainOne(step, *got).loss, loss) << step;
    }
    EXPECT_EQ(TensorsThatDiffer(StateOf(*want), StateOf(*got)), 0);
  });
}

// By the device alone where there is one rank, by the host where there are two.
TEST(DeviceStep, ThatIsNotFiniteChangesNothing) {
  for (const int ranks : {1, 2}) {
    for (const bool graphs : {false, true}) {
      RunRanks(ranks, "auto", [&](Communicator& world) {
        const auto model = NewModel(SmallConfig("topk", graphs), world);
        for (int64_t step = 0; step < 3; ++step) EXPECT_TRUE(TrainOne(step, *model).finite);
        for (const OwnedPart& part : model->store().owned()) {
          if (part.name != "model.norm.weight") continue;
          const Tensor bad = ToHost(part.master, model->stream());
          bad.data<float>()[0] = std::numeric_limits<float>::quiet_NaN();
          Copy(bad, part.master, model->stream());
        }
        ASSERT_TRUE(model->store().GatherWeights(model->stream()).ok());
        const std::vector<Tensor> before = StateOf(*model);
        const StepResult result = TrainOne(3, *model);
        EXPECT_FALSE(result.finite);
        EXPECT_TRUE(std::isnan(result.loss));
        EXPECT_EQ(TensorsThatDiffer(StateOf(*model), before), 0);
      });
    }
  }
}

TEST(DeviceStep, TimesOfTasksAreInTheirOrder) {
  RunRanks(1, "auto", [](Communicator& world) {
    for (const bool graphs : {false, true}) {
      const auto model = NewModel(SmallConfig("topk", graphs), world);
      for (int64_t step = 0; step < 3; ++step) {
        const StepResult result = TrainOne(step, *model);
        const StepRecord& record = model->record();
        ASSERT_EQ(record.tasks.size(), model->graph().tasks.size());
        int64_t last = record.begin_ns;
        for (const TaskRecord& task : record.tasks) {
          EXPECT_GE(task.begin_ns, last);
          EXPECT_GE(task.end_ns, task.begin_ns);
          last = task.end_ns;
        }
        EXPECT_GE(record.end_ns, last);
        EXPECT_GT(result.forward_seconds, 0);
        EXPECT_GT(result.backward_seconds, 0);
        EXPECT_GT(record.tasks[0].units, 0);
      }
    }
  });
}

TEST(DeviceStep, EndsWithTheNameOfTheTaskThatPoisonedItsStream) {
  if (OnRealDevice()) GTEST_SKIP() << "makes calls of the fake device fail";
  RunRanks(1, "auto", [](Communicator& world) {
    const auto model = NewModel(SmallConfig("topk", /*graphs=*/false), world);
    TrainOne(0, *model);
    FakeDevice::Current().FailCall("fill", 1, DeviceResult::Code::kFailed, "the bus fell off");
    const std::string message(Train(1, *model).status().message());
    EXPECT_THAT(message, HasSubstr("the bus fell off"));
    EXPECT_THAT(message, AnyOf(HasSubstr("(part 0)"), HasSubstr("embed"), HasSubstr("head"))) << "a task";
    EXPECT_FALSE(Train(2, *model).ok()) << "the stream stays poisoned";
  });
}

// What fails on the device alone is met by the wait at the end: no update has come out of it.
TEST(DeviceStep, EndsWithTheCauseWhereWorkFails) {
  if (OnRealDevice()) GTEST_SKIP() << "makes calls of the fake device fail";
  RunRanks(1, "auto", [](Communicator& world) {
    const auto model = NewModel(SmallConfig("topk", /*graphs=*/false), world);
    TrainOne(0, *model);
    FakeDevice::Current().FailCall("kernel", 20, DeviceResult::Code::kFailed, "an illegal address was met");
    const std::string message(Train(1, *model).status().message());
    EXPECT_THAT(message, HasSubstr("an illegal address was met"));
  });
}

}  // namespace
}  // namespace shoal
