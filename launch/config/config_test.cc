#include "launch/config/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/message_differencer.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class LoadConfigTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "shoal_config_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name) << text;
    return (folder_ / name).string();
  }
  // The error of a file that has no data file, with the folder's name left out.
  std::string Error(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
    const auto loaded = LoadConfig(Write("a.yaml", yaml), overrides, Files::kMayBeMissing);
    std::string message(loaded.status().message());
    const std::string prefix = folder_.string() + "/";
    for (size_t at; (at = message.find(prefix)) != std::string::npos;) message.erase(at, prefix.size());
    return message;
  }

  fs::path folder_;
};

constexpr char kRandom[] = "data: {kind: random}\n";

TEST_F(LoadConfigTest, ResolvesWhatIsLeftOut) {
  const auto loaded =
      LoadConfig(Write("small.yaml",
                       "data: {kind: random}\nmodel: {hidden_size: 96, num_attention_heads: 4}\n"
                       "train: {steps: 200}\nscheduler: {kind: wsd}\n"),
                 {"train.steps=300"}, Files::kMustExist);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Config& config = loaded->config;
  EXPECT_EQ(config.run().name(), "small");
  EXPECT_EQ(config.model().head_dim(), 24);
  EXPECT_EQ(config.model().num_key_value_heads(), 4);
  EXPECT_EQ(config.model().dense_intermediate_size(), 1024);
  EXPECT_EQ(config.scheduler().decay_steps(), 300);
  EXPECT_EQ(config.scheduler().wsd_decay_steps(), 30);
  EXPECT_EQ(config.data().validation_fraction(), 0);
  EXPECT_EQ(loaded->positions.Where("train.steps"), "--set train.steps=300");
  Config again = config;
  ResolveConfig(&again);
  EXPECT_EQ(ConfigYaml(again), ConfigYaml(config));
}

TEST_F(LoadConfigTest, YamlRoundTripsAndKeepsTheHash) {
  const auto loaded = LoadConfig(Write("a.yaml", "data: {kind: random}\nmodel: {dense_layers: [0, 2]}\n"), {},
                                 Files::kMustExist);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const auto again = LoadConfig(Write("b.yaml", ConfigYaml(loaded->config)), {}, Files::kMustExist);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(ConfigYaml(again->config), ConfigYaml(loaded->config));
  EXPECT_EQ(ConfigHash(again->config), ConfigHash(loaded->config));
  EXPECT_EQ(again->config.run().name(), "a");
  Config other = again->config;
  other.mutable_run()->set_seed(1);
  EXPECT_NE(ConfigHash(other), ConfigHash(again->config));
}

TEST_F(LoadConfigTest, NamesAMissingFileAndItsNeighbour) {
  Write("quickstart.yaml", kRandom);
  const auto loaded = LoadConfig((folder_ / "quickstrat.yaml").string(), {}, Files::kMustExist);
  EXPECT_TRUE(absl::IsNotFound(loaded.status()));
  EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("no such file; did you mean"));
  EXPECT_THAT(std::string(loaded.status().message()), EndsWith("quickstart.yaml?"));
  EXPECT_TRUE(absl::IsInvalidArgument(LoadConfig(folder_.string(), {}, Files::kMustExist).status()));
  EXPECT_EQ(std::string(LoadConfig("no-such.yaml", {}, Files::kMustExist).status().message()),
            "no-such.yaml: no such file in " + fs::current_path().string());
  EXPECT_TRUE(absl::IsInvalidArgument(LoadConfig("", {}, Files::kMustExist).status()));
}

TEST_F(LoadConfigTest, TakesAnEmptyFile) {
  EXPECT_EQ(Error(""), "data.path: must be set with data.kind = text (default)");
  EXPECT_EQ(Error("", {"data.kind=random"}), "");
}

TEST_F(LoadConfigTest, FindsDataBesideTheConfiguration) {
  Write("text.txt", "text");
  const std::string path = Write("a.yaml", "data: {path: text.txt}\n");
  const auto loaded = LoadConfig(path, {}, Files::kMustExist);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->config.data().path(), (folder_ / "text.txt").string());
}

