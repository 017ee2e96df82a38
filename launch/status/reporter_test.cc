#include "launch/status/reporter.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_split.h"
#include "launch/status/progress.h"
#include "tests/harness/prometheus.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

// A reporter with its own clock, whose output goes to a file.
class Desk {
 public:
  Desk() {
    options.run_dir = folder / "runs/a";
    options.run_name = "a";
    options.total_steps = 20;
    options.tokens_per_step = 1000;
    options.gemm_peak_flops = 400e9;
    options.bytes_per_token = 1;
    options.log_interval = 5;
    options.expert_counts_interval = 10;
    options.parameters = 5243000;
    options.active_parameters = 2120000;
    options.world_size = 2;
    options.model = "4 layers";
    options.precision = "fp32";
    options.moe_layers = {1};
    options.mode = OutputMode::kLog;
    options.now_seconds = [this] { return now; };
    out_ = open((folder / "out").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    options.out_fd = out_;
  }
  ~Desk() { close(out_); }

  void Start() {
    auto created = Reporter::Create(options);
    ASSERT_TRUE(created.ok()) << created.status();
    reporter = std::move(created).value();
  }
  static TrainRecord Record(int64_t step) {
    TrainRecord record;
    record.step = step;
    record.ce_loss = 5.0 - 0.1 * static_cast<double>(step);
    record.loss = record.ce_loss + 0.04;
    record.aux_loss = 2;
    record.learning_rate = 1e-3;
    record.grad_norm = 0.5;
    record.tokens = 1000;
    record.seconds = step == 0 ? 5 : 0.1;
    record.flops = 20e9;
    record.expert_counts = {{200, 300, 250, 250}};
    record.experts =
        ExpertSummary{.rank_max_over_mean = 1.5, .stay_host = 0.75, .weight_bytes = 1000, .owner_moves = 2};
    record.moe_layers = {1};
    record.phase_seconds = {{"forward", 0.04}};
    return record;
  }
  void Steps(int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      const TrainRecord record = Record(step);
      now += record.seconds;
      const absl::Status status = reporter->Step(record);
      ASSERT_TRUE(status.ok()) << status;
    }
  }
  void Eval(int64_t step, double loss) {
    const absl::Status status = reporter->Eval({.step = step, .loss = loss, .tokens = 500, .seconds = 0.5});
    ASSERT_TRUE(status.ok()) << status;
  }
  void Finish(const FinishRecord& record) {
    const absl::Status status = reporter->Finish(record);
    ASSERT_TRUE(status.ok()) << status;
  }
  std::string Out() const { return testing::ReadFile(folder / "out"); }
  std::vector<std::string> OutLines() const { return absl::StrSplit(Out(), '\n'); }
  std::vector<nlohmann::json> Records() const {
    std::vector<nlohmann::json> records;
    for (const std::string& line : std::vector<std::string>(
             absl::StrSplit(testing::ReadFile(options.run_dir + "/metrics.jsonl"), '\n'))) {
      if (!line.empty()) records.push_back(nlohmann::json::parse(line));
    }
    return records;
  }

  testing::TempDir folder;
  ReporterOptions options;
  std::unique_ptr<Reporter> reporter;
  double now = 100;

 private:
  int out_ = -1;
};

TEST(Reporter, LogHasALineEveryIntervalAndKeptValidations) {
  Desk desk;
  desk.Start();
  desk.Steps(0, 10);
  desk.Eval(9, 4.2);
  desk.Steps(10, 20);
  desk.Eval(19, 3.2);
  EXPECT_EQ(desk.Out(),
            "shoal: a\n"
            "  model      5.24M parameters, 2.12M active per token: 4 layers\n"
            "  ranks      2 ranks x 1 thread\n"
            "  precision  fp32\n"
            "  training   20 steps x 1,000 tokens = 20.0k tokens\n"
            "  GEMM peak  400 GFLOP/s of all ranks, measured\n"
            "  files      " +
                desk.options.run_dir +
                "\n"
                "\n"
                "step  1/20  eta     --  loss 5.0000  lr 1.0e-03  grad norm 0.50  expert balance 1.20\n"
                "step  5/20  eta   1.5s  loss 4.6000  lr 1.0e-03  grad 0.50  10.0k tok/s   200 GFLOP/s   50% "
                "peak  balance 1.20\n"
                "step 10/20  eta   1.0s  loss 4.1000  lr 1.0e-03  grad 0.50  10.0k tok/s   200 GFLOP/s   50% "
                "peak  balance 1.20\n"
                "step 10/20  validation loss 4.2000  6.0593 bits per byte  in 0.5s\n"
                "step 15/20  eta   0.5s  loss 3.6000  lr 1.0e-03  grad 0.50  10.0k tok/s   200 GFLOP/s   50% "
                "peak  balance 1.20\n"
                "step 20/20  eta     0s  loss 3.1000  lr 1.0e-03  grad 0.50  10.0k tok/s   200 GFLOP/s   50% "
                "peak  balance 1.20\n"
                "step 20/20  validation loss 3.2000  4.6166 bits per byte  in 0.5s  best so far\n");
}

