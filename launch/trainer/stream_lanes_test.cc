#include "launch/trainer/stream_lanes.h"

#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/device/device.h"
#include "runtime/device/fake_device.h"
#include "runtime/tensor/tensor.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Streams work only when they are waited for: what ran tells who waited for what.
class StreamLanesTest : public testing::Test {
 protected:
  int Add(Lane lane, absl::InlinedVector<int, 4> after = {}) {
    graph_.tasks.push_back({.op = Op::kPack, .lane = lane, .layer = static_cast<int>(graph_.tasks.size()), .after = std::move(after)});
    return static_cast<int>(graph_.tasks.size()) - 1;
  }
  // A task of a stream puts its number there; another one notes what has run when it begins, by task.
  absl::Status Run(StreamLanes* lanes, StepRecord* record) {
    seen_.assign(graph_.tasks.size(), {});
    const auto body = [&](const Task& task) -> absl::StatusOr<double> {
      SHOAL_RETURN_IF_ERROR(lanes->Begin(task));
      if (task.lane == Lane::kCompute || task.lane == Lane::kCopy) {
        Stream& stream = task.lane == Lane::kCompute ? *compute_ : *copy_;
        fake_.Submit(stream.handle(), [this, number = task.layer] {
          ran_.push_back(number);
          return DeviceResult{};
        });
        if (task.layer == fails_) FillWithZeros(Empty({1}, DType::kF32, stream), stream);
      } else {
        seen_[static_cast<size_t>(task.layer)] = ran_;
      }
      SHOAL_RETURN_IF_ERROR(lanes->End(task));
      return 1;
    };
    lanes->Start();
    return executor_.Run(graph_, body, nullptr, record);
  }

  std::vector<int> ran_;  // Streams that end do what is left of their work.
  std::vector<std::vector<int>> seen_;
  FakeDevice fake_{{.progress = FakeDeviceOptions::Progress::kByWaits}};
  std::unique_ptr<Device> device_ = *Device::Create(fake_.api(), 0);
  std::unique_ptr<Stream> compute_ = *device_->NewStream(), copy_ = *device_->NewStream();
  Executor executor_;
  Graph graph_;
  int fails_ = -1;  // This task's body makes its stream fail.
};

TEST_F(StreamLanesTest, TheHostRunsAheadOfStreamsThatWaitForEachOther) {
  const int first = Add(Lane::kCompute), copied = Add(Lane::kCopy, {first});
  Add(Lane::kCompute);  // Runs beside the copy, and before it here: it is put there first, and the copy runs when someone waits for it.
  Add(Lane::kCompute, {copied});
  StreamLanes lanes(graph_, *compute_, *copy_, Timing::kNo);
  ASSERT_TRUE(Run(&lanes, nullptr).ok());
  EXPECT_THAT(ran_, IsEmpty());
  EXPECT_EQ(device_->waits().waits, 0);
  ASSERT_TRUE(compute_->Wait().ok());
  EXPECT_THAT(ran_, ElementsAre(0, 2, 1, 3));
}

TEST_F(StreamLanesTest, CommunicationBlocksItsOwnLaneUntilWhatItNeedsIsThere) {
  const int a = Add(Lane::kCompute), b = Add(Lane::kCompute, {a});
  const int sent = Add(Lane::kIntra, {a, b});  // Of a lane's tasks the last is waited for.
  Add(Lane::kCompute);
  const int copied = Add(Lane::kCopy, {sent});
  Add(Lane::kControl, {copied, b});
  StreamLanes lanes(graph_, *compute_, *copy_, Timing::kNo);
  ASSERT_TRUE(Run(&lanes, nullptr).ok());
  EXPECT_THAT(seen_[static_cast<size_t>(sent)], ElementsAre(0, 1));
  EXPECT_THAT(seen_[5], ElementsAre(0, 1, 4)) << "nobody waits for task 3";
  EXPECT_EQ(device_->waits().waits, 3) << "one for each lane of streams that a task of communication depends on";
  EXPECT_EQ(fake_.Calls("record"), 2) << "of what somebody waits for: tasks 1 and 4";
}

TEST_F(StreamLanesTest, AGraphOfOneLaneHasNoEvents) {
  Add(Lane::kCompute, {Add(Lane::kCompute)});
  StreamLanes lanes(graph_, *compute_, *copy_, Timing::kNo);
  ASSERT_TRUE(Run(&lanes, nullptr).ok());
  EXPECT_EQ(fake_.Calls("record") + fake_.Calls("wait_for"), 0);
}

TEST_F(StreamLanesTest, AStreamThatFailsEndsTheRunWithTheTask) {
  Add(Lane::kCompute, {Add(Lane::kCopy, {Add(Lane::kCompute)})});
  fails_ = 1;
  fake_.FailCall("fill", 1, DeviceResult::Code::kFailed, "the bus fell off");
  StreamLanes lanes(graph_, *compute_, *copy_, Timing::kNo);
  const absl::Status status = Run(&lanes, nullptr);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1 pack forward"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("the bus fell off"));
}

// Only the device knows of it, so whoever waits first says what for.
TEST_F(StreamLanesTest, WorkThatFailsIsMetByTheLaneThatWaitsForIt) {
  Add(Lane::kIntra, {Add(Lane::kCompute)});
  fake_.FailCall("kernel", 1, DeviceResult::Code::kFailed, "an illegal address was met");
  StreamLanes lanes(graph_, *compute_, *copy_, Timing::kNo);
  const absl::Status status = Run(&lanes, nullptr);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1 pack forward: after layer 0 pack forward: fake:0"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("an illegal address was met"));
  EXPECT_FALSE(compute_->Wait().ok());
}

TEST_F(StreamLanesTest, TimesAreTheDevices) {
  const int a = Add(Lane::kCompute);
  const int b = Add(Lane::kCopy, {a});
  const int c = Add(Lane::kCompute, {b}), d = Add(Lane::kCompute, {c});
  StreamLanes lanes(graph_, *compute_, *copy_, Timing::kYes);
  StepRecord record;
  ASSERT_TRUE(Run(&lanes, &record).ok());
  EXPECT_FALSE(lanes.SetTimes(&record).ok()) << "nothing has run";
  ASSERT_TRUE(compute_->Wait().ok());
  ASSERT_TRUE(lanes.SetTimes(&record).ok());
  const auto task = [&](int index) { return record.tasks[static_cast<size_t>(index)]; };
  // The fake device takes a millisecond for each piece of work: events, waiting and the tasks' own.
  EXPECT_EQ(task(a).end_ns - task(a).begin_ns, 2'000'000);
  EXPECT_GE(task(b).begin_ns, task(a).end_ns);
  EXPECT_EQ(task(b).end_ns - task(b).begin_ns, 2'000'000);
  EXPECT_GE(task(c).begin_ns, task(b).end_ns);
  EXPECT_EQ(task(d).begin_ns, task(c).end_ns);
  EXPECT_GT(task(d).end_ns, task(d).begin_ns);
  EXPECT_GE(task(a).begin_ns, record.begin_ns);
  EXPECT_GE(record.end_ns, task(d).end_ns);
  EXPECT_EQ(task(c).units, 1);
}

}  // namespace
}  // namespace shoal
