#include "tests/cluster/member.h"

#include <dirent.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "collectives/membership/state_sync.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr absl::Duration kStuck =
    absl::Seconds(45);  // No collective takes so long, whatever happens to its peers.
constexpr int64_t kElements[] = {1, 1000, 20'000, 200'000};  // In turn.
constexpr int64_t kElementsMax = 200'000;
constexpr int64_t kPieceMax = 2000;                           // Of one rank, in gathers.
constexpr int64_t kStateBlocks = 8, kStateElements = 16'384;  // Each.
constexpr int64_t kSyncRounds = 40;

absl::Time Deadline() { return absl::Now() + kStuck; }

// For every connected socket but the parent's.
void ForEachConnection(const std::function<void(int fd, int family)>& act) {
  DIR* folder = opendir("/proc/self/fd");
  SHOAL_CHECK(folder != nullptr);
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    sockaddr_storage peer;
    socklen_t length = sizeof peer;
    if (fd > 2 && getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) == 0) act(fd, peer.ss_family);
  }
  closedir(folder);
}

absl::Status Differs(const char* what, int64_t at, double is, double want) {
  return absl::DataLossError(absl::StrCat(what, ": element ", at, " is ", is, ", want ", want));
}

// The state that the members replicate: what it holds follows from its revision. A revision changes one
// block.
class State {
 public:
  State() : tensor_(Zeros({kStateBlocks * kStateElements}, DType::kF32)) { Set(0); }

  uint64_t revision() const { return revision_; }
  const Tensor& tensor() const { return tensor_; }
  void Set(uint64_t revision) {
    revision_ = revision;
    for (int64_t block = 0; block < kStateBlocks; ++block) Fill(block);
  }
  void Advance() {
    ++revision_;
    Fill(static_cast<int64_t>(revision_ % kStateBlocks));
  }
  absl::Status CheckIs(uint64_t revision) {
    revision_ = revision;
    const float* data = tensor_.data<float>();
    for (int64_t i = 0; i < tensor_.elements(); ++i) {
      if (data[i] != Want(i)) return Differs("state", i, data[i], Want(i));
    }
    return absl::OkStatus();
  }

 private:
  // The last revision that changed the block.
  float Want(int64_t i) const {
    const auto block = static_cast<uint64_t>(i / kStateElements);
    const uint64_t of_block = revision_ < block ? 0 : revision_ - (revision_ - block) % kStateBlocks;
    return static_cast<float>((of_block * 131 + static_cast<uint64_t>(i)) % 65'521);
  }
  void Fill(int64_t block) {
    float* data = tensor_.data<float>();
    for (int64_t i = block * kStateElements; i < (block + 1) * kStateElements; ++i) data[i] = Want(i);
  }

  Tensor tensor_;
  uint64_t revision_ = 0;
};

// ---- One collective each: begun, then checked. `ranks` are the world's, by index in `group`.

struct Job {
  Communicator* group = nullptr;
  std::vector<int> ranks;
  int64_t step = 0;
  Tensor in, out;  // Memory for the largest.
  Work work;

