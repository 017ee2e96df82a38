#include "launch/agent/rank_output.h"

#include <poll.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"

namespace shoal {
namespace {

constexpr size_t kLastLines = 20;
// A rank that never ends its line must not fill the memory: it is cut here.
constexpr size_t kLineBytesMax = 16 * 1024;
constexpr size_t kKeptLineBytesMax = 512;

// "I 12:34:56.789 ...", as runtime/base/log.h writes them.
bool IsInformation(std::string_view line) {
  return line.size() > 5 && line[0] == 'I' && line[1] == ' ' &&
         std::isdigit(static_cast<unsigned char>(line[2])) != 0 && line[4] == ':';
}

}  // namespace

bool WriteFully(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), bytes.size());
    if (written >= 0) {
      bytes.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EAGAIN) {
      pollfd writable = {fd, POLLOUT, 0};  // A terminal that someone else made non-blocking.
      poll(&writable, 1, -1);
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

RankOutput::RankOutput(int rank, int log_fd, int terminal_fd)
    : rank_(rank), log_fd_(log_fd), terminal_fd_(terminal_fd) {}

RankOutput::~RankOutput() {
  if (log_fd_ >= 0) close(log_fd_);
}

void RankOutput::Take(RankStream stream, std::string_view bytes) {
  // A closed terminal ends the words there, not the job.
  if (rank_ == 0 && stream == RankStream::kStderr) static_cast<void>(WriteFully(terminal_fd_, bytes));
  std::string& partial = partial_[static_cast<int>(stream)];
  while (!bytes.empty()) {
    const size_t end = bytes.find('\n');
    partial.append(bytes.substr(0, end));
    bytes.remove_prefix(end == std::string_view::npos ? bytes.size() : end + 1);
    if (end == std::string_view::npos && partial.size() < kLineBytesMax) break;
    TakeLine(stream, partial);
    partial.clear();
  }
}

void RankOutput::Finish() {
  for (const RankStream stream : {RankStream::kStdout, RankStream::kStderr}) {
    std::string& partial = partial_[static_cast<int>(stream)];
    if (!partial.empty()) TakeLine(stream, partial);
    partial.clear();
  }
}

void RankOutput::TakeLine(RankStream stream, std::string_view line) {
  WriteLog(absl::StrCat(absl::string_view(line.data(), line.size()), "\n"));
  if (rank_ != 0 && stream == RankStream::kStderr && !line.empty() && !IsInformation(line)) {
    static_cast<void>(
        WriteFully(terminal_fd_,
                   absl::StrCat("[rank ", rank_, "] ", absl::string_view(line.data(), line.size()), "\n")));
  }
  while (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  line = line.substr(line.rfind('\r') + 1);
  if (line.empty()) return;
  last_lines_.emplace_back(line.substr(0, kKeptLineBytesMax));
  if (last_lines_.size() > kLastLines) last_lines_.pop_front();
}

void RankOutput::WriteLog(std::string_view bytes) {
  if (log_fd_ < 0 || WriteFully(log_fd_, bytes)) return;
  SHOAL_LOG(kWarning) << "the log file of rank " << rank_ << " takes no more: " << std::strerror(errno);
  close(log_fd_);
  log_fd_ = -1;
}

std::vector<std::string> RankOutput::LastLines() const { return {last_lines_.begin(), last_lines_.end()}; }

}  // namespace shoal
