#include "parallel/schedule/simulate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <queue>
#include <utility>

#include "absl/strings/str_format.h"
#include "parallel/schedule/lane_order.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr size_t At(int index) { return static_cast<size_t>(index); }
constexpr size_t At(Lane lane) { return static_cast<size_t>(lane); }

// However much communication asks for, computation goes on.
constexpr double kLeastComputeRate = 0.05;

int64_t Rounded(double ns) { return static_cast<int64_t>(std::llround(ns)); }

std::array<LaneOrder, kLanes> LanesOf(const Graph& graph) {
  std::array<LaneOrder, kLanes> lanes;
  for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = LaneOrder(graph, static_cast<Lane>(lane));
  return lanes;
}

// How far one rank is in all lanes.
std::array<LaneOrder::Cursor, kLanes> CursorsOf(const std::array<LaneOrder, kLanes>& lanes) {
  std::array<LaneOrder::Cursor, kLanes> cursors;
  for (size_t lane = 0; lane < kLanes; ++lane) cursors[lane] = LaneOrder::Cursor(lanes[lane]);
  return cursors;
}

// Adds a span of time in which the lanes of `busy` worked.
void Account(const std::array<bool, kLanes>& busy, double span, Prediction* out) {
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if (busy[lane]) out->busy_ns[lane] += span;
  }
  if (!busy[At(Lane::kCompute)] && (busy[At(Lane::kIntra)] || busy[At(Lane::kInter)] || busy[At(Lane::kControl)])) {
    out->exposed_ns += span;
  }
}

// ---- One rank.

class AlikeRun {
 public:
  AlikeRun(const Graph& graph, const FlatCosts& costs)
      : graph_(graph), costs_(costs), lanes_(LanesOf(graph)), cursors_(CursorsOf(lanes_)), done_(graph.tasks.size()) {}

  Prediction Run(Record record) {
    if (record == Record::kYes) prediction_.record.tasks.resize(graph_.tasks.size());
    size_t left = graph_.tasks.size();
    double now = 0;
    while (left > 0) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        if (!busy_[lane]) Begin(lane, now, record);
      }
      const double slow = busy_[At(Lane::kIntra)] && busy_[At(Lane::kInter)] ? costs_.interference() : 1.0;
      const std::array<double, kLanes> factor = {costs_.ComputeSlowdown(busy_), 1, slow, slow, 1};
      double span = std::numeric_limits<double>::infinity();
      for (size_t lane = 0; lane < kLanes; ++lane) {
        if (busy_[lane]) span = std::min(span, left_ns_[lane] * factor[lane]);
      }
      SHOAL_CHECK(std::isfinite(span)) << "a task waits for one that never ends";
      if (span > 0) Account(busy_, span, &prediction_);
      now += span;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        if (!busy_[lane]) continue;
        // The lane that determined the span ends exactly, whatever rounding says.
        if (left_ns_[lane] * factor[lane] > span) {
          left_ns_[lane] -= span / factor[lane];
          continue;
        }
        End(lane, now, record);
        --left;
      }
    }
    prediction_.step_ns = now;
    prediction_.record.end_ns = Rounded(now);
    return std::move(prediction_);
  }

 private:
  void Begin(size_t lane, double now, Record record) {
    const int index = cursors_[lane].Take(done_);
    if (index == LaneOrder::kNone) return;
    const Task& task = graph_.tasks[At(index)];
    running_[lane] = index;
    busy_[lane] = true;
    left_ns_[lane] = costs_.Predict(task, task.units);
    if (record == Record::kYes) prediction_.record.tasks[At(index)] = {Rounded(now), 0, task.units};
  }
  void End(size_t lane, double now, Record record) {
    const size_t index = At(running_[lane]);
    if (record == Record::kYes) prediction_.record.tasks[index].end_ns = Rounded(now);
    done_[index] = 1;
    busy_[lane] = false;
  }

  const Graph& graph_;
  const FlatCosts& costs_;
  const std::array<LaneOrder, kLanes> lanes_;
  std::array<LaneOrder::Cursor, kLanes> cursors_;
  std::vector<uint8_t> done_;
  std::array<int, kLanes> running_ = {};
  std::array<bool, kLanes> busy_ = {};
  std::array<double, kLanes> left_ns_ = {};
  Prediction prediction_;
};

// ---- All ranks.