TEST(Reporter, TerminalHasOneUpdatingLineAndKeptValidations) {
  Desk desk;
  desk.options.mode = OutputMode::kTerminal;
  desk.options.columns = 79;
  setenv("NO_COLOR", "1", 1);
  desk.Start();
  unsetenv("NO_COLOR");
  const std::string header = desk.Out();
  desk.Steps(0, 1);
  desk.now += 0.1;  // Long enough for the next step to be drawn.
  desk.Steps(1, 2);
  desk.Eval(1, 4.2);
  desk.now += 0.1;
  desk.Steps(2, 3);
  const std::string shown = desk.Out().substr(header.size());
  EXPECT_EQ(shown,
            "\rstep  1/20  eta     --  loss 5.0000  lr 1.0e-03  grad norm 0.50  balance 1.20\x1b[K"
            "\rstep  2/20  eta   3.6s  loss 4.9000  10.0k tok/s   50% peak  bal 1.20\x1b[K"
            "\r\x1b[Kstep  2/20  validation loss 4.2000  6.0593 bits per byte  in 0.5s\n"
            "\rstep  3/20  eta   3.4s  loss 4.8000  10.0k tok/s   50% peak  bal 1.20\x1b[K");
  desk.reporter.reset();  // The shell's prompt begins a line of its own.
  EXPECT_THAT(desk.Out(), EndsWith("\n"));
}

TEST(Reporter, TerminalIsNotRedrawnMoreOftenThanItCanBeRead) {
  Desk desk;
  desk.options.mode = OutputMode::kTerminal;
  desk.options.columns = 79;
  desk.options.total_steps = 2000;
  desk.Start();
  for (int64_t step = 0; step < 1000; ++step) {
    TrainRecord record = Desk::Record(step);
    record.seconds = 0.001;
    desk.now += record.seconds;
    ASSERT_TRUE(desk.reporter->Step(record).ok());
  }
  const std::string out = desk.Out();
  EXPECT_LE(std::count(out.begin(), out.end(), '\r'), 12);
}

TEST(Reporter, AutoModeKnowsATerminalAndItsWidth) {
  int terminal = -1, process = -1;
  const winsize size = {.ws_row = 24, .ws_col = 60, .ws_xpixel = 0, .ws_ypixel = 0};
  ASSERT_EQ(openpty(&terminal, &process, nullptr, nullptr, &size), 0);
  termios settings{};
  ASSERT_EQ(tcgetattr(process, &settings), 0);
  cfmakeraw(&settings);
  ASSERT_EQ(tcsetattr(process, TCSANOW, &settings), 0);
  setenv("TERM", "xterm", 1);
  Desk desk;
  desk.options.mode = OutputMode::kAuto;
  desk.options.out_fd = process;
  desk.Start();
  desk.Steps(0, 2);
  desk.reporter.reset();
  // What was written reaches the other side some time later: all of it is there once reading ends.
  close(process);
  std::string shown;
  std::array<char, 4096> text{};
  for (ssize_t got; (got = read(terminal, text.data(), text.size())) > 0;)
    shown.append(text.data(), static_cast<size_t>(got));
  close(terminal);
  shown.erase(0, std::min(shown.find('\r'), shown.size()));  // The block at the start.
  EXPECT_THAT(shown, AllOf(StartsWith("\r"), HasSubstr("\x1b[")));
  for (size_t at; (at = shown.find("\x1b[")) != std::string::npos;) {
    shown.erase(at, shown.find_first_of("mK", at) - at + 1);
  }
  EXPECT_THAT(std::vector<std::string>(absl::StrSplit(shown, absl::ByAnyChar("\r\n"))), Each(SizeIs(Le(59))));
}

TEST(Reporter, AutoModeTakesAFileForALog) {
  Desk desk;
  desk.options.mode = OutputMode::kAuto;
  desk.Start();
  desk.Steps(0, 20);
  EXPECT_THAT(desk.Out(), Not(HasSubstr("\x1b")));
  EXPECT_THAT(desk.Out(), Not(HasSubstr("\r")));
}

