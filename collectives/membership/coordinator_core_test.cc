// The coordinator's and the members' decisions on a network without delay. Everything that takes luck to
// happen is in tests/sim.
#include "collectives/membership/coordinator_core.h"

#include <gtest/gtest.h>

#include <deque>
#include <functional>
#include <set>

#include "collectives/membership/member_core.h"
#include "collectives/membership/seating.h"
#include "collectives/membership/setbacks.h"

namespace shoal {
namespace {

constexpr int64_t kMs = 1'000'000;

class Job : public ::testing::Test {
 protected:
  struct Member {
    std::unique_ptr<MemberCore> core;
    MemberInfo info;
    uint64_t connection = 0;
    bool frozen = false;
    std::vector<std::function<void()>> held;  // What arrived meanwhile.
    std::vector<View> views;
    std::string excluded, refused, waiting;
    uint64_t joiners = 0;
  };

  void StartCoordinator() {
    coordinator_ = std::make_unique<CoordinatorCore>(options_, ++seed_, now_);
    links_.clear();
  }

  void StopCoordinator() {
    coordinator_.reset();
    events_.clear();
    for (auto& [id, member] : members_) {
      if (member.connection != 0) Close(id);
    }
  }

  // A process that joins.
  void Start(uint64_t id, int wanted_rank = -1, absl::Duration delay = absl::ZeroDuration()) {
    Member& member = members_[id];
    member.info = {.id = id, .pid = static_cast<int64_t>(id), .host_name = "h", .boot = boots_[id], .wanted_rank = wanted_rank};
    member.core = std::make_unique<MemberCore>(member.info, MemberOptions{.first_dial_delay = delay}, now_);
    Do(id, member.core->Ready({}, now_));
  }

  void Ready(uint64_t id, std::vector<Accusation> accusations = {}) {
    Do(id, members_[id].core->Ready(std::move(accusations), now_));
  }

  void Leave(uint64_t id) { Do(id, members_[id].core->Leave(now_)); }

  void Kill(uint64_t id) {
    const uint64_t connection = members_[id].connection;
    members_.erase(id);
    if (connection != 0 && links_.erase(connection) == 1)
      events_.push_back([=, this] {
        if (coordinator_) Do(coordinator_->OnClosed(connection, now_));
      });
  }

  void Run(absl::Duration time = absl::Milliseconds(1)) {
    const int64_t end = now_ + absl::ToInt64Nanoseconds(time);
    for (;; now_ += kMs) {
      Settle();
      if (now_ >= end) return;
    }
  }

  void Freeze(uint64_t id) { members_[id].frozen = true; }
  void Thaw(uint64_t id) {
    members_[id].frozen = false;
    for (const auto& event : std::exchange(members_[id].held, {})) events_.push_back(event);
  }

  // The ids of the last view, by rank, if all of its members hold it; otherwise what differs.
  std::vector<uint64_t> Ranks() {
    std::vector<uint64_t> ranks;
    for (const MemberInfo& member : coordinator_->committed().members) {
      ranks.push_back(member.id);
      if (!members_.contains(member.id)) continue;
      EXPECT_EQ(Encode(members_[member.id].core->committed()), Encode(coordinator_->committed()))
          << member.id;
    }
    return ranks;
  }
  uint64_t Number() { return static_cast<uint64_t>(coordinator_->committed().epoch); }

  using Ids = std::vector<uint64_t>;
  CoordinatorOptions options_ = {.size_min = 3};
  int64_t now_ = 1000 * kMs;
  std::unique_ptr<CoordinatorCore> coordinator_;
  std::map<uint64_t, Member> members_;
  std::set<std::pair<uint64_t, uint64_t>> unreachable_;  // From, to.
  std::set<uint64_t> unfit_;                             // They cannot connect with anybody, and know it.
  std::deque<std::function<void()>> events_;
  std::map<uint64_t, uint64_t> links_;  // Connection to member.
  std::set<uint64_t> stuck_;            // Do not answer proposals.
  std::set<uint64_t> patient_;          // Fail to connect with more than two others, and blame none of them.
  bool drop_commits_ = false;
  std::map<uint64_t, std::string> boots_ = {{11, "k"}, {12, "k"}, {13, "other"}};

