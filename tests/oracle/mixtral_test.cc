// Whole training runs against an independent implementation in PyTorch: its golden files are beside this file.
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>

#include "gtest/gtest.h"
#include "launch/trainer/schedule.h"
#include "launch/trainer/step.h"
#include "models/data/batches.h"
#include "nlohmann/json.hpp"
#include "parallel/expert/testing.h"
#include "runtime/files/safetensors.h"
#include "runtime/kernels/cuda/device_testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using nlohmann::json;

// From tests/oracle/README.md: a correct fp32 implementation stays below this.
constexpr double kTolerance = 5e-6;
// Gradient norms of later steps are more sensitive: two kernels of the reference differed by 7e-5.
constexpr double kNormTolerance = 3e-4;
// The auxiliary loss enters the loss with a coefficient of 0.01 or 0.02, and is that much more sensitive.
constexpr double kAuxTolerance = 5e-5;
// AdamW's first steps turn rounding of near-zero gradients into whole steps of single weights (measured against the
// reference in fp64: updates of a tensor differ by 1e-3, as those of the reference in fp32 do), so late in a run a router's
// near-tie may fall the other way. One such token moves the loss of 240 tokens by about 1e-5.
constexpr int64_t kFlipsMax = 2;
constexpr double kFlipTolerance = 5e-5;

// An emulated device takes about a second for each.
constexpr int64_t kEmulatedSteps = 2;

struct Case {
  std::string folder;
  std::string data = "batches";  // Or "text".
  int ranks = 1;
  int expert = 1;
  int accumulation = 1;
  bool recompute = false;
  std::string transport = "auto";
  std::string dense = "replicated", experts = "grouped";
  int chunks = 0;  // 0: as chosen.
  int chunks_backward = -1;  // -1: as `chunks`.
  bool rematerialise = false;
  int prefetch = 1;
  int ranks_per_host = 0;  // 0: one host.
  int waves = 1;
  bool apart = false;  // Waves in different layers.
  std::string owners = "hecate";
  int overlap = 2;  // -1: copies by cost.
  bool calibrate = false;  // Copies that no step expected, wherever there is room.
  bool pinned = false;
  bool device = false;  // TestDevice() computes. Only the first steps where it is emulated.
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.folder << "_" << c.data << "_" << c.ranks << "ranks_expert" << c.expert << "_accumulation" << c.accumulation
             << (c.recompute ? "_recompute" : "") << "_" << c.transport << (c.dense == "sharded" ? "_sharded" : "")
             << (c.experts == "sparse" ? "_sparse" : "") << (c.chunks > 0 ? absl::StrCat("_chunks", c.chunks) : "")
             << (c.chunks_backward >= 0 ? absl::StrCat("_backward", c.chunks_backward) : "")
             << (c.rematerialise ? "_rematerialise" : "") << (c.prefetch > 1 ? absl::StrCat("_prefetch", c.prefetch) : "")
             << (c.owners != "hecate" ? "_" + c.owners : "") << (c.overlap < 0 ? "_by_cost" : "") << (c.pinned ? "_pinned" : "")
             << (c.waves > 1 ? absl::StrCat("_waves", c.waves) : "") << (c.calibrate ? "_calibrated" : "") << (c.apart ? "_apart" : "")
             << (c.ranks_per_host > 0 ? absl::StrCat("_hosts_of_", c.ranks_per_host) : "") << (c.device ? "_device" : "");
}

// Of the sources, or of those that SHOAL_TEST_SOURCE names: for a build that was taken elsewhere.
std::string Folder(const std::string& name) {
  const char* const elsewhere = std::getenv("SHOAL_TEST_SOURCE");
  return absl::StrCat(elsewhere != nullptr ? elsewhere : SHOAL_SOURCE_DIR, "/tests/oracle/", name);
}

json ReadLog(const std::string& folder) {
  std::ifstream file(Folder(folder) + "/log.json");
  return json::parse(file);
}

