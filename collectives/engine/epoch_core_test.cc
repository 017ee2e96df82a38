// Whole epochs of EpochCores that talk to each other without sockets or clocks.

#include "collectives/engine/epoch_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "absl/strings/str_cat.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

constexpr int64_t kMs = 1'000'000;
constexpr int64_t kTimeoutNs = 1000 * kMs;

// Ranks of one epoch. What one says arrives at once, in order, unless the link is cut.
class Epoch {
 public:
  explicit Epoch(int size) : ended_(size), over_(size), left_(size), cut_(size, std::vector<bool>(size)) {
    for (int rank = 0; rank < size; ++rank) {
      EpochCore::Options options;
      options.rank = rank;
      options.heartbeat_timeout_ns = kTimeoutNs;
      for (int peer = 0; peer < size; ++peer) options.names.push_back(absl::StrCat("rank ", peer));
      cores_.push_back(std::make_unique<EpochCore>(options, now_ns_));
    }
  }

  EpochCore& core(int rank) { return *cores_[rank]; }
  int64_t now_ns() const { return now_ns_; }
  void Cut(int from, int to) { cut_[from][to] = true; }
  // Of a process that is gone, or stopped: it neither speaks nor hears.
  void Isolate(int rank) {
    for (size_t peer = 0; peer < cores_.size(); ++peer) cut_[rank][peer] = cut_[peer][rank] = true;
  }

  // On every one of `ranks`: the group's name is its key.
  void AddGroup(uint64_t key, const std::vector<int>& ranks, const std::vector<uint64_t>& ancestors = {}) {
    for (int rank : ranks) AddGroupOn(rank, key, ranks, ancestors);
  }
  void AddGroupOn(int rank, uint64_t key, const std::vector<int>& ranks,
                  const std::vector<uint64_t>& ancestors = {}) {
    std::string over;
    const uint64_t number = cores_[rank]->AddGroup(key, ranks, ancestors, &over);
    keys_[{rank, number}] = key;
    numbers_[{rank, key}] = number;
    if (!over.empty()) ended_[rank].emplace(key, over);
  }
  uint64_t Number(int rank, uint64_t key) { return numbers_.at({rank, key}); }

  // Runs `event` on one rank and what follows from it everywhere.
  void At(int rank, const std::function<void(EpochCore&, EpochCore::Effects*)>& event) {
    EpochCore::Effects effects;
    event(*cores_[rank], &effects);
    Take(rank, effects);
    while (!wire_.empty()) {
      const Wire wire = wire_.front();
      wire_.pop_front();
      EpochCore::Effects next;
      cores_[wire.to]->OnMessage(wire.from, wire.type, wire.body, now_ns_, &next);
      Take(wire.to, next);
    }
  }
  void Lose(int rank, int peer) {
    At(rank, [&](EpochCore& core, EpochCore::Effects* effects) { core.OnLost(peer, "connection closed", effects); });
  }
  void End(int rank, uint64_t key, const std::string& cause) {
    At(rank, [&](EpochCore& core, EpochCore::Effects* effects) { core.End(Number(rank, key), cause, effects); });
  }
  // Everybody ticks when it wants to, until `ns` from now.
  void Pass(int64_t ns) {
    const int64_t end_ns = now_ns_ + ns;
    while (now_ns_ < end_ns) {
      int64_t next_ns = end_ns;
      for (const auto& core : cores_) next_ns = std::min(next_ns, core->NextTickNs());
      now_ns_ = std::max(now_ns_, next_ns);
      for (size_t rank = 0; rank < cores_.size(); ++rank) {
        if (cores_[rank]->NextTickNs() > now_ns_) continue;
        At(rank, [&](EpochCore& core, EpochCore::Effects* effects) { core.Tick(now_ns_, doing, effects); });
      }
    }
  }

  // By key, with causes.
  const std::map<uint64_t, std::string>& ended(int rank) const { return ended_[rank]; }
  const std::vector<uint64_t>& over(int rank) const { return over_[rank]; }
  const std::vector<int>& left(int rank) const { return left_[rank]; }
  EpochCore::Doing doing;

 private:
  struct Wire {
    int from, to;
    ControlType type;
    std::string body;
  };

  void Take(int rank, const EpochCore::Effects& effects) {
    for (const auto& [group, cause] : effects.ended) {
      const bool first = ended_[rank].emplace(keys_.at({rank, group}), cause).second;
      EXPECT_TRUE(first) << "rank " << rank << ": a group ended twice";
    }
    over_[rank].insert(over_[rank].end(), effects.over.begin(), effects.over.end());
    left_[rank].insert(left_[rank].end(), effects.left.begin(), effects.left.end());
    for (const auto& [to, type, body] : effects.messages) {
      EXPECT_NE(to, rank);
      if (!cut_[rank][to]) wire_.push_back({rank, to, type, body});
    }
  }