TEST_F(LoadConfigTest, NamesDataThatIsMissing) {
  const std::string path = Write("a.yaml", "data:\n  path: text.txt\n");
  const std::string message(LoadConfig(path, {}, Files::kMustExist).status().message());
  EXPECT_THAT(message, StartsWith(path + ":2:3: data.path: text.txt: no such file in "));
  EXPECT_THAT(message, EndsWith(" or beside the configuration, in " + folder_.string()));
  EXPECT_TRUE(LoadConfig(path, {}, Files::kMayBeMissing).ok());
  const std::string folder(
      LoadConfig(path, {"data.path=" + folder_.string()}, Files::kMustExist).status().message());
  EXPECT_THAT(folder, EndsWith("a folder; expected a file"));
  const std::string elsewhere(
      LoadConfig(path, {"data.path=/no/where"}, Files::kMustExist).status().message());
  EXPECT_EQ(elsewhere, "--set data.path=/no/where: /no/where: no such file");
}

TEST_F(LoadConfigTest, NamesTheMissingHalfOfAMegatronPair) {
  Write("pair.idx", "");
  const std::string path = Write("a.yaml", "data: {kind: megatron, path: pair}\n");
  EXPECT_THAT(std::string(LoadConfig(path, {}, Files::kMustExist).status().message()),
              HasSubstr("pair.bin: no such file"));
  Write("pair.bin", "");
  const auto loaded = LoadConfig(path, {}, Files::kMustExist);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->config.data().path(), (folder_ / "pair").string());
}

TEST_F(LoadConfigTest, NamesAMissingStart) {
  const std::string path =
      Write("a.yaml", "data: {kind: random}\nrun: {init_from: m}\ncheckpoint: {resume: c}\n");
  const std::string message(LoadConfig(path, {}, Files::kMustExist).status().message());
  EXPECT_THAT(message, HasSubstr("run.init_from: m: no such file"));
  EXPECT_THAT(message, HasSubstr("checkpoint.resume: c: no such file"));
  const std::string no_model(
      LoadConfig(path, {"run.init_from=/", "checkpoint.resume=none"}, Files::kMustExist).status().message());
  EXPECT_THAT(no_model, HasSubstr("/config.json: no such file"));
}

TEST_F(LoadConfigTest, MetricsListenOnAnAddress) {
  for (const char* good : {"0.0.0.0", "::", "[::1]"}) {
    EXPECT_EQ(Error(kRandom, {absl::StrCat("telemetry.metrics_address=\"", good, "\"")}), "") << good;
  }
  EXPECT_EQ(
      Error(kRandom, {"telemetry.metrics_address=host.example"}),
      "--set telemetry.metrics_address=host.example: \"host.example\" is no IP address; 127.0.0.1 (this host "
      "alone) or 0.0.0.0 would fit");
}

TEST_F(LoadConfigTest, NamesUnknownKeysOfTheRealSchema) {
  EXPECT_EQ(Error("model:\n  hiden_size: 3\n  lr: 1e-3\n  num_experts: 4\ntrain: {batch_size: 4}\n"),
            "a.yaml:2:3: model.hiden_size: unknown key; did you mean hidden_size?\n"
            "a.yaml:3:3: model.lr: unknown key; did you mean optimizer.lr?\n"
            "a.yaml:4:3: model.num_experts: unknown key; did you mean num_local_experts?\n"
            "a.yaml:5:9: train.batch_size: unknown key; did you mean global_batch_size?");
}

struct Combination {
  std::string yaml;
  std::string error;
};