TEST(Reporter, WritesOneRecordAStepAndAValidation) {
  Desk desk;
  desk.Start();
  desk.Steps(0, 12);
  desk.Eval(11, 3.5);
  const std::vector<nlohmann::json> records = desk.Records();
  ASSERT_EQ(records.size(), 13u);
  for (int64_t step = 0; step < 12; ++step) {
    const nlohmann::json& record = records[static_cast<size_t>(step)];
    EXPECT_EQ(record["step"], step);
    EXPECT_EQ(record["ce_loss"].get<double>(), Desk::Record(step).ce_loss);
    EXPECT_EQ(record.contains("expert_counts"), step % 10 == 0) << step;
  }
  EXPECT_EQ(records[0]["expert_counts"], nlohmann::json::parse("[[200,300,250,250]]"));
  EXPECT_EQ(records[12]["validation_loss"], 3.5);
}

TEST(Reporter, ResumeContinuesFileCurveAndCounts) {
  Desk desk;
  desk.Start();
  desk.Steps(0, 8);
  desk.Eval(3, 4.0);
  desk.reporter.reset();
  desk.options.start_step = 5;
  desk.Start();
  desk.Steps(5, 20);
  desk.Finish({});
  const std::vector<nlohmann::json> records = desk.Records();
  ASSERT_EQ(records.size(), 21u);
  EXPECT_EQ(records[20]["step"], 19);
  EXPECT_THAT(desk.Out(), HasSubstr("20 of 20, 15 of them since the resume"));
  EXPECT_THAT(desk.Out(), HasSubstr("validation loss  4.0000 nats per token"));
  EXPECT_THAT(testing::ReadFile(desk.options.run_dir + "/loss.svg"), HasSubstr(">4.000</text>"));
}

TEST(Reporter, FinishPrintsTableSampleAndPlaces) {
  Desk desk;
  desk.Start();
  desk.Steps(0, 20);
  desk.Eval(19, 3.2);
  const size_t before = desk.Out().size();
  FinishRecord record;
  record.sample_prompt = "Call";
  record.sample_text = "Call me Ishmael.\x1b[2J";
  record.peak_memory_bytes = {400 << 20, 390 << 20};
  record.checkpoint_dir = "runs/a/checkpoints/step-20";
  record.hints = {"./shoal generate --checkpoint runs/a"};
  desk.Finish(record);
  const std::string dir = desk.options.run_dir;
  EXPECT_EQ(desk.Out().substr(before),
            "\nfinished\n"
            "  steps            20 of 20\n"
            "  tokens           20,000\n"
            "  wall time        6.9s, 0.5s in validations\n"
            "  step time        0.100 s median, 0.100 to 0.100 s for nine in ten\n"
            "  tokens/s         10.0k median\n"
            "  compute          200 GFLOP/s median, 50% of the measured GEMM peak (400 GFLOP/s)\n"
            "  train loss       4.0500 nats per token, mean of the last 20 steps\n"
            "  validation loss  3.2000 nats per token, 4.6166 bits per byte\n"
            "  expert balance   1.20 max over mean, least balanced layer\n"
            "  peak memory      400 MiB, 390 MiB (by rank)\n"
            "\nsample of generated text, after \"Call\"\n"
            "    Call me Ishmael.?[2J\n"
            "\nwritten\n"
            "  metrics     " +
                dir +
                "/metrics.jsonl\n"
                "  loss curve  " +
                dir +
                "/loss.svg\n"
                "  checkpoint  runs/a/checkpoints/step-20\n"
                "\nnext\n"
                "  ./shoal generate --checkpoint runs/a\n");
}

TEST(Reporter, FailedRunSaysWhyAndStillWritesTheCurve) {
  Desk desk;
  desk.Start();
  desk.Steps(0, 3);
  desk.Finish({.status = absl::AbortedError("rank 1: killed by signal 9"),
               .sample_prompt = "",
               .sample_text = "",
               .peak_memory_bytes = {},
               .checkpoint_dir = "",
               .config_path = "",
               .log_dir = "",
               .hints = {}});
  EXPECT_THAT(desk.Out(),
              HasSubstr("stopped before the end\n  reason          rank 1: killed by signal 9\n"));
  EXPECT_THAT(desk.Out(), HasSubstr("3 of 20\n"));
  EXPECT_TRUE(std::filesystem::exists(desk.options.run_dir + "/loss.svg"));
}