 private:
  void Settle() {
    for (int rounds = 0; rounds < 100'000; ++rounds) {
      if (!events_.empty()) {
        const auto event = events_.front();
        events_.pop_front();
        event();
        continue;
      }
      bool due = false;
      if (coordinator_ && coordinator_->NextTimeNs() <= now_) {
        Do(coordinator_->OnTime(now_));
        due = true;
      }
      for (auto& [id, member] : members_) {
        if (member.frozen || member.core->NextTimeNs() > now_) continue;
        Do(id, member.core->OnTime(now_));
        due = true;
        break;
      }
      if (!due && events_.empty()) return;
    }
    FAIL() << "no end of events at one instant";
  }

  // Once whatever comes before it was handled.
  void Deliver(uint64_t id, std::function<void()> event) {
    events_.push_back([=, this] {
      if (!members_.contains(id)) return;
      if (members_[id].frozen) {
        members_[id].held.push_back(event);
      } else {
        event();
      }
    });
  }

  void Close(uint64_t id) {
    Deliver(id, [=, this, connection = members_[id].connection] {
      if (members_[id].connection != connection) return;
      members_[id].connection = 0;
      Do(id, members_[id].core->OnCoordinator(false, now_));
    });
  }

  void Do(const std::vector<CoordinatorCore::Action>& actions) {
    for (const CoordinatorCore::Action& action : actions) {
      if (!links_.contains(action.connection)) continue;
      const uint64_t id = links_[action.connection];
      if (action.type == CoordinatorCore::Action::kClose) {
        links_.erase(action.connection);
        Deliver(id, [=, this] {
          if (members_[id].connection == action.connection) Close(id);
        });
      }
      if (action.type != CoordinatorCore::Action::kSend) continue;
      const CoordinatorMessage message = action.message;
      if (drop_commits_ && message.type == CoordinatorMessage::kCommit) continue;
      Deliver(id, [=, this] {
        if (members_[id].connection == action.connection) Do(id, members_[id].core->OnMessage(message, now_));
      });
    }
  }

  void Do(uint64_t id, const std::vector<MemberCore::Action>& actions) {
    for (const MemberCore::Action& action : actions) {
      Member& member = members_[id];
      switch (action.type) {
        case MemberCore::Action::kDial: {
          const bool up = coordinator_ != nullptr;
          if (up) links_[member.connection = ++connections_] = id;
          Deliver(id, [=, this] { Do(id, members_[id].core->OnCoordinator(up, now_)); });
          break;
        }
        case MemberCore::Action::kHangUp: {
          const uint64_t connection = member.connection;
          member.connection = 0;
          links_.erase(connection);
          events_.push_back([=, this] {
            if (coordinator_) Do(coordinator_->OnClosed(connection, now_));
          });
          break;
        }
        case MemberCore::Action::kSend: {
          const uint64_t connection = member.connection;
          events_.push_back([=, this, message = action.message] {
            if (links_.contains(connection)) Do(coordinator_->OnMessage(connection, message, now_));
          });
          break;
        }
        case MemberCore::Action::kConnect:
          Connect(id, action.view);
          break;
        case MemberCore::Action::kCommit:
          member.views.push_back(action.view);
          break;
        case MemberCore::Action::kExcluded:
          member.excluded = action.text;
          break;
        case MemberCore::Action::kRefused:
          member.refused = action.text;
          break;
        case MemberCore::Action::kJoiners:
          member.joiners = action.joiners;
          break;
        case MemberCore::Action::kWaiting:
          member.waiting = action.text;
          break;
        case MemberCore::Action::kLog:
          break;
      }
    }
  }

  void Connect(uint64_t id, const View& view) {
    if (stuck_.contains(id)) return;
    std::vector<Accusation> accusations;
    if (unfit_.contains(id)) accusations.push_back({id, "no descriptors"});
    for (const MemberInfo& peer : view.members) {
      if (unfit_.contains(id)) break;
      if (unfit_.contains(peer.id) && peer.id != id) accusations.push_back({peer.id, "no answer"});
      // Waits for others, and gives up with them.
      if (patient_.contains(id)) continue;
      if (!members_.contains(peer.id) || unreachable_.contains({id, peer.id}) ||
          unreachable_.contains({peer.id, id}))
        accusations.push_back({peer.id, "refused"});
    }
    const bool waits = patient_.contains(id) && view.members.size() > 3;
    Deliver(id, [=, this] {
      Do(id, accusations.empty() && !waits ? members_[id].core->OnConnected(view.epoch, now_)
                                 : members_[id].core->OnConnectFailed(view.epoch, accusations, now_));
    });
  }