  int64_t now_ns_ = 5'000 * kMs;
  std::vector<std::unique_ptr<EpochCore>> cores_;
  std::map<std::pair<int, uint64_t>, uint64_t> keys_, numbers_;
  std::vector<std::map<uint64_t, std::string>> ended_;
  std::vector<std::vector<uint64_t>> over_;
  std::vector<std::vector<int>> left_;
  std::vector<std::vector<bool>> cut_;
  std::deque<Wire> wire_;
};

TEST(EpochCore, ADeathEndsExactlyTheGroupsThatHaveTheDeadRankOnAllMembers) {
  Epoch epoch(5);
  epoch.AddGroup(10, {0, 1, 2, 3, 4});
  epoch.AddGroup(11, {0, 1, 2}, {10});
  epoch.AddGroup(12, {3, 4}, {10});
  epoch.Isolate(1);
  epoch.Lose(0, 1);  // The others hear it from rank 0.
  const std::string cause = "rank 1: connection closed";
  for (int rank : {0, 2}) EXPECT_THAT(epoch.ended(rank), ElementsAre(Pair(10, cause), Pair(11, cause)));
  for (int rank : {3, 4}) {
    EXPECT_THAT(epoch.ended(rank), ElementsAre(Pair(10, cause)));
    EXPECT_THAT(epoch.core(rank).dead(), ElementsAre(Pair(1, cause)));
  }
  // Groups that are made later.
  epoch.AddGroup(13, {1, 3, 4});
  epoch.AddGroup(14, {0, 4});
  EXPECT_THAT(epoch.ended(3), ElementsAre(Pair(10, cause), Pair(13, cause)));
  EXPECT_THAT(epoch.ended(4), ElementsAre(Pair(10, cause), Pair(13, cause)));
}

TEST(EpochCore, ADeathIsBelievedOnceWithItsFirstCause) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.Isolate(1);
  epoch.Lose(0, 1);
  epoch.At(2, [](EpochCore& core, EpochCore::Effects* effects) {
    core.OnLost(1, "process died", effects);
    EXPECT_THAT(effects->messages, IsEmpty());
  });
  EXPECT_THAT(epoch.core(2).dead(), ElementsAre(Pair(1, "rank 1: connection closed")));
}

TEST(EpochCore, AnEndEndsTheGroupAndItsDescendantsAndNothingElse) {
  Epoch epoch(4);
  epoch.AddGroup(10, {0, 1, 2, 3});
  epoch.AddGroup(11, {0, 1, 2}, {10});
  epoch.AddGroup(12, {1, 2}, {10, 11});
  epoch.AddGroup(13, {2, 3}, {10});
  epoch.End(0, 11, "late");
  EXPECT_THAT(epoch.ended(0), ElementsAre(Pair(11, "late")));
  EXPECT_THAT(epoch.ended(1), ElementsAre(Pair(11, "late"), Pair(12, "late")));
  EXPECT_THAT(epoch.ended(2), ElementsAre(Pair(11, "late"), Pair(12, "late")));
  EXPECT_THAT(epoch.ended(3), IsEmpty());
}

TEST(EpochCore, TheFirstCauseOfAnEndWins) {
  Epoch epoch(2);
  epoch.AddGroup(10, {0, 1});
  epoch.End(0, 10, "late");
  epoch.End(1, 10, "mismatch");
  for (int rank : {0, 1}) EXPECT_THAT(epoch.ended(rank), ElementsAre(Pair(10, "late")));
}

TEST(EpochCore, AGroupThatIsMadeAfterItsEndWasToldIsOver) {
  Epoch epoch(2);
  epoch.AddGroup(10, {0, 1});
  epoch.AddGroupOn(0, 11, {0, 1}, {10});
  epoch.AddGroupOn(0, 12, {0, 1}, {10, 11});
  epoch.End(0, 11, "late");
  EXPECT_THAT(epoch.ended(1), IsEmpty());
  epoch.AddGroupOn(1, 11, {0, 1}, {10});
  epoch.AddGroupOn(1, 12, {0, 1}, {10, 11});
  epoch.AddGroupOn(1, 13, {0, 1}, {10});
  EXPECT_THAT(epoch.ended(1), ElementsAre(Pair(11, "late"), Pair(12, "late")));
}

