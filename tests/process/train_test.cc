// `shoal train` and its relatives as a user runs them: real processes, real files, real failures.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <regex>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "launch/agent/exit_codes.h"
#include "nlohmann/json.hpp"
#include "runtime/base/status.h"
#include "tests/harness/http.h"
#include "tests/harness/prometheus.h"
#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"
#include "tests/process/processes.h"

namespace shoal {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::ProcessResult;
using testing::ReadFile;
using testing::RunProcess;
using testing::Subprocess;
using testing::SubprocessOptions;
using testing::TempDir;
using testing::WaitAllGone;
using testing::WaitForRanks;
using testing::WriteFile;

using Words = std::vector<std::string>;

constexpr absl::Duration kLong = absl::Seconds(90);
constexpr absl::Duration kEndMax = absl::Seconds(10);  // From a rank's failure to the end of the job.
constexpr char kTraining[] = "/1000000  eta";           // What a run of a million steps prints from its first step on.

constexpr char kConfig[] = R"(
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 8,
        intermediate_size: 32, rope_theta: 10000}
data: {kind: text}
optimizer: {lr: 3e-3}
scheduler: {warmup_steps: 4}
train: {steps: 12, global_batch_size: 8, seq_length: 32, threads: 1}
telemetry: {log_interval: 1}
)";

