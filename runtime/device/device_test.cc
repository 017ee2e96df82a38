#include "runtime/device/device.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include "gtest/gtest.h"
#include "runtime/device/fake_device.h"
#include "runtime/device/fake_memory.h"
#include "runtime/tensor/tensor.h"

namespace shoal {
namespace {

using Progress = FakeDeviceOptions::Progress;

class DeviceTest : public testing::Test {
 protected:
  std::unique_ptr<Stream> NewStream() { return *device_->NewStream(); }
  // Work that writes its number.
  void Note(Stream& stream, int number) {
    fake_.Submit(stream.handle(), [this, number] {
      order_.push_back(number);
      return DeviceResult{};
    });
  }

  FakeDevice fake_{{.progress = Progress::kByWaits}};
  std::unique_ptr<Device> device_ = *Device::Create(fake_.api(), 0);
  std::vector<int> order_;
};

TEST_F(DeviceTest, SaysWhatIsMissing) {
  EXPECT_EQ(Device::Create(fake_.api(), 1).status(), absl::UnavailableError("fake: no device 1 among 1"));
  fake_.FailCall("count", 1, DeviceResult::Code::kUnavailable, "no driver");
  EXPECT_EQ(Device::Create(fake_.api(), 0).status(), absl::UnavailableError("fake: looking for devices: no driver"));
  DeviceApi other = fake_.api();
  other.version = 99;
  EXPECT_TRUE(absl::IsFailedPrecondition(Device::Create(other, 0).status()));
}

TEST_F(DeviceTest, NothingRunsUntilTheHostWaits) {
  const std::unique_ptr<Stream> stream = NewStream();
  Note(*stream, 1);
  EXPECT_TRUE(order_.empty());
  ASSERT_TRUE(stream->Wait().ok());
  EXPECT_EQ(order_, std::vector<int>{1});
  EXPECT_EQ(device_->waits().waits, 1);
}

TEST_F(DeviceTest, AStreamThatWaitsForAnotherRunsAfterIt) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  Note(*a, 1);
  b->WaitFor(*a);
  Note(*a, 2);
  Note(*b, 3);
  const Event done = b->Record();
  EXPECT_FALSE(done.Done());
  ASSERT_TRUE(done.Wait().ok());
  EXPECT_TRUE(done.Done());
  EXPECT_EQ(order_, (std::vector<int>{1, 3})) << "what a does later is not waited for";
  EXPECT_EQ(device_->waits().waits, 1);
}

TEST_F(DeviceTest, TheCpuWaitsForADeviceAndADeviceNotForTheCpu) {
  const std::unique_ptr<Stream> stream = NewStream();
  Stream cpu;
  Note(*stream, 1);
  stream->WaitFor(cpu);
  EXPECT_TRUE(order_.empty());
  cpu.WaitFor(*stream);
  EXPECT_EQ(order_, std::vector<int>{1});
}

TEST_F(DeviceTest, EventsAreUsedAgain) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  for (int i = 0; i < 10; ++i) {
    Note(*a, i);
    b->WaitFor(*a);
  }
  EXPECT_EQ(fake_.Calls("create_event"), 1);
  Note(*b, 10);
  ASSERT_TRUE(b->Wait().ok());
  EXPECT_EQ(order_.size(), 11u);
}

TEST_F(DeviceTest, TheFirstFailurePoisonsTheStreamAndThoseThatWaitForIt) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  fake_.FailCall("kernel", 1, DeviceResult::Code::kFailed, "an illegal address was met");
  Note(*a, 1);
  EXPECT_TRUE(a->status().ok()) << "nobody knows yet";
  EXPECT_EQ(a->Wait(), absl::InternalError("fake:0: waiting for a stream: an illegal address was met"));
  b->WaitFor(*a);
  EXPECT_EQ(b->status(), a->status());
  EXPECT_EQ(b->Wait(), a->status());
  const Tensor nothing = Empty({4}, DType::kF32, *b);
  EXPECT_EQ(Download(nothing, *b).status(), a->status());
}