// Who takes part in a task.
enum class Reach : uint8_t { kRank, kHost, kWorld };

Reach ReachOf(const Task& task, bool one_host) {
  switch (task.lane) {
    case Lane::kCompute:
    case Lane::kCopy:
      return Reach::kRank;
    case Lane::kIntra:
      return one_host ? Reach::kWorld : Reach::kHost;
    case Lane::kInter:
    case Lane::kControl:
      return Reach::kWorld;
  }
  return Reach::kRank;
}

struct Classes {
  std::vector<RankClass> ranks;
  std::vector<int> host_of;             // By class of ranks: the class of its host.
  std::vector<std::vector<int>> hosts;  // By class of hosts: its classes of ranks.
};

// Hosts are alike when the ranks on them are.
Classes Classify(const StepUnits& units, const Topology& topology) {
  std::map<std::vector<double>, int> kinds;
  std::vector<std::vector<int>> kinds_of_host(At(topology.hosts()));
  std::vector<int> kind_of(At(topology.ranks()));
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    const int kind = kinds.try_emplace(units.KeyOfRank(rank), static_cast<int>(kinds.size())).first->second;
    kind_of[At(rank)] = kind;
    kinds_of_host[At(topology.HostOf(rank))].push_back(kind);
  }
  Classes classes;
  std::map<std::vector<int>, int> host_classes;
  std::vector<int> class_of_host;
  for (std::vector<int>& ranks : kinds_of_host) {
    std::sort(ranks.begin(), ranks.end());
    class_of_host.push_back(host_classes.try_emplace(ranks, static_cast<int>(host_classes.size())).first->second);
  }
  classes.hosts.resize(host_classes.size());
  std::map<std::pair<int, int>, size_t> found;
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    const int host = class_of_host[At(topology.HostOf(rank))];
    const auto [entry, added] = found.try_emplace({host, kind_of[At(rank)]}, classes.ranks.size());
    if (added) {
      classes.hosts[At(host)].push_back(static_cast<int>(classes.ranks.size()));
      classes.ranks.push_back({.first_rank = rank});
      classes.host_of.push_back(host);
    }
    ++classes.ranks[entry->second].ranks;
  }
  return classes;
}

class ClusterRun {
 public:
  ClusterRun(const Graph& graph, const FlatCosts& costs, const Schedule& schedule, const StepUnits& units,
             const Topology& topology, Record record)
      : graph_(graph),
        costs_(costs),
        schedule_(schedule),
        units_(units),
        one_host_(topology.hosts() == 1),
        record_(record),
        lanes_(LanesOf(graph)),
        classes_(Classify(units, topology)),
        members_(classes_.ranks.size()),
        host_comm_(classes_.hosts.size()) {
    for (size_t i = 0; i < members_.size(); ++i) {
      everyone_.push_back(static_cast<int>(i));
      members_[i].done.resize(graph.tasks.size());
      members_[i].cursors = CursorsOf(lanes_);
      if (record == Record::kYes) classes_.ranks[i].prediction.record.tasks.resize(graph.tasks.size());
    }
  }

