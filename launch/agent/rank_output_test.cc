#include "launch/agent/rank_output.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

namespace shoal {
namespace {

using testing::ElementsAre;
using testing::SizeIs;

class Scratch {
 public:
  Scratch() : fd_(memfd_create("scratch", MFD_CLOEXEC)) {}
  ~Scratch() { close(fd_); }
  int fd() const { return fd_; }
  std::string Text() const {
    std::string text(1 << 20, '\0');
    text.resize(static_cast<size_t>(pread(fd_, text.data(), text.size(), 0)));
    return text;
  }

 private:
  int fd_;
};

TEST(RankOutput, RankZeroPassesThroughByteForByte) {
  Scratch terminal;
  Scratch log;
  RankOutput output(0, dup(log.fd()), terminal.fd());
  output.Take(RankStream::kStderr, "I 12:34:56.000 started\nhal");
  EXPECT_EQ(terminal.Text(), "I 12:34:56.000 started\nhal");
  output.Take(RankStream::kStderr, "f\r");
  output.Finish();
  EXPECT_EQ(terminal.Text(), "I 12:34:56.000 started\nhalf\r");
  EXPECT_EQ(log.Text(), "I 12:34:56.000 started\nhalf\r\n");
  EXPECT_THAT(output.LastLines(), ElementsAre("I 12:34:56.000 started", "half"));
}

TEST(RankOutput, OthersPassThroughWarningsByWholeLines) {
  Scratch terminal;
  Scratch log;
  RankOutput output(3, dup(log.fd()), terminal.fd());
  output.Take(RankStream::kStderr, "I 12:34:56.000 started\nW 12:34:5");
  EXPECT_EQ(terminal.Text(), "");
  output.Take(RankStream::kStdout, "to the log only\n");
  output.Take(RankStream::kStderr, "7.000 slow\nIt is not information\n");
  EXPECT_EQ(terminal.Text(), "[rank 3] W 12:34:57.000 slow\n[rank 3] It is not information\n");
  EXPECT_EQ(log.Text(),
            "I 12:34:56.000 started\nto the log only\nW 12:34:57.000 slow\nIt is not information\n");
}

TEST(RankOutput, KeepsWhatATerminalWouldShow) {
  Scratch terminal;
  RankOutput output(1, -1, terminal.fd());
  output.Take(RankStream::kStdout, "step 1\rstep 2\rstep 3\n\n");
  EXPECT_THAT(output.LastLines(), ElementsAre("step 3"));
  for (int i = 0; i < 100; ++i) output.Take(RankStream::kStdout, "line " + std::to_string(i) + "\n");
  EXPECT_THAT(output.LastLines(), SizeIs(20));
  EXPECT_EQ(output.LastLines().front(), "line 80");
}

TEST(RankOutput, EndlessLinesAreCut) {
  Scratch terminal;
  RankOutput output(1, -1, terminal.fd());
  for (int i = 0; i < 100; ++i) output.Take(RankStream::kStderr, std::string(1000, 'x'));
  output.Finish();
  EXPECT_EQ(output.LastLines().size(), 6u);
  EXPECT_EQ(output.LastLines().front(), std::string(512, 'x'));
}

TEST(RankOutput, AFullLogDoesNotEndTheJob) {
  Scratch terminal;
  RankOutput output(1, open("/dev/full", O_WRONLY | O_CLOEXEC), terminal.fd());
  output.Take(RankStream::kStderr, "E 12:34:56.000 one\nE 12:34:56.000 two\n");
  EXPECT_EQ(terminal.Text(), "[rank 1] E 12:34:56.000 one\n[rank 1] E 12:34:56.000 two\n");
}

}  // namespace
}  // namespace shoal
