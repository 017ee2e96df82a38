#include "launch/agent/verdict.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>

#include "launch/agent/exit_codes.h"

namespace shoal {
namespace {

using testing::HasSubstr;
using testing::Not;
using Kind = RankFailure::Kind;

RankFailure Failure(int rank, Kind kind, int code, double seconds, bool after_shutdown = false) {
  RankFailure failure;
  failure.rank = rank;
  failure.local_rank = rank % 2;
  failure.pid = 100 + rank;
  failure.kind = kind;
  failure.code = code;
  failure.at = absl::Seconds(seconds);
  failure.after_shutdown = after_shutdown;
  return failure;
}

TEST(ChooseCulprit, FirstByTime) {
  EXPECT_EQ(ChooseCulprit({Failure(0, Kind::kExited, 1, 2), Failure(1, Kind::kKilled, SIGSEGV, 1)}), 1u);
  EXPECT_EQ(ChooseCulprit({Failure(3, Kind::kExited, 1, 1), Failure(1, Kind::kExited, 1, 1)}), 1u);
}

TEST(ChooseCulprit, PeerLostIsBlamedOnlyAlone) {
  EXPECT_EQ(
      ChooseCulprit({Failure(0, Kind::kExited, kExitPeerLost, 1), Failure(1, Kind::kKilled, SIGKILL, 2)}),
      1u);
  EXPECT_EQ(ChooseCulprit(
                {Failure(0, Kind::kExited, kExitPeerLost, 2), Failure(1, Kind::kExited, kExitPeerLost, 1)}),
            1u);
}

TEST(ChooseCulprit, EndsThatTheLauncherCausedAreNot) {
  EXPECT_EQ(ChooseCulprit(
                {Failure(0, Kind::kKilled, SIGTERM, 1, true), Failure(1, Kind::kExited, kExitPeerLost, 2)}),
            1u);
  EXPECT_EQ(
      ChooseCulprit({Failure(0, Kind::kExited, kExitPeerLost, 1), Failure(1, Kind::kExited, 1, 2, true)}),
      0u);
}

TEST(ChooseCulprit, ACoreDumpThatTookLongIsTheCauseOfALostPeer) {
  EXPECT_EQ(ChooseCulprit(
                {Failure(0, Kind::kExited, kExitPeerLost, 1), Failure(1, Kind::kKilled, SIGABRT, 9, true)}),
            1u);
  EXPECT_EQ(ChooseCulprit({Failure(0, Kind::kExited, 3, 1), Failure(1, Kind::kKilled, SIGABRT, 9, true)}),
            0u);
}

TEST(Verdict, NamesTheRankAndWhatHappened) {
  std::vector<RankFailure> failures = {Failure(2, Kind::kKilled, SIGKILL, 12.25),
                                       Failure(0, Kind::kExited, kExitPeerLost, 12.5),
                                       Failure(1, Kind::kKilled, SIGTERM, 13, true)};
  failures[0].log_path = "runs/a/logs/rank-2.log";
  failures[0].last_lines = {"step 7", "step 8"};
  EXPECT_EQ(Verdict(failures, 4, "b"),
            "shoal: rank 2 of 4 killed by signal 9 (SIGKILL), 12.2 s after the start; the job has ended\n"
            "  local rank 0, pid 102, host b\n"
            "  (sent by someone, or by the kernel when memory ran out: see dmesg)\n"
            "  its last lines (runs/a/logs/rank-2.log):\n"
            "    step 7\n"
            "    step 8\n"
            "  then: rank 0 exited with code 75 (peer lost)\n");
}

TEST(Verdict, OtherKinds) {
  RankFailure stopped = Failure(1, Kind::kStopped, SIGSTOP, 4);
  stopped.stopped_for = absl::Seconds(3);
  EXPECT_THAT(Verdict({stopped}, 4, "b"), HasSubstr("rank 1 of 4 stopped by SIGSTOP for 3.0 s"));
  EXPECT_THAT(Verdict({Failure(1, Kind::kExited, 3, 4)}, 4, "b"),
              HasSubstr("rank 1 of 4 exited with code 3"));
  EXPECT_THAT(Verdict({Failure(1, Kind::kExited, kExitPeerLost, 4)}, 4, "b"),
              HasSubstr("see the launcher on that rank's host"));
}

TEST(Verdict, ThousandsOfOthersStayShort) {
  std::vector<RankFailure> failures;
  for (int rank = 0; rank < 1000; ++rank) failures.push_back(Failure(rank, Kind::kExited, kExitPeerLost, 2));
  failures.push_back(Failure(1000, Kind::kExited, 1, 3));
  const std::string text = Verdict(failures, 1001, "b");
  EXPECT_THAT(text, HasSubstr("rank 1000 of 1001 exited with code 1"));
  EXPECT_THAT(text, HasSubstr("and 992 more"));
  EXPECT_THAT(text, Not(HasSubstr("rank 8 ")));
}

}  // namespace
}  // namespace shoal