TEST_F(DeviceTest, OutOfMemoryPoisonsTheStream) {
  const std::unique_ptr<Stream> stream = NewStream();
  const Tensor tensor = Empty({int64_t{1} << 40}, DType::kF32, *stream);
  EXPECT_TRUE(absl::IsResourceExhausted(stream->status())) << stream->status();
  EXPECT_EQ(tensor.raw(), nullptr);
  EXPECT_EQ(tensor.dim(0), int64_t{1} << 40);
}

TEST_F(DeviceTest, TensorsGoThereAndBackWithOneWait) {
  const std::unique_ptr<Stream> stream = NewStream();
  const Tensor host = Empty({3, 5}, DType::kI32);
  for (int i = 0; i < 15; ++i) host.span<int32_t>()[i] = i;
  const Tensor there = Upload(host, *stream);
  host.span<int32_t>()[0] = 77;  // Allowed at once.
  const Tensor copy = Empty({15}, DType::kI32, *stream);
  Copy(there, copy, *stream);
  EXPECT_EQ(device_->waits().waits, 0);
  const absl::StatusOr<Tensor> back = Download(copy, *stream);
  ASSERT_TRUE(back.ok()) << back.status();
  for (int i = 0; i < 15; ++i) EXPECT_EQ(back->span<int32_t>()[i], i);
  EXPECT_EQ(device_->waits().waits, 1);
  EXPECT_EQ(fake_.Calls("pageable_copy"), 0);
  const absl::StatusOr<Tensor> zeros = Download(Zeros({7}, DType::kF32, *stream), *stream);
  for (const float value : zeros->span<float>()) EXPECT_EQ(value, 0);
}

// What makes the host wait is counted, or it is not there: all waiting that the table saw is what the device counted.
TEST_F(DeviceTest, AllWaitingIsCounted) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  for (int round = 0; round < 20; ++round) {
    const Tensor x = Upload(Zeros({1000 * (round % 3 + 1)}, DType::kF32), *a);
    b->WaitFor(*a);
    const Tensor y = Empty(x.shape(), DType::kF32, *b);
    Copy(x, y, *b);
    UsedOn(x, *b);
    ASSERT_TRUE(round % 5 != 4 || b->Wait().ok());
  }
  const DeviceWaits counted = device_->waits();
  EXPECT_EQ(counted.waits + counted.allocations, fake_.Waits());
  EXPECT_EQ(counted.waits, 4);
}

TEST_F(DeviceTest, AGraphDoesItsWorkAtEachLaunchInMemoryOfItsOwn) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  const Tensor counter = Zeros({1}, DType::kI32, *a);
  const auto add_one = [&](Stream& stream) {
    fake_.Submit(stream.handle(), [to = counter.data<int32_t>()] {
      ++*to;
      return DeviceResult{};
    });
  };
  {
    ASSERT_TRUE(a->BeginCapture().ok());
    const void* const inside = Empty({1000}, DType::kF32, *a).raw();
    add_one(*a);
    b->WaitFor(*a);
    add_one(*b);
    a->WaitFor(*b);
    absl::StatusOr<CapturedGraph> graph = a->EndCapture();
    ASSERT_TRUE(graph.ok()) << graph.status();
    EXPECT_NE(Empty({1000}, DType::kF32, *a).raw(), inside) << "the graph writes there whenever it is launched";
    EXPECT_NE(Empty({1000}, DType::kF32, *b).raw(), inside);
    device_->memory().Trim();
    for (int i = 0; i < 3; ++i) a->Launch(*graph);
    EXPECT_EQ(Download(counter, *a)->data<int32_t>()[0], 6);
  }
  EXPECT_EQ(Download(counter, *a)->data<int32_t>()[0], 6);
  EXPECT_TRUE(b->Wait().ok()) << "b records no longer";
}