TEST_F(LoadConfigTest, RefusesCombinationsThatCannotBe) {
  const Combination combinations[] = {
      {"model:\n  num_key_value_heads: 3\n",
       "a.yaml:3:3: model.num_key_value_heads: 3 does not divide model.num_attention_heads = 8 (default); 1, "
       "2, 4 or 8 would fit"},
      {"model: {head_dim: 7}\n",
       "a.yaml:2:9: model.head_dim: 7 is odd, and rotary positions turn pairs; 6 or 8 would fit"},
      {"model: {hidden_size: 100}\n",
       "a.yaml:2:9: model.hidden_size: 100 is not a multiple of model.num_attention_heads = 8 (default); 96 "
       "or 112 would fit, or "
       "an even model.head_dim"},
      {"model: {hidden_size: 8}\n",
       "a.yaml:2:9: model.hidden_size: 8 gives heads of an odd width with model.num_attention_heads = 8 "
       "(default); 16 would fit, or "
       "an even model.head_dim"},
      {"model: {num_local_experts: 2, num_experts_per_tok: 3}\n",
       "a.yaml:2:31: model.num_experts_per_tok: 3 is more than model.num_local_experts = 2 (a.yaml:2:9); at "
       "most 2 would fit"},
      {"model: {dense_layers: [0, 4, 0]}\n",
       "a.yaml:2:9: model.dense_layers: 4 is no layer with model.num_hidden_layers = 4 (default); 0 to 3 "
       "would fit\n"
       "a.yaml:2:9: model.dense_layers: 0 stands in the list twice"},
      {"train: {gradient_accumulation_steps: 3}\n",
       "a.yaml:2:9: train.gradient_accumulation_steps: 3 does not divide train.global_batch_size = 8 "
       "(default); 1, 2, 4 or 8 would "
       "fit"},
      {"train: {eval_interval: 5}\n",
       "a.yaml:2:9: train.eval_interval: 5 has nothing to validate on with data.validation_fraction = 0 "
       "(default); 0 would fit"},
      {"scheduler: {warmup_steps: 1001}\n",
       "a.yaml:2:13: scheduler.warmup_steps: 1001 is more than train.steps = 1000 (default); at most 1000 "
       "would fit"},
      {"scheduler: {warmup_steps: 11, decay_steps: 10}\n",
       "a.yaml:2:13: scheduler.warmup_steps: 11 is more than scheduler.decay_steps = 10 (a.yaml:2:31); at "
       "most 10 would fit"},
      {"scheduler: {kind: wsd, warmup_steps: 900, wsd_decay_steps: 200}\n",
       "a.yaml:2:43: scheduler.wsd_decay_steps: 200 and scheduler.warmup_steps = 900 (a.yaml:2:24) are "
       "together more than "
       "train.steps = 1000 (default); at most 100 would fit"},
      {"scheduler: {min_lr: 1}\n",
       "a.yaml:2:13: scheduler.min_lr: 1 is more than optimizer.lr = 3e-04 (default); at most 3e-04 would "
       "fit"},
      {"parallel: {experts: sparse, expert: 2}\n",
       "a.yaml:2:29: parallel.expert: 2 makes groups of ranks, which parallel.experts = sparse (a.yaml:2:12) has none of; "
       "1 would fit"},
      {"run: {name: a/b}\n", "a.yaml:2:7: run.name: \"a/b\" is no name of a folder"},
      {"run: {name: ..}\n", "a.yaml:2:7: run.name: \"..\" is no name of a folder"},
  };
  for (const Combination& combination : combinations)
    EXPECT_EQ(Error(kRandom + combination.yaml), combination.error);
}

TEST_F(LoadConfigTest, DocumentsNeedTheTokenThatTheyEndWith) {
  EXPECT_EQ(Error("data: {kind: random, document_mask: true}\n"),
            "a.yaml:1:22: data.document_mask: needs the token that documents end with, and data.end_of_document_token = -1 (default) "
            "is none");
  EXPECT_EQ(Error("data: {kind: random, document_mask: true, end_of_document_token: 256}\n"),
            "a.yaml:1:43: data.end_of_document_token: 256 is no token of model.vocab_size = 256 (default); at most 255 would fit");
  EXPECT_EQ(Error("data: {kind: random, document_mask: true, end_of_document_token: 256}\nmodel: {vocab_size: 257}\n"), "");
  EXPECT_EQ(Error("data: {kind: random, document_mask: true, end_of_document_token: 0}\n"), "");
}