Config ConfigOf(const Case& c, const json& log) {
  Config config;
  const json& model = log["model"];
  Model& to = *config.mutable_model();
  to.set_vocab_size(model["vocab_size"]);
  to.set_hidden_size(model["hidden_size"]);
  to.set_intermediate_size(model["intermediate_size"]);
  to.set_num_hidden_layers(model["num_hidden_layers"]);
  to.set_num_attention_heads(model["num_attention_heads"]);
  to.set_num_key_value_heads(model["num_key_value_heads"]);
  to.set_head_dim(model["head_dim"]);
  to.set_num_local_experts(model["num_local_experts"]);
  to.set_num_experts_per_tok(model["num_experts_per_tok"]);
  to.set_rms_norm_eps(model["rms_norm_eps"]);
  to.set_rope_theta(model["rope_theta"]);
  to.set_tie_word_embeddings(model["tie_word_embeddings"]);
  to.set_aux_loss(model["aux_loss"].get<std::string>());
  to.set_router_aux_loss_coef(model["router_aux_loss_coef"]);
  to.set_norm_topk_prob(model.value("norm_topk_prob", true));
  to.set_router_z_loss_coef(model.value("router_z_loss_coef", 0.0));
  to.set_router(model.value("router", "topk"));
  to.set_capacity_factor(model.value("capacity_factor", 0.0));
  to.set_routed_scaling_factor(model.value("routed_scaling_factor", 1.0));
  to.set_bias_update_rate(model.value("bias_update_rate", 0.001));
  to.set_seq_aux_loss_coef(model.value("seq_aux_loss_coef", 0.0));
  to.set_router_dim(model.value("router_dim", 0));
  to.set_router_temperature_init(model.value("router_temperature_init", 0.3));
  to.set_shared_intermediate_size(model.value("shared_intermediate_size", 0));
  const json& train = log["train"];
  config.mutable_optimizer()->set_lr(train["lr"]);
  config.mutable_optimizer()->set_beta1(train["beta1"]);
  config.mutable_optimizer()->set_beta2(train["beta2"]);
  config.mutable_optimizer()->set_eps(train["eps"]);
  config.mutable_optimizer()->set_weight_decay(train["weight_decay"]);
  config.mutable_optimizer()->set_clip_grad(train["clip"]);
  config.mutable_scheduler()->set_warmup_steps(train["warmup_steps"]);
  config.mutable_scheduler()->set_decay_steps(train["decay_steps"]);
  config.mutable_scheduler()->set_min_lr(train["min_lr"]);
  config.mutable_train()->set_global_batch_size(log["run"]["batch"]);
  config.mutable_train()->set_seq_length(log["run"]["seq"]);
  config.mutable_train()->set_gradient_accumulation_steps(c.accumulation);
  config.mutable_train()->set_recompute(c.recompute);
  config.mutable_train()->set_numerics(c.pinned ? "pinned" : "fast");
  config.mutable_train()->set_loss_chunk(50);
  config.mutable_parallel()->set_expert(c.expert);
  config.mutable_parallel()->set_dense(c.dense);
  config.mutable_parallel()->set_experts(c.experts);
  config.mutable_schedule()->set_chunks_forward(c.chunks);
  config.mutable_schedule()->set_chunks_backward(c.chunks_backward < 0 ? c.chunks : c.chunks_backward);
  config.mutable_schedule()->set_prefetch(c.prefetch);
  config.mutable_schedule()->set_waves(c.waves);
  config.mutable_schedule()->set_wave_order(c.apart ? "apart" : "auto");
  config.mutable_parallel()->set_rematerialise(c.rematerialise);
  // Copies from the second step on, other owners every few steps.
  config.mutable_parallel()->set_expert_overlap(c.overlap);
  config.mutable_parallel()->set_owners(c.owners);
  config.mutable_parallel()->set_expert_copies(2);
  config.mutable_parallel()->set_reshard_interval(3);
  return config;
}

absl::StatusOr<BatchSourcePtr> Batches(const Case& c, const Config& config) {
  DatasetOptions options;
  options.kind = c.data == "text" ? DataKind::kText : DataKind::kSafetensors;
  options.path = c.data == "text" ? Folder("text.txt") : Folder(c.folder) + "/batches.safetensors";
  options.order = DataOrder::kSequential;
  options.vocab_size = config.model().vocab_size();
  options.seq = config.train().seq_length();
  options.global_batch = config.train().global_batch_size();
  SHOAL_ASSIGN_OR_RETURN(Dataset dataset, OpenDataset(options));
  return dataset.train;
}