  int own() const { return ranks[group->index()]; }
  int64_t size() const { return static_cast<int64_t>(ranks.size()); }
};

Tensor Part(const Tensor& of, int64_t elements) { return Tensor(of.data<float>(), {elements}, DType::kF32); }

float SumTerm(int rank, int64_t step, int64_t i) {
  return static_cast<float>((rank + 1) * (step % 97 + 1) + i % 13);
}

void BeginSum(Job& job) {
  const int64_t elements = kElements[job.step % 4];
  float* data = job.out.data<float>();
  for (int64_t i = 0; i < elements; ++i) data[i] = SumTerm(job.own(), job.step, i);
  const Tensor tensor = Part(job.out, elements);
  job.work = job.group->AllReduce(tensor, tensor, ReduceOp::kSum, {.label = "sum"});
}

absl::Status CheckSum(const Job& job) {
  float terms = 0;
  for (int rank : job.ranks) terms += SumTerm(rank, job.step, 0);
  const float* data = job.out.data<float>();
  for (int64_t i = 0; i < kElements[job.step % 4]; ++i) {
    const float want = terms + static_cast<float>(job.size() * (i % 13));
    if (data[i] != want) return Differs("sum", i, data[i], want);
  }
  return absl::OkStatus();
}

float PieceTerm(int from, int to, int64_t step, int64_t i) {
  return static_cast<float>(from * 1'000'000 + to * 100'000 + (step * 7 + i) % 99'991);
}

// Uneven, sometimes nothing.
int64_t PieceElements(int rank, int64_t step) { return (rank * 331 + step * 77) % kPieceMax; }

void BeginGather(Job& job) {
  std::vector<int64_t> counts;
  for (int rank : job.ranks) counts.push_back(PieceElements(rank, job.step));
  const int64_t own = counts[job.group->index()];
  for (int64_t i = 0; i < own; ++i) job.in.data<float>()[i] = PieceTerm(job.own(), 0, job.step, i);
  const int64_t all = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  job.work = job.group->AllGather(Part(job.in, own), counts, Part(job.out, all), {.label = "gather"});
}

absl::Status CheckGather(const Job& job) {
  const float* data = job.out.data<float>();
  for (int rank : job.ranks) {
    for (int64_t i = 0; i < PieceElements(rank, job.step); ++i, ++data) {
      const float want = PieceTerm(rank, 0, job.step, i);
      if (*data != want) return Differs("gather", data - job.out.data<float>(), *data, want);
    }
  }
  return absl::OkStatus();
}

void BeginExchange(Job& job) {
  const int64_t each = job.step % kPieceMax + 1;
  float* data = job.in.data<float>();
  for (int to : job.ranks) {
    for (int64_t i = 0; i < each; ++i) *data++ = PieceTerm(job.own(), to, job.step, i);
  }
  job.work = job.group->AllToAll(Part(job.in, each * job.size()), {}, Part(job.out, each * job.size()), {},
                                 {.label = "exchange"});
}

absl::Status CheckExchange(const Job& job) {
  const int64_t each = job.step % kPieceMax + 1;
  const float* data = job.out.data<float>();
  for (int from : job.ranks) {
    for (int64_t i = 0; i < each; ++i, ++data) {
      const float want = PieceTerm(from, job.own(), job.step, i);
      if (*data != want) return Differs("exchange", data - job.out.data<float>(), *data, want);
    }
  }
  return absl::OkStatus();
}

void BeginBroadcast(Job& job) {
  const int64_t elements = kElements[(job.step + 2) % 4];
  const int root = static_cast<int>(job.step % job.size());
  float* data = job.out.data<float>();
  for (int64_t i = 0; i < elements; ++i) {
    data[i] = root == job.group->index() ? PieceTerm(job.own(), 1, job.step, i) : -1;
  }
  job.work = job.group->Broadcast(Part(job.out, elements), root, {.label = "broadcast"});
}

absl::Status CheckBroadcast(const Job& job) {
  const float* data = job.out.data<float>();
  for (int64_t i = 0; i < kElements[(job.step + 2) % 4]; ++i) {
    const float want = PieceTerm(job.ranks[job.step % job.size()], 1, job.step, i);
    if (data[i] != want) return Differs("broadcast", i, data[i], want);
  }
  return absl::OkStatus();
}

struct Kind {
  void (*begin)(Job& job);
  absl::Status (*check)(const Job& job);
};
constexpr Kind kKinds[] = {{BeginSum, CheckSum},
                           {BeginSum, CheckSum},
                           {BeginGather, CheckGather},
                           {BeginExchange, CheckExchange},
                           {BeginBroadcast, CheckBroadcast}};
constexpr int kJobs = 5;

// ---- The whole life

class Life {
 public:
  Life(Membership& membership, Child::Parent& parent) : membership_(membership), parent_(parent) {}

  void Run() {
    while (!over_) {
      absl::StatusOr<std::unique_ptr<Communicator>> group =
          membership_.NextEpoch(absl::Now() + absl::Seconds(60));
      if (!group.ok()) return parent_.Say(absl::StrCat("wrong: no epoch: ", group.status().ToString()));
      const View view = membership_.view();
      name_ = absl::StrCat(view.lineage, " ", static_cast<uint64_t>(view.epoch));
      SayView(view);
      group_ = *std::move(group);  // The one before ends here: after NextEpoch, which is as good as before.
      const absl::Status status = RunEpoch(*group_);
      if (absl::IsAborted(status)) {
        state_.Set(state_.revision());  // A sync may have been in the middle of it.
        parent_.Say(absl::StrCat("aborted ", name_, " ", NowNs(), " ", status.message()));
      } else if (!status.ok()) {
        return parent_.Say(absl::StrCat("wrong: epoch ", name_, ": ", status.ToString()));
      } else if (!over_) {
        parent_.Say(absl::StrCat("done ", name_, " ", NowNs(), " -"));
      }
    }
  }

 private:
  void SayView(const View& view) {
    std::vector<int64_t> pids;
    for (const MemberInfo& member : view.members) pids.push_back(member.pid);
    parent_.Say(absl::StrCat("view ", name_, " ", NowNs(), " ", absl::StrJoin(pids, ",")));
  }

  void SayWorked() {
    int unix_connections = 0;
    ForEachConnection([&](int, int family) { unix_connections += family == AF_UNIX ? 1 : 0; });
    parent_.Say(absl::StrCat("worked ", name_, " ", NowNs(), " ", unix_connections));
  }