TEST_F(LoadConfigTest, RefusesWhatTheRouterDoesNotHave) {
  const auto error = [&](const std::string& model) { return Error("data: {kind: random}\nmodel: {" + model + "}\n"); };
  EXPECT_EQ(error("router: switch"),
            "model.num_experts_per_tok: 2 does not go with model.router = switch (a.yaml:2:9); 1 would fit");
  EXPECT_THAT(error("router: gshard, num_experts_per_tok: 4"), HasSubstr("4 does not go with model.router = gshard"));
  EXPECT_THAT(error("router: expert_choice"), HasSubstr("model.capacity_factor: 0"));
  EXPECT_THAT(error("capacity_factor: 1.5"), HasSubstr("model.capacity_factor: 1.5 does not go with model.router = topk"));
  EXPECT_THAT(error("router: sigmoid_bias, aux_loss: hf"), HasSubstr("model.aux_loss: hf does not go with"));
  EXPECT_THAT(error("router: sigmoid_bias, router_z_loss_coef: 0.1"), HasSubstr("model.router_z_loss_coef: 0.1"));
  EXPECT_THAT(error("seq_aux_loss_coef: 0.1"), HasSubstr("model.seq_aux_loss_coef: 0.1 does not go with"));
  EXPECT_THAT(error("router: xmoe"), HasSubstr("model.router_dim: 0"));
  EXPECT_THAT(error("router_dim: 8"), HasSubstr("model.router_dim: 8 does not go with"));
  EXPECT_THAT(error("router: gshard, norm_topk_prob: false"), HasSubstr("model.norm_topk_prob: false"));
  EXPECT_THAT(error("router: top2"), HasSubstr("model.router"));
}

TEST_F(LoadConfigTest, RefusesWhatThePlacementOfExpertsDoesNotHave) {
  const auto error = [&](const std::string& yaml) { return Error("data: {kind: random}\n" + yaml + "\n"); };
  EXPECT_EQ(error("parallel: {expert_copies: 2}"),
            "a.yaml:2:12: parallel.expert_copies: 2 does not go with parallel.experts = grouped (default); "
            "-1, or parallel.experts = sparse, would fit");
  EXPECT_THAT(error("parallel: {expert_overlap: 0, experts: grouped}"),
              HasSubstr("a.yaml:2:12: parallel.expert_overlap: 0 does not go with parallel.experts = grouped (a.yaml:2:31)"));
  EXPECT_THAT(error("parallel: {reshard_interval: 7}"), HasSubstr("parallel.reshard_interval: 7 does not go with"));
  EXPECT_EQ(error("parallel: {reshard_interval: 0}"), "");
  EXPECT_EQ(error("parallel: {owners: eplb}"),
            "a.yaml:2:12: parallel.owners: eplb does not go with parallel.experts = grouped (default); "
            "hecate, or parallel.experts = sparse, would fit");
  EXPECT_EQ(error("parallel: {owners: hecate, calibrate: false}"), "");
  EXPECT_EQ(error("parallel: {experts: sparse, owners: eplb, calibrate: true}"), "");
  EXPECT_EQ(error("parallel: {calibrate: true}"),
            "a.yaml:2:12: parallel.calibrate: true does not go with parallel.experts = grouped (default); "
            "false, or parallel.experts = sparse, would fit");
  EXPECT_EQ(error("parallel: {experts: sparse, expert_copies: 0, calibrate: true}"),
            "a.yaml:2:47: parallel.calibrate: true has no room for copies with parallel.expert_copies = 0 (a.yaml:2:29); "
            "false would fit");
  EXPECT_EQ(error("parallel: {experts: sparse, expert_copies: 9}"),
            "a.yaml:2:29: parallel.expert_copies: 9 is more than model.num_local_experts = 8 (default); at most 8 would fit");
  EXPECT_THAT(error("parallel: {experts: sparse, expert_overlap: 9}"), HasSubstr("parallel.expert_overlap: 9 is more than"));
  EXPECT_EQ(error("parallel: {experts: sparse, expert_copies: 0, expert_overlap: 3}"),
            "a.yaml:2:47: parallel.expert_overlap: 3 experts have no room with parallel.expert_copies = 0 (a.yaml:2:29); "
            "0 would fit");
  EXPECT_EQ(error("parallel: {experts: sparse, expert_copies: 0, rematerialise: true}"),
            "a.yaml:2:47: parallel.rematerialise: true has nothing to gather again with parallel.expert_copies = 0 "
            "(a.yaml:2:29); false would fit");
  EXPECT_EQ(error("parallel: {experts: sparse, expert_copies: 0, expert_overlap: 0}"), "");
  EXPECT_EQ(error("parallel: {experts: sparse, expert_copies: 8, dense: sharded, rematerialise: true}"), "");
}

