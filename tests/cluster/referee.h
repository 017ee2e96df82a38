// Judges a churn by what its members say, knowing what was done to them. The clock is NowNs().
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/cluster/member.h"
#include "tests/process/network_hosts.h"

namespace shoal {

class Referee {
 public:
  // A member of an epoch that cannot hear, or be heard by, another one of it for `abort_ns` must know by
  // then.
  Referee(const testing::NetworkHosts& network, int64_t abort_ns) : network_(network), abort_ns_(abort_ns) {}

  // ---- What was done; told at once.
  void OnStart(pid_t pid, int host);
  void OnStop(pid_t pid);
  void OnContinue(pid_t pid);
  void OnLeave(pid_t pid);  // It was told to: its collectives are no longer of interest.
  void OnGone(pid_t pid);
  void OnNetworkChange();

  // ---- What they say.
  void Hear(pid_t pid, const MemberReport& report);
  // What is overdue. `late_ns`: how late this process itself may be.
  void Check(int64_t late_ns);

  struct Member {
    int host = 0;
    enum State : uint8_t { kRunning, kStopped, kLeaving, kGone } state = kRunning;
    int64_t running_since_ns = 0;
    // Of its epoch; lineage 0: none yet.
    uint64_t lineage = 0, epoch = 0;
    std::vector<int64_t> pids;
    int64_t entered_ns = 0;
    bool worked = false;  // A round of the epoch has ended well.
    bool over = false;    // It knows that the epoch has ended.
  };
  const std::map<pid_t, Member>& members() const { return members_; }
  uint64_t newest_epoch() const { return views_.empty() ? 0 : newest_.second; }
  // All that are there have worked in one epoch with exactly themselves.
  bool Together() const;

  const std::vector<std::string>& violations() const { return violations_; }
  const std::vector<double>& abort_ms() const { return abort_ms_; }  // From a separation to ABORTED.
  size_t epochs() const { return views_.size(); }
  size_t lineages() const;

 private:
  using Name = std::pair<uint64_t, uint64_t>;  // Lineage, epoch.

  void OnView(pid_t pid, Member& member, const MemberReport& report);
  bool Apart(const Member& a, pid_t b) const;
  int64_t ApartSinceNs(pid_t pid, const Member& member) const;
  void UpdateSeparations();
  void Violated(pid_t pid, const std::string& what);

  const testing::NetworkHosts& network_;
  const int64_t abort_ns_;
  int64_t late_ns_ = 0;
  std::map<pid_t, Member> members_;
  std::map<Name, std::vector<int64_t>> views_;
  Name newest_;
  std::map<std::pair<pid_t, pid_t>, int64_t> apart_since_ns_;
  std::vector<std::string> violations_;
  std::vector<double> abort_ms_;
};

}  // namespace shoal