Words Joined(Words words, const Words& more) {
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

class TrainTest : public ::testing::Test {
 protected:
  TrainTest() {
    signal(SIGINT, SIG_DFL);
    std::string text;
    for (int i = 0; i < 3000; ++i) absl::StrAppend(&text, "the number ", i, " follows ", i - 1, "\n");
    WriteFile(folder_ / "text.txt", text);
    WriteFile(folder_ / "tiny.yaml", kConfig);
  }

  SubprocessOptions Options(Words command, const Words& more, const Words& sets) const {
    command.insert(command.begin(), SHOAL_PROGRAM);
    command.insert(command.end(), more.begin(), more.end());
    for (const std::string& set : sets) {
      command.push_back("--set");
      command.push_back(set);
    }
    SubprocessOptions options;
    options.args = std::move(command);
    options.env = {{"OMP_NUM_THREADS", "1"}, {"OMP_WAIT_POLICY", "passive"}};
    options.unset_env = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"};
    options.cwd = folder_.path();
    return options;
  }

  SubprocessOptions Train(int ranks, Words sets, const Words& flags = {}) const {
    sets.push_back("data.path=text.txt");
    return Options({"train", "tiny.yaml"}, Joined({"--nproc-per-node", std::to_string(ranks)}, flags), sets);
  }

  ProcessResult Run(const SubprocessOptions& options) const {
    const absl::StatusOr<ProcessResult> result = RunProcess(options, kLong);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.value_or(ProcessResult());
  }

  void RunWholeAndHalves(const Words& sets);
  std::string Path(const std::string& name) const { return folder_ / name; }

  std::vector<json> Metrics(const std::string& run) const {
    std::vector<json> records;
    for (absl::string_view line : absl::StrSplit(ReadFile(Path("runs/" + run + "/metrics.jsonl")), '\n', absl::SkipEmpty())) {
      records.push_back(json::parse(line));
    }
    return records;
  }

  std::vector<double> Losses(const std::string& run) const {
    std::vector<double> losses;
    for (const json& record : Metrics(run)) {
      if (record.contains("loss")) losses.push_back(record["loss"]);
    }
    return losses;
  }

  // Hashes of all tensors of a checkpoint: equal hashes are equal bits.
  json Tensors(const std::string& run, const std::string& step) const {
    return json::parse(ReadFile(Path("runs/" + run + "/checkpoints/step-" + step + "/manifest.json")))["tensors"];
  }

  TempDir folder_;
};

TEST_F(TrainTest, WritesEverythingItPromises) {
  const ProcessResult result = Run(Train(2, {"train.eval_interval=6", "telemetry.sample_prompt=the ", "checkpoint.interval=6",
                                             "telemetry.expert_counts_interval=4"}));
  ASSERT_TRUE(result.ok()) << result.ToString();
  EXPECT_THAT(result.out, AllOf(HasSubstr("step 12/12"), HasSubstr("validation"), HasSubstr("sample of generated text"),
                                HasSubstr("runs/tiny/loss.svg"), HasSubstr("% peak"), HasSubstr("http://127.0.0.1:")));
  int steps = 0, validations = 0, counted = 0;
  for (const json& record : Metrics("tiny")) {
    if (record.contains("validation_loss")) {
      ++validations;
      continue;
    }
    EXPECT_EQ(record["step"], steps++);
    for (const char* key : {"loss", "ce_loss", "aux_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"}) {
      EXPECT_TRUE(record[key].is_number()) << key;
    }
    if (!record.contains("expert_counts")) continue;
    ++counted;
    ASSERT_EQ(record["expert_counts"].size(), 2u);
    int64_t slots = 0;
    for (const json& count : record["expert_counts"][1]) slots += count.get<int64_t>();
    EXPECT_EQ(slots, 8 * 32 * 2);  // Tokens of all ranks, two experts each.
  }
  EXPECT_EQ(steps, 12);
  EXPECT_EQ(validations, 2);
  EXPECT_EQ(counted, 3);
  EXPECT_LT(Losses("tiny").back(), Losses("tiny").front() - 0.5);
  EXPECT_THAT(ReadFile(Path("runs/tiny/loss.svg")), HasSubstr("<svg"));
  EXPECT_THAT(ReadFile(Path("runs/tiny/config.yaml")), HasSubstr("global_batch_size: 8"));
  EXPECT_TRUE(std::filesystem::exists(Path("runs/tiny/checkpoints/step-00000012/manifest.json")));
}

TEST_F(TrainTest, EveryLayoutComputesTheSameLosses) {
  const Words sets = {"checkpoint.save_last=false", "train.gradient_accumulation_steps=2"};
  const auto losses = [&](int ranks, const std::string& name, Words more) {
    more.insert(more.end(), sets.begin(), sets.end());
    more.push_back("run.name=" + name);
    const ProcessResult result = Run(Train(ranks, more));
    EXPECT_TRUE(result.ok()) << result.ToString();
    return Losses(name);
  };
  const std::vector<double> one = losses(1, "one", {});
  ASSERT_EQ(one.size(), 12u);
  const std::vector<std::vector<double>> others = {
      losses(3, "three", {}), losses(3, "experts", {"parallel.expert=-1"}), losses(4, "both", {"parallel.expert=2"}),
      losses(2, "tcp", {"parallel.expert=2", "comm.transport=tcp"}), losses(2, "recompute", {"train.recompute=true"})};
  for (const std::vector<double>& other : others) {
    ASSERT_EQ(other.size(), one.size());
    for (size_t step = 0; step < one.size(); ++step) EXPECT_NEAR(other[step], one[step], 2e-5 * one[step]) << step;
  }
}

// Runs "whole" without a stop, and "halves" stopped after 5 of its 12 steps and resumed: the same losses.
void TrainTest::RunWholeAndHalves(const Words& sets) {
  ASSERT_TRUE(Run(Train(2, Joined({"run.name=whole"}, sets))).ok());
  // The schedule must be that of the whole run.
  ASSERT_TRUE(Run(Train(2, Joined({"run.name=halves", "train.steps=5", "scheduler.decay_steps=12"}, sets))).ok());
  const ProcessResult rest = Run(Train(2, Joined({"run.name=halves"}, sets), {"--resume"}));
  ASSERT_TRUE(rest.ok()) << rest.ToString();
  EXPECT_EQ(Losses("halves"), Losses("whole"));
}

TEST_F(TrainTest, ResumedRunIsBitIdentical) {
  for (const char* precision : {"fp32", "bf16"}) {
    // A schedule chosen by measurement may be another one the next time, with another order of sums.
    const Words sets = {absl::StrCat("train.precision=", precision), "parallel.expert=2", "schedule.chunks_forward=2",
                        "schedule.chunks_backward=1", "schedule.waves=2", "schedule.gradient_slices=plain"};
    ASSERT_NO_FATAL_FAILURE(RunWholeAndHalves(sets));
    EXPECT_EQ(Tensors("halves", "00000012"), Tensors("whole", "00000012"));
    std::filesystem::remove_all(Path("runs"));
  }
}

TEST_F(TrainTest, ResumedRunWithExpertsThatMoveIsBitIdentical) {
  // Copies from the first steps on, and other owners before and after the stop.
  const Words sets = {"parallel.experts=sparse", "parallel.expert_overlap=2", "parallel.expert_copies=2",
                      "parallel.reshard_interval=2", "schedule.chunks_forward=1", "schedule.chunks_backward=1",
                      "schedule.waves=1", "schedule.gradient_slices=plain"};
  ASSERT_NO_FATAL_FAILURE(RunWholeAndHalves(sets));
  const json whole = Tensors("whole", "00000012"), halves = Tensors("halves", "00000012");
  EXPECT_TRUE(whole.contains("expert_moves"));
  // Costs are measured times.
  for (const auto& [name, tensor] : whole.items()) {
    if (name != "expert_moves") {
      EXPECT_EQ(halves[name], tensor) << name;
    }
  }
  double copies = 0, moves = 0;
  for (const json& record : Metrics("whole")) {
    if (!record.contains("experts")) continue;
    copies += record["experts"]["copies_per_layer"].get<double>();
    moves += record["experts"]["owner_moves"].get<double>();
  }
  EXPECT_GT(copies, 0);
  EXPECT_GT(moves, 0);
  // Another number of ranks says that it goes on without.
  const ProcessResult alone = Run(Train(3, Joined({"run.name=halves", "train.steps=13"}, sets), {"--resume"}));
  ASSERT_TRUE(alone.ok()) << alone.ToString();
  EXPECT_THAT(alone.ToString(), HasSubstr("begin anew: it is of 2 ranks, and here are 3"));
}

TEST_F(TrainTest, ResumesAtAnyNumberOfRanks) {
  const ProcessResult first = Run(Train(1, {"run.name=whole"}, {"--resume"}));
  ASSERT_TRUE(first.ok()) << first.ToString();
  EXPECT_THAT(first.out, HasSubstr("runs/whole has no checkpoint to go on from: the run starts anew"));
  ASSERT_TRUE(Run(Train(2, {"run.name=moved", "train.steps=6", "scheduler.decay_steps=12", "parallel.expert=2"})).ok());
  const ProcessResult rest = Run(Train(3, {"run.name=moved"}, {"--resume"}));
  ASSERT_TRUE(rest.ok()) << rest.ToString();
  EXPECT_THAT(rest.out, AllOf(HasSubstr("going on from runs/moved/checkpoints/step-00000006"), HasSubstr("train.steps: 6 -> 12"),
                              HasSubstr("parallel.expert: 2 -> 1"), Not(HasSubstr("run.seed"))));
  const std::vector<double> whole = Losses("whole"), moved = Losses("moved");
  ASSERT_EQ(moved.size(), whole.size());
  for (size_t step = 0; step < whole.size(); ++step) EXPECT_NEAR(moved[step], whole[step], 2e-5 * whole[step]) << step;
}

TEST_F(TrainTest, DamagedCheckpointIsNamedAndPassedOverOnlyOnRequest) {
  ASSERT_TRUE(Run(Train(2, {"checkpoint.interval=6"})).ok());
  const std::string file = Path("runs/tiny/checkpoints/step-00000012/rank-00001-of-00002.safetensors");
  std::string bytes = ReadFile(file);
  bytes[bytes.size() - 5] ^= 1;
  WriteFile(file, bytes);
  const ProcessResult refused = Run(Train(2, {"train.steps=14"}, {"--resume"}));
  EXPECT_EQ(refused.exit_code, kExitFailure);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("rank-00001-of-00002.safetensors"), HasSubstr("checkpoint.allow_fallback")));
  const ProcessResult allowed = Run(Train(2, {"train.steps=14", "checkpoint.allow_fallback=true"}, {"--resume"}));
  ASSERT_TRUE(allowed.ok()) << allowed.ToString();
  EXPECT_EQ(Losses("tiny").size(), 14u);
}