absl::Status LoadWeights(const std::string& path, RankModel& model) {
  SHOAL_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(path));
  for (const OwnedPart& part : model.store().owned()) {
    SHOAL_RETURN_IF_ERROR(WriteFromHost(part.master, model.stream(),
                                        [&](const Tensor& host) { return file->Read(part.name, part.row_begin, host); }));
  }
  model.store().ZeroMoments(model.stream());
  return model.store().GatherWeights(model.stream());
}

// Relative Frobenius norm of owned gradients against a golden tensor, squared and summed by parameter.
struct Difference {
  double difference = 0, golden = 0;
};

std::map<std::string, Difference> CompareOwned(const ParameterStore& store, const std::string& path, Stream& stream) {
  std::map<std::string, Difference> differences;
  const auto file = SafetensorsFile::Open(path);
  EXPECT_TRUE(file.ok()) << file.status();
  for (const OwnedPart& part : store.owned()) {
    const Tensor golden = Empty(part.master.shape(), DType::kF32);
    EXPECT_TRUE((*file)->Read(part.name, part.row_begin, golden).ok());
    const Tensor gradient = ToHost(part.gradient, stream);
    const float* own = gradient.data<float>();
    Difference& sums = differences[part.name];
    for (int64_t i = 0; i < golden.elements(); ++i) {
      const double want = golden.data<float>()[i], got = own[i];
      sums.difference += (got - want) * (got - want);
      sums.golden += want * want;
    }
  }
  return differences;
}

int64_t FlippedChoices(const std::vector<std::vector<int64_t>>& got, const json& want) {
  int64_t moved = 0;
  for (size_t layer = 0; layer < got.size(); ++layer) {
    for (size_t e = 0; e < got[layer].size(); ++e) moved += std::abs(got[layer][e] - want[layer][e].get<int64_t>());
  }
  return (moved + 1) / 2;
}

// What routers with a capacity, a bias or a loss of their own log besides.
void CompareRouting(const StepResult& got, const json& want) {
  if (want.contains("dropped")) {
    EXPECT_EQ(json(got.dropped), want["dropped"]);
  }
  if (want.contains("unrouted_tokens")) {
    EXPECT_EQ(json(got.unrouted), want["unrouted_tokens"]);
  }
  EXPECT_NEAR(got.seq_aux, want.value("seq_aux_loss", 0.0), kAuxTolerance * got.seq_aux);
  if (!want.contains("router_bias")) return;
  ASSERT_EQ(got.router_state.size(), want["router_bias"].size());
  for (size_t layer = 0; layer < got.router_state.size(); ++layer) {
    const absl::Span<const float> bias = got.router_state[layer].span<float>();
    ASSERT_EQ(bias.size(), want["router_bias"][layer].size());
    for (size_t e = 0; e < bias.size(); ++e) EXPECT_NEAR(bias[e], want["router_bias"][layer][e], 1e-7) << layer << ", " << e;
  }
}