  ClusterPrediction Run(int64_t ranks) {
    for (int member : everyone_) BeginReady(member);
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      if (event.version != (event.group != nullptr ? event.group->version : VersionOf(event))) continue;
      now_ = event.at;
      if (event.group == nullptr) {
        End(event.member, event.lane);
        BeginReady(event.member);
      } else {
        EndGroup(event.group);
      }
    }
    ClusterPrediction out;
    out.step_ns = now_;
    out.rank_count = ranks;
    for (size_t i = 0; i < members_.size(); ++i) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        SHOAL_CHECK(members_[i].cursors[lane].AllTaken()) << "a task waits for one that never ends";
      }
      Prediction& prediction = classes_.ranks[i].prediction;
      prediction.step_ns = now_;
      prediction.record.end_ns = Rounded(now_);
    }
    out.classes = std::move(classes_.ranks);
    return out;
  }

 private:
  // One class of ranks.
  struct Member {
    std::vector<uint8_t> done;
    std::array<LaneOrder::Cursor, kLanes> cursors;
    std::array<int, kLanes> taken = {};             // The task that is busy or here.
    std::array<bool, kLanes> busy = {}, here = {};  // `here`: has reached a group's task.
    double accounted = 0;
    // Of the task that computes, as Group has it.
    double left_ns = 0, since = 0, factor = 1;
    uint64_t version = 0;
  };
  // The task at which the members of a host or of the world meet, on one lane.
  struct Group {
    const std::vector<int>* members = nullptr;
    Lane lane = Lane::kIntra;
    size_t arrived = 0;
    double cost_ns = 0;  // Of the member with the most.
    bool running = false;
    double left_ns = 0, since = 0, factor = 1;  // At `since`.
    uint64_t version = 0;
  };
  struct Event {
    double at = 0;
    int member = 0;
    size_t lane = 0;
    Group* group = nullptr;
    uint64_t version = 0, number = 0;
    bool operator<(const Event& other) const {  // The queue's top is the largest.
      return at != other.at ? at > other.at : number > other.number;
    }
  };

  const Task& TaskAt(const Member& member, size_t lane) const { return graph_.tasks[At(member.taken[lane])]; }

  uint64_t VersionOf(const Event& event) const {
    return event.lane == At(Lane::kCompute) ? members_[At(event.member)].version : 0;
  }

  void Push(Event event) {
    event.number = events_pushed_++;
    events_.push(event);
  }

  Group* GroupOf(int member, const Task& task) {
    if (ReachOf(task, one_host_) == Reach::kHost) {
      Group& group = host_comm_[At(classes_.host_of[At(member)])];
      group.members = &classes_.hosts[At(classes_.host_of[At(member)])];
      return &group;
    }
    Group& group = world_comm_[At(task.lane)];
    group.members = &everyone_;
    group.lane = task.lane;
    return &group;
  }

  void AccountUntilNow(int index) {
    Member& member = members_[At(index)];
    if (now_ > member.accounted) Account(member.busy, now_ - member.accounted, &classes_.ranks[At(index)].prediction);
    member.accounted = now_;
  }

  void SetBusy(int index, size_t lane, bool busy) {
    AccountUntilNow(index);
    Member& member = members_[At(index)];
    member.busy[lane] = busy;
    if (record_ == Record::kNo) return;
    TaskRecord& record = classes_.ranks[At(index)].prediction.record.tasks[At(member.taken[lane])];
    (busy ? record.begin_ns : record.end_ns) = Rounded(now_);
    if (busy) record.units = units_.Of(TaskAt(member, lane), schedule_, classes_.ranks[At(index)].first_rank);
  }

  void BeginReady(int index) {
    Member& member = members_[At(index)];
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (member.busy[lane] || member.here[lane]) continue;
      const int taken = member.cursors[lane].Take(member.done);
      if (taken == LaneOrder::kNone) continue;
      member.taken[lane] = taken;
      const Task& task = TaskAt(member, lane);
      const double cost = costs_.Predict(task, units_.Of(task, schedule_, classes_.ranks[At(index)].first_rank));
      if (ReachOf(task, one_host_) == Reach::kRank) {
        SetBusy(index, lane, true);
        if (lane == At(Lane::kCompute)) {
          BeginComputing(index, cost);
        } else {
          Push({.at = now_ + cost, .member = index, .lane = lane});
        }
        continue;
      }
      member.here[lane] = true;
      Group* group = GroupOf(index, task);
      group->cost_ns = std::max(group->cost_ns, cost);
      if (++group->arrived == group->members->size()) BeginGroup(group);
    }
  }

  void BeginComputing(int index, double cost) {
    Member& member = members_[At(index)];
    member.left_ns = cost;
    member.since = now_;
    member.factor = costs_.ComputeSlowdown(member.busy);
    AwaitComputing(index);
  }

  void AwaitComputing(int index) {
    Member& member = members_[At(index)];
    ++member.version;
    Push({.at = member.since + member.left_ns * member.factor,
          .member = index,
          .lane = At(Lane::kCompute),
          .version = member.version});
  }

  // After a communication lane of the member has begun or ended.
  void UpdateComputing(int index) {
    Member& member = members_[At(index)];
    if (!costs_.slows_compute() || !member.busy[At(Lane::kCompute)]) return;
    const double factor = costs_.ComputeSlowdown(member.busy);
    if (factor == member.factor) return;
    member.left_ns = std::max(0.0, member.left_ns - (now_ - member.since) / member.factor);
    member.since = now_;
    member.factor = factor;
    AwaitComputing(index);
  }

  void End(int index, size_t lane) {
    SetBusy(index, lane, false);
    Member& member = members_[At(index)];
    member.done[At(member.taken[lane])] = 1;
    member.here[lane] = false;
  }

  void BeginGroup(Group* group) {
    group->running = true;
    group->left_ns = group->cost_ns;
    group->since = now_;
    group->factor = 1;
    for (int member : *group->members) {
      SetBusy(member, At(group->lane), true);
      UpdateComputing(member);
    }
    Await(group);
    if (group->lane == Lane::kIntra) ++intra_running_;
    UpdateSpeeds(group);
  }

  void EndGroup(Group* group) {
    group->running = false;
    ++group->version;
    group->arrived = 0;
    group->cost_ns = 0;
    if (group->lane == Lane::kIntra) --intra_running_;
    UpdateSpeeds(group);
    for (int member : *group->members) {
      End(member, At(group->lane));
      UpdateComputing(member);
    }
    for (int member : *group->members) BeginReady(member);
  }

  void Await(Group* group) {
    ++group->version;
    Push({.at = group->since + group->left_ns * group->factor, .group = group, .version = group->version});
  }

  void SetFactor(Group* group, double factor) {
    if (!group->running || group->factor == factor) return;
    group->left_ns = std::max(0.0, group->left_ns - (now_ - group->since) / group->factor);
    group->since = now_;
    group->factor = factor;
    Await(group);
  }

  // Communication inside hosts and across them slow each other; a task across hosts is as slow as on the busiest host.
  void UpdateSpeeds(Group* changed) {
    if (changed->lane == Lane::kControl || costs_.interference() == 1 || one_host_) return;
    Group& inter = world_comm_[At(Lane::kInter)];
    SetFactor(&inter, intra_running_ > 0 ? costs_.interference() : 1);
    const double factor = inter.running ? costs_.interference() : 1;
    if (changed != &inter) return SetFactor(changed, factor);
    for (Group& intra : host_comm_) SetFactor(&intra, factor);
  }

  const Graph& graph_;
  const FlatCosts& costs_;
  const Schedule& schedule_;
  const StepUnits& units_;
  const bool one_host_;
  const Record record_;
  const std::array<LaneOrder, kLanes> lanes_;
  Classes classes_;
  std::vector<Member> members_;
  std::vector<int> everyone_;
  std::vector<Group> host_comm_;  // kIntra of each class of hosts, when there are several hosts.
  std::array<Group, kLanes> world_comm_;
  int intra_running_ = 0;
  double now_ = 0;
  uint64_t events_pushed_ = 0;
  std::priority_queue<Event> events_;
};

}  // namespace