TEST_F(TrainTest, ACheckpointOfAnotherModelIsRefusedWithWhatChanged) {
  ASSERT_TRUE(Run(Train(1, {"train.steps=4"})).ok());
  const ProcessResult result = Run(Train(1, {"model.hidden_size=64"}, {"--resume"}));
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, AllOf(HasSubstr("changed since: model.hidden_size: 32 -> 64"), HasSubstr("step-00000004 does not hold"),
                                HasSubstr("lm_head.weight is f32 [256, 32], wanted is f32 [256, 64]")));
}

TEST_F(TrainTest, ResumingAtAnEarlierStepLeavesTheLaterOnesBehind) {
  ASSERT_TRUE(Run(Train(2, {"checkpoint.interval=4", "checkpoint.keep=3"})).ok());
  const Words branch = {"checkpoint.resume=runs/tiny/checkpoints/step-00000004", "train.steps=6", "scheduler.decay_steps=12"};
  const ProcessResult result = Run(Train(2, branch));
  ASSERT_TRUE(result.ok()) << result.ToString();
  EXPECT_THAT(result.out, HasSubstr("checkpoints/step-00000006"));
  EXPECT_TRUE(std::filesystem::exists(Path("runs/tiny/checkpoints.after-step-4/step-00000012/manifest.json")));
  ASSERT_TRUE(Run(Train(2, {}, {"--resume"})).ok());
  std::vector<int> steps;
  for (const json& record : Metrics("tiny")) {
    if (record.contains("loss")) steps.push_back(record["step"]);
  }
  EXPECT_THAT(steps, ::testing::ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11));
}