void RunCase(const Case& c, Communicator& world) {
  const json log = ReadLog(c.folder);
  const Config config = ConfigOf(c, log);
  RankModel::Options options{.host = c.ranks_per_host > 0 ? world.index() / c.ranks_per_host : 0,
                             .device = c.device ? &kernels::testing::TestDevice() : nullptr};
  if (c.calibrate) {
    options.calibrate = [&](const ExpertPlacement& planned, absl::Span<const int64_t> rows) {
      return expert_testing::AddCopies(planned, rows, c.ranks, config.parallel().expert_copies());
    };
  }
  auto model = RankModel::Create(config, ModelConfigOf(config), world, options);
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_TRUE(LoadWeights(Folder(c.folder) + "/init.safetensors", **model).ok());
  const absl::StatusOr<BatchSourcePtr> batches = Batches(c, config);
  ASSERT_TRUE(batches.ok()) << batches.status();
  const int64_t part_rows = config.train().global_batch_size() / c.accumulation;
  const Range mine = (*model)->RowsOf(part_rows);
  for (const json& want : log["steps"]) {
    const int64_t step = want["step"];
    if (c.device && !kernels::testing::OnRealDevice() && step >= kEmulatedSteps) break;
    SCOPED_TRACE(absl::StrCat("step ", step));
    std::vector<Tensor> parts;
    for (int part = 0; part < c.accumulation; ++part) {
      parts.push_back(Empty({mine.count, config.train().seq_length() + 1}, DType::kI32));
      ASSERT_TRUE((*batches)->ReadRows(step, part * part_rows + mine.begin, parts.back()).ok());
    }
    const auto compare_gradients = [&](const ParameterStore& store) {
      if (step != 0 || c.accumulation != 1) return;
      for (const auto& [name, sums] : CompareOwned(store, Folder(c.folder) + "/grads_step0.safetensors", (*model)->stream())) {
        EXPECT_LE(std::sqrt(sums.difference), kTolerance * std::sqrt(sums.golden) + 1e-12) << name;
      }
    };
    const auto got = (*model)->Train(parts, LearningRate(config, step), step + 1, compare_gradients);
    ASSERT_TRUE(got.ok()) << got.status();
    if (c.accumulation == 1) {
      const int64_t flips = FlippedChoices(got->expert_counts, want["expert_counts"]);
      EXPECT_LE(flips, step < 10 ? 0 : kFlipsMax);
      const double tolerance = flips == 0 ? kTolerance : kFlipTolerance;
      EXPECT_NEAR(got->loss, want["loss"], tolerance * want["loss"].get<double>());
      EXPECT_NEAR(got->cross_entropy, want["ce_loss"], tolerance * want["ce_loss"].get<double>());
      EXPECT_NEAR(got->z, want.value("z_loss", got->z), kAuxTolerance * got->z);
      EXPECT_NEAR(got->aux, want["aux_loss"], kAuxTolerance * want["aux_loss"].get<double>());
      if (flips == 0) CompareRouting(*got, want);
      EXPECT_NEAR(got->grad_norm, want["grad_norm"], kNormTolerance * want["grad_norm"].get<double>());
    } else if (step == 0) {
      // Auxiliary losses are those of the parts; cross-entropy does not know of parts.
      EXPECT_NEAR(got->cross_entropy, want["ce_loss"], kTolerance * want["ce_loss"].get<double>());
      EXPECT_EQ(json(got->expert_counts), want["expert_counts"]);
    }
    EXPECT_NEAR(LearningRate(config, step), want["lr"], 1e-12);
  }
}

// Losses of the first steps on one rank, in bf16.
std::vector<double> Bf16Losses(const Case& c, Communicator& world) {
  const json log = ReadLog(c.folder);
  Config config = ConfigOf(c, log);
  config.mutable_train()->set_precision("bf16");
  const auto model =
      RankModel::Create(config, ModelConfigOf(config), world, {.device = c.device ? &kernels::testing::TestDevice() : nullptr});
  EXPECT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(LoadWeights(Folder(c.folder) + "/init.safetensors", **model).ok());
  const absl::StatusOr<BatchSourcePtr> batches = Batches(c, config);
  EXPECT_TRUE(batches.ok()) << batches.status();
  std::vector<double> losses;
  for (int64_t step = 0; step < kEmulatedSteps; ++step) {
    const Tensor rows = Empty({config.train().global_batch_size(), config.train().seq_length() + 1}, DType::kI32);
    EXPECT_TRUE((*batches)->ReadRows(step, 0, rows).ok());
    const auto result = (*model)->Train({rows}, LearningRate(config, step), step + 1);
    EXPECT_TRUE(result.ok()) << result.status();
    losses.push_back(result->loss);
  }
  return losses;
}