TEST_F(DeviceTest, AGraphWithWorkThatNothingWaitsForIsRefused) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  ASSERT_TRUE(a->BeginCapture().ok());
  b->WaitFor(*a);
  Note(*b, 1);
  a->WaitFor(*b);
  Note(*b, 2);
  EXPECT_TRUE(absl::IsInternal(a->EndCapture().status())) << "of CUDA's: cudaErrorStreamCaptureUnjoined";
  Note(*b, 3);
  EXPECT_TRUE(b->Wait().ok());
  EXPECT_EQ(order_, std::vector<int>{3});
}

TEST_F(DeviceTest, StreamsOfAGraphDoNotShareItsMemory) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  ASSERT_TRUE(a->BeginCapture().ok());
  b->WaitFor(*a);
  EXPECT_TRUE(b->capturing());
  const void* const of_a = Empty({1000}, DType::kF32, *a).raw();
  EXPECT_NE(Empty({1000}, DType::kF32, *b).raw(), of_a) << "they may run at the same time";
  EXPECT_EQ(Empty({1000}, DType::kF32, *a).raw(), of_a);
  a->WaitFor(*b);
  EXPECT_TRUE(a->EndCapture().ok());
  EXPECT_FALSE(b->capturing());
  EXPECT_EQ(Empty({1000}, DType::kF32, *a).raw(), of_a) << "the graph has ended";
}

TEST_F(DeviceTest, MemoryFreedWhileItsStreamRecordsIsPendingUntilTheEnd) {
  const std::unique_ptr<Stream> a = NewStream(), b = NewStream();
  Tensor staging = EmptyHost({10}, DType::kF32, *b);
  const void* const address = staging.raw();
  Note(*b, 1);
  ASSERT_TRUE(a->BeginCapture().ok());
  b->WaitFor(*a);
  staging = Tensor();
  fake_.RunAll();
  EXPECT_NE(EmptyHost({10}, DType::kF32, *b).raw(), address);
  a->WaitFor(*b);
  ASSERT_TRUE(a->EndCapture().ok());
  EXPECT_NE(EmptyHost({10}, DType::kF32, *b).raw(), address) << "now the point is taken";
  fake_.RunAll();
  std::vector<Tensor> tensors;
  bool found = false;
  for (int i = 0; i < 4; ++i) {
    tensors.push_back(EmptyHost({10}, DType::kF32, *b));
    found = found || tensors.back().raw() == address;
  }
  EXPECT_TRUE(found);
}

TEST_F(DeviceTest, WaitingWhileRecordingFails) {
  const std::unique_ptr<Stream> stream = NewStream();
  ASSERT_TRUE(stream->BeginCapture().ok());
  EXPECT_FALSE(stream->Wait().ok());
}

TEST_F(DeviceTest, TimedEventsTellTimes) {
  const std::unique_ptr<Stream> stream = NewStream();
  const Event begin = stream->Record(Timing::kYes);
  for (int i = 0; i < 3; ++i) Note(*stream, i);
  const Event end = stream->Record(Timing::kYes);
  EXPECT_FALSE(Event::Milliseconds(begin, end).ok()) << "not yet";
  ASSERT_TRUE(stream->Wait().ok());
  EXPECT_EQ(*Event::Milliseconds(begin, end), 4);
}

TEST_F(DeviceTest, TimedEventsOfAGraphTellTimesOfEachLaunch) {
  const std::unique_ptr<Stream> stream = NewStream();
  Event begin, end;
  ASSERT_TRUE(stream->BeginCapture().ok());
  begin = stream->Record(Timing::kYes);
  for (int i = 0; i < 3; ++i) Note(*stream, i);
  end = stream->Record(Timing::kYes);
  const absl::StatusOr<CapturedGraph> graph = stream->EndCapture();
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_FALSE(Event::Milliseconds(begin, end).ok()) << "not launched";
  for (int launch = 1; launch <= 2; ++launch) {
    const Event before = stream->Record(Timing::kYes);
    Note(*stream, 9);
    stream->Launch(*graph);
    ASSERT_TRUE(stream->Wait().ok());
    EXPECT_EQ(*Event::Milliseconds(begin, end), 4);
    EXPECT_EQ(*Event::Milliseconds(before, begin), 2) << launch;
  }
}

