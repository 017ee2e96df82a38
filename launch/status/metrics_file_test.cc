#include "launch/status/metrics_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using testing::TempDir;

TrainRecord Record(int64_t step) {
  TrainRecord record;
  record.step = step;
  record.loss = 1.0 / 3 + static_cast<double>(step);
  record.ce_loss = 0.1 + static_cast<double>(step);
  record.tokens = 4096;
  record.seconds = 0.5;
  return record;
}

std::unique_ptr<MetricsFile> OpenOrDie(const std::string& path, int64_t first_step) {
  auto file = MetricsFile::Open(path, first_step);
  EXPECT_TRUE(file.ok()) << file.status();
  return std::move(file).value();
}

void AppendOrDie(MetricsFile& file, const std::string& json) {
  const absl::Status status = file.Append(json);
  EXPECT_TRUE(status.ok()) << status;
}

TEST(StepJson, HasExactlyTheKeysInOrder) {
  TrainRecord record = Record(12);
  record.aux_loss = 2.01;
  record.z_loss = 0.5;
  record.learning_rate = 3e-4;
  record.grad_norm = 1.25;
  record.expert_counts = {{1, 2}, {3, 4}};
  EXPECT_EQ(StepJson(record, ExpertCounts::kInclude),
            "{\"step\":12,\"loss\":12.333333333333334,\"ce_loss\":12.1,\"aux_loss\":2.01,\"z_loss\":0.5,"
            "\"lr\":3e-04,"
            "\"grad_norm\":1.25,\"tokens\":4096,\"tokens_per_second\":8192,\"seconds\":0.5,"
            "\"expert_counts\":[[1,2],[3,4]]}");
  EXPECT_FALSE(nlohmann::json::parse(StepJson(record, ExpertCounts::kOmit)).contains("expert_counts"));
}

TEST(StepJson, HasExpertsWhereTheyAreKnown) {
  TrainRecord record = Record(0);
  EXPECT_FALSE(nlohmann::json::parse(StepJson(record, ExpertCounts::kOmit)).contains("experts"));
  record.experts = ExpertSummary{.expert_max_over_mean = 1.5,
                                 .rank_max_over_mean = 1.25,
                                 .hottest_expert = 2,
                                 .stay_rank = 0.5,
                                 .stay_host = 0.75,
                                 .dropped = 0.125,
                                 .copies_per_layer = 3,
                                 .weight_bytes = 100,
                                 .gradient_bytes = 200,
                                 .owner_moves = 4};
  EXPECT_EQ(nlohmann::json::parse(StepJson(record, ExpertCounts::kOmit))["experts"],
            nlohmann::json::parse(R"({"hottest_expert": 2, "expert_max_over_mean": 1.5, "rank_max_over_mean": 1.25,
                "stay_rank": 0.5, "stay_host": 0.75, "dropped": 0.125, "copies_per_layer": 3, "weight_bytes": 100,
                "gradient_bytes": 200, "owner_moves": 4})"));
}

TEST(StepJson, NumbersReadBackExactly) {
  for (const double value : {1.0 / 3, 1e-300, 5e-324, 1.7976931348623157e308, -0.1, 123456789.123456789}) {
    TrainRecord record = Record(0);
    record.loss = value;
    const nlohmann::json json = nlohmann::json::parse(StepJson(record, ExpertCounts::kOmit));
    EXPECT_EQ(json["loss"].get<double>(), value);
  }
}

TEST(StepJson, WhatIsNotFiniteIsNull) {
  TrainRecord record = Record(0);
  record.loss = std::numeric_limits<double>::quiet_NaN();
  record.grad_norm = -std::numeric_limits<double>::infinity();
  const nlohmann::json json = nlohmann::json::parse(StepJson(record, ExpertCounts::kOmit));
  EXPECT_TRUE(json["loss"].is_null());
  EXPECT_TRUE(json["grad_norm"].is_null());
}

