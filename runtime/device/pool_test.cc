#include "runtime/device/pool.h"

#include "gtest/gtest.h"
#include "runtime/device/device.h"
#include "runtime/device/fake_device.h"

namespace shoal {
namespace {

using Progress = FakeDeviceOptions::Progress;
constexpr int64_t kMiB = int64_t{1} << 20;

std::unique_ptr<Device> Open(const FakeDevice& fake) { return *Device::Create(fake.api(), 0); }

// Work of no interest.
void Work(FakeDevice& fake, Stream& stream) { fake.Submit(stream.handle(), [] { return DeviceResult{}; }); }

class PoolTest : public testing::Test {
 protected:
  explicit PoolTest(int64_t memory_bytes = 256 * kMiB) : fake_({.progress = Progress::kByWaits, .memory_bytes = memory_bytes}) {}

  std::shared_ptr<void> Take(int64_t bytes, Stream& stream) {
    absl::StatusOr<std::shared_ptr<void>> block = device_->memory().Allocate(bytes, stream);
    EXPECT_TRUE(block.ok()) << block.status();
    return block.ok() ? *block : nullptr;
  }

  FakeDevice fake_;
  std::unique_ptr<Device> device_ = Open(fake_);
  std::unique_ptr<Stream> a_ = *device_->NewStream(), b_ = *device_->NewStream();
};

TEST_F(PoolTest, AStreamHasItsOwnMemoryAgainAtOnceAndWithoutWaiting) {
  void* const first = Take(3 * kMiB, *a_).get();
  Work(fake_, *a_);
  const int64_t waits = fake_.Waits();
  EXPECT_EQ(Take(3 * kMiB, *a_).get(), first);
  EXPECT_EQ(fake_.Waits(), waits);
  EXPECT_EQ(fake_.Calls("allocate"), 1);
}

TEST_F(PoolTest, AnotherStreamHasItOnlyAfterAnEvent) {
  void* const first = Take(3 * kMiB, *a_).get();
  Work(fake_, *a_);
  EXPECT_NE(Take(3 * kMiB, *b_).get(), first);
  EXPECT_EQ(fake_.Calls("allocate"), 2);
}

TEST_F(PoolTest, AnIdleSegmentMovesOnceItsEventHasPassed) {
  void* const first = Take(30 * kMiB, *a_).get();
  Work(fake_, *a_);
  const std::shared_ptr<void> second = Take(30 * kMiB, *b_);  // Puts the event there.
  EXPECT_NE(second.get(), first);
  fake_.RunAll();
  EXPECT_EQ(Take(30 * kMiB, *b_).get(), first);
}

TEST_F(PoolTest, MemoryUsedOnAnotherStreamComesBackAfterThatUse) {
  std::shared_ptr<void> block = Take(30 * kMiB, *a_);
  void* const address = block.get();
  Work(fake_, *b_);
  device_->memory().UsedOn(address, *b_);
  block.reset();
  const std::shared_ptr<void> other = Take(30 * kMiB, *a_);
  EXPECT_NE(other.get(), address);
  fake_.RunAll();
  EXPECT_EQ(Take(30 * kMiB, *a_).get(), address);
}

TEST_F(PoolTest, StatisticsCountBlocksAndSegments) {
  {
    const std::shared_ptr<void> block = Take(3 * kMiB, *a_);
    EXPECT_EQ(device_->memory().stats().in_use_bytes, 3 * kMiB);
    EXPECT_EQ(device_->memory().stats().reserved_bytes, 20 * kMiB);
  }
  EXPECT_EQ(device_->memory().stats().in_use_bytes, 0);
  EXPECT_EQ(device_->memory().stats().peak_bytes, 3 * kMiB);
  device_->memory().ResetPeak();
  EXPECT_EQ(device_->memory().stats().peak_bytes, 0);
  device_->memory().Trim();
  EXPECT_EQ(device_->memory().stats().reserved_bytes, 0);
  EXPECT_EQ(fake_.allocated_bytes(), 0);
}

TEST_F(PoolTest, ExportedMemoryIsFoundByOthersAndStaysUntilTheDeviceEnds) {
  std::shared_ptr<void> first = Take(3 * kMiB, *a_), plain = Take(30 * kMiB, *a_), second = Take(4 * kMiB, *a_);
  const char* const inside = static_cast<const char*>(second.get()) + 5;
  const auto exported = device_->memory().Export(inside), again = device_->memory().Export(first.get());
  ASSERT_TRUE(exported.ok()) << exported.status();
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(fake_.Calls("export_memory"), 1) << "they lie in one segment";
  void* base = nullptr;
  ASSERT_EQ(fake_.api().open_memory(&exported->handle, &base).code, DeviceResult::Code::kOk);
  EXPECT_EQ(static_cast<const char*>(base) + exported->offset_bytes, inside);
  EXPECT_EQ(static_cast<const char*>(base) + again->offset_bytes, first.get());
  int elsewhere = 0;
  EXPECT_TRUE(absl::IsNotFound(device_->memory().Export(&elsewhere).status()));
  for (std::shared_ptr<void>* block : {&first, &plain, &second}) block->reset();
  device_->memory().Trim();
  EXPECT_EQ(device_->memory().stats().reserved_bytes, 20 * kMiB) << "the exported segment";
  EXPECT_EQ(fake_.api().close_memory(base).code, DeviceResult::Code::kOk);
  EXPECT_EQ(fake_.api().close_memory(base).code, DeviceResult::Code::kFailed);
}

TEST_F(PoolTest, MemoryThatAnotherOneHasOpenOutlivesItsDevice) {
  std::shared_ptr<void> block = Take(3 * kMiB, *a_);
  const DeviceIpcHandle handle = device_->memory().Export(block.get())->handle;
  void *one = nullptr, *two = nullptr;
  ASSERT_EQ(fake_.api().open_memory(&handle, &one).code, DeviceResult::Code::kOk);
  ASSERT_EQ(fake_.api().open_memory(&handle, &two).code, DeviceResult::Code::kOk);
  EXPECT_EQ(one, two);
  block.reset();
  a_.reset();
  b_.reset();
  device_.reset();
  EXPECT_EQ(fake_.api().open_memory(&handle, &two).code, DeviceResult::Code::kFailed) << "it is gone for newcomers";
  EXPECT_GT(fake_.allocated_bytes(), 0);
  fake_.api().close_memory(one);
  EXPECT_GT(fake_.allocated_bytes(), 0);
  fake_.api().close_memory(one);
  EXPECT_EQ(fake_.allocated_bytes(), 0);
}

TEST_F(PoolTest, AnExportThatFailsSaysSoAndCanBeTriedAgain) {
  const std::shared_ptr<void> block = Take(3 * kMiB, *a_);
  fake_.FailCall("export_memory", 1, DeviceResult::Code::kFailed, "not here");
  EXPECT_EQ(device_->memory().Export(block.get()).status().message(), "fake:0: exporting memory: not here");
  EXPECT_TRUE(device_->memory().Export(block.get()).ok());
}

class SmallPoolTest : public PoolTest {
 protected:
  SmallPoolTest() : PoolTest(64 * kMiB) {}
};

TEST_F(SmallPoolTest, OutOfMemoryTakesWhatAnotherStreamFreedAndWaitsForItOnTheDevice) {
  void* const first = Take(40 * kMiB, *a_).get();
  Work(fake_, *a_);
  const int64_t waits = fake_.Waits();
  const std::shared_ptr<void> again = Take(40 * kMiB, *b_);
  EXPECT_EQ(again.get(), first);
  EXPECT_EQ(fake_.Calls("wait_for"), 1);
  EXPECT_EQ(fake_.Waits(), waits + 1) << "the host only asked the driver";
}

TEST_F(SmallPoolTest, OutOfMemoryTakesWhatAnotherStreamStillUses) {
  std::shared_ptr<void> block = Take(40 * kMiB, *a_);
  void* const address = block.get();
  Work(fake_, *b_);
  device_->memory().UsedOn(address, *b_);
  block.reset();
  EXPECT_EQ(Take(40 * kMiB, *a_).get(), address);
  EXPECT_EQ(fake_.Calls("wait_for"), 1);
}

TEST_F(SmallPoolTest, OutOfMemoryGivesIdlePiecesBackAndTriesAgain) {
  Take(15 * kMiB, *a_);
  Take(20 * kMiB, *b_);
  EXPECT_NE(Take(60 * kMiB, *a_), nullptr);
  EXPECT_EQ(device_->memory().stats().reserved_bytes, 60 * kMiB);
}

TEST_F(SmallPoolTest, OutOfMemorySaysWhatIsHeld) {
  const std::shared_ptr<void> held = Take(40 * kMiB, *a_);
  const absl::Status status = device_->memory().Allocate(40 * kMiB, *a_).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find("0.04 GiB wanted on fake:0 of 0.06 GiB: this process has 0.04 GiB in use"), absl::string_view::npos)
      << status;
}

TEST_F(PoolTest, AnyOtherFailureOfTheDriverIsNotTriedAgain) {
  fake_.FailCall("allocate", 1, DeviceResult::Code::kFailed, "an illegal address was met");
  const absl::Status status = device_->memory().Allocate(kMiB, *a_).status();
  EXPECT_EQ(status, absl::InternalError("fake:0: allocating memory: an illegal address was met"));
  EXPECT_EQ(fake_.Calls("allocate"), 1);
}

TEST_F(PoolTest, WhatAStreamThatEndedHadIsAnybodys) {
  void* const first = Take(30 * kMiB, *a_).get();
  std::shared_ptr<void> late = Take(30 * kMiB, *a_);
  ASSERT_EQ(late.get(), first);
  a_.reset();
  late.reset();
  EXPECT_EQ(Take(30 * kMiB, *b_).get(), first);
}

TEST_F(PoolTest, PinnedMemoryWaitsForTheStreamBeforeTheHostHasItAgain) {
  void* first = nullptr;
  {
    const std::shared_ptr<void> block = *device_->pinned().Allocate(100, *a_);
    first = block.get();
    Work(fake_, *a_);
  }
  {
    const std::shared_ptr<void> other = *device_->pinned().Allocate(100, *a_);
    EXPECT_NE(other.get(), first);
  }
  fake_.RunAll();
  EXPECT_EQ(device_->pinned().stats().reserved_bytes, 2 * 4096);
  const std::shared_ptr<void> a = *device_->pinned().Allocate(100, *a_), b = *device_->pinned().Allocate(4096, *b_);
  EXPECT_EQ(device_->pinned().stats().reserved_bytes, 2 * 4096);
  EXPECT_EQ(fake_.Calls("allocate_host"), 2);
}

}  // namespace
}  // namespace shoal