TEST_F(TrainTest, RanksThatSeeOtherCheckpointsRefuseToResume) {
  ASSERT_TRUE(Run(Train(1, {"train.steps=4"})).ok());
  // Rank 1 runs in a folder of its own, as on a host without a shared file system.
  std::filesystem::create_directory(Path("other"));
  std::filesystem::copy(Path("text.txt"), Path("other/text.txt"));
  std::vector<std::unique_ptr<Subprocess>> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    SubprocessOptions options = Train(1, {}, {"--resume"});
    options.args[2] = Path("tiny.yaml");
    if (rank == 1) options.cwd = Path("other");
    const std::string number = std::to_string(rank);
    options.env.insert({{"SHOAL_RANK", number}, {"SHOAL_LOCAL_RANK", number}, {"SHOAL_WORLD_SIZE", "2"},
                        {"SHOAL_LOCAL_WORLD_SIZE", "2"}, {"SHOAL_NODE_RANK", "0"}, {"SHOAL_NODES", "1"},
                        {"SHOAL_RUN_ID", "test"}, {"SHOAL_EPOCH", "1"},
                        {"SHOAL_MASTER", absl::StrCat("unix:train_test.", getpid())}});
    ranks.push_back(*Subprocess::Start(options));
  }
  for (const auto& rank : ranks) {
    const auto result = rank->Wait(kLong);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_NE(result->exit_code, kExitOk);
    EXPECT_THAT(result->err, AllOf(HasSubstr("for rank 0 that of step 4 and for rank 1 none"), HasSubstr("all ranks share")));
  }
}

TEST_F(TrainTest, ValidationNeedsNoMoreMemoryThanAPartOfAStep) {
  const auto peak = [&](const std::string& validation_fraction) {
    const ProcessResult result = Run(Train(1, {"train.steps=1", "train.global_batch_size=1024", "train.seq_length=64",
                                               "train.gradient_accumulation_steps=128", "checkpoint.save_last=false",
                                               "scheduler.warmup_steps=0", "data.validation_fraction=" + validation_fraction}));
    EXPECT_TRUE(result.ok()) << result.ToString();
    std::smatch match;
    EXPECT_TRUE(std::regex_search(result.out, match, std::regex("peak memory +([0-9.]+) MiB"))) << result.out;
    return match.empty() ? 0 : std::stod(match[1]);
  };
  EXPECT_LT(peak("0.9"), 2 * peak("0"));  // The whole global batch at a time needs three times as much.
}