  uint64_t seed_ = 0, connections_ = 0;
};

class RunningJob : public Job {
 protected:
  void SetUp() override {
    StartCoordinator();
    for (uint64_t id : {11, 12, 13}) Start(id);
    Run(absl::Milliseconds(200));
    ASSERT_EQ(Ranks(), (Ids{11, 12, 13}));
    ASSERT_EQ(Number(), 1u);
  }
};

TEST_F(Job, TheFirstEpochWaitsForEnoughProcesses) {
  StartCoordinator();
  Start(11);
  Start(12);
  Run(absl::Seconds(10));
  EXPECT_TRUE(Ranks().empty());
  EXPECT_EQ(members_[11].waiting, "2 of at least 3 processes are here");
  Start(13);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
}

TEST_F(Job, TheFirstEpochFollowsWantedRanks) {
  options_.size_min = 4;
  StartCoordinator();
  Start(11, 3);
  Start(12, 0);
  Start(13);
  Start(14, 1);
  Run(absl::Milliseconds(200));
  EXPECT_EQ(Ranks(), (Ids{12, 14, 13, 11}));
}

TEST_F(Job, OfTwoThatWantOneRankTheSecondIsRefused) {
  StartCoordinator();
  Start(11, 0);
  Run(absl::Milliseconds(10));
  Start(12, 0);
  Start(13);
  Run(absl::Milliseconds(300));
  EXPECT_EQ(members_[12].refused, "rank 0 is taken by pid 11, host h");
  Start(14);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));
}

TEST_F(Job, TheRankOfAProcessThatDiedIsFree) {
  StartCoordinator();
  Start(11, 0);
  Run(absl::Milliseconds(10));
  Start(12, 0);
  Kill(11);
  Start(13);
  Start(14);
  Run(absl::Milliseconds(300));
  EXPECT_EQ(Ranks(), (Ids{12, 13, 14}));
}

TEST_F(RunningJob, ADeadAndAccusedMemberIsLeftOutAtOnce) {
  options_.size_min = 1;
  Kill(12);
  Ready(11, {{12, "connection closed"}});
  Ready(13, {{12, "connection closed"}});
  Run();
  EXPECT_TRUE(coordinator_->committed().epoch == Epoch{1}) << "two processes are too few";
  Start(14);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));
  EXPECT_EQ(Number(), 2u);
}

// The connection of a dead process stays open for as long as the kernel frees its memory.
TEST_F(RunningJob, TheDeadAreNotWaitedForThoughTheirConnectionLives) {
  Freeze(12);
  Start(14);
  Ready(11, {{12, "process died", /*died=*/true}});
  Ready(13);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));
}

TEST_F(RunningJob, NobodyKnowsOfDeathsOnAnotherHost) {
  const uint64_t before = Number();
  Freeze(13);
  Start(14);
  Ready(11, {{13, "process died", /*died=*/true}});
  Ready(12);
  Run();
  EXPECT_EQ(Number(), before) << "a word is not a proof";
}

TEST_F(RunningJob, JoinersAreToldOfAndAdmittedWhenAllMembersAsk) {
  Start(14);
  Start(15);
  Run(absl::Milliseconds(300));
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
  EXPECT_EQ(members_[11].joiners, 2u);
  EXPECT_EQ(members_[14].waiting,
            "waits for rank 0 (pid 11, host h), which is busy; rank 1 (pid 12, host h), which is busy; "
            "rank 2 (pid 13, host h), which is busy");
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13, 14, 15}));
  EXPECT_EQ(members_[11].joiners, 0u);
}

TEST_F(RunningJob, AProposalWithoutOneThatDiedMeanwhileFollowsAtOnce) {
  Start(14);
  stuck_ = {12};
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Number(), 1u);
  Kill(12);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));
  EXPECT_EQ(Number(), 3u);
}

TEST_F(RunningJob, WhoLeftIsNotWaitedFor) {
  Start(14);
  Run();
  Kill(12);  // Its connection closes; nobody accuses it.
  Ready(11);
  Ready(13);
  Run(absl::Milliseconds(500));
  EXPECT_EQ(Number(), 1u);
  EXPECT_EQ(members_[11].waiting, "waits for rank 1 (pid 12, host h), which is not connected");
  Run(absl::Milliseconds(700));
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));

  Start(15);
  Run();
  members_[13].core->Leave(now_);
  Ready(11);
  Ready(14);
  Run();
  EXPECT_EQ(Number(), 2u);
}

