#include "tests/cluster/referee.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "collectives/transport/clock.h"

namespace shoal {

void Referee::Violated(pid_t pid, const std::string& what) {
  violations_.push_back(absl::StrCat("pid ", pid, " on host ", members_[pid].host, ": ", what));
}

void Referee::OnStart(pid_t pid, int host) {
  Member& member = members_[pid];
  member = Member();
  member.host = host;
  member.running_since_ns = NowNs();
}

void Referee::OnStop(pid_t pid) {
  members_[pid].state = Member::kStopped;
  UpdateSeparations();
}

void Referee::OnContinue(pid_t pid) {
  Member& member = members_[pid];
  if (member.state == Member::kStopped) member.state = Member::kRunning;
  member.running_since_ns = NowNs();
  UpdateSeparations();
}

void Referee::OnLeave(pid_t pid) { members_[pid].state = Member::kLeaving; }

void Referee::OnGone(pid_t pid) {
  members_[pid].state = Member::kGone;
  UpdateSeparations();
}

void Referee::OnNetworkChange() { UpdateSeparations(); }

bool Referee::Apart(const Member& a, pid_t b) const {
  const auto found = members_.find(b);
  if (found == members_.end()) return false;
  const Member& other = found->second;
  if (other.state == Member::kStopped || other.state == Member::kGone) return true;
  return !network_.Reaches(a.host, other.host) || !network_.Reaches(other.host, a.host);
}

void Referee::UpdateSeparations() {
  const int64_t now_ns = NowNs();
  std::map<std::pair<pid_t, pid_t>, int64_t> before;
  before.swap(apart_since_ns_);
  for (const auto& [a, member] : members_) {
    for (const auto& [b, other] : members_) {
      if (a == b || !Apart(member, b)) continue;
      const auto known = before.find({a, b});
      apart_since_ns_[{a, b}] = known == before.end() ? now_ns : known->second;
    }
  }
}

// Since when it has been separated from a member of its epoch, running all the while; 0: it is not.
int64_t Referee::ApartSinceNs(pid_t pid, const Member& member) const {
  int64_t since_ns = 0;
  for (int64_t other : member.pids) {
    const auto found = apart_since_ns_.find({pid, static_cast<pid_t>(other)});
    if (found == apart_since_ns_.end()) continue;
    since_ns = since_ns == 0 ? found->second : std::min(since_ns, found->second);
  }
  return since_ns == 0 ? 0 : std::max({since_ns, member.entered_ns, member.running_since_ns});
}

void Referee::OnView(pid_t pid, Member& member, const MemberReport& report) {
  const Name name = {report.lineage, report.epoch};
  if (member.lineage == report.lineage && report.epoch <= member.epoch) {
    Violated(pid, absl::StrCat("after epoch ", member.epoch, ": ", report.text));
  }
  if (std::count(report.pids.begin(), report.pids.end(), pid) != 1) {
    Violated(pid, absl::StrCat("not a member of its own epoch: ", report.text));
  }
  const auto [view, first] = views_.emplace(name, report.pids);
  if (!first && view->second != report.pids) {
    Violated(pid, absl::StrCat("two views in one epoch: ", report.text, ", another one has ",
                               absl::StrJoin(view->second, ",")));
  }
  if (newest_.first != name.first || newest_.second < name.second) newest_ = name;
  member.lineage = report.lineage;
  member.epoch = report.epoch;
  member.pids = report.pids;
  member.entered_ns = report.at_ns;
  member.worked = member.over = false;
}

void Referee::Hear(pid_t pid, const MemberReport& report) {
  Member& member = members_[pid];
  switch (report.type) {
    case MemberReport::kView:
      return OnView(pid, member, report);
    case MemberReport::kWorked:
      member.worked = true;
      return;
    case MemberReport::kDone:
      member.over = true;
      return;
    case MemberReport::kAborted: {
      member.over = true;
      const int64_t since_ns = ApartSinceNs(pid, member);
      if (since_ns == 0 || report.at_ns < since_ns || member.state != Member::kRunning) return;
      abort_ms_.push_back(static_cast<double>(report.at_ns - since_ns) * 1e-6);
      if (report.at_ns - since_ns <= abort_ns_ + late_ns_) return;
      return Violated(pid, absl::StrCat("ABORTED ", abort_ms_.back(),
                                        " ms after it was separated from a peer: ", report.text));
    }
    case MemberReport::kRounds:
      return;
    case MemberReport::kOther:
      return Violated(pid, absl::StrCat("says: ", report.text));
  }
}

void Referee::Check(int64_t late_ns) {
  late_ns_ = late_ns;
  const int64_t now_ns = NowNs();
  for (auto& [pid, member] : members_) {
    if (member.state != Member::kRunning || member.over || member.lineage == 0) continue;
    const int64_t since_ns = ApartSinceNs(pid, member);
    if (since_ns == 0 || now_ns - since_ns <= 2 * (abort_ns_ + late_ns_)) continue;
    member.over = true;  // Said once.
    Violated(pid, absl::StrCat("separated from a peer of epoch ", member.epoch, " for ",
                               (now_ns - since_ns) / 1'000'000, " ms and not ABORTED"));
  }
}

bool Referee::Together() const {
  const Member* first = nullptr;
  size_t count = 0;
  for (const auto& [pid, member] : members_) {
    if (member.state == Member::kGone) continue;
    ++count;
    if (first == nullptr) first = &member;
    if (member.state != Member::kRunning || !member.worked || member.over) return false;
    if (member.lineage != first->lineage || member.epoch != first->epoch) return false;
  }
  return first != nullptr && first->pids.size() == count;
}

size_t Referee::lineages() const {
  std::set<uint64_t> lineages;
  for (const auto& [name, pids] : views_) lineages.insert(name.first);
  return lineages.size();
}

}  // namespace shoal
