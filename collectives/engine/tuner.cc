#include "collectives/engine/tuner.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kCanonicalBytes = 4;  // Of an element, when times are predicted.
// Another algorithm is tried when it is expected to take no more than 5/4 of the best one's time; for so many operations.
constexpr size_t kCandidatesMax = 3;
constexpr int kTrialOperations = 12;
constexpr int64_t kEnoughObserved = 8;

bool Reduces(OpKind kind) {
  return kind == OpKind::kAllReduce || kind == OpKind::kReduceScatter || kind == OpKind::kReduce;
}

bool ByElements(OpKind kind) {
  return kind == OpKind::kAllReduce || kind == OpKind::kReduce || kind == OpKind::kBroadcast;
}

bool OneHost(const Topology& topology) {
  return std::all_of(topology.host.begin(), topology.host.end(), [&](int host) { return host == topology.host[0]; });
}

// The operation of a class that predictions are made for.
Problem Canonical(const Problem& problem, int log2_bytes) {
  Problem p;
  p.kind = problem.kind;
  p.size = problem.size;
  p.topology = problem.topology;
  p.lending = problem.lending;
  p.even = true;
  const int64_t bytes = log2_bytes < 0 ? 0 : (int64_t{3} << log2_bytes) / 2;
  if (ByElements(p.kind)) {
    p.elements = std::max<int64_t>(1, bytes / kCanonicalBytes);
  } else if (p.kind != OpKind::kBarrier) {
    p.counts.assign(p.size, std::max<int64_t>(1, bytes / kCanonicalBytes / p.size));
    if (p.kind == OpKind::kAllToAll) p.recv_counts = p.counts;
  }
  return p;
}

int64_t Median(const std::array<int64_t, 16>& recent, int64_t observed) {
  std::array<int64_t, 16> sorted = recent;
  const auto count = static_cast<size_t>(std::min<int64_t>(observed, sorted.size()));
  if (count == 0) return 0;
  std::nth_element(sorted.begin(), sorted.begin() + count / 2, sorted.begin() + count);
  return sorted[count / 2];
}

std::string Micros(int64_t ns) { return absl::StrCat(ns / 1000, ".", ns % 1000 / 100, " us"); }

}  // namespace

