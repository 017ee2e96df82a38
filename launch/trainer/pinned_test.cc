// Training with train.numerics: pinned has the same bits wherever experts are.
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "launch/trainer/session.h"
#include "parallel/expert/testing.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

constexpr int kRanks = 4, kSteps = 5;
constexpr int64_t kSeq = 40;

struct Case {
  std::string name;
  int expert = -1;  // Ranks of a group of experts; 0: sparse.
  int copies = 2, overlap = 2, reshard = 0;
  bool rematerialise = false, water_fill = false;
  std::string owners = "hecate", transport = "auto";
  int ranks_per_host = kRanks;
  bool calibrate = false;  // Copies that no step expected, wherever there is room.
};

// What all runs of a comparison have in common.
struct Model {
  std::string numerics = "pinned", precision = "fp32", router = "topk";
  int parts = 1;
  bool recompute = false, sharded = false, slices = true;
  bool on_device = false;  // TestDevice(): less work, because it may be emulated.

  int steps() const { return on_device ? 2 : kSteps; }
  int batch() const { return on_device ? 6 : 18; }  // Uneven over four ranks.
};

Config ConfigOf(const Case& c, const Model& m) {
  Config config;
  auto& model = *config.mutable_model();
  model.set_hidden_size(48);
  model.set_num_attention_heads(2);
  model.set_num_key_value_heads(1);
  model.set_num_hidden_layers(3);
  model.add_dense_layers(1);
  model.set_intermediate_size(40);
  model.set_num_local_experts(6);
  model.set_router(m.router);
  if (m.router == "gshard" || m.router == "expert_choice") model.set_capacity_factor(1.5);
  if (m.router == "sigmoid_bias") model.set_shared_intermediate_size(24);
  Train& train = *config.mutable_train();
  train.set_seq_length(kSeq);
  train.set_global_batch_size(m.batch());
  train.set_gradient_accumulation_steps(m.parts);
  train.set_precision(m.precision);
  train.set_recompute(m.recompute);
  train.set_numerics(m.numerics);
  config.mutable_optimizer()->set_lr(1e-2);
  Parallel& parallel = *config.mutable_parallel();
  parallel.set_dense(m.sharded ? "sharded" : "replicated");
  parallel.set_dispatch(c.water_fill ? "water_fill" : "nearest");
  parallel.set_rematerialise(c.rematerialise);
  parallel.set_expert(c.expert == 0 ? 1 : c.expert);
  parallel.set_experts(c.expert == 0 ? "sparse" : "grouped");
  parallel.set_expert_copies(c.copies);
  parallel.set_expert_overlap(c.overlap);
  parallel.set_reshard_interval(c.reshard);
  parallel.set_owners(c.owners);
  // Alike with fast numerics, so that it is not the schedule that makes the difference.
  StepSchedule& schedule = *config.mutable_schedule();
  schedule.set_chunks_forward(1);
  schedule.set_chunks_backward(1);
  schedule.set_waves(1);
  schedule.set_gradient_slices(m.slices ? "auto" : "plain");
  ResolveConfig(&config);
  return config;
}

// All that ranks own, by name, and what every rank is told.
struct Run {
  std::map<std::string, std::vector<float>> values;
  std::vector<double> numbers;
  double hottest = 0, copies = 0;  // Of the steps, the most.
  int64_t owner_moves = 0, finite = 0;
};