TEST(EpochCore, AMemberHearsOfTheEndOfAGroupThatItNeverMade) {
  Epoch epoch(2);
  epoch.AddGroupOn(0, 11, {0, 1}, {});
  epoch.End(0, 11, "late");
  EXPECT_THAT(epoch.over(1), ElementsAre(11));
  epoch.End(0, 11, "again");
  EXPECT_THAT(epoch.over(1), ElementsAre(11));
}

TEST(EpochCore, AGroupThatADeathEndedDoesNotTakeItsDescendantsWithIt) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.AddGroup(11, {0, 2}, {10});
  epoch.Isolate(1);
  epoch.Lose(0, 1);
  epoch.End(0, 10, "closed");  // Over already.
  for (int rank : {0, 2}) EXPECT_EQ(epoch.ended(rank).count(11), 0) << rank;
}

TEST(EpochCore, EndAllEndsEverythingEverywhere) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.AddGroup(11, {1, 2}, {10});
  epoch.At(0, [](EpochCore& core, EpochCore::Effects* effects) { core.EndAll("next epoch", effects); });
  EXPECT_THAT(epoch.ended(1), ElementsAre(Pair(10, "next epoch"), Pair(11, "next epoch")));
  epoch.AddGroupOn(2, 12, {1, 2});
  EXPECT_EQ(epoch.ended(2).at(12), "next epoch");
  EXPECT_THAT(epoch.core(1).dead(), IsEmpty());
}

TEST(EpochCore, WhoSaidGoodbyeIsMissedByNobody) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.At(1, [](EpochCore& core, EpochCore::Effects* effects) { core.Leave(effects); });
  for (int rank : {0, 2}) {
    EXPECT_THAT(epoch.left(rank), ElementsAre(1));
    epoch.Lose(rank, 1);
    epoch.Lose(1, rank);  // They answer by closing.
  }
  epoch.Isolate(1);
  epoch.Pass(10 * kTimeoutNs);
  for (int rank : {0, 1, 2}) {
    EXPECT_THAT(epoch.ended(rank), IsEmpty());
    EXPECT_THAT(epoch.core(rank).dead(), IsEmpty());
  }
}

TEST(EpochCore, HeartbeatsKeepEverybodyAlive) {
  Epoch epoch(4);
  epoch.AddGroup(10, {0, 1, 2, 3});
  epoch.Pass(20 * kTimeoutNs);
  for (int rank = 0; rank < 4; ++rank) EXPECT_THAT(epoch.ended(rank), IsEmpty());
}

TEST(EpochCore, SilenceIsNoticedInTimeWithWhatWasLastDone) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.doing = {"all_reduce \"grads\" #17", true, epoch.now_ns()};
  epoch.Pass(300 * kMs);
  epoch.Isolate(1);
  epoch.Pass(kTimeoutNs - 100 * kMs - 1);  // It said something up to 100 ms before.
  EXPECT_THAT(epoch.ended(0), IsEmpty());
  epoch.Pass(100 * kMs + 1);
  for (int rank : {0, 2}) {
    ASSERT_EQ(epoch.ended(rank).count(10), 1);
    EXPECT_THAT(epoch.ended(rank).at(10),
                ::testing::MatchesRegex(
                    "rank 1: silent for 1.0 s \\(last: all_reduce \"grads\" #17, started 1\\.[0-9] s ago\\)"));
  }
}

// What is remembered of ended groups is bounded; that costs nobody his life.
TEST(EpochCore, MoreGroupsEndThanAreRemembered) {
  Epoch epoch(2);
  const uint64_t last = 20'000;
  for (uint64_t key = 1; key <= last; ++key) {
    epoch.AddGroup(key, {0, 1});
    epoch.End(key % 2, key, "over");
    for (int rank : {0, 1}) epoch.core(rank).RemoveGroup(epoch.Number(rank, key));
  }
  for (int rank : {0, 1}) EXPECT_THAT(epoch.core(rank).dead(), IsEmpty());
  epoch.AddGroup(last + 1, {0, 1}, {last});
  epoch.AddGroup(last + 2, {0, 1});
  for (int rank : {0, 1}) {
    EXPECT_EQ(epoch.ended(rank).count(last + 1), 1) << "split from one that is over";
    EXPECT_EQ(epoch.ended(rank).count(last + 2), 0);
  }
}

