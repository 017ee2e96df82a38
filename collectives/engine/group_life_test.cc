#include "collectives/engine/group_life.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>

namespace shoal {
namespace {

using ::testing::ElementsAre;

class LocalLife final : public GroupLife {
 public:
  LocalLife() : GroupLife(7, {0}, 0) {}
  absl::Status End(const std::string& cause) override {
    Finish(absl::AbortedError(cause));
    RunCallbacks();
    return status();
  }
};

// Writes down what happens, and what can be known meanwhile.
class Witness final : public Sleeper {
 public:
  explicit Witness(const GroupLife* life) : life_(life) {}
  void Fence(const std::string& cause) override {
    log.push_back("fence " + cause + (life_->Ended() ? " (known)" : " (unknown)"));
  }
  void Wake() override { log.push_back(life_->Ended() ? "wake (known)" : "wake (unknown)"); }

  std::vector<std::string> log;

 private:
  const GroupLife* const life_;
};

TEST(GroupLife, FencesRunBeforeAnybodyKnowsAndSleepersWakeAfterwards) {
  LocalLife life;
  Witness early(&life), gone(&life), late(&life);
  life.AddSleeper(&early);
  life.AddSleeper(&gone);
  life.RemoveSleeper(&gone);
  std::vector<std::string> called;
  life.AddCallback(&life, [&](const absl::Status& status) { called.push_back(status.ToString()); });
  EXPECT_TRUE(life.status().ok());
  EXPECT_EQ(life.End("late").ToString(), "ABORTED: late");
  EXPECT_EQ(life.End("again").ToString(), "ABORTED: late");
  EXPECT_THAT(early.log, ElementsAre("fence late (unknown)", "wake (known)"));
  EXPECT_TRUE(gone.log.empty());
  life.AddSleeper(&late);
  EXPECT_THAT(late.log, ElementsAre("fence late (known)", "wake (known)"));
  life.AddCallback(&life, [&](const absl::Status&) { called.push_back("at once"); });
  EXPECT_THAT(called, ElementsAre("ABORTED: late", "at once"));
}

TEST(GroupLife, RemovedCallbacksDoNotRunAndARunningOneIsAwaited) {
  LocalLife life;
  std::atomic<bool> inside{false}, let_go{false}, ended{false};
  int other = 0;
  life.AddCallback(&other, [&](const absl::Status&) { ADD_FAILURE() << "removed"; });
  life.RemoveCallbacks(&other);
  life.AddCallback(&life, [&](const absl::Status&) {
    EXPECT_TRUE(life.InCallbackOf(&life));
    EXPECT_FALSE(life.InCallbackOf(&other));
    life.RemoveCallbacks(&life);  // From inside: does not wait for itself.
    inside = true;
    while (!let_go) std::this_thread::yield();
    ended = true;
  });
  std::thread ender([&] { (void)life.End("late"); });
  while (!inside) std::this_thread::yield();
  std::thread remover([&] {
    life.RemoveCallbacks(&life);
    EXPECT_TRUE(ended);
  });
  let_go = true;
  remover.join();
  ender.join();
}

// A callback may own another communicator of the world, whose end needs locks itself.
TEST(GroupLife, WhatARemovedCallbackHoldsGoesWithoutTheLock) {
  LocalLife life;
  bool gone = false;
  {
    const std::shared_ptr<int> held(new int(0), [&](const int* number) {
      delete number;
      life.RemoveCallbacks(&gone);
      gone = true;
    });
    life.AddCallback(&life, [held](const absl::Status&) { ADD_FAILURE() << "removed"; });
  }
  life.RemoveCallbacks(&life);
  EXPECT_TRUE(gone);
}

TEST(OperationNote, SaysWhatRunsAndWhatEnded) {
  OperationNote note;
  EXPECT_EQ(note.Read().changes, 0u);
  note.Start(OpKind::kAllReduce, "grads", 17);
  OperationNote::Value value = note.Read();
  EXPECT_EQ(value.changes, 1u);
  EXPECT_EQ(value.kind, OpKind::kAllReduce);
  EXPECT_EQ(value.label, "grads");
  EXPECT_EQ(value.seq, 17u);
  note.End();
  note.End();
  EXPECT_EQ(note.Read().changes, 2u);
  note.Start(OpKind::kBarrier, "", 18);
  note.Start(OpKind::kBarrier, std::string(100, 'x'), 19);  // The one before ended without a word.
  value = note.Read();
  EXPECT_EQ(value.changes % 2, 1u);
  EXPECT_EQ(value.label, std::string(OperationNote::kLabelBytes, 'x'));
}

TEST(OperationNote, ReadersNeverSeeHalfOfTwo) {
  OperationNote note;
  std::atomic<bool> stop{false};
  std::thread reader([&] {
    while (!stop) {
      const OperationNote::Value value = note.Read();
      if (value.changes == 0) continue;
      EXPECT_EQ(value.label, std::string(value.seq % 40, static_cast<char>('a' + value.seq % 26)));
    }
  });
  for (uint64_t seq = 0; seq < 200'000; ++seq) {
    note.Start(OpKind::kBarrier, std::string(seq % 40, static_cast<char>('a' + seq % 26)), seq);
    note.End();
  }
  stop = true;
  reader.join();
}

}  // namespace
}  // namespace shoal
