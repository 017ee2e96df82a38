#include <algorithm>
#include <numeric>

#include "collectives/program/cost.h"
#include "collectives/program/layout.h"

namespace shoal {
namespace {

constexpr int kSimulatedRanksMax = 64;
constexpr int64_t kPieceBytes[] = {128 << 10, 1 << 20};

bool ByElements(OpKind kind) {
  return kind == OpKind::kAllReduce || kind == OpKind::kBroadcast || kind == OpKind::kReduce || kind == OpKind::kSend ||
         kind == OpKind::kReceive;
}

int64_t Total(const Problem& p) {
  return ByElements(p.kind) ? p.elements : std::accumulate(p.counts.begin(), p.counts.end(), int64_t{0});
}

// The longest region that is cut into pieces by some algorithm.
int64_t Longest(const Problem& p) {
  if (ByElements(p.kind)) return p.elements;
  return p.counts.empty() ? 0 : *std::max_element(p.counts.begin(), p.counts.end());
}

// The operation with its sizes scaled to `part` of `whole`.
Problem Scaled(Problem p, int64_t part, int64_t whole) {
  const auto scale = [&](int64_t count) { return static_cast<int64_t>(static_cast<__int128>(count) * part / whole); };
  p.elements = scale(p.elements);
  for (int64_t& count : p.counts) count = scale(count);
  for (int64_t& count : p.recv_counts) count = scale(count);
  return p;
}

std::vector<Program> ProgramsOf(const Algorithm& algorithm, Problem p) {
  std::vector<Program> programs;
  programs.reserve(p.size);
  for (p.rank = 0; p.rank < p.size; ++p.rank) programs.push_back(algorithm.make(p));
  return programs;
}

int64_t Simulate(const CostModel& model, const Algorithm& algorithm, const Problem& p, int64_t element_bytes) {
  return PredictNs(model, ProgramsOf(algorithm, p), element_bytes);
}

// How many parts, which are sent one by one, the algorithm makes of the longest region before it cuts them into pieces.
int64_t PartsOf(const Algorithm& algorithm, Problem p) {
  p.piece = 0;
  const Program program = algorithm.make(p);
  int64_t longest = 0;
  for (const Instruction& i : program.instructions) {
    if (i.code != OpCode::kReduce) longest = std::max(longest, i.region.count);
  }
  return longest == 0 ? 1 : std::max<int64_t>(1, Longest(p) / longest);
}

// Once pieces follow each other without a gap, each takes as long as the one before: so a few are simulated.
int64_t SimulatePieces(const CostModel& model, const Algorithm& algorithm, const Problem& p, int64_t element_bytes) {
  if (p.piece == 0) return Simulate(model, algorithm, p, element_bytes);
  const int64_t longest = Longest(p), unit = p.piece * PartsOf(algorithm, p);
  const int64_t few = 4 * unit, more = 12 * unit;
  if (longest <= more) return Simulate(model, algorithm, p, element_bytes);
  const int64_t few_ns = Simulate(model, algorithm, Scaled(p, few, longest), element_bytes);
  const int64_t more_ns = Simulate(model, algorithm, Scaled(p, more, longest), element_bytes);
  const __int128 rest = static_cast<__int128>(more_ns - few_ns) * (longest - more) / (more - few);
  return more_ns + static_cast<int64_t>(rest);
}

// What the busiest rank does, roughly.
struct Load {
  int64_t steps = 1;         // Messages that wait for each other.
  int64_t moved = 0;         // Bytes sent or received, the more of both.
  int64_t reduced = 0;       // Bytes read by arithmetic and copies.
  int64_t instructions = 0;
};

int64_t Log2(int64_t n) {
  int64_t steps = 0;
  while ((int64_t{1} << steps) < n) ++steps;
  return steps;
}

// all_reduce, reduce_scatter, all_gather.
Load PartedLoad(std::string_view name, const Problem& p, int64_t bytes) {
  const int64_t n = p.size, steps = Log2(n), phases = p.kind == OpKind::kAllReduce ? 2 : 1;
  const int64_t reduced = p.kind == OpKind::kAllGather ? 0 : bytes;
  if (name == "fused") return {1, 0, 2 * bytes, 2 * n};
  if (name == "direct1") return {1, (n - 1) * bytes, n * bytes, 2 * n};
  if (name == "ring") return {phases * (n - 1), phases * bytes, 2 * reduced, 3 * phases * n};
  if (name == "ring2") return {phases * (n - 1), phases * bytes, 2 * reduced, 6 * phases * n};
  if (name == "recursive_doubling") {
    const int64_t each = p.kind == OpKind::kAllReduce ? steps : 1;
    return {steps + 2, each * bytes, 2 * each * reduced, 3 * steps};
  }
  if (name == "halving_doubling") return {phases * steps + 2, phases * bytes, 2 * reduced, 3 * phases * steps};
  if (name == "tree") return {2 * steps, 3 * bytes * (p.piece > 0 ? 1 : steps), 3 * reduced, 8};
  if (name == "double_tree") return {2 * steps, 2 * bytes * (p.piece > 0 ? 1 : steps), 3 * reduced, 16};
  if (name == "two_level" || name == "two_level_ring") {
    const int64_t hosts = static_cast<int64_t>(RanksByHost(p).size());
    return {name == "two_level" ? 4 : 2 + 2 * hosts, phases * bytes, 2 * reduced, 4 * (n / hosts + hosts)};
  }
  return {phases, phases * bytes, reduced, 2 * phases * n};
}

// broadcast, reduce, gather, scatter.
Load RootedLoad(std::string_view name, const Problem& p, int64_t bytes) {
  const int64_t n = p.size, steps = Log2(n);
  const bool gathers = p.kind == OpKind::kGather || p.kind == OpKind::kScatter;
  const int64_t reduced = p.kind == OpKind::kReduce ? bytes : 0;
  const bool pieces = p.piece > 0;
  if (name == "ring") return {n - 1, bytes * (pieces ? 1 : n - 1), 2 * reduced, 3};
  if (name == "tree") return {steps, 2 * bytes * (pieces ? 1 : steps), 3 * reduced, 4};
  if (name == "double_tree") return {steps + 1, bytes * (pieces ? 1 : steps), 3 * reduced, 6};
  if (name == "binomial") return {steps, bytes * (gathers ? 1 : steps), steps * reduced, steps};
  if (name == "two_level") return {3, 2 * bytes, 2 * reduced, 2 * Log2(n)};
  return {1, gathers ? bytes : (n - 1) * bytes, n * reduced, n};
}

Load OtherLoad(std::string_view name, const Problem& p, int64_t bytes) {
  const int64_t n = p.size, steps = Log2(n);
  if (p.kind == OpKind::kBarrier) return name == "direct" ? Load{1, 0, 0, 2 * n} : Load{steps, 0, 0, 2 * steps};
  if (p.kind != OpKind::kAllToAll) return {name == "direct" ? 1 : 2, bytes, bytes, n};  // Sparse.
  if (name == "bruck") return {steps, steps * bytes / 2, (steps + 1) * bytes, n * steps};
  if (name == "pairwise") return {n - 1, bytes, 0, 2 * n};
  if (name == "two_level") return {3, 2 * bytes, 3 * bytes, 3 * n};
  return {1, bytes, 0, 2 * n};
}

int64_t Estimate(const CostModel& model, const Algorithm& algorithm, const Problem& p, int64_t element_bytes) {
  const int64_t bytes = Total(p) * element_bytes;
  Load load;
  switch (p.kind) {
    case OpKind::kAllReduce:
    case OpKind::kReduceScatter:
    case OpKind::kAllGather: load = PartedLoad(algorithm.name, p, bytes); break;
    case OpKind::kBroadcast:
    case OpKind::kReduce:
    case OpKind::kGather:
    case OpKind::kScatter: load = RootedLoad(algorithm.name, p, bytes); break;
    default: load = OtherLoad(algorithm.name, p, bytes);
  }
  int64_t latency_ns = 0, bytes_per_ms = 0;
  for (int r = 1; r < p.size; ++r) {  // Of one rank's links, as a sample.
    latency_ns = std::max(latency_ns, model.links[r].latency_ns);
    bytes_per_ms += model.links[r].bytes_per_ms;
  }
  bytes_per_ms = std::max<int64_t>(1, bytes_per_ms / (p.size - 1));
  const auto time = [](int64_t amount, int64_t per_ms) {
    return static_cast<int64_t>(static_cast<__int128>(amount) * 1'000'000 / std::max<int64_t>(1, per_ms));
  };
  const int64_t pieces = p.piece > 0 ? std::max<int64_t>(1, Longest(p) / p.piece) : 1;
  return load.steps * latency_ns + time(load.moved, bytes_per_ms) + time(load.reduced, model.reduce_bytes_per_ms) +
         std::max(load.instructions, pieces) * model.instruction_ns;
}

// The same on all ranks, whichever rank's problem it was.
Problem StandIn(const Problem& problem) {
  Problem p = problem;
  p.rank = 0;
  p.in_place = p.kind == OpKind::kAllReduce;  // As most are.
  if (p.kind == OpKind::kAllToAll && !p.even) {  // What others send is not known: take them to be alike.
    p.counts.assign(p.size, Total(p) / p.size);
    p.recv_counts = p.counts;
  }
  return p;
}

}  // namespace

std::vector<Choice> RankAlgorithms(const CostModel& model, const Problem& problem, int64_t element_bytes) {
  Problem p = StandIn(problem);
  const bool pair = p.kind == OpKind::kSend || p.kind == OpKind::kReceive;
  const bool simulate = !pair && p.size <= kSimulatedRanksMax;
  p.piece = 0;
  std::vector<Choice> choices;
  std::vector<std::pair<int64_t, const Algorithm*>> by_bound;
  for (const Algorithm& algorithm : Algorithms()) {
    if (!algorithm.applies(problem)) continue;
    Choice choice{&algorithm};
    int64_t bound_ns = 0;
    if (simulate) {
      const std::vector<Program> programs = ProgramsOf(algorithm, p);
      choice.predicted_ns = PredictNs(model, programs, element_bytes);
      bound_ns = BusiestNs(model, programs, element_bytes);
    } else if (p.size > 1) {
      choice.predicted_ns = Estimate(model, algorithm, p, element_bytes);
    }
    choices.push_back(choice);
    by_bound.push_back({bound_ns, &algorithm});
  }
  const auto faster = [](const Choice& a, const Choice& b) { return a.predicted_ns < b.predicted_ns; };
  int64_t best_ns = std::min_element(choices.begin(), choices.end(), faster)->predicted_ns;
  std::stable_sort(by_bound.begin(), by_bound.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [bound_ns, algorithm] : by_bound) {
    for (int64_t bytes : kPieceBytes) {
      if (bytes >= Longest(p) * element_bytes || bound_ns >= best_ns || p.size == 1) continue;
      p.piece = bytes / element_bytes;
      const int64_t predicted_ns = simulate ? SimulatePieces(model, *algorithm, p, element_bytes)
                                            : Estimate(model, *algorithm, p, element_bytes);
      choices.push_back({algorithm, p.piece, predicted_ns});
      best_ns = std::min(best_ns, predicted_ns);
    }
  }
  std::stable_sort(choices.begin(), choices.end(), faster);
  return choices;
}

}  // namespace shoal