TEST(EpochCore, ItsOwnPauseAccusesNobody) {
  Epoch epoch(2);
  epoch.AddGroup(10, {0, 1});
  epoch.Pass(200 * kMs);
  EpochCore::Effects effects;
  epoch.core(0).Tick(epoch.now_ns() + 100 * kTimeoutNs, {}, &effects);
  EXPECT_THAT(effects.ended, IsEmpty());
  EXPECT_THAT(epoch.core(0).dead(), IsEmpty());
}

TEST(EpochCore, ARankThatTheOthersGaveUpEndsAllOfItsGroupsAndAccusesNobody) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.AddGroup(11, {1, 2});
  epoch.Cut(1, 0);  // Rank 0 does not hear rank 1.
  epoch.Lose(0, 1);
  const std::string cause = "rank 1: connection closed, says rank 0";
  EXPECT_THAT(epoch.ended(1), ElementsAre(Pair(10, cause), Pair(11, cause)));
  epoch.Lose(1, 0);
  epoch.Lose(1, 2);
  EXPECT_THAT(epoch.core(1).dead(), IsEmpty());
  epoch.AddGroupOn(1, 12, {1, 2});
  EXPECT_EQ(epoch.ended(1).at(12), cause);
}

TEST(EpochCore, WhatTheDeadSayDoesNotCount) {
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 2});
  epoch.Cut(0, 1);
  epoch.Cut(2, 1);
  epoch.Lose(0, 1);
  epoch.At(1, [](EpochCore& core, EpochCore::Effects* effects) { core.EndAll("I am alive", effects); });
  epoch.Lose(1, 2);
  for (int rank : {0, 2}) EXPECT_THAT(epoch.ended(rank), IsEmpty());
}

TEST(EpochCore, NonsenseOnTheWireIsTheSendersDeath) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 20'000; ++round) {
    Epoch epoch(3);
    epoch.AddGroup(10, {0, 1, 2});
    std::string body(random() % 40, '\0');
    for (char& byte : body) byte = static_cast<char>(random() % 3 == 0 ? random() : 0);
    const auto type = static_cast<ControlType>(1 + random() % 7);
    epoch.At(0, [&](EpochCore& core, EpochCore::Effects* effects) {
      core.OnMessage(1, type, body, epoch.now_ns(), effects);
    });
  }
  Epoch epoch(3);
  epoch.AddGroup(10, {0, 1, 2});
  epoch.At(0, [&](EpochCore& core, EpochCore::Effects* effects) {
    core.OnMessage(1, ControlType::kDead, "x", epoch.now_ns(), effects);
  });
  EXPECT_THAT(epoch.ended(2), ElementsAre(Pair(10, "rank 1: sent a verdict that makes no sense")));
}

// Whoever dies and whatever happens in whichever order: when everything was delivered, the living agree on which groups
// are over.
TEST(EpochCore, TheLivingAgreeOnWhichGroupsAreOver) {
  for (uint64_t seed = 0; seed < 3'000; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    const int size = 2 + random() % 6;
    Epoch epoch(size);
    std::vector<std::vector<int>> groups;
    for (uint64_t key = 1; key <= 6; ++key) {
      std::vector<int> ranks;
      for (int rank = 0; rank < size; ++rank) {
        if (random() % 2 == 0) ranks.push_back(rank);
      }
      groups.push_back(ranks);
      epoch.AddGroup(key, ranks);
    }
    std::set<int> dead;
    for (int step = 0; step < 4; ++step) {
      const int rank = random() % size;
      if (dead.contains(rank)) continue;
      if (random() % 2 == 0 && static_cast<int>(dead.size()) < size - 1) {
        epoch.Isolate(rank);
        dead.insert(rank);
        for (int peer = 0; peer < size; ++peer) {
          if (!dead.contains(peer) && random() % 2 == 0) epoch.Lose(peer, rank);
        }
      } else {
        const uint64_t key = 1 + random() % 6;
        const std::vector<int>& members = groups[key - 1];
        if (std::find(members.begin(), members.end(), rank) != members.end()) epoch.End(rank, key, "late");
      }
    }
    epoch.Pass(3 * kTimeoutNs);
    for (size_t i = 0; i < groups.size(); ++i) {
      std::set<size_t> verdicts;
      bool member_died = false;
      for (int rank : groups[i]) {
        member_died = member_died || dead.contains(rank);
        if (!dead.contains(rank)) verdicts.insert(epoch.ended(rank).count(i + 1));
      }
      EXPECT_LE(verdicts.size(), 1u) << "group " << i + 1;
      if (member_died && !verdicts.empty()) {
        EXPECT_EQ(*verdicts.begin(), 1u) << "group " << i + 1;
      }
    }
  }
}

}  // namespace
}  // namespace shoal