TEST_F(LoadConfigTest, RefusesWavesThatCannotTakeTurns) {
  const std::string waves = "data: {kind: random}\nschedule: {waves: 4}\n";
  EXPECT_EQ(Error(waves), "");
  EXPECT_EQ(Error(waves + "train: {gradient_accumulation_steps: 4}\n"),
            "a.yaml:2:12: schedule.waves: 4 is more than the 2 sequences of a part of the batch "
            "(train.global_batch_size = 8 (default)); at most 2 would fit");
  EXPECT_EQ(Error(waves + "model: {router: expert_choice, capacity_factor: 2}\n"),
            "a.yaml:2:12: schedule.waves: 4 does not go with model.capacity_factor = 2 (a.yaml:3:32), with which choices "
            "depend on all tokens; 0 or 1 would fit");
  EXPECT_EQ(Error(waves + "model: {router: gshard}\n"), "");
  EXPECT_EQ(Error("data: {kind: random}\nschedule: {waves: 1}\nmodel: {router: expert_choice, capacity_factor: 2}\n"), "");
}

TEST_F(LoadConfigTest, BalancesWithoutALossWhereTheRouterDoes) {
  const auto loaded = LoadConfig(Write("a.yaml", "data: {kind: random}\nmodel: {router: sigmoid_bias}\n"), {}, Files::kMustExist);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->config.model().aux_loss(), "none");
  EXPECT_EQ(Error("data: {kind: random}\nmodel: {router: expert_choice, capacity_factor: 2}\n"), "");
  EXPECT_EQ(Error("data: {kind: random}\nmodel: {router: xmoe, router_dim: 16, shared_intermediate_size: 64}\n"), "");
}

TEST_F(LoadConfigTest, RefusesCombinationsOfData) {
  EXPECT_EQ(Error("data: {path: x}\nmodel: {vocab_size: 255}\n"),
            "a.yaml:2:9: model.vocab_size: 255 is less than the 256 bytes of data.kind = text (default); at "
            "least 256 would fit");
  EXPECT_EQ(Error("data: {path: x, order: sequential, validation_fraction: 0.1}\n"),
            "a.yaml:1:36: data.validation_fraction: 0.1 cannot be held out with data.order = sequential "
            "(a.yaml:1:17), which reads "
            "the whole text; 0, or data.order = shuffled, would fit");
  EXPECT_THAT(Error("data: {kind: random, validation_fraction: 0.1}\n"),
              HasSubstr("which has no text to hold out; 0 would fit"));
  EXPECT_EQ(Error("data: {path: x, order: sequential, validation_fraction: 0}\n"), "");
}

TEST_F(LoadConfigTest, PinnedSumsAreOfUndividedWork) {
  const std::string pinned = std::string(kRandom) + "train: {numerics: pinned}\n";
  EXPECT_EQ(Error(pinned + "schedule: {chunks_forward: 1, waves: 0}\n"), "");
  EXPECT_EQ(Error(pinned + "schedule: {chunks_backward: 2, waves: 4}\n"),
            "a.yaml:3:12: schedule.chunks_backward: 2 does not go with train.numerics = pinned (a.yaml:2:9), whose sums are those "
            "of undivided work; 0 or 1 would fit\n"
            "a.yaml:3:32: schedule.waves: 4 does not go with train.numerics = pinned (a.yaml:2:9), whose sums are those of "
            "undivided work; 0 or 1 would fit");
  EXPECT_THAT(Error(pinned + "comm: {transport: mpi}\n"), HasSubstr("mpi adds in an order of its own"));
  Config config;
  config.mutable_train()->set_numerics("pinned");
  ResolveConfig(&config);
  EXPECT_EQ(config.schedule().chunks_forward(), 1);
  EXPECT_EQ(config.schedule().chunks_backward(), 1);
  EXPECT_EQ(config.schedule().waves(), 1);
}

