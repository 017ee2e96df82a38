#include "launch/bench/child_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

namespace shoal {
namespace {

using ::testing::HasSubstr;
using Read = ChildProcess::Read;

constexpr absl::Duration kLong = absl::Seconds(60);

TEST(ChildProcess, LinesComeOneByOneThenTheEnd) {
  const auto child = ChildProcess::Start([] {
    printf("one\ntwo\n");
    fflush(stdout);
    return 0;
  });
  ASSERT_TRUE(child.ok()) << child.status();
  std::string line;
  EXPECT_EQ((*child)->ReadLine(kLong, &line), Read::kLine);
  EXPECT_EQ(line, "one");
  EXPECT_EQ((*child)->ReadLine(kLong, &line), Read::kLine);
  EXPECT_EQ(line, "two");
  EXPECT_EQ((*child)->ReadLine(kLong, &line), Read::kEnd);
  EXPECT_EQ((*child)->Result(), "");
}

TEST(ChildProcess, AFailureHasItsStatusAndWhatItSaid) {
  const auto child = ChildProcess::Start([] {
    fprintf(stderr, "no such thing\n");
    return 3;
  });
  std::string line;
  EXPECT_EQ((*child)->ReadLine(kLong, &line), Read::kEnd);
  EXPECT_EQ((*child)->Result(), "exit status 3: no such thing");
}

TEST(ChildProcess, ASignalIsNamed) {
  const auto child = ChildProcess::Start([] {
    raise(SIGKILL);
    return 0;
  });
  EXPECT_EQ((*child)->Result(), "killed by signal 9");
}

TEST(ChildProcess, ASilentChildTimesOutAndIsEndedWithItsChildren) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  {
    const auto child = ChildProcess::Start([] {
      signal(SIGTERM, SIG_DFL);
      (void)fork();  // Both hold the pipe's writing end.
      pause();
      return 0;
    });
    std::string line;
    EXPECT_EQ((*child)->ReadLine(absl::Milliseconds(1), &line), Read::kTimeout);
  }
  close(ends[1]);
  char byte;
  EXPECT_EQ(read(ends[0], &byte, 1), 0);  // Nobody is left to write.
  close(ends[0]);
}

}  // namespace
}  // namespace shoal