CostModel DefaultCostModel(const Topology& topology, int64_t cores_per_host) {
  // Medians of many measurements: a message on shared memory, its copy, and TCP on one machine.
  constexpr Link kMemory = {600, 12'000'000}, kNetwork = {30'000, 2'000'000};
  CostModel model;
  model.topology = topology;
  model.reduce_bytes_per_ms = 24'000'000;
  model.instruction_ns = 150;
  model.cores_per_host = std::max<int64_t>(1, cores_per_host);
  const size_t size = topology.host.size();
  for (size_t from = 0; from < size; ++from) {
    for (size_t to = 0; to < size; ++to) {
      model.links.push_back(topology.host[from] == topology.host[to] ? kMemory : kNetwork);
    }
  }
  return model;
}

size_t BestObserved(absl::Span<const int64_t> times_ns, size_t present) {
  size_t best = present;
  for (size_t c = 0; c < times_ns.size(); ++c) {
    if (times_ns[c] > 0 && times_ns[c] < times_ns[best]) best = c;
  }
  return times_ns[best] < times_ns[present] - times_ns[present] / 10 ? best : present;
}

Tuner::Allowed Tuner::AllowedFor(const Operation& op) {
  if (op.wire != WireFormat::kAsIs) return Allowed::kDirect;
  if (op.order == Order::kFixed) return Allowed::kIndexOrder;
  // Sums of 16-bit numbers that pass several ranks are rounded at each.
  const bool rounds = op.dtype == DType::kBF16 || op.dtype == DType::kF16;
  const bool adds = op.reduce == ReduceOp::kSum || op.reduce == ReduceOp::kAverage || op.reduce == ReduceOp::kProduct;
  return Reduces(op.kind) && rounds && adds ? Allowed::kPrecise : Allowed::kAll;
}

int Tuner::LogBytes(const Operation& op, const Problem& problem) {
  const bool sparse = op.kind == OpKind::kSparseAllGather || op.kind == OpKind::kSparseReduceScatter;
  if (sparse || (op.kind == OpKind::kAllToAll && !op.even)) return -1;
  const int64_t elements = ByElements(op.kind)
                               ? problem.elements
                               : std::accumulate(problem.counts.begin(), problem.counts.end(), int64_t{0});
  return std::bit_width(static_cast<uint64_t>(std::max<int64_t>(1, elements * SizeOf(op.dtype)))) - 1;
}

Tuner::Class& Tuner::ClassOf(const Operation& op, const Problem& problem) {
  const Allowed allowed = AllowedFor(op);
  const int log2_bytes = LogBytes(op, problem);
  for (Class& known : classes_) {
    if (known.kind == op.kind && known.allowed == allowed && known.log2_bytes == log2_bytes) return known;
  }
  Class& added = classes_.emplace_back();
  added.kind = op.kind;
  added.allowed = allowed;
  added.log2_bytes = log2_bytes;
  FillClass(problem, &added);
  return added;
}

void Tuner::FillClass(const Problem& problem, Class* found) const {
  Class& c = *found;
  std::vector<Choice> choices;
  if (c.log2_bytes >= 0) {
    choices = RankAlgorithms(model_, Canonical(problem, c.log2_bytes), kCanonicalBytes);
  } else {
    // The sparse ones go by way of a leader on each host.
    for (const Algorithm& algorithm : Algorithms()) {
      const bool wanted = algorithm.name == (OneHost(model_.topology) || c.kind == OpKind::kAllToAll ? "direct" : "two_level");
      if (wanted && algorithm.applies(problem)) choices.push_back({&algorithm, 0, 0});
    }
  }
  const bool one_host = OneHost(model_.topology);
  const auto ordered = [](const Choice& choice) { return choice.algorithm->index_order; };
  const auto direct = [](const Choice& choice) { return choice.algorithm->name == "direct" && choice.piece == 0; };
  const auto best_ordered = std::find_if(choices.begin(), choices.end(), ordered);
  const auto refused = [&](const Choice& choice) {
    if (one_host && choice.piece > 0) return true;  // Peers read in place: nothing waits for the whole.
    if (c.allowed == Allowed::kDirect) return !direct(choice);
    if (c.allowed == Allowed::kIndexOrder) return !ordered(choice);
    if (c.allowed != Allowed::kPrecise || ordered(choice) || best_ordered == choices.end()) return false;
    return choice.predicted_ns * 10 > best_ordered->predicted_ns * 7;  // Gains too little for what it loses.
  };
  std::vector<Choice> kept;
  std::copy_if(choices.begin(), choices.end(), std::back_inserter(kept), [&](const Choice& x) { return !refused(x); });
  for (const Choice& choice : kept) {
    const bool close = choice.predicted_ns <= kept[0].predicted_ns + kept[0].predicted_ns / 4;
    if (close && c.candidates.size() < kCandidatesMax) c.candidates.push_back({choice});
  }
  if (c.log2_bytes < 0) {
    c.why = "ranks know different sizes";
  } else if (kept.empty()) {
    c.why = "nothing else applies";
  } else if (kept.size() == 1) {
    c.why = c.allowed == Allowed::kDirect ? "wire formats go directly" : "the only one that may";
  } else {
    c.why = absl::StrCat("predicted best, before ", AbslSv(kept[1].algorithm->name), " with ", Micros(kept[1].predicted_ns));
  }
}

Tuner::Decision Tuner::Choose(const Operation& op, const Problem& problem) {
  MutexLock lock(&mutex_);
  Class& c = ClassOf(op, problem);
  size_t first = c.present;
  if (c.trials_left > 0) {
    --c.trials_left;
    first = c.trial;
  }
  // What applies to equal counts may not apply to these.
  for (size_t k = 0; k < c.candidates.size(); ++k) {
    Candidate& candidate = c.candidates[(first + k) % c.candidates.size()];
    if (!candidate.choice.algorithm->applies(problem)) continue;
    last_ = &candidate;
    return {candidate.choice.algorithm, candidate.choice.piece * kCanonicalBytes};
  }
  last_ = nullptr;
  const absl::StatusOr<const Algorithm*> direct = FindAlgorithm("direct", problem);
  SHOAL_CHECK(direct.ok()) << direct.status().ToString();
  return {*direct, 0};
}

void Tuner::Skip() {
  MutexLock lock(&mutex_);
  last_ = nullptr;
}

void Tuner::Observe(int64_t ns) {
  MutexLock lock(&mutex_);
  if (last_ == nullptr) return;
  last_->recent_ns[last_->observed++ % last_->recent_ns.size()] = std::max<int64_t>(1, ns);
}

void Tuner::SetModel(CostModel model) {
  MutexLock lock(&mutex_);
  model_ = std::move(model);
  classes_.clear();
  last_ = nullptr;
}

bool Tuner::ExchangesBefore(uint64_t number) {
  return number >= 64 && std::has_single_bit(number) && std::countr_zero(number) % 2 == 0;
}

void Tuner::FillExchange(absl::Span<int64_t> own) {
  MutexLock lock(&mutex_);
  std::fill(own.begin(), own.end(), 0);
  size_t at = 0;
  for (const Class& c : classes_) {
    for (const Candidate& candidate : c.candidates) {
      if (at == own.size()) return;
      if (candidate.observed >= kEnoughObserved) own[at] = Median(candidate.recent_ns, candidate.observed);
      ++at;
    }
  }
}

void Tuner::ApplyExchange(absl::Span<const int64_t> all) {
  MutexLock lock(&mutex_);
  const size_t ranks = all.size() / kExchanged;
  size_t at = 0;
  for (Class& c : classes_) {
    for (Candidate& candidate : c.candidates) {
      if (at == kExchanged) return;
      candidate.agreed_ns = 0;
      bool everywhere = true;
      for (size_t rank = 0; rank < ranks; ++rank) {
        const int64_t ns = all[rank * kExchanged + at];
        everywhere = everywhere && ns > 0;
        candidate.agreed_ns = std::max(candidate.agreed_ns, ns);
      }
      if (!everywhere) candidate.agreed_ns = 0;
      ++at;
    }
    Adjust(&c);
  }
}

void Tuner::Adjust(Class* found) const {
  Class& c = *found;
  c.trials_left = 0;
  if (c.candidates.size() < 2 || c.candidates[c.present].agreed_ns == 0) return;
  std::vector<int64_t> times;
  for (const Candidate& candidate : c.candidates) times.push_back(candidate.agreed_ns);
  if (const size_t best = BestObserved(times, c.present); best != c.present) {
    c.why = absl::StrCat("observed ", Micros(times[best]), " on the slowest rank, ",
                         AbslSv(c.candidates[c.present].choice.algorithm->name), " ", Micros(times[c.present]));
    c.present = best;
  }
  for (size_t k = 0; k < times.size(); ++k) {
    if (times[k] > 0) continue;
    c.trial = k;
    c.trials_left = kTrialOperations;
    return;
  }
}

std::vector<TuningRow> Tuner::Rows() const {
  std::vector<TuningRow> rows;
  MutexLock lock(&mutex_);
  for (const Class& c : classes_) {
    for (size_t k = 0; k < c.candidates.size(); ++k) {
      const Candidate& candidate = c.candidates[k];
      if (k != c.present && candidate.observed == 0) continue;
      TuningRow row;
      row.kind = c.kind;
      row.size_class = c.log2_bytes < 0 ? 0 : int64_t{1} << c.log2_bytes;
      row.algorithm = std::string(candidate.choice.algorithm->name);
      row.piece_bytes = candidate.choice.piece * kCanonicalBytes;
      row.predicted_ns = candidate.choice.predicted_ns;
      row.observed_ns = Median(candidate.recent_ns, candidate.observed);
      row.operations = candidate.observed;
      row.chosen = k == c.present;
      row.why = row.chosen ? c.why : "tried";
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

}  // namespace shoal