// Where the processor and the device round to bf16 differs by the order of sums alone: the loss, a mean of logarithms, by less than a
// unit of bf16.
TEST(Devices, TrainInBf16AsTheCpuDoes) {
  for (const char* folder : {"mixtral_a", "sigmoid_bias_shared"}) {
    RunRanks(1, "auto", [&](Communicator& world) {
      const std::vector<double> cpu = Bf16Losses({.folder = folder}, world);
      const std::vector<double> device = Bf16Losses({.folder = folder, .device = true}, world);
      for (size_t step = 0; step < cpu.size(); ++step) {
        EXPECT_NEAR(device[step], cpu[step], cpu[step] / 256) << folder << " step " << step;
        EXPECT_NE(device[step], cpu[step]) << "the same bits from other kernels: is it the device?";
      }
    });
  }
}

class Oracle : public testing::TestWithParam<Case> {};

TEST_P(Oracle, LossesNormsCountsAndGradientsMatch) {
  const Case& c = GetParam();
  RunRanks(c.ranks, c.transport, [&](Communicator& world) { RunCase(c, world); });
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const char* folder : {"mixtral_a", "mixtral_b", "topk_z_unnorm"}) {
    if (std::string(folder) != "topk_z_unnorm") cases.push_back({folder, "text", 1, 1});
    cases.push_back({folder, "batches", 1, 1, 2});
    cases.push_back({folder, "batches", 1, 1, 1, true});
    cases.push_back({folder, "batches", 4, 2, 1, true});
    cases.push_back({folder, "batches", 2, 2, 1, false, "tcp"});
    for (int ranks : {1, 2, 3, 4}) {
      for (int expert = 1; expert <= ranks; ++expert) {
        if (ranks % expert == 0) cases.push_back({folder, "batches", ranks, expert});
      }
    }
  }
  return cases;
}

// The other routers, alone, data parallel and expert parallel: alike, though choices may depend on the tokens of all ranks.
std::vector<Case> RouterCases() {
  std::vector<Case> cases;
  for (const char* folder : {"sigmoid_bias_shared", "switch_drop", "gshard_drop", "xmoe", "expert_choice"}) {
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {4, 1}, {4, 2}, {4, 4}}) {
      cases.push_back({folder, "batches", ranks, expert});
    }
    cases.push_back({folder, "batches", 1, 1, 1, true});
    cases.push_back({.folder = folder, .ranks = 2, .expert = 2, .recompute = true, .chunks = 3});
    cases.push_back({.folder = folder, .ranks = 3, .dense = "sharded", .experts = "sparse"});
    cases.push_back({.folder = folder, .ranks = 3, .expert = 3, .chunks = 1, .pinned = true});
  }
  return cases;
}

// On a device that all ranks share.
std::vector<Case> DeviceCases() {
  std::vector<Case> cases;
  for (const char* folder : {"mixtral_a", "sigmoid_bias_shared", "switch_drop", "gshard_drop", "xmoe", "expert_choice", "topk_z_unnorm"}) {
    cases.push_back({.folder = folder, .device = true});
  }
  for (const char* folder : {"mixtral_b", "sigmoid_bias_shared"}) {
    cases.push_back({.folder = folder, .accumulation = 2, .recompute = true, .chunks = 3, .chunks_backward = 2, .device = true});
  }
  cases.push_back({.folder = "mixtral_a", .ranks = 2, .expert = 2, .chunks = 2, .waves = 2, .device = true});
  cases.push_back({.folder = "mixtral_b", .ranks = 2, .accumulation = 2, .recompute = true, .dense = "sharded", .device = true});
  cases.push_back({.folder = "sigmoid_bias_shared", .ranks = 2, .experts = "sparse", .rematerialise = true, .device = true});
  cases.push_back({.folder = "mixtral_a", .ranks = 4, .expert = 4, .chunks = 2, .chunks_backward = 1, .ranks_per_host = 2, .device = true});
  return cases;
}