class Recorder {
 public:
  void Add(const std::string& prefix, const OwnedPart& part, const Tensor& there, Stream& stream) {
    const Tensor tensor = ToHost(there, stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<float>& to = run.values[prefix + part.name];
    const int64_t all = ElementCount(part.full_shape);
    to.resize(static_cast<size_t>(all));
    std::memcpy(to.data() + part.row_begin * (all / part.full_shape[0]), tensor.raw(), static_cast<size_t>(tensor.bytes()));
  }
  Run run;

 private:
  std::mutex mutex_;
};

// Half of all first choices are experts 0 and 1: tokens score them high with opposite signs.
void SkewRouters(RankModel& model) {
  for (const OwnedPart& part : model.store().owned()) {
    if (!absl::StrContains(part.name, "gate.weight") || part.full_shape[0] != 6) continue;
    const int64_t width = part.full_shape[1];
    const Tensor master = ToHost(part.master, model.stream());
    for (int64_t row = part.row_begin; row < part.row_begin + part.master.dim(0); ++row) {
      for (int64_t i = 0; i < width; ++i) {
        const float far = (i % 3 == 0 ? 0.5f : -0.3f) * (row == 0 ? 1.0f : -1.0f);
        if (row < 2) master.data<float>()[(row - part.row_begin) * width + i] = far;
      }
    }
    if (model.stream().device() != nullptr) Copy(master, part.master, model.stream());
  }
}

void TrainOneRank(const Case& c, const Model& m, Communicator& world, Recorder* recorder) {
  const Config config = ConfigOf(c, m);
  RankModel::Options options{.host = world.index() / c.ranks_per_host,
                             .device = m.on_device ? &kernels::testing::TestDevice() : nullptr};
  if (c.calibrate) {
    options.calibrate = [&](const ExpertPlacement& planned, absl::Span<const int64_t> counts) {
      return expert_testing::AddCopies(planned, counts, kRanks, c.copies);
    };
  }
  const auto model = RankModel::Create(config, ModelConfigOf(config), world, options);
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_TRUE(LoadWeights({.seed = 7}, **model).ok());
  SkewRouters(**model);
  ASSERT_TRUE((*model)->store().GatherWeights((*model)->stream()).ok());
  const int64_t rows = config.train().global_batch_size() / m.parts;
  const Range mine = (*model)->RowsOf(rows);
  for (int step = 0; step < m.steps(); ++step) {
    std::vector<Tensor> parts;
    for (int64_t part = 0; part < m.parts; ++part) {
      parts.push_back(Empty({mine.count, kSeq + 1}, DType::kI32));
      for (int64_t i = 0; i < parts.back().elements(); ++i) {
        const int64_t row = part * rows + mine.begin + i / (kSeq + 1), column = i % (kSeq + 1);
        parts.back().data<int32_t>()[i] = static_cast<int32_t>((row * row * 71 + column * column * 13 + step * column) % 256);
      }
    }
    const auto record_gradients = [&](const ParameterStore& store) {
      for (const OwnedPart& part : store.owned()) {
        recorder->Add(absl::StrCat("step ", step, " gradient "), part, part.gradient, (*model)->stream());
      }
    };
    const auto result = (*model)->Train(parts, 1e-2, step + 1, record_gradients);
    ASSERT_TRUE(result.ok()) << result.status();
    if (world.index() != 0) continue;
    Run& run = recorder->run;
    run.finite += result->finite ? 1 : 0;
    if (result->experts.has_value()) {
      run.hottest = std::max(run.hottest, result->experts->hottest_expert);
      run.copies = std::max(run.copies, result->experts->copies_per_layer);
      run.owner_moves += result->experts->owner_moves;
    }
    for (double number : {result->loss, result->cross_entropy, result->aux, result->z, result->seq_aux, result->grad_norm}) {
      run.numbers.push_back(number);
    }
    for (const auto& layer : result->expert_counts) run.numbers.insert(run.numbers.end(), layer.begin(), layer.end());
  }
  for (const OwnedPart& part : (*model)->store().owned()) {
    recorder->Add("weight ", part, part.master, (*model)->stream());
    recorder->Add("first moment ", part, part.exp_avg, (*model)->stream());
    recorder->Add("second moment ", part, part.exp_avg_sq, (*model)->stream());
  }
  const auto loss = (*model)->Evaluate(Zeros({mine.count, kSeq + 1}, DType::kI32), rows);
  ASSERT_TRUE(loss.ok()) << loss.status();
  if (world.index() == 0) recorder->run.numbers.push_back(*loss);
}

Run TrainAll(const Case& c, const Model& m) {
  Recorder recorder;
  RunRanks(kRanks, c.transport, [&](Communicator& world) { TrainOneRank(c, m, world, &recorder); });
  return std::move(recorder.run);
}

// Names of what differs, "" for none.
std::string Differences(const Run& a, const Run& b) {
  std::string names = a.numbers == b.numbers ? "" : "losses;";
  if (a.values.size() != b.values.size()) return "other tensors";
  for (const auto& [name, values] : a.values) {
    const auto found = b.values.find(name);
    const bool same = found != b.values.end() && found->second.size() == values.size() &&
                      std::memcmp(found->second.data(), values.data(), values.size() * sizeof(float)) == 0;
    if (!same) names += " " + name + ";";
  }
  return names;
}

std::vector<Case> Placements() {
  return {{.name = "groups of two", .expert = 2},
          {.name = "data parallel", .expert = 1},
          {.name = "hosts", .ranks_per_host = 2},
          {.name = "TCP", .transport = "tcp"},
          {.name = "sparse without copies", .expert = 0, .copies = 0, .overlap = 0},
          {.name = "sparse", .expert = 0},
          {.name = "sparse on hosts over TCP", .expert = 0, .transport = "tcp", .ranks_per_host = 2},
          {.name = "sparse, all copied", .expert = 0, .copies = 6, .overlap = 6},
          {.name = "sparse, by cost", .expert = 0, .copies = 3, .overlap = -1},
          {.name = "moving owners", .expert = 0, .overlap = 1, .reshard = 2, .owners = "eplb"},
          {.name = "moving owners on hosts, rematerialised", .expert = 0, .reshard = 2, .rematerialise = true,
           .owners = "eplb", .ranks_per_host = 2},
          {.name = "filling", .expert = 0, .copies = 1, .overlap = 3, .water_fill = true},
          {.name = "filling, rematerialised, tuned owners", .expert = 0, .reshard = 2, .rematerialise = true, .water_fill = true,
           .owners = "tuned"},
          {.name = "calibrated", .expert = 0, .copies = 3, .overlap = 0, .calibrate = true},
          {.name = "calibrated, filling, moving owners on hosts, rematerialised", .expert = 0, .copies = 4, .overlap = 1, .reshard = 2,
           .rematerialise = true, .water_fill = true, .owners = "eplb", .ranks_per_host = 2, .calibrate = true}};
}

void ExpectSameBits(const Model& m, const std::vector<Case>& cases) {
  const Run plain = TrainAll({.name = "plain"}, m);
  ASSERT_EQ(plain.finite, m.steps());
  const bool skewed = m.router != "expert_choice";  // There every expert has as many rows; a capacity cuts those of busy ones.
  EXPECT_GT(plain.hottest, !skewed ? 0.99 : m.router == "gshard" ? 1.3 : 1.8) << "rows over their mean: routers are not skewed";
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    const Run run = TrainAll(c, m);
    EXPECT_EQ(Differences(plain, run), "");
    if (skewed && c.expert == 0 && (c.overlap > 0 || c.calibrate)) {
      EXPECT_GT(run.copies, 0);
    }
    if (skewed && c.reshard > 0) {
      // Tuned owners move where measured times say that it pays, and those of a few steps on a busy machine may not.
      int64_t moves = run.owner_moves;
      for (int again = 0; moves == 0 && again < 9; ++again) {
        const Run another = TrainAll(c, m);
        EXPECT_EQ(Differences(plain, another), "");
        moves = another.owner_moves;
      }
      EXPECT_GT(moves, 0);
    }
  }
}

