#include "collectives/program/cost.h"

#include <algorithm>
#include <numeric>
#include <queue>

#include "runtime/base/check.h"

namespace shoal {
namespace {

int64_t TimeFor(int64_t bytes, int64_t bytes_per_ms) { return bytes * 1'000'000 / std::max<int64_t>(1, bytes_per_ms); }

// Plays all programs in the order of time. Instructions of all ranks are numbered through.
class Simulation {
 public:
  Simulation(const CostModel& model, const std::vector<Program>& programs, int64_t element_bytes)
      : model_(model), programs_(programs), size_(static_cast<int>(programs.size())), element_bytes_(element_bytes) {}

  int64_t Busiest();

  int64_t Run() {
    Prepare();
    MatchMessages();
    for (int g = 0; g < static_cast<int>(items_.size()); ++g) {
      if (items_[g].waiting == 0) Push(0, kReady, g);
    }
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      now_ = event.at;
      switch (event.what) {
        case kReady: Start(event.item); break;
        case kMet: Take(event.item); break;
        case kEnded: End(event.item); break;
      }
    }
    return now_;
  }

 private:
  enum What : uint8_t { kEnded, kMet, kReady };  // kMet: a message, and its receive.
  struct Event {
    int64_t at;
    int32_t item;
    What what;
    // The earlier first; then what frees others; then the lower index.
    bool operator<(const Event& o) const {
      if (at != o.at) return at > o.at;
      if (what != o.what) return what > o.what;
      return item > o.item;
    }
  };
  struct Item {
    const Instruction* instruction;
    int32_t rank;
    int32_t match = -1;
    int32_t waiting = 0;
    int32_t readers = 0;  // Of a view.
    // Of a receive, when: -1: not yet.
    int64_t posted = -1;
    int64_t arrived = -1;
  };

  void Push(int64_t at, What what, int item) { events_.push({at, item, what}); }
  int64_t Bytes(const Item& item) const { return item.instruction->region.count * element_bytes_; }
  bool Near(int a, int b) const { return model_.shared_memory && host_[a] == host_[b]; }
  const Link& LinkOf(int from, int to) const { return model_.links[from * size_ + to]; }

  // What arithmetic reads; and what it writes beyond its first target.
  int64_t WorkBytes(const Item& item) const {
    const Instruction& i = *item.instruction;
    return Bytes(item) * (i.sources_count + (i.returns ? i.sources_count - 1 : 0));
  }

  void Prepare();
  void MatchMessages();
  void Start(int g);
  void Move(int send, int64_t posted);
  void MeetIfBoth(int receive);
  void Take(int receive);
  void End(int g);
  // When `work` of this rank is done that could begin now: a rank does one thing at a time, on one of its host's cores.
  int64_t Compute(int rank, int64_t work);