TEST_F(TrainTest, KilledAndStoppedRanksEndTheJobWithOneVerdict) {
  struct Failure {
    int signal;
    std::string name;
  };
  for (const Failure& failure : {Failure{SIGKILL, "SIGKILL"}, Failure{SIGSTOP, "SIGSTOP"}}) {
    auto job = *Subprocess::Start(Train(3, {"train.steps=1000000"}));
    ASSERT_TRUE(job->WaitForOutput("step", kLong).ok());
    const auto ranks = WaitForRanks(job->pid(), 3, kLong);
    ASSERT_TRUE(ranks.ok()) << ranks.status();
    const absl::Time begin = absl::Now();
    (*ranks)[2].Signal(failure.signal);
    const auto result = job->Wait(kLong);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_LE(absl::Now() - begin, kEndMax);
    EXPECT_EQ(result->exit_code, kExitFailure);
    EXPECT_THAT(result->err, AllOf(HasSubstr("rank 2"), HasSubstr(failure.name)));
    EXPECT_TRUE(WaitAllGone(*ranks, kEndMax).ok());
  }
}

TEST_F(TrainTest, NothingOutlivesTheLauncherOrCtrlC) {
  for (int signal : {SIGKILL, SIGINT}) {
    auto job = *Subprocess::Start(Train(2, {"train.steps=1000000"}));
    ASSERT_TRUE(job->WaitForOutput("step", kLong).ok());
    const auto ranks = WaitForRanks(job->pid(), 2, kLong);
    ASSERT_TRUE(ranks.ok()) << ranks.status();
    if (signal == SIGINT) {
      job->SignalGroup(signal);  // As a terminal does.
      const auto result = job->Wait(kEndMax);
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(result->exit_code, kExitSignalBase + SIGINT);
    } else {
      job->Signal(signal);
    }
    EXPECT_TRUE(WaitAllGone(*ranks, kEndMax).ok());
  }
}

// Whoever gets SIGTERM (a rank, all of them, the launcher, or everybody, as Slurm and systemd do it): all ranks save the same step
// and end, and the rest of the run has the bits of one that was never stopped.
TEST_F(TrainTest, SigtermSavesAndEndsAndTheRunGoesOnBitForBit) {
  const Words sets = {"parallel.expert=2", "schedule.chunks_forward=1", "schedule.chunks_backward=1", "schedule.waves=1",
                      "schedule.gradient_slices=plain", "scheduler.decay_steps=10000", "checkpoint.keep=1"};
  for (const std::string whom : {"rank", "ranks", "launcher", "everybody"}) {
    SCOPED_TRACE(whom);
    auto job = *Subprocess::Start(Train(2, Joined({"train.steps=1000000"}, sets)));
    ASSERT_TRUE(job->WaitForOutput(kTraining, kLong).ok());
    {
      const auto ranks = WaitForRanks(job->pid(), 2, kLong);
      ASSERT_TRUE(ranks.ok()) << ranks.status();
      if (whom != "launcher") (*ranks)[1].Signal(SIGTERM);
      if (whom == "ranks" || whom == "everybody") (*ranks)[0].Signal(SIGTERM);
      if (whom == "launcher" || whom == "everybody") job->Signal(SIGTERM);
    }
    const auto ended = job->Wait(kLong);
    ASSERT_TRUE(ended.ok()) << ended.status();
    EXPECT_EQ(ended->exit_code, kExitSignalBase + SIGTERM) << ended->ToString();
    EXPECT_THAT(ended->err, Not(HasSubstr("exited with code"))) << "no rank is to blame";
    const size_t steps = Losses("tiny").size();
    EXPECT_THAT(ended->out, HasSubstr(absl::StrCat("SIGTERM: ended after step ", steps, ", which is saved")));
    const Words more = Joined({absl::StrCat("train.steps=", steps + 3)}, sets);
    const ProcessResult rest = Run(Train(2, more, {"--resume"}));
    ASSERT_TRUE(rest.ok()) << rest.ToString();
    EXPECT_THAT(rest.out, HasSubstr(absl::StrFormat("checkpoints/step-%08d", steps)));
    ASSERT_TRUE(Run(Train(2, Joined({"run.name=whole"}, more))).ok());
    EXPECT_EQ(Losses("tiny"), Losses("whole"));
    const std::string last = absl::StrFormat("%08d", steps + 3);
    EXPECT_EQ(Tensors("tiny", last), Tensors("whole", last));
    std::filesystem::remove_all(Path("runs"));
  }
}

