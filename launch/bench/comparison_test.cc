#include "launch/bench/comparison.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace shoal {
namespace {

// A folder with a "gloo_bench" that is this shell script.
class Comparison : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/comparison_test.XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    folder_ = name;
    options_.ops = {"all_to_all"};  // For which Gloo has one algorithm.
    options_.transports = {"shm"};
    options_.peers = {"gloo"};
    options_.sizes = {8, 64};
    options_.ranks = {2};
    options_.seconds = 0;
    options_.rounds = 1;
    options_.folder = folder_;
    options_.say = [this](const std::string& line) { said_ += line + "\n"; };
    options_.on_rows = [](absl::Span<const BenchRow>) { return absl::OkStatus(); };
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void WritePeer(const std::string& script) {
    const std::string path = folder_ + "/gloo_bench";
    std::ofstream(path) << "#!/bin/sh\n" << script;
    ASSERT_EQ(chmod(path.c_str(), 0755), 0);
  }
  const BenchRow& Find(const std::vector<BenchRow>& rows, const std::string& library, int64_t bytes) {
    for (const BenchRow& row : rows) {
      if (row.library == library && row.bytes == bytes) return row;
    }
    ADD_FAILURE() << "no row of " << library << " for " << bytes;
    return rows[0];
  }

  std::string folder_, said_;
  ComparisonOptions options_;
};

TEST_F(Comparison, OwnRanksAndPeersHaveARowForEachSize) {
  WritePeer("echo begin 8; echo result 8 0 2 4 3; echo begin 64; echo result 64 5 7\n");
  const auto rows = Compare(options_);
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 4u);
  for (int64_t bytes : {8, 64}) {
    EXPECT_GT(Find(*rows, "shoal", bytes).us.median, 0);
    EXPECT_EQ(Find(*rows, "shoal", bytes).wrong, 0);
  }
  EXPECT_EQ(Find(*rows, "gloo", 8).us.median, 3);
  EXPECT_EQ(Find(*rows, "gloo", 64).wrong, 5);
}

TEST_F(Comparison, APeerThatHangsAtOneSizeIsEndedAndMeasuredAtTheNext) {
  options_.patience = absl::Milliseconds(200);
  options_.peers = {"gloo"};
  // Arguments: RANKS OP ALGORITHM SECONDS BYTES...
  WritePeer("echo begin $5; [ $5 = 8 ] && exec sleep 1000; echo result $5 0 9\n");
  const auto rows = Compare(options_);
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(Find(*rows, "gloo", 8).failure, "hung");
  EXPECT_TRUE(std::isnan(Find(*rows, "gloo", 8).us.median));
  EXPECT_EQ(Find(*rows, "gloo", 64).us.median, 9);
}

TEST_F(Comparison, APeerThatDoesNotStartFailsAtAllSizesAndSaysWhy) {
  WritePeer("echo no such network >&2; exit 4\n");
  const auto rows = Compare(options_);
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(Find(*rows, "gloo", 8).failure, "failed");
  EXPECT_EQ(Find(*rows, "gloo", 64).failure, "failed");
  EXPECT_THAT(said_, ::testing::HasSubstr("exit status 4: no such network"));
}

TEST_F(Comparison, ALimitThatIsNotKnownHasNoRow) {
  options_.peers = {};
  options_.limits = true;
  options_.folder = folder_ + "/peers";
  std::filesystem::create_directory(options_.folder);
  WritePeer("");
  std::filesystem::rename(folder_ + "/gloo_bench", folder_ + "/bench_limits");
  const auto rows = Compare(options_);
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(rows->size(), 2u);  // Our own.
}

}  // namespace
}  // namespace shoal