TEST(MetricsFile, ResumeDropsLaterRecordsAndATornLine) {
  const TempDir folder;
  const std::string path = folder / "metrics.jsonl";
  std::string kept;
  {
    const auto file = OpenOrDie(path, 0);
    for (int64_t step = 0; step < 6; ++step) {
      AppendOrDie(*file, StepJson(Record(step), ExpertCounts::kOmit));
      if (step == 2) AppendOrDie(*file, EvalJson({.step = 2, .loss = 1.5, .tokens = 10, .seconds = 1}));
      if (step == 3) kept = testing::ReadFile(path);
    }
  }
  testing::WriteFile(path, testing::ReadFile(path) + "{\"step\":3,\"lo");
  const auto file = OpenOrDie(path, 4);
  EXPECT_EQ(testing::ReadFile(path), kept);
  EXPECT_THAT(file->history().train, ElementsAre(Pair(0, 0.1), Pair(1, 1.1), Pair(2, 2.1), Pair(3, 3.1)));
  EXPECT_THAT(file->history().validation, ElementsAre(Pair(2, 1.5)));
  AppendOrDie(*file, StepJson(Record(4), ExpertCounts::kOmit));
  EXPECT_EQ(testing::ReadFile(path), kept + StepJson(Record(4), ExpertCounts::kOmit) + "\n");
}

TEST(MetricsFile, ResumeReadsNullAsNaN) {
  const TempDir folder;
  TrainRecord record = Record(0);
  record.ce_loss = std::numeric_limits<double>::quiet_NaN();
  testing::WriteFile(folder / "m.jsonl", StepJson(record, ExpertCounts::kOmit) + "\n");
  const auto file = OpenOrDie(folder / "m.jsonl", 9);
  ASSERT_EQ(file->history().train.size(), 1u);
  EXPECT_TRUE(std::isnan(file->history().train[0].second));
}

TEST(MetricsFile, ResumeWithNothingToDropLeavesTheFileAlone) {
  const TempDir folder;
  const std::string path = folder / "metrics.jsonl";
  testing::WriteFile(path, StepJson(Record(0), ExpertCounts::kOmit) + "\n");
  const auto before = std::filesystem::last_write_time(path);
  OpenOrDie(path, 1);
  EXPECT_EQ(std::filesystem::last_write_time(path), before);
}

TEST(MetricsFile, ResumeWithoutAFileBeginsOne) {
  const TempDir folder;
  AppendOrDie(*OpenOrDie(folder / "metrics.jsonl", 10), "{\"step\":10}");
  EXPECT_EQ(testing::ReadFile(folder / "metrics.jsonl"), "{\"step\":10}\n");
}

TEST(MetricsFile, NewRunKeepsTheOldFileBeside) {
  const TempDir folder;
  testing::WriteFile(folder / "metrics.jsonl", "{\"step\":0}\n");
  OpenOrDie(folder / "metrics.jsonl", 0);
  EXPECT_EQ(testing::ReadFile(folder / "metrics.jsonl"), "");
  EXPECT_EQ(testing::ReadFile(folder / "metrics.previous.jsonl"), "{\"step\":0}\n");
}

TEST(MetricsFile, FullDiskIsResourceExhaustedAndNamesTheFile) {
  const TempDir folder;
  ASSERT_EQ(symlink("/dev/full", (folder / "metrics.jsonl").c_str()), 0);
  const auto file = OpenOrDie(folder / "metrics.jsonl", 0);
  const absl::Status status = file->Append("{}");
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(folder / "metrics.jsonl"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("No space left"));
}

// A file size limit cuts a write short as a filling disk does.
TEST(MetricsFile, ShortWriteLeavesWholeLines) {
  const TempDir folder;
  const auto file = OpenOrDie(folder / "metrics.jsonl", 0);
  AppendOrDie(*file, "{\"step\":0}");
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit tight = {15, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &tight);
  const absl::Status status = file->Append("{\"step\":1}");
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(testing::ReadFile(folder / "metrics.jsonl"), "{\"step\":0}\n");
}

TEST(MetricsFile, MissingFolderIsNotFoundAndNamed) {
  const TempDir folder;
  const auto file = MetricsFile::Open(folder / "no/metrics.jsonl", 0);
  EXPECT_TRUE(absl::IsNotFound(file.status())) << file.status();
  EXPECT_THAT(std::string(file.status().message()), HasSubstr("no/metrics.jsonl"));
}

}  // namespace
}  // namespace shoal
