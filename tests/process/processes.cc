#include "tests/process/processes.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string_view>
#include <utility>

#include "absl/time/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal::testing {
namespace {

std::vector<pid_t> Children(pid_t parent) {
  const std::string pid = std::to_string(parent);
  std::ifstream file("/proc/" + pid + "/task/" + pid + "/children");
  std::vector<pid_t> children;
  for (pid_t child = 0; file >> child;) children.push_back(child);
  return children;
}

// SHOAL_RANK of a process; -1: it does not run the rank's program yet.
// Of an elastic job: its place on this host.
int RankOf(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/environ");
  int place = -1;
  for (std::string entry; std::getline(file, entry, '\0');) {
    constexpr std::string_view kName = "SHOAL_RANK=", kPlace = "SHOAL_LOCAL_RANK=";
    if (entry.rfind(kName, 0) == 0) return std::atoi(entry.c_str() + kName.size());
    if (entry.rfind(kPlace, 0) == 0) place = std::atoi(entry.c_str() + kPlace.size());
  }
  return place;
}

}  // namespace

ProcessHandle::ProcessHandle(pid_t pid)
    : pid_(pid), pidfd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {}

ProcessHandle::~ProcessHandle() {
  if (pidfd_ >= 0) close(pidfd_);
}

ProcessHandle::ProcessHandle(ProcessHandle&& other) noexcept
    : pid_(other.pid_), pidfd_(std::exchange(other.pidfd_, -1)) {}

void ProcessHandle::Signal(int signal) const {
  if (pidfd_ >= 0) syscall(SYS_pidfd_send_signal, pidfd_, signal, nullptr, 0);
}

absl::Status ProcessHandle::WaitGone(absl::Duration timeout) const {
  if (pidfd_ < 0) return absl::OkStatus();
  pollfd polled = {pidfd_, POLLIN, 0};
  if (poll(&polled, 1, static_cast<int>(absl::ToInt64Milliseconds(timeout))) == 1) return absl::OkStatus();
  return absl::DeadlineExceededError(absl::StrCat("process ", pid_, " runs on"));
}

absl::StatusOr<std::vector<ProcessHandle>> WaitForRanks(pid_t launcher, size_t count,
                                                        absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (true) {
    std::map<int, pid_t> pids;
    for (const pid_t pid : Children(launcher)) {
      if (const int rank = RankOf(pid); rank >= 0) pids[rank] = pid;
    }
    if (pids.size() == count) {
      std::vector<ProcessHandle> ranks;
      for (const auto& [rank, pid] : pids) ranks.emplace_back(pid);
      return ranks;
    }
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("process ", launcher, " has ", pids.size(), " ranks, want ", count));
    }
    usleep(1000);  // The kernel has no event for another process's children.
  }
}

absl::Status WaitAllGone(const std::vector<ProcessHandle>& processes, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  for (const ProcessHandle& process : processes) {
    SHOAL_RETURN_IF_ERROR(process.WaitGone(std::max(deadline - absl::Now(), absl::ZeroDuration())));
  }
  return absl::OkStatus();
}

int ProbablyFreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  SHOAL_CHECK_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  SHOAL_CHECK_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(fd);
  return ntohs(address.sin_port);
}

std::vector<std::string> Words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

}  // namespace shoal::testing