// The same work with weights, experts and rows in other places, and in other pieces.
std::vector<Case> PlacementCases() {
  std::vector<Case> cases;
  for (const char* folder : {"mixtral_a", "mixtral_b", "sigmoid_bias_shared"}) {
    cases.push_back({.folder = folder, .ranks = 2, .expert = 2, .chunks = 4, .chunks_backward = 1});
    cases.push_back({.folder = folder, .ranks = 2, .expert = 2, .chunks = 1, .chunks_backward = 2});
    cases.push_back({.folder = folder, .ranks = 3, .dense = "sharded", .prefetch = 2});
    cases.push_back({.folder = folder, .ranks = 4, .expert = 4, .chunks = 2, .chunks_backward = 3, .ranks_per_host = 2});
    cases.push_back({.folder = folder, .ranks = 2, .expert = 2, .chunks = 2, .ranks_per_host = 1, .waves = 2});
    cases.push_back({.folder = folder, .ranks = 2, .expert = 2, .chunks = 2, .ranks_per_host = 1, .waves = 3, .apart = true});
    cases.push_back({.folder = folder, .ranks = 2, .accumulation = 2, .recompute = true, .dense = "sharded", .experts = "sparse",
                     .rematerialise = true, .prefetch = 2, .waves = 3});
    cases.push_back({.folder = folder, .ranks = 4, .expert = 2, .transport = "tcp", .chunks = 2, .ranks_per_host = 1});
    cases.push_back({.folder = folder, .ranks = 2, .recompute = true, .dense = "sharded", .rematerialise = true});
    cases.push_back({.folder = folder, .ranks = 4, .experts = "sparse", .chunks = 2, .ranks_per_host = 2});
    cases.push_back({.folder = folder, .ranks = 4, .experts = "sparse", .rematerialise = true, .prefetch = 2});
    cases.push_back({.folder = folder, .ranks = 3, .recompute = true, .dense = "sharded", .experts = "sparse", .rematerialise = true});
    cases.push_back({.folder = folder, .ranks = 2, .accumulation = 2, .dense = "sharded", .experts = "sparse", .rematerialise = true});
    cases.push_back({.folder = folder, .ranks = 4, .experts = "sparse", .owners = "eplb"});
    cases.push_back({.folder = folder, .ranks = 3, .experts = "sparse", .rematerialise = true, .owners = "tuned"});
    cases.push_back({.folder = folder, .ranks = 4, .experts = "sparse", .ranks_per_host = 1, .owners = "eplb", .overlap = -1});
    cases.push_back({.folder = folder, .ranks = 2, .experts = "sparse", .owners = "tuned", .overlap = -1});
    cases.push_back({.folder = folder, .ranks = 4, .experts = "sparse", .ranks_per_host = 2, .overlap = 0, .calibrate = true});
    cases.push_back({.folder = folder, .ranks = 3, .accumulation = 2, .recompute = true, .dense = "sharded", .experts = "sparse",
                     .rematerialise = true, .overlap = 1, .calibrate = true});
    cases.push_back({.folder = folder, .ranks = 2, .experts = "sparse", .chunks = 2, .waves = 2, .overlap = 1, .calibrate = true});
    cases.push_back({.folder = folder, .ranks = 2, .experts = "sparse", .rematerialise = true, .waves = 3, .overlap = 0, .calibrate = true});
    cases.push_back({.folder = folder, .ranks = 1, .chunks = 1, .pinned = true});
    cases.push_back({.folder = folder, .ranks = 4, .expert = 4, .chunks = 1, .pinned = true});
    cases.push_back({.folder = folder, .ranks = 4, .experts = "sparse", .chunks = 1, .ranks_per_host = 2, .pinned = true});
    cases.push_back({.folder = folder, .ranks = 2, .accumulation = 2, .experts = "sparse", .chunks = 1, .pinned = true});
  }
  return cases;
}

std::string NameOf(const testing::TestParamInfo<Case>& info) {
  std::ostringstream name;
  name << info.param;
  return name.str();
}

INSTANTIATE_TEST_SUITE_P(Mixtral, Oracle, testing::ValuesIn(Cases()), NameOf);
INSTANTIATE_TEST_SUITE_P(Placements, Oracle, testing::ValuesIn(PlacementCases()), NameOf);
INSTANTIATE_TEST_SUITE_P(Devices, Oracle, testing::ValuesIn(DeviceCases()), NameOf);
INSTANTIATE_TEST_SUITE_P(Routers, Oracle, testing::ValuesIn(RouterCases()), NameOf);

}  // namespace
}  // namespace shoal