FlatCosts::FlatCosts(const CostTable& costs)
    : interference_(std::max(1.0, costs.interference)), compute_share_(costs.compute_share) {
  for (const auto& [key, model] : costs.models) models_[Index(key)] = model;
  for (double share : compute_share_) slows_compute_ = slows_compute_ || share > 0;
}

double FlatCosts::ComputeSlowdown(const std::array<bool, kLanes>& busy) const {
  if (!slows_compute_) return 1;
  double rate = 1;
  for (size_t lane = 0; lane < kLanes; ++lane) rate -= busy[lane] ? compute_share_[lane] : 0;
  return 1 / std::max(rate, kLeastComputeRate);
}

Prediction SimulateAlike(const Graph& graph, const FlatCosts& costs, Record record) { return AlikeRun(graph, costs).Run(record); }

const RankClass& ClusterPrediction::slowest() const {
  const auto own = [](const RankClass& ranks) { return ranks.prediction.busy_ns[At(Lane::kCompute)]; };
  return *std::max_element(classes.begin(), classes.end(),
                           [&](const RankClass& a, const RankClass& b) { return own(a) < own(b); });
}

ClusterPrediction SimulateCluster(const Graph& graph, const FlatCosts& costs, const Schedule& schedule, const StepUnits& units,
                                  const Topology& topology, Record record) {
  return ClusterRun(graph, costs, schedule, units, topology, record).Run(topology.ranks());
}

std::string TimeText(double ns) {
  const double size = std::abs(ns);
  if (size >= 1e9) return absl::StrFormat("%.3g s", ns / 1e9);
  if (size >= 1e6) return absl::StrFormat("%.3g ms", ns / 1e6);
  return absl::StrFormat("%.3g us", size < 1 ? 0 : ns / 1e3);
}

}  // namespace shoal