TEST_F(RunningJob, ASilentMemberIsExcludedAndToldSo) {
  Start(14);
  Freeze(12);
  Run(absl::Milliseconds(1500));
  EXPECT_EQ(Number(), 1u);
  Ready(11);
  Ready(13);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));
  Thaw(12);
  Run();
  EXPECT_EQ(members_[12].excluded, "epoch 2 was formed without it");
}

TEST_F(RunningJob, OfTwoThatAccuseEachOtherTheOneWithMoreAccusersGoes) {
  Start(14);
  Run();
  Ready(11, {{12, "silent"}});
  Ready(13, {{11, "silent"}});
  Ready(12, {{11, "silent"}});
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 13, 14}));
  EXPECT_EQ(members_[12].excluded, "it and pid 11, host h do not reach each other: silent");
}

// It comes back when it can; the others wait for it no longer than for the attempt.
TEST_F(RunningJob, WhoSaysThatItCannotConnectIsLeftOutThoughItIsTheOldest) {
  Start(14);
  unfit_ = {11};
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{12, 13, 14}));
  EXPECT_EQ(members_[11].excluded, "no descriptors");
}

TEST_F(RunningJob, OneThatTheOthersCannotReachIsLeftOut) {
  Start(14);
  unreachable_ = {{11, 12}, {11, 13}, {11, 14}};
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{12, 13, 14}));
}

TEST_F(RunningJob, ANewcomerThatOneMemberCannotReachIsExcluded) {
  Start(14);
  Run();
  unreachable_ = {{14, 12}};
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
  EXPECT_EQ(Number(), 3u);
  EXPECT_FALSE(members_[14].excluded.empty());
}

TEST_F(RunningJob, WhoWaitedForTwoThatDoNotReachEachOtherIsNotToBlame) {
  Start(14);
  Run();
  unreachable_ = {{14, 12}};
  patient_ = {11, 13};
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
  EXPECT_EQ(Number(), 3u);
  EXPECT_EQ(members_[11].excluded, "");
  EXPECT_EQ(members_[14].excluded, "it and pid 12, host h do not reach each other: refused");
}

TEST_F(RunningJob, WhenNobodyIsToBlameThoseGoThatCouldNotConnect) {
  Start(14);
  Run();
  patient_ = {13};
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 14}));
  EXPECT_EQ(members_[13].excluded, "it could not connect, and blames nobody");
}

TEST_F(RunningJob, ARestartedCoordinatorLearnsTheJobFromItsMembers) {
  StopCoordinator();
  Start(14);
  Run(absl::Seconds(3));
  StartCoordinator();
  Run(absl::Milliseconds(300));
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13, 14}));
  EXPECT_GT(Number(), 1u << 20) << "the numbers of another coordinator";
}

TEST_F(RunningJob, WhoWasConfirmedAndMissedTheCommitGetsItFromTheNextCoordinator) {
  for (uint64_t id : {11, 12}) Ready(id);
  Run();
  drop_commits_ = true;
  Ready(13);
  Run();
  drop_commits_ = false;
  EXPECT_EQ(Number(), 2u);
  EXPECT_EQ(members_[11].core->committed().epoch, Epoch{1});
  // One heard it from the old coordinator.
  CoordinatorMessage commit;
  commit.type = CoordinatorMessage::kCommit;
  commit.view = coordinator_->committed();
  members_[12].core->OnMessage(commit, now_);
  StopCoordinator();
  StartCoordinator();
  Run(absl::Milliseconds(300));
  EXPECT_EQ(Number(), 2u);
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
}

