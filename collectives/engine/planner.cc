#include "collectives/engine/planner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "collectives/engine/arguments.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kPlansMax = 64;

uint64_t HashOf(const Operation& op, const Problem& problem) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  mix(static_cast<uint64_t>(problem.kind) | static_cast<uint64_t>(op.dtype) << 8 | static_cast<uint64_t>(op.wire) << 16 |
      static_cast<uint64_t>(op.order) << 24 | static_cast<uint64_t>(problem.in_place) << 32);
  mix(problem.root);
  mix(problem.elements);
  for (int64_t count : problem.counts) mix(count);
  for (int64_t count : problem.recv_counts) mix(count);
  for (const SparseMove& move : problem.moves) {
    mix(move.chunk);
    mix(move.owner);
    for (int holder : move.holders) mix(holder + 1);
  }
  for (char letter : op.algorithm) mix(letter);
  return hash;
}

bool SameMoves(const std::vector<SparseMove>& a, const std::vector<SparseMove>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const SparseMove& x, const SparseMove& y) {
    return x.chunk == y.chunk && x.owner == y.owner && x.holders == y.holders;
  });
}

bool Fits(const Planner::Plan& plan, uint64_t hash, const Operation& op, const Problem& problem) {
  const Problem& known = plan.problem;
  return plan.hash == hash && known.kind == problem.kind && plan.dtype == op.dtype && plan.wire == op.wire &&
         plan.order == op.order && plan.forced == op.algorithm && known.in_place == problem.in_place &&
         known.root == problem.root && known.elements == problem.elements && known.counts == problem.counts &&
         known.recv_counts == problem.recv_counts && known.even == problem.even &&
         known.piece == problem.piece && SameMoves(known.moves, problem.moves);
}

// "NAME" or "NAME:BYTES": the latter in pieces of so many bytes.
struct Forced {
  std::string_view name;
  int64_t piece_bytes = 0;
};

absl::StatusOr<Forced> ParseForced(std::string_view text) {
  const size_t colon = text.find(':');
  Forced forced = {text.substr(0, colon)};
  if (colon == std::string_view::npos) return forced;
  if (absl::SimpleAtoi(AbslSv(text.substr(colon + 1)), &forced.piece_bytes) && forced.piece_bytes >= 64) return forced;
  return absl::InvalidArgumentError(
      absl::StrCat("algorithm '", AbslSv(text), "': want NAME or NAME:BYTES, pieces of 64 bytes or more"));
}

}  // namespace

Problem ProblemOf(const Operation& op, int index, int size, const Topology* topology) {
  Problem problem;
  problem.kind = op.kind;
  problem.rank = index;
  problem.size = size;
  problem.root = op.root;
  const bool counted =
      op.kind == OpKind::kAllReduce || op.kind == OpKind::kReduce || op.kind == OpKind::kBroadcast;
  problem.elements = counted ? op.in.elements() : 0;
  problem.counts = op.counts;
  problem.recv_counts = op.recv_counts;
  problem.even = op.even;
  problem.in_place = IsInPlace(op, index);
  problem.moves = op.moves;
  problem.topology = topology;
  // Ranks that share a host share memory: others are told to be on hosts of their own (Topology).
  const bool one_host = std::all_of(topology->host.begin(), topology->host.end(),
                                    [&](int host) { return host == topology->host[0]; });
  problem.lending = one_host && op.wire == WireFormat::kAsIs;
  return problem;
}

absl::Status CheckAlgorithm(const Operation& op, int index, int size, const Topology& topology) {
  if (op.algorithm.empty()) return absl::OkStatus();
  const Problem problem = ProblemOf(op, index, size, &topology);
  SHOAL_ASSIGN_OR_RETURN(const Forced forced, ParseForced(op.algorithm));
  SHOAL_ASSIGN_OR_RETURN(const Algorithm* algorithm, FindAlgorithm(forced.name, problem));
  const bool ordered = op.order == Order::kFixed || op.wire != WireFormat::kAsIs;
  if (!ordered || algorithm->index_order) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("algorithm '", op.algorithm, "' does not reduce in index order, as a fixed order or a wire format needs"));
}

Planner::Planner(int index, int size, Topology topology, CostModel model)
    : index_(index), size_(size), topology_(std::move(topology)), tuner_(std::move(model)) {}

Planner::Planner(int index, int size)
    : Planner(index, size, {std::vector<int>(size), {}},
              DefaultCostModel({std::vector<int>(size), {}}, /*cores_per_host=*/1)) {}

void Planner::SetModel(CostModel model) {
  topology_.order = model.topology.order;
  plans_.clear();
  tuner_.SetModel(std::move(model));
}

const Algorithm* Planner::Choose(const Operation& op, Problem* problem) {
  if (op.algorithm.empty()) {
    const Tuner::Decision decision = tuner_.Choose(op, *problem);
    problem->piece = decision.piece_bytes / SizeOf(op.dtype);
    return decision.algorithm;
  }
  tuner_.Skip();
  const absl::StatusOr<Forced> forced = ParseForced(op.algorithm);
  SHOAL_CHECK(forced.ok()) << forced.status().ToString();
  const absl::StatusOr<const Algorithm*> algorithm = FindAlgorithm(forced->name, *problem);
  SHOAL_CHECK(algorithm.ok()) << algorithm.status().ToString();
  problem->piece = forced->piece_bytes / SizeOf(op.dtype);
  return *algorithm;
}

const Planner::Plan& Planner::Find(const Operation& op) {
  Problem problem = ProblemOf(op, index_, size_, &topology_);
  const Algorithm* const algorithm = Choose(op, &problem);
  const uint64_t hash = HashOf(op, problem);
  for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
    if (plan->algorithm != algorithm || !Fits(*plan, hash, op, problem)) continue;
    if (plan != plans_.begin()) plans_.splice(plans_.begin(), plans_, plan);
    return plans_.front();
  }
  Plan plan;
  plan.algorithm = algorithm;
  plan.program = std::make_shared<PreparedProgram>(plan.algorithm->make(problem), op.wire);
  plan.problem = std::move(problem);
  plan.dtype = op.dtype;
  plan.wire = op.wire;
  plan.order = op.order;
  plan.forced = op.algorithm;
  plan.hash = hash;
  plans_.push_front(std::move(plan));
  if (plans_.size() > kPlansMax) plans_.pop_back();
  return plans_.front();
}

}  // namespace shoal
