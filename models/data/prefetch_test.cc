#include "models/data/prefetch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "models/data/testing.h"

namespace shoal {
namespace {

// Rows hold [step, row]. Counts reads, can fail at a step, and can hold reads back.
class FakeBatches : public BatchSource {
 public:
  int64_t steps() const override { return kEndless; }
  int64_t rows_per_step() const override { return 8; }
  int64_t seq() const override { return 1; }
  absl::Status ReadRows(int64_t step, int64_t row_begin, const Tensor& out) const override {
    MutexLock lock(&mutex_);
    reads_.push_back(step);
    changed_.NotifyAll();
    while (held_) changed_.Wait(&mutex_);
    if (fail_at_ == step) return absl::DataLossError(absl::StrCat("step ", step, " is damaged"));
    for (int64_t row = 0; row < out.dim(0); ++row) {
      out.span<int32_t>()[row * 2] = static_cast<int32_t>(step);
      out.span<int32_t>()[row * 2 + 1] = static_cast<int32_t>(row_begin + row);
    }
    return absl::OkStatus();
  }

  void FailAt(std::optional<int64_t> step) {
    MutexLock lock(&mutex_);
    fail_at_ = step;
  }
  void Hold(bool held) {
    MutexLock lock(&mutex_);
    held_ = held;
    changed_.NotifyAll();
  }
  // Returns the steps read once there are `count` of them.
  std::vector<int64_t> WaitForReads(size_t count) const {
    MutexLock lock(&mutex_);
    while (reads_.size() < count) changed_.Wait(&mutex_);
    return reads_;
  }

 private:
  mutable Mutex mutex_;
  mutable CondVar changed_;
  mutable std::vector<int64_t> reads_ ABSL_GUARDED_BY(mutex_);
  std::optional<int64_t> fail_at_ ABSL_GUARDED_BY(mutex_);
  bool held_ ABSL_GUARDED_BY(mutex_) = false;
};

void ExpectStep(const absl::StatusOr<Tensor>& rows, int64_t step, int64_t row_begin, int64_t count) {
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->shape(), (Shape{count, 2}));
  for (int64_t row = 0; row < count; ++row) {
    EXPECT_EQ(rows->span<int32_t>()[row * 2], step);
    EXPECT_EQ(rows->span<int32_t>()[row * 2 + 1], row_begin + row);
  }
}

TEST(Prefetcher, GivesTheStepsInOrder) {
  const auto source = std::make_shared<FakeBatches>();
  Prefetcher prefetcher(source, {.row_begin = 3, .rows = 2, .first_step = 100});
  for (int64_t step = 100; step < 600; ++step) ExpectStep(prefetcher.Next(step), step, 3, 2);
}

TEST(Prefetcher, ReadsTwoStepsAheadAndNoMore) {
  const auto source = std::make_shared<FakeBatches>();
  std::vector<int64_t> reads;
  {
    Prefetcher prefetcher(source, {.rows = 1});
    EXPECT_EQ(source->WaitForReads(2), (std::vector<int64_t>{0, 1}));
    ExpectStep(prefetcher.Next(0), 0, 0, 1);
    EXPECT_EQ(source->WaitForReads(3), (std::vector<int64_t>{0, 1, 2}));
  }
  // The thread has ended: what it has read now is all that it ever read.
  EXPECT_EQ(source->WaitForReads(3), (std::vector<int64_t>{0, 1, 2}));
}

TEST(Prefetcher, GoesBackAndForth) {
  const auto source = std::make_shared<FakeBatches>();
  Prefetcher prefetcher(source, {.rows = 1});
  for (const int64_t step : {0, 1, 2, 1, 2, 3, 50, 51, 7, 7, 7, 8, 0})
    ExpectStep(prefetcher.Next(step), step, 0, 1);
}

TEST(Prefetcher, DropsAReadThatBeganBeforeAJump) {
  const auto source = std::make_shared<FakeBatches>();
  source->Hold(true);
  Prefetcher prefetcher(source, {.rows = 1});
  source->WaitForReads(1);  // Of step 0, held back.
  std::thread release([&] { source->Hold(false); });
  ExpectStep(prefetcher.Next(9), 9, 0, 1);
  ExpectStep(prefetcher.Next(10), 10, 0, 1);
  release.join();
}

TEST(Prefetcher, GivesTheErrorOfAStepAndRetriesWhenAskedAgain) {
  const auto source = std::make_shared<FakeBatches>();
  source->FailAt(2);
  Prefetcher prefetcher(source, {.rows = 1});
  ExpectStep(prefetcher.Next(0), 0, 0, 1);
  ExpectStep(prefetcher.Next(1), 1, 0, 1);
  EXPECT_EQ(prefetcher.Next(2).status(), absl::DataLossError("step 2 is damaged"));
  EXPECT_EQ(prefetcher.Next(2).status(), absl::DataLossError("step 2 is damaged"));
  source->FailAt(std::nullopt);
  ExpectStep(prefetcher.Next(2), 2, 0, 1);
  ExpectStep(prefetcher.Next(3), 3, 0, 1);
}

TEST(Prefetcher, ARankWithoutRowsGetsNone) {
  const auto source = std::make_shared<FakeBatches>();
  Prefetcher prefetcher(source, {.row_begin = 8, .rows = 0});
  ExpectStep(prefetcher.Next(0), 0, 8, 0);
  ExpectStep(prefetcher.Next(1), 1, 8, 0);
}

TEST(Prefetcher, StopsInAnyState) {
  for (int asked = 0; asked < 200; ++asked) {
    const auto source = std::make_shared<FakeBatches>();
    source->FailAt(asked % 3);
    Prefetcher prefetcher(source, {.rows = 1});
    for (int64_t step = 0; step < asked % 5; ++step) EXPECT_EQ(prefetcher.Next(step).ok(), step != asked % 3);
  }
}

TEST(Prefetcher, MatchesTheSourceItReads) {
  const BatchSourcePtr source =
      TrainingWindows(RandomTokens(1, 50, 5000), {.seed = 6, .seq = 16, .batch = 10}).value();
  Prefetcher prefetcher(source, {.row_begin = 2, .rows = 5, .first_step = 30});
  for (int64_t step = 30; step < 120; ++step) {
    const Tensor rows = prefetcher.Next(step).value();
    const absl::Span<int32_t> ids = rows.span<int32_t>();
    ASSERT_EQ(std::vector<int32_t>(ids.begin(), ids.end()), testing::Rows(*source, step, 2, 5));
  }
}

}  // namespace
}  // namespace shoal