TEST_F(RunningJob, NewcomersAtARestartedCoordinatorGiveWayToTheJob) {
  StopCoordinator();
  for (uint64_t id : {11, 12, 13}) Freeze(id);
  StartCoordinator();
  for (uint64_t id : {21, 22, 23}) Start(id);
  Run(absl::Seconds(1));
  EXPECT_EQ(Ranks(), (Ids{21, 22, 23}));
  const uint64_t lineage = members_[11].core->committed().lineage;
  for (uint64_t id : {11, 12, 13}) Thaw(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
  EXPECT_EQ(coordinator_->committed().lineage, lineage);
  EXPECT_FALSE(members_[21].excluded.empty());
}

TEST_F(RunningJob, AJobWithoutMembersIsRememberedForAWhile) {
  const uint64_t lineage = coordinator_->committed().lineage;
  std::map<uint64_t, Member> old;
  for (uint64_t id : {11, 12, 13}) Freeze(id);
  Run(absl::Milliseconds(1200));
  for (uint64_t id : {21, 22, 23}) Start(id);
  Run(absl::Milliseconds(3000));
  EXPECT_EQ(coordinator_->committed().lineage, lineage);
  Run(absl::Milliseconds(2000));
  EXPECT_EQ(Ranks(), (Ids{21, 22, 23}));
  EXPECT_NE(coordinator_->committed().lineage, lineage);
  for (uint64_t id : {11, 12, 13}) Thaw(id);
  Run();
  EXPECT_EQ(members_[11].excluded, "the job of its epoch has ended, and another one has begun");
  EXPECT_EQ(Ranks(), (Ids{21, 22, 23}));
}

TEST_F(RunningJob, APausedCoordinatorExcludesNobody) {
  now_ += 60'000 * kMs;
  Run(absl::Milliseconds(500));
  for (uint64_t id : {11, 12, 13}) Ready(id);
  Run();
  EXPECT_EQ(Ranks(), (Ids{11, 12, 13}));
  EXPECT_EQ(Number(), 2u);
}

TEST(Member, MayBeToldToWaitBeforeItDials) {
  constexpr int64_t kDelayMs = 700;
  MemberOptions options;
  options.first_dial_delay = absl::Milliseconds(kDelayMs);
  MemberCore core({.id = 1}, options, 0);
  int64_t dialled_ms = -1;
  for (int64_t ms = 0; dialled_ms < 0 && ms < 10 * kDelayMs; ++ms) {
    if (core.NextTimeNs() > ms * kMs) continue;
    for (const MemberCore::Action& action : core.OnTime(ms * kMs)) {
      if (action.type == MemberCore::Action::kDial) dialled_ms = ms;
    }
  }
  EXPECT_EQ(dialled_ms, kDelayMs);
}

TEST(Seating, SurvivorsKeepTheirOrderAndNewcomersGetWhatIsFree) {
  const auto member = [](uint64_t id, int wanted) { return MemberInfo{.id = id, .wanted_rank = wanted}; };
  std::vector<uint64_t> ids;
  for (const MemberInfo& info :
       Seat({member(1, 0), member(3, 2), member(4, -1)}, {member(7, -1), member(8, 9), member(9, 1)}))
    ids.push_back(info.id);
  EXPECT_EQ(ids, (std::vector<uint64_t>{1, 9, 3, 4, 8, 7}));
}

// With enough to connect but not to work: each epoch that has the member is over at once. The others lose ever fewer by it.
TEST_F(Job, AMemberThatBreaksEpochsStandsBackLongerAndLonger) {
  options_.size_min = 1;
  StartCoordinator();
  uint64_t limited = 12;
  for (uint64_t id : {uint64_t{11}, limited}) Start(id);
  Setbacks setbacks;
  std::vector<int64_t> broken_ns;
  int times = 0;
  size_t broken = 0, asked = 0;  // Views of either member that are over.
  for (const int64_t end_ns = now_ + 60'000 * kMs; now_ < end_ns; Run()) {
    const std::vector<View>& views = members_[11].views;
    if (members_[limited].views.size() > broken) {
      const int64_t last_ns = broken_ns.empty() ? 0 : broken_ns.back();
      EXPECT_GE(now_ - last_ns, absl::ToInt64Nanoseconds(RejoinDelay(absl::Seconds(1), times)));
      broken_ns.push_back(now_);
      setbacks.OnFormed();
      times = setbacks.OnLack();
      if (times == 0) {
        ++broken;
        Ready(limited);
      } else {
        broken = 0;
        Leave(limited);
        Start(++limited, -1, RejoinDelay(absl::Seconds(1), times));
      }
    }
    if (asked < views.size() && (views.back().members.size() == 2 || members_[11].joiners > 0)) {
      asked = views.size();
      Ready(11);
    }
  }
  EXPECT_EQ(broken_ns.size(), 8u);  // After 0, 0, 1, 3, 7, 15, 31 and 47 s.
  EXPECT_EQ(Ranks(), Ids{11});
}

}  // namespace
}  // namespace shoal