TEST_F(TrainTest, Sigusr1SavesAndTheJobGoesOn) {
  auto job = *Subprocess::Start(Train(2, {"train.steps=1000000"}));
  ASSERT_TRUE(job->WaitForOutput(kTraining, kLong).ok());
  job->Signal(SIGUSR1);
  const absl::Status saved = job->WaitForOutput("is saved, as SIGUSR1 asks", kLong);
  ASSERT_TRUE(saved.ok()) << saved;
  job->Signal(SIGTERM);
  const auto result = job->Wait(kLong);
  ASSERT_TRUE(result.ok()) << result.status();
  std::smatch match;
  ASSERT_TRUE(std::regex_search(result->out, match, std::regex("step ([0-9]+) is saved, as SIGUSR1 asks"))) << result->out;
  const int64_t first = std::stoll(match[1]);
  EXPECT_GT(static_cast<int64_t>(Losses("tiny").size()), first);
  for (const int64_t step : {first, static_cast<int64_t>(Losses("tiny").size())}) {
    EXPECT_TRUE(std::filesystem::exists(Path(absl::StrFormat("runs/tiny/checkpoints/step-%08d/manifest.json", step)))) << step;
  }
}

TEST_F(TrainTest, WithoutCheckpointsSignalsSaveNothingAndSaySo) {
  auto job = *Subprocess::Start(Train(2, {"train.steps=1000000", "checkpoint.save_last=false"}));
  ASSERT_TRUE(job->WaitForOutput(kTraining, kLong).ok());
  job->Signal(SIGUSR1);
  ASSERT_TRUE(job->WaitForOutput("SIGUSR1 saves nothing, as checkpoint.interval is 0", kLong).ok());
  job->Signal(SIGTERM);
  const auto result = job->Wait(kLong);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->exit_code, kExitSignalBase + SIGTERM) << result->ToString();
  EXPECT_THAT(result->out, HasSubstr("nothing was saved"));
  EXPECT_TRUE(std::filesystem::is_empty(Path("runs/tiny/checkpoints")));
}

TEST_F(TrainTest, ResumingAtTheEndHasNothingLeftToDoAndIsNoFailure) {
  ASSERT_TRUE(Run(Train(2, {})).ok());
  const json before = Tensors("tiny", "00000012");
  for (const Words& sets : {Words{}, Words{"train.steps=7"}, Words{"checkpoint.resume=runs/tiny"}}) {
    const ProcessResult again = Run(Train(2, sets, {"--resume"}));
    ASSERT_TRUE(again.ok()) << again.ToString();
    EXPECT_THAT(again.out, AllOf(HasSubstr("step-00000012"), HasSubstr("nothing is left to do"), Not(HasSubstr("GEMM peak"))));
    EXPECT_EQ(Losses("tiny").size(), 12u);
    EXPECT_EQ(Tensors("tiny", "00000012"), before);
  }
}

TEST_F(TrainTest, LossThatIsNotFiniteEndsTheRunAndSavesNothingWrong) {
  const ProcessResult result =
      Run(Train(2, {"optimizer.lr=1e30", "optimizer.clip_grad=0", "checkpoint.interval=1", "scheduler.warmup_steps=0"}));
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, AllOf(HasSubstr("not finite"), HasSubstr("step ")));
  EXPECT_FALSE(std::filesystem::exists(Path("runs/tiny/checkpoints/step-00000012")));
}