TEST(Pinned, SameBitsWhereverExpertsAre) { ExpectSameBits({}, Placements()); }

TEST(Pinned, SameBitsInBf16) { ExpectSameBits({.precision = "bf16"}, Placements()); }

TEST(Pinned, SameBitsWithParts) { ExpectSameBits({.parts = 3}, Placements()); }

TEST(Pinned, SameBitsRecomputedAndSharded) {
  ExpectSameBits({.precision = "bf16", .parts = 2, .recompute = true, .sharded = true},
                 {{.name = "data parallel", .expert = 1},
                  {.name = "sparse", .expert = 0, .reshard = 2, .owners = "eplb", .ranks_per_host = 2},
                  {.name = "filling, rematerialised", .expert = 0, .copies = 1, .rematerialise = true, .water_fill = true},
                  {.name = "calibrated", .expert = 0, .copies = 3, .overlap = 1, .calibrate = true}});
}

TEST(Pinned, SameBitsWithOtherRouters) {
  for (const char* router : {"gshard", "sigmoid_bias", "expert_choice"}) {
    SCOPED_TRACE(router);
    Model m{.router = router};
    ExpectSameBits(m, {{.name = "data parallel", .expert = 1},
                       {.name = "sparse", .expert = 0, .reshard = 2, .water_fill = true, .owners = "eplb", .ranks_per_host = 2}});
  }
}

TEST(Pinned, DenseLayersShardedAreTheSameBitsWithOnePart) {
  EXPECT_EQ(Differences(TrainAll({}, {}), TrainAll({}, {.recompute = true, .sharded = true, .slices = false})), "");
}

TEST(Pinned, SameBitsOnADevice) {
  ExpectSameBits({.on_device = true},
                 {{.name = "data parallel", .expert = 1},
                  {.name = "sparse on hosts", .expert = 0, .copies = 3, .reshard = 1, .owners = "eplb", .ranks_per_host = 2}});
  ExpectSameBits({.precision = "bf16", .parts = 2, .on_device = true},
                 {{.name = "filling, rematerialised", .expert = 0, .copies = 1, .rematerialise = true, .water_fill = true}});
}

// One rank routes on the host too: partials of its rows are products of their own.
TEST(Pinned, OneRankOnADeviceRepeatsItself) {
  const Model m{.on_device = true};
  const auto train = [&] {
    Recorder recorder;
    RunRanks(1, "auto", [&](Communicator& world) { TrainOneRank({.name = "alone"}, m, world, &recorder); });
    return std::move(recorder.run);
  };
  EXPECT_EQ(Differences(train(), train()), "");
}

TEST(Fast, OtherBitsWhereExpertsAreElsewhere) {
  const Model fast{.numerics = "fast", .slices = false};
  EXPECT_EQ(Differences(TrainAll({}, fast), TrainAll({.expert = 0}, fast)).substr(0, 6), "losses");
}

}  // namespace
}  // namespace shoal