TEST(Reporter, NoLineIsWiderThanTheLimit) {
  Desk desk;
  desk.options.data = std::string(300, 'x');
  desk.Start();
  desk.Steps(0, 20);
  FinishRecord record;
  for (int i = 0; i < 100; ++i) record.sample_text += "some words ";
  record.status = absl::InternalError(std::string(500, 'e'));
  desk.Finish(record);
  EXPECT_THAT(desk.OutLines(), Each(SizeIs(Le(kColumnsMax))));
}

TEST(Reporter, FullDiskEndsTheStepWithAnErrorNamingTheFile) {
  Desk desk;
  std::filesystem::create_directories(desk.options.run_dir);
  ASSERT_EQ(symlink("/dev/full", (desk.options.run_dir + "/metrics.jsonl").c_str()), 0);
  desk.Start();
  const absl::Status status = desk.reporter->Step(Desk::Record(0));
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(desk.options.run_dir + "/metrics.jsonl"));
}

TEST(Reporter, UnusableRunFolderIsAnErrorNamingIt) {
  Desk desk;
  testing::WriteFile(desk.folder / "runs", "a file in the way");
  const auto reporter = Reporter::Create(desk.options);
  ASSERT_FALSE(reporter.ok());
  EXPECT_THAT(std::string(reporter.status().message()), HasSubstr(desk.folder / "runs"));
}

TEST(Reporter, OtherRanksNeitherPrintNorWrite) {
  Desk desk;
  desk.options.is_rank0 = false;
  desk.Start();
  desk.Steps(0, 20);
  desk.Eval(19, 3);
  desk.reporter->Note("note");
  desk.Finish({});
  EXPECT_EQ(desk.Out(), "");
  EXPECT_FALSE(std::filesystem::exists(desk.folder / "runs"));
}

TEST(Reporter, FeedsTheMetrics) {
  auto server = MetricsServer::Create("127.0.0.1", MetricsServer::kNoPort);
  ASSERT_TRUE(server.ok()) << server.status();
  Desk desk;
  desk.options.metrics = server->get();
  desk.Start();
  desk.Steps(0, 3);
  desk.Eval(2, 3.25);
  TrainRecord broken = Desk::Record(3);
  broken.loss = std::numeric_limits<double>::quiet_NaN();
  ASSERT_TRUE(desk.reporter->SkippedStep(broken).ok());
  const std::string text = (*server)->Text();
  for (const char* line : {
           "shoal_train_step 3\n",
           "shoal_train_steps_total{outcome=\"committed\"} 3\n",
           "shoal_train_steps_total{outcome=\"skipped_nonfinite\"} 1\n",
           "shoal_train_anomalies_total{kind=\"nan_loss\"} 1\n",
           "shoal_train_anomalies_total{kind=\"nan_grad\"} 0\n",
           "shoal_train_tokens_total 3000\n",
           "shoal_train_model_flops_total 60000000000\n",
           "shoal_train_mfu_ratio 0.5\n",
           "shoal_train_loss{objective=\"lm\"} 4.8\n",
           "shoal_train_loss{objective=\"load_balance\"} 2\n",
           "shoal_train_phase_seconds_total{phase=\"forward\"} 0.12\n",
           "shoal_eval_loss{dataset=\"validation\"} 3.25\n",
           "shoal_moe_expert_load_ratio{layer=\"1\",stat=\"max\"} 1.2\n",
           "shoal_moe_expert_load_ratio{layer=\"1\",stat=\"min\"} 0.8\n",
           "shoal_moe_idle_experts{layer=\"1\"} 0\n",
           "shoal_moe_max_over_mean_ratio{of=\"ranks\"} 1.5\n",
           "shoal_moe_local_rows_ratio{on=\"host\"} 0.75\n",
           "shoal_moe_copied_bytes_total{what=\"weights\"} 3000\n",
           "shoal_moe_owner_moves_total 6\n",
           "shoal_job_state{state=\"train\"} 1\n",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_NEAR((*server)->Layers({1})[0].max_violation.value(), 0.2, 1e-12);
  desk.Finish({});
  EXPECT_THAT((*server)->Text(), HasSubstr("shoal_job_state{state=\"done\"} 1\n"));
  if (testing::PrometheusServer::Installed()) {
    const absl::Status status = testing::CheckMetricsText((*server)->Text());
    EXPECT_TRUE(status.ok()) << status;
  }
}

}  // namespace
}  // namespace shoal