TEST_F(TrainTest, FullDiskIsSaidAndTheCheckpointBeforeStaysWhole) {
  const std::string small = Path("small");
  std::filesystem::create_directory(small);
  if (mount("tmpfs", small.c_str(), "tmpfs", 0, "size=1600k") != 0) GTEST_SKIP() << "cannot mount a tmpfs here";
  // One checkpoint of about 0.8 MB fits; the next does not, as the one before it is kept until then.
  const ProcessResult result =
      Run(Train(2, {"checkpoint.interval=4", "checkpoint.keep=3"}, {"--output-dir", "small"}));
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("No space left on device"));
  EXPECT_THAT(result.err, HasSubstr("small/tiny/"));
  const ProcessResult generated =
      Run(Options({"generate", "--checkpoint", "small/tiny", "--prompt", "the ", "--length", "5"}, {}, {}));
  EXPECT_TRUE(generated.ok()) << generated.ToString();
  umount2(small.c_str(), MNT_DETACH);
}

TEST_F(TrainTest, BadInputsAreNamed) {
  struct Case {
    Words sets;
    Words expect;
  };
  WriteFile(Path("short.txt"), "too short");
  for (const Case& c : std::vector<Case>{
           {{"model.hiden_size=8"}, {"--set model.hiden_size=8", "did you mean model.hidden_size"}},
           {{"train.steps=many"}, {"train.steps"}},
           {{"parallel.expert=2"}, {"parallel.expert", "1 or 3 would fit"}},
           {{"data.path=nowhere.txt"}, {"nowhere.txt"}},
           {{"data.path=short.txt"}, {"short.txt", "tokens"}}}) {
    SubprocessOptions options = Train(3, {});
    for (const std::string& set : c.sets) {
      options.args.push_back("--set");
      options.args.push_back(set);
    }
    const ProcessResult result = Run(options);
    EXPECT_THAT(result.exit_code, ::testing::AnyOf(kExitUsage, kExitFailure)) << c.sets[0];
    for (const std::string& expect : c.expect) EXPECT_THAT(result.err, HasSubstr(expect));
  }
}

TEST_F(TrainTest, ARunsFolderHasOneJobAtATime) {
  auto first = *Subprocess::Start(Train(1, {"train.steps=1000000"}));
  ASSERT_TRUE(first->WaitForOutput("step", kLong).ok());
  const ProcessResult second = Run(Train(2, {}));
  EXPECT_EQ(second.exit_code, kExitFailure);
  EXPECT_THAT(second.err, HasSubstr("runs/tiny: another job is writing there"));
  EXPECT_EQ(second.out, "");
  EXPECT_TRUE(Run(Train(2, {"run.name=second"})).ok());
  first->Signal(SIGINT);
  ASSERT_TRUE(first->Wait(kEndMax).ok());
  EXPECT_TRUE(Run(Train(2, {})).ok());
}

TEST_F(TrainTest, OutputThatIsLostIsAnError) {
  SubprocessOptions options;
  options.args = {"sh", "-c", std::string(SHOAL_PROGRAM) + " config reference > /dev/full"};
  const ProcessResult result = Run(options);
  EXPECT_EQ(result.exit_code, kExitFailure);
  EXPECT_THAT(result.err, HasSubstr("cannot write to stdout: No space left on device"));
}

TEST_F(TrainTest, PortInUseIsNamed) {
  auto first = *Subprocess::Start(Train(1, {"train.steps=1000000", "run.name=first"}));
  ASSERT_TRUE(first->WaitForOutput("step", kLong).ok());
  std::smatch match;
  const std::string out = first->out();
  ASSERT_TRUE(std::regex_search(out, match, std::regex("http://127.0.0.1:([0-9]+)/metrics"))) << out;
  const ProcessResult second = Run(Train(1, {"telemetry.metrics_port=" + match[1].str()}));
  EXPECT_EQ(second.exit_code, kExitFailure);
  EXPECT_THAT(second.err, AllOf(HasSubstr(match[1].str()), HasSubstr("telemetry.metrics_port")));
}