TEST_F(LoadConfigTest, ProductsInFp8NeedBf16) {
  EXPECT_EQ(Error(std::string(kRandom) + "train: {matmul: fp8, precision: bf16}\n"), "");
  EXPECT_THAT(Error(std::string(kRandom) + "train: {matmul: fp8}\n"),
              HasSubstr("train.matmul: fp8 does not go with train.precision = fp32 (default); same, or train.precision = bf16, "
                        "would fit"));
}

TEST_F(LoadConfigTest, TakesWhatIsUnusualButPossible) {
  EXPECT_EQ(Error(std::string(kRandom) + "model: {dense_layers: [0, 1, 2, 3]}\n"), "");
  EXPECT_EQ(Error(std::string(kRandom) + "model: {hidden_size: 100, head_dim: 4}\n"), "");
  EXPECT_EQ(Error(std::string(kRandom) + "scheduler: {kind: constant, min_lr: 1, warmup_steps: 1000}\n"), "");
  EXPECT_EQ(Error(std::string(kRandom) + "scheduler: {warmup_steps: 500, decay_steps: 9000}\n"), "");
  EXPECT_EQ(Error(std::string(kRandom) + "optimizer: {lr: 0}\nscheduler: {min_lr: 0}\n"), "");
}

TEST(CheckConfig, TakesAResolvedConfiguration) {
  Config config;
  config.mutable_data()->set_kind("random");
  ResolveConfig(&config);
  EXPECT_TRUE(CheckConfig(config, KeyPositions()).ok());
}

std::string ParallelError(int expert, int world_size, int experts, bool all_dense) {
  Config config;
  config.mutable_parallel()->set_expert(expert);
  config.mutable_model()->set_num_local_experts(experts);
  for (int i = 0; all_dense && i < config.model().num_hidden_layers(); ++i)
    config.mutable_model()->add_dense_layers(i);
  KeyPositions positions;
  positions.Set("parallel.expert", "a.yaml:3:3");
  return std::string(CheckParallel(config, positions, world_size).message());
}

TEST(CheckParallel, SaysWhatWouldFit) {
  EXPECT_EQ(ParallelError(1, 3, 8, false), "");
  EXPECT_EQ(ParallelError(3, 3, 8, false), "");
  EXPECT_EQ(ParallelError(-1, 4, 8, false), "");
  EXPECT_EQ(ParallelError(2, 3, 8, false),
            "a.yaml:3:3: parallel.expert: 2 does not divide 3 ranks; 1 or 3 would fit");
  EXPECT_EQ(ParallelError(2, 1, 8, false),
            "a.yaml:3:3: parallel.expert: 2 does not divide 1 rank; 1 would fit");
  EXPECT_EQ(ParallelError(-1, 16, 8, false),
            "a.yaml:3:3: parallel.expert: -1, all 16 ranks, is more than model.num_local_experts = 8 "
            "(default); 1, 2, 4 or 8 would "
            "fit");
  EXPECT_EQ(ParallelError(-1, 16, 8, true), "");
  EXPECT_EQ(ParallelError(0, 2, 8, false),
            "a.yaml:3:3: parallel.expert: 0 is no number of ranks; 1 or 2 would fit");
}

TEST(ConfigReference, IsWhatTheDocumentationHas) {
  const std::string path = SHOAL_SOURCE_DIR "/docs/configuration.md";
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(), ConfigReference())
      << "write it anew: ./shoal config reference > docs/configuration.md";
}

}  // namespace
}  // namespace shoal