  const CostModel& model_;
  const std::vector<Program>& programs_;
  const int size_;
  const int64_t element_bytes_;
  std::vector<Item> items_;
  std::vector<int32_t> base_;
  std::vector<int32_t> dependents_begin_, dependents_;
  std::vector<int> host_;  // By rank, from 0.
  std::vector<std::vector<int64_t>> core_free_;
  std::vector<int64_t> rank_free_, out_free_, in_free_, link_free_, port_;
  std::priority_queue<Event> events_;
  int64_t now_ = 0;
};

void Simulation::Prepare() {
  host_.resize(size_);
  int hosts = 1;
  if (!model_.topology.host.empty()) {
    std::vector<int> numbers = model_.topology.host;
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    hosts = static_cast<int>(numbers.size());
    for (int r = 0; r < size_; ++r) {
      host_[r] = static_cast<int>(std::lower_bound(numbers.begin(), numbers.end(), model_.topology.host[r]) - numbers.begin());
    }
  }
  core_free_.assign(hosts, std::vector<int64_t>(std::max<int64_t>(1, model_.cores_per_host)));
  rank_free_.assign(size_, 0);
  out_free_.assign(size_, 0);
  in_free_.assign(size_, 0);
  link_free_.assign(size_ * size_, 0);
  port_.assign(size_, 1);
  for (int a = 0; a < size_; ++a) {
    for (int b = 0; b < size_; ++b) {
      if (a != b) port_[a] = std::max({port_[a], LinkOf(a, b).bytes_per_ms, LinkOf(b, a).bytes_per_ms});
    }
  }
  size_t total = 0;
  for (const Program& program : programs_) total += program.instructions.size();
  items_.reserve(total);
  dependents_begin_.assign(total + 1, 0);
  for (int r = 0; r < size_; ++r) {
    base_.push_back(static_cast<int32_t>(items_.size()));
    for (const Instruction& i : programs_[r].instructions) {
      for (int32_t d : programs_[r].DependenciesOf(i)) ++dependents_begin_[base_[r] + d + 1];
      programs_[r].ForViews(i, [&](int32_t receive, const Region&) { ++items_[base_[r] + receive].readers; });
      items_.push_back({&i, r, -1, i.dependencies_count});
    }
  }
  std::partial_sum(dependents_begin_.begin(), dependents_begin_.end(), dependents_begin_.begin());
  dependents_.resize(dependents_begin_.back());
  std::vector<int32_t> next = dependents_begin_;
  for (int g = 0; g < static_cast<int>(total); ++g) {
    const int r = items_[g].rank;
    for (int32_t d : programs_[r].DependenciesOf(*items_[g].instruction)) dependents_[next[base_[r] + d]++] = g;
  }
}

void Simulation::MatchMessages() {
  std::vector<std::pair<uint64_t, int>> ends[2];
  for (int g = 0; g < static_cast<int>(items_.size()); ++g) {
    const Instruction& i = *items_[g].instruction;
    if (i.code == OpCode::kReduce) continue;
    const bool send = i.code == OpCode::kSend;
    const uint64_t from = send ? items_[g].rank : i.peer, to = send ? i.peer : items_[g].rank;
    ends[send ? 0 : 1].push_back({(from * size_ + to) << 32 | i.tag, g});
  }
  std::sort(ends[0].begin(), ends[0].end());
  std::sort(ends[1].begin(), ends[1].end());
  SHOAL_CHECK_EQ(ends[0].size(), ends[1].size());
  for (size_t k = 0; k < ends[0].size(); ++k) {
    SHOAL_CHECK_EQ(ends[0][k].first, ends[1][k].first);
    items_[ends[0][k].second].match = ends[1][k].second;
    items_[ends[1][k].second].match = ends[0][k].second;
  }
}

int64_t Simulation::Compute(int rank, int64_t work) {
  std::vector<int64_t>& cores = core_free_[host_[rank]];
  int64_t& core = *std::min_element(cores.begin(), cores.end());
  const int64_t done = std::max({now_, rank_free_[rank], core}) + work;
  rank_free_[rank] = core = done;
  return done;
}

void Simulation::Start(int g) {
  Item& item = items_[g];
  const Instruction& i = *item.instruction;
  if (i.code == OpCode::kReduce) {
    const int64_t work = TimeFor(WorkBytes(item), model_.reduce_bytes_per_ms);
    Push(Compute(item.rank, model_.instruction_ns + work), kEnded, g);
    return;
  }
  const int64_t posted = Compute(item.rank, model_.instruction_ns);
  if (i.code == OpCode::kSend) return Move(g, posted);
  item.posted = posted;
  MeetIfBoth(g);
}

// Within a host nothing moves, and the receiver ends the send. Across hosts the bytes go without waiting for it.
void Simulation::Move(int send, int64_t posted) {
  const Item& item = items_[send];
  const int from = item.rank, to = item.instruction->peer;
  const Link& link = LinkOf(from, to);
  int64_t moved = posted;
  if (!Near(from, to)) {
    int64_t& link_free = link_free_[from * size_ + to];
    const int64_t begin = std::max({posted, link_free, out_free_[from], in_free_[to]});
    out_free_[from] = begin + TimeFor(Bytes(item), port_[from]);
    in_free_[to] = begin + TimeFor(Bytes(item), port_[to]);
    moved = link_free = begin + TimeFor(Bytes(item), link.bytes_per_ms);
    Push(moved, kEnded, send);
  }
  items_[item.match].arrived = moved + link.latency_ns;
  MeetIfBoth(item.match);
}

void Simulation::MeetIfBoth(int receive) {
  const Item& item = items_[receive];
  if (item.posted >= 0 && item.arrived >= 0) Push(std::max(item.posted, item.arrived), kMet, receive);
}

void Simulation::Take(int receive) {
  const Item& item = items_[receive];
  const int from = item.instruction->peer;
  const bool near = Near(item.rank, from), view = item.instruction->region.buffer == Buffer::kMessage;
  int64_t taken = now_;
  if (near && !view) taken = Compute(item.rank, TimeFor(Bytes(item), LinkOf(from, item.rank).bytes_per_ms));
  Push(taken, kEnded, receive);
  if (near && (!view || item.readers == 0)) Push(taken, kEnded, item.match);
}

void Simulation::End(int g) {
  for (int d = dependents_begin_[g]; d < dependents_begin_[g + 1]; ++d) {
    if (--items_[dependents_[d]].waiting == 0) Push(now_, kReady, dependents_[d]);
  }
  const Item& item = items_[g];
  programs_[item.rank].ForViews(*item.instruction, [&](int32_t receive, const Region&) {
    Item& view = items_[base_[item.rank] + receive];
    if (--view.readers == 0 && Near(item.rank, view.instruction->peer)) Push(now_, kEnded, view.match);
  });
}

int64_t Simulation::Busiest() {
  Prepare();
  std::vector<int64_t> rank(size_), host(core_free_.size());
  for (const Item& item : items_) {
    const Instruction& i = *item.instruction;
    if (i.code == OpCode::kReduce) {
      rank[item.rank] += TimeFor(WorkBytes(item), model_.reduce_bytes_per_ms);
    } else if (i.code == OpCode::kSend && !Near(item.rank, i.peer)) {
      out_free_[item.rank] += TimeFor(Bytes(item), port_[item.rank]);
      in_free_[i.peer] += TimeFor(Bytes(item), port_[i.peer]);
      link_free_[item.rank * size_ + i.peer] += TimeFor(Bytes(item), LinkOf(item.rank, i.peer).bytes_per_ms);
    } else if (i.code == OpCode::kReceive && i.region.buffer != Buffer::kMessage && Near(item.rank, i.peer)) {
      rank[item.rank] += TimeFor(Bytes(item), LinkOf(i.peer, item.rank).bytes_per_ms);
    }
  }
  for (int r = 0; r < size_; ++r) host[host_[r]] += rank[r] / static_cast<int64_t>(core_free_[host_[r]].size());
  int64_t busiest = 0;
  for (const std::vector<int64_t>* all : {&rank, &host, &out_free_, &in_free_, &link_free_}) {
    busiest = std::max(busiest, *std::max_element(all->begin(), all->end()));
  }
  return busiest;
}

}  // namespace

int64_t BusiestNs(const CostModel& model, const std::vector<Program>& programs, int64_t element_bytes) {
  return Simulation(model, programs, element_bytes).Busiest();
}

int64_t PredictNs(const CostModel& model, const std::vector<Program>& programs, int64_t element_bytes) {
  return Simulation(model, programs, element_bytes).Run();
}

}  // namespace shoal