TEST_F(TrainTest, ExportedModelContinuesWhereItWas) {
  ASSERT_TRUE(Run(Train(2, {"parallel.expert=2"})).ok());
  const ProcessResult exported = Run(Options({"export", "--checkpoint", "runs/tiny", "--out", "hf"}, {}, {}));
  ASSERT_TRUE(exported.ok()) << exported.ToString();
  EXPECT_EQ(json::parse(ReadFile(Path("hf/config.json")))["model_type"], "mixtral");
  const ProcessResult again = Run(Train(1, {"run.name=again", "run.init_from=hf", "train.steps=4"}));
  ASSERT_TRUE(again.ok()) << again.ToString();
  EXPECT_LT(Losses("again").front(), Losses("tiny").front() - 0.5);
  const ProcessResult from_run = Run(Options({"generate", "--checkpoint", "runs/tiny", "--prompt", "the ", "--length", "20"}, {}, {}));
  const ProcessResult from_folder = Run(Options({"generate", "--checkpoint", "hf", "--prompt", "the ", "--length", "20"}, {}, {}));
  ASSERT_TRUE(from_run.ok()) << from_run.ToString();
  EXPECT_EQ(from_run.out, from_folder.out);
  const ProcessResult wrong = Run(Train(1, {"run.init_from=hf", "model.num_local_experts=4"}));
  EXPECT_NE(wrong.exit_code, kExitOk);
  EXPECT_THAT(wrong.err, AllOf(HasSubstr("num_local_experts"), HasSubstr("hf")));
}

TEST_F(TrainTest, PackedTextTrainsLikeTheTextItself) {
  const ProcessResult packed = Run(Options({"data", "pack", "text.txt", "--output-prefix", "sets/packed"}, {}, {}));
  ASSERT_TRUE(packed.ok()) << packed.ToString();
  ASSERT_TRUE(Run(Train(2, {"run.name=text", "data.validation_fraction=0.1"})).ok());
  SubprocessOptions options = Train(2, {"run.name=packed", "data.kind=megatron", "data.validation_fraction=0.1"});
  options.args.insert(options.args.end(), {"--set", "data.path=sets/packed"});
  const ProcessResult result = Run(options);
  ASSERT_TRUE(result.ok()) << result.ToString();
  EXPECT_EQ(Losses("packed"), Losses("text"));
}

TEST_F(TrainTest, PrometheusScrapesARunningJob) {
  if (!testing::PrometheusServer::Installed()) GTEST_SKIP() << "Debian package prometheus is not installed";
  auto job = *Subprocess::Start(Train(2, {"train.steps=1000000"}));
  ASSERT_TRUE(job->WaitForOutput("metrics of the other ranks", kLong).ok());
  ASSERT_TRUE(job->WaitForOutput("step", kLong).ok());
  const std::string out = job->out();
  std::smatch first, second;
  ASSERT_TRUE(std::regex_search(out, first, std::regex("http://(127.0.0.1:[0-9]+)/metrics"))) << out;
  ASSERT_TRUE(std::regex_search(out, second, std::regex("port ([0-9]+) \\(rank 1\\)"))) << out;
  auto server = testing::PrometheusServer::Start({first[1].str(), "127.0.0.1:" + second[1].str()});
  ASSERT_TRUE(server.ok()) << server.status();
  const auto steps = (*server)->WaitFor("shoal_train_step > 3", kLong);
  ASSERT_TRUE(steps.ok()) << steps.status();
  const auto ranks = (*server)->WaitFor("count(shoal_rank_info) == 2", kLong);
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  const auto rate = (*server)->WaitFor("rate(shoal_train_tokens_total[5s]) > 0", kLong);
  EXPECT_TRUE(rate.ok()) << rate.status();
  const std::string address = first[1].str();
  const auto text = testing::HttpGet("127.0.0.1", std::stoi(address.substr(address.find(':') + 1)), "/metrics");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_TRUE(testing::CheckMetricsText(text->body).ok()) << testing::CheckMetricsText(text->body);
}

}  // namespace
}  // namespace shoal
