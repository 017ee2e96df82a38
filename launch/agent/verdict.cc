#include "launch/agent/verdict.h"

#include <csignal>
#include <cstring>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/agent/exit_codes.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr size_t kOthersMax = 8;  // More of them would bury the cause.

std::string SignalName(int signal) {
  const char* name = sigabbrev_np(signal);
  return name != nullptr ? absl::StrCat("SIG", name) : absl::StrCat("signal ", signal);
}

bool IsCrash(const RankFailure& failure) {
  return failure.kind == RankFailure::Kind::kKilled && failure.code != SIGTERM && failure.code != SIGKILL &&
         failure.code != SIGINT && failure.code != SIGHUP && failure.code != SIGQUIT;
}

bool IsPeerLost(const RankFailure& failure) {
  return failure.kind == RankFailure::Kind::kExited && failure.code == kExitPeerLost;
}

// Smaller is guiltier. A crash during the shutdown may be the cause that others noticed first (a core dump
// takes its time), but yields to a cause seen before.
int Innocence(const RankFailure& failure) {
  if (!failure.after_shutdown) return IsPeerLost(failure) ? 2 : 0;
  return IsCrash(failure) ? 1 : 3;
}

// What the number alone does not tell a reader.
std::string Hint(const RankFailure& failure) {
  if (failure.kind == RankFailure::Kind::kKilled && failure.code == SIGKILL) {
    return "\n  (sent by someone, or by the kernel when memory ran out: see dmesg)";
  }
  if (IsPeerLost(failure)) {
    return "\n  (it lost a rank that this launcher does not watch: see the launcher on that rank's host)";
  }
  return "";
}

}  // namespace

std::string Describe(const RankFailure& failure) {
  switch (failure.kind) {
    case RankFailure::Kind::kExited:
      return absl::StrCat("exited with code ", failure.code, IsPeerLost(failure) ? " (peer lost)" : "");
    case RankFailure::Kind::kKilled:
      return absl::StrCat("killed by signal ", failure.code, " (", SignalName(failure.code), ")",
                          failure.core_dumped ? ", core dumped" : "");
    case RankFailure::Kind::kStopped:
      return absl::StrFormat("stopped by %s for %.1f s", SignalName(failure.code),
                             absl::ToDoubleSeconds(failure.stopped_for));
  }
  return "";
}

size_t ChooseCulprit(absl::Span<const RankFailure> failures) {
  SHOAL_CHECK(!failures.empty());
  size_t best = 0;
  const auto key = [&failures](size_t i) {
    return std::make_tuple(Innocence(failures[i]), failures[i].at, failures[i].rank);
  };
  for (size_t i = 1; i < failures.size(); ++i) {
    if (key(i) < key(best)) best = i;
  }
  return best;
}

std::string Verdict(absl::Span<const RankFailure> failures, int world_size, const std::string& host) {
  const size_t culprit = ChooseCulprit(failures);
  const RankFailure& first = failures[culprit];
  std::string text = absl::StrFormat(
      "shoal: rank %d of %d %s, %.1f s after the start; the job has ended\n  local rank %d, pid %d, host "
      "%s%s\n",
      first.rank, world_size, Describe(first), absl::ToDoubleSeconds(first.at), first.local_rank, first.pid,
      host, Hint(first));
  if (first.last_lines.empty()) {
    absl::StrAppend(&text, "  it had printed nothing to stderr\n");
  } else {
    absl::StrAppend(&text, "  its last lines", first.log_path.empty() ? "" : " (", first.log_path,
                    first.log_path.empty() ? ":\n" : "):\n");
    for (const std::string& line : first.last_lines) absl::StrAppend(&text, "    ", line, "\n");
  }
  std::string others;
  size_t named = 0;
  for (size_t i = 0; i < failures.size(); ++i) {
    if (i == culprit || failures[i].after_shutdown) continue;
    if (++named > kOthersMax) continue;
    absl::StrAppend(&others, others.empty() ? "" : ", ", "rank ", failures[i].rank, " ",
                    Describe(failures[i]));
  }
  if (named > kOthersMax) absl::StrAppend(&others, ", and ", named - kOthersMax, " more");
  if (!others.empty()) absl::StrAppend(&text, "  then: ", others, "\n");
  return text;
}

}  // namespace shoal
