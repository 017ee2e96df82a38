#include "collectives/engine/planner.h"

#include <algorithm>
#include <utility>

#include "collectives/engine/arguments.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kPlansMax = 64;

uint64_t HashOf(const Op& op, const Problem& problem) {
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

bool Fits(const Planner::Plan& plan, uint64_t hash, const Op& op, const Problem& problem) {
  const Problem& known = plan.problem;
  return plan.hash == hash && known.kind == problem.kind && plan.dtype == op.dtype && plan.wire == op.wire &&
         plan.order == op.order && plan.forced == op.algorithm && known.in_place == problem.in_place &&
         known.root == problem.root && known.elements == problem.elements && known.counts == problem.counts &&
         known.recv_counts == problem.recv_counts && known.even == problem.even && SameMoves(known.moves, problem.moves);
}

const Algorithm* Direct(const Problem& problem) {
  const absl::StatusOr<const Algorithm*> direct = FindAlgorithm("direct", problem);
  SHOAL_CHECK(direct.ok()) << direct.status().ToString();
  return *direct;
}

}  // namespace

Problem ProblemOf(const Op& op, int index, int size, const Topology* topology) {
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
  return problem;
}

absl::Status CheckAlgorithm(const Op& op, int index, int size, const Topology& topology) {
  if (op.algorithm.empty()) return absl::OkStatus();
  const Problem problem = ProblemOf(op, index, size, &topology);
  SHOAL_ASSIGN_OR_RETURN(const Algorithm* algorithm, FindAlgorithm(op.algorithm, problem));
  const bool ordered = op.order == Order::kFixed || op.wire != WireFormat::kAsIs;
  if (!ordered || algorithm->index_order) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("algorithm '", op.algorithm, "' does not reduce in index order, as a fixed order or a wire format needs"));
}

Planner::Planner(int index, int size, Topology topology)
    : index_(index), size_(size), topology_(std::move(topology)) {}

const Algorithm* Planner::Choose(const Op& op, const Problem& problem) const {
  if (op.algorithm.empty()) return Direct(problem);
  const absl::StatusOr<const Algorithm*> forced = FindAlgorithm(op.algorithm, problem);
  SHOAL_CHECK(forced.ok()) << forced.status().ToString();
  return *forced;
}

const Planner::Plan& Planner::Find(const Op& op) {
  Problem problem = ProblemOf(op, index_, size_, &topology_);
  const uint64_t hash = HashOf(op, problem);
  for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
    if (!Fits(*plan, hash, op, problem)) continue;
    if (plan != plans_.begin()) plans_.splice(plans_.begin(), plans_, plan);
    return plans_.front();
  }
  Plan plan;
  plan.algorithm = Choose(op, problem);
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