TEST_F(DeviceTest, WhatFailsWhileRecordingLeavesTheStreamAsItWas) {
  const std::unique_ptr<Stream> stream = NewStream();
  ASSERT_TRUE(stream->BeginCapture().ok());
  const Tensor none = Empty({int64_t{1} << 40}, DType::kF32, *stream);
  EXPECT_FALSE(stream->status().ok());
  EXPECT_TRUE(absl::IsResourceExhausted(stream->EndCapture().status()));
  EXPECT_TRUE(stream->status().ok());
  Note(*stream, 1);
  ASSERT_TRUE(stream->Wait().ok());
  EXPECT_EQ(order_, std::vector<int>{1});
}

TEST_F(DeviceTest, EveryCallThatFailsIsReportedAndNothingIsLost) {
  for (const char* function : {"create_stream", "create_event", "record", "wait_for", "allocate_host", "allocate", "copy", "fill"}) {
    SCOPED_TRACE(function);
    fake_.FailCall(function, 1, DeviceResult::Code::kFailed, "told to");
    absl::Status status;
    {
      absl::StatusOr<std::unique_ptr<Stream>> a = device_->NewStream(), b = device_->NewStream();
      status.Update(a.status());
      if (a.ok() && b.ok()) {
        std::vector<Event> held;
        for (int i = 0; i < 9; ++i) held.push_back((*a)->Record());
        if (std::string_view(function).starts_with("alloc") || std::string_view(function) == "copy") Upload(Zeros({100}, DType::kF32), **a);
        if (std::string_view(function) == "fill") Zeros({3}, DType::kF32, **a);
        (*b)->WaitFor(**a);
        status.Update((*b)->status());
      }
    }
    EXPECT_NE(status.message().find("told to"), absl::string_view::npos) << status;
    device_->memory().Trim();
  }
}

// Another process finds the memory by its handle, until it is released; what it has open stays.
TEST(FakeMemoryTest, IsOpenedByAnotherProcess) {
  FakeMemory memory(/*protect=*/true);
  void* const own = memory.Allocate(100, 0);
  DeviceIpcHandle handle;
  ASSERT_TRUE(memory.Export(own, &handle));
  int turns[2];  // A byte when the memory was released.
  ASSERT_EQ(pipe(turns), 0);
  const pid_t child = fork();
  if (child == 0) {
    FakeMemory there(/*protect=*/true);
    void* const opened = there.Open(handle);
    if (opened == nullptr || there.Open(handle) != opened || !there.Contains(opened)) _exit(1);
    {
      const FakeMemory::Touching touching(&there);
      ++*static_cast<int*>(opened);
    }
    char byte = 0;
    if (!there.Close(opened) || !there.Close(opened) || there.Contains(opened)) _exit(2);
    kill(getpid(), SIGSTOP);
    if (read(turns[0], &byte, 1) != 1 || there.Open(handle) != nullptr) _exit(3);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, WUNTRACED), child);
  ASSERT_TRUE(WIFSTOPPED(status)) << status;
  {
    const FakeMemory::Touching touching(&memory);
    EXPECT_EQ(*static_cast<int*>(own), 0) << "from -1, which memory is full of";
  }
  EXPECT_TRUE(memory.Release(own));
  kill(child, SIGCONT);
  ASSERT_EQ(write(turns[1], "", 1), 1);
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  close(turns[0]);
  close(turns[1]);
}

TEST(DeviceOrdinal, EachThreadUsesTheDeviceThatItCalls) {
  const FakeDevice fake({.progress = Progress::kAtOnce, .devices = 2});
  const std::unique_ptr<Device> first = *Device::Create(fake.api(), 0), second = *Device::Create(fake.api(), 1);
  const std::unique_ptr<Stream> a = *first->NewStream(), b = *second->NewStream();
  EXPECT_EQ(second->name(), "fake:1");
  const Tensor x = Zeros({10}, DType::kF32, *a), y = Zeros({10}, DType::kF32, *b);
  EXPECT_TRUE(a->Wait().ok() && b->Wait().ok());
}

}  // namespace
}  // namespace shoal