  absl::Status Sync(Communicator& world) {
    const uint64_t before = state_.revision();
    SHOAL_ASSIGN_OR_RETURN(const SyncReport report,
                           SyncState(world, {{"state", state_.tensor()}}, before, {.deadline = Deadline()}));
    if (report.revision < before) {
      return absl::DataLossError(
          absl::StrCat("sync_state goes back to revision ", report.revision, " from ", before));
    }
    return state_.CheckIs(report.revision);
  }

  absl::Status RunEpoch(Communicator& world) {
    std::vector<int> all(world.size()), half;
    std::iota(all.begin(), all.end(), 0);
    for (int rank : all) {
      if (rank % 2 == world.index() % 2) half.push_back(rank);
    }
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> second, world.Split(all));
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> own, world.Split(half));
    Job jobs[kJobs];
    for (int i = 0; i < kJobs; ++i) {
      jobs[i].group = i == 0 || i == 3 ? &world : i == 2 ? second.get() : own.get();
      jobs[i].ranks = i == 1 || i == 4 ? half : all;
      for (Tensor* tensor : {&jobs[i].in, &jobs[i].out}) {
        SHOAL_ASSIGN_OR_RETURN(*tensor, world.Allocate({kElementsMax}, DType::kF32));
      }
    }
    for (int64_t step = 0; !over_; ++step) {
      Obey();
      if (over_) return absl::OkStatus();
      if (step % kSyncRounds == 0) SHOAL_RETURN_IF_ERROR(Sync(world));
      SHOAL_RETURN_IF_ERROR(RunRound(jobs, step));
      state_.Advance();
      ++rounds_;
      if (step == 0) SayWorked();
      SHOAL_ASSIGN_OR_RETURN(const bool waits, SomebodyWaits(world));
      if (waits) return absl::OkStatus();
    }
    return absl::OkStatus();
  }

  // All are awaited, whatever became of the first. Another error than ABORTED goes before ABORTED.
  static absl::Status RunRound(Job (&jobs)[kJobs], int64_t step) {
    for (int i = 0; i < kJobs; ++i) {
      jobs[i].step = step + i;
      kKinds[i].begin(jobs[i]);
    }
    absl::Status status;
    for (int i = 0; i < kJobs; ++i) {
      absl::Status ended = jobs[i].work.Await(Deadline());
      if (ended.ok()) ended = kKinds[i].check(jobs[i]);
      if (status.ok() || (absl::IsAborted(status) && !ended.ok() && !absl::IsAborted(ended))) status = ended;
    }
    return status;
  }

  absl::StatusOr<bool> SomebodyWaits(Communicator& world) {
    Tensor joiners = Zeros({1}, DType::kI64);
    joiners.data<int64_t>()[0] = membership_.JoinersWaiting();
    SHOAL_RETURN_IF_ERROR(
        world.AllReduce(joiners, joiners, ReduceOp::kMax, {.label = "joiners"}).Await(Deadline()));
    return joiners.data<int64_t>()[0] > 0;
  }

  void Obey() {
    const std::string order = parent_.Hear(absl::ZeroDuration());
    if (order == "rounds") parent_.Say(absl::StrCat("rounds ", rounds_));
    if (order == "leave") over_ = true;
    if (order == "cut") ForEachConnection([](int fd, int) { (void)shutdown(fd, SHUT_RDWR); });
  }

  Membership& membership_;
  Child::Parent& parent_;
  std::unique_ptr<Communicator> group_;
  std::string name_;  // Of the epoch: lineage and number.
  State state_;
  int64_t rounds_ = 0;
  bool over_ = false;
};

}  // namespace

void LiveInCluster(Membership& membership, Child::Parent& parent) { Life(membership, parent).Run(); }

MemberReport ParseMemberReport(const std::string& line) {
  MemberReport report;
  const std::vector<std::string> words = absl::StrSplit(line, absl::MaxSplits(' ', 4));
  const std::string& type = words[0];
  report.text = line;
  if (type == "rounds" && words.size() == 2 && absl::SimpleAtoi(words[1], &report.rounds)) {
    report.type = MemberReport::kRounds;
    return report;
  }
  if (words.size() < 5 || !absl::SimpleAtoi(words[1], &report.lineage) ||
      !absl::SimpleAtoi(words[2], &report.epoch) || !absl::SimpleAtoi(words[3], &report.at_ns)) {
    return report;
  }
  if (type == "view") {
    report.type = MemberReport::kView;
    for (const auto pid : absl::StrSplit(words[4], ',')) {
      if (!absl::SimpleAtoi(pid, &report.pids.emplace_back())) report.type = MemberReport::kOther;
    }
  } else if (type == "worked" && absl::SimpleAtoi(words[4], &report.unix_connections)) {
    report.type = MemberReport::kWorked;
  } else if (type == "done") {
    report.type = MemberReport::kDone;
  } else if (type == "aborted") {
    report.type = MemberReport::kAborted;
    report.text = words[4];
  }
  return report;
}

}  // namespace shoal
