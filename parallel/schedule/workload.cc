#include "parallel/schedule/workload.h"

#include <algorithm>
#include <utility>

#include "parallel/placement/placement.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

size_t At(int index) { return static_cast<size_t>(index); }

// The ranks that hold an expert, ascending, owner included.
std::vector<int> MembersOf(const ExpertCopies& copies) {
  std::vector<int> members = copies.holders;
  members.insert(std::lower_bound(members.begin(), members.end(), copies.owner), copies.owner);
  return members;
}

// Calls fn(host, begin, end) for each run of members on one host. Ranks of a host need not be consecutive.
template <typename Fn>
void ForHosts(const Topology& topology, std::vector<int>* members, Fn fn) {
  std::stable_sort(members->begin(), members->end(), [&](int a, int b) { return topology.HostOf(a) < topology.HostOf(b); });
  for (size_t begin = 0, end = 0; begin < members->size(); begin = end) {
    const int host = topology.HostOf((*members)[begin]);
    while (end < members->size() && topology.HostOf((*members)[end]) == host) ++end;
    fn(host, begin, end);
  }
}

struct Flows {
  std::vector<double> intra_out, intra_in, inter_out, inter_in;
  explicit Flows(size_t ranks) : intra_out(ranks), intra_in(ranks), inter_out(ranks), inter_in(ranks) {}
};

// Every token visits every expert equally often; copies share as DispatchRule::kNearest says.
void SpreadEvenly(const Workload& workload, const ExpertPlacement& placement, const Topology& topology, Flows* flows,
                  std::vector<ExpertShare>* shares) {
  const int ranks = topology.ranks();
  const double per_expert = static_cast<double>(workload.choices) / static_cast<double>(placement.size());
  std::vector<double> host_rows(At(topology.hosts()));  // For one expert.
  double all_rows = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    const double rows = per_expert * static_cast<double>(workload.TokensOf(rank));
    host_rows[At(topology.HostOf(rank))] += rows;
    all_rows += rows;
  }
  std::vector<int> on_rank(At(ranks)), on_host(host_rows.size());
  for (const ExpertCopies& copies : placement) {
    std::vector<int> members = MembersOf(copies);
    double reached = 0;  // Rows of hosts that have a copy.
    ForHosts(topology, &members, [&](int host, size_t begin, size_t end) {
      ++on_host[At(host)];
      reached += host_rows[At(host)];
      double away = host_rows[At(host)];
      for (size_t i = begin; i < end; ++i) {
        const double rows = per_expert * static_cast<double>(workload.TokensOf(members[i]));
        ++on_rank[At(members[i])];
        (*shares)[At(members[i])].stay += rows;
        away -= rows;
      }
      for (size_t i = begin; i < end; ++i)
        flows->intra_in[At(members[i])] += std::max(0.0, away) / static_cast<double>(end - begin);
    });
    const double from_far = std::max(0.0, all_rows - reached) / static_cast<double>(members.size());
    for (int member : members) flows->inter_in[At(member)] += from_far;
  }
  for (int rank = 0; rank < ranks; ++rank) {
    const double rows = per_expert * static_cast<double>(workload.TokensOf(rank));
    const int near = on_host[At(topology.HostOf(rank))];
    flows->intra_out[At(rank)] = rows * (near - on_rank[At(rank)]);
    flows->inter_out[At(rank)] = rows * (static_cast<int>(placement.size()) - near);
  }
}

void SplitRows(const Workload& workload, const ExpertWork& experts, const Topology& topology, Flows* flows,
               std::vector<ExpertShare>* shares) {
  const auto split = SplitTokens(workload.dispatch, topology, experts.placement, experts.rows);
  for (int source = 0; source < topology.ranks(); ++source) {
    for (const DispatchShare& share : split[At(source)]) {
      const double rows = static_cast<double>(share.rows);
      if (share.rank == source) {
        (*shares)[At(source)].stay += rows;
      } else if (topology.HostOf(share.rank) == topology.HostOf(source)) {
        flows->intra_out[At(source)] += rows;
        flows->intra_in[At(share.rank)] += rows;
      } else {
        flows->inter_out[At(source)] += rows;
        flows->inter_in[At(share.rank)] += rows;
      }
    }
  }
}

void CountCopies(const ExpertPlacement& placement, const Topology& topology, std::vector<ExpertShare>* shares) {
  for (const ExpertCopies& copies : placement) (*shares)[At(copies.owner)].owned += 1;
  const std::vector<int64_t> moved = MovedExperts(placement, topology);
  for (size_t rank = 0; rank < shares->size(); ++rank) (*shares)[rank].copies = static_cast<double>(moved[rank]);
}

ExpertShare Largest(const std::vector<ExpertShare>& shares) {
  ExpertShare largest;
  for (const ExpertShare& share : shares) {
    for (double ExpertShare::*field : {&ExpertShare::rows, &ExpertShare::arrived, &ExpertShare::stay, &ExpertShare::intra,
                                       &ExpertShare::inter, &ExpertShare::copies, &ExpertShare::owned}) {
      largest.*field = std::max(largest.*field, share.*field);
    }
  }
  return largest;
}

// The share of a chunk in a rank's tokens.
double Fraction(int64_t tokens, int chunks, int chunk) {
  if (tokens == 0) return 1.0 / chunks;
  return static_cast<double>(EvenPart(tokens, chunks, chunk).count) / static_cast<double>(tokens);
}

}  // namespace

std::vector<ExpertShare> ShareExperts(const Workload& workload, const ExpertWork& experts, const Topology& topology) {
  const size_t ranks = At(topology.ranks());
  std::vector<ExpertShare> shares(ranks);
  Flows flows(ranks);
  if (experts.rows.empty()) {
    SpreadEvenly(workload, experts.placement, topology, &flows, &shares);
  } else {
    SplitRows(workload, experts, topology, &flows, &shares);
  }
  CountCopies(experts.placement, topology, &shares);
  for (size_t rank = 0; rank < ranks; ++rank) {
    ExpertShare& share = shares[rank];
    share.rows = share.stay + flows.intra_out[rank] + flows.inter_out[rank];
    share.arrived = share.stay + flows.intra_in[rank] + flows.inter_in[rank];
    share.intra = std::max(flows.intra_out[rank], flows.intra_in[rank]);
    share.inter = std::max(flows.inter_out[rank], flows.inter_in[rank]);
  }
  return shares;
}

StepUnits::StepUnits(const Workload& workload, const Topology& topology) : workload_(workload), ranks_(topology.ranks()) {
  for (int64_t tokens : workload.tokens) tokens_max_ = std::max(tokens_max_, tokens);
  for (const ExpertWork& experts : workload.experts) {
    shares_.push_back(ShareExperts(workload, experts, topology));
    shares_.back().push_back(Largest(shares_.back()));
  }
}

const ExpertShare& StepUnits::Share(int layer, int rank) const {
  const std::vector<ExpertShare>& shares = shares_[At(workload_.experts_of_layer[At(layer)])];
  return rank == kEveryRank ? shares.back() : shares[At(rank)];
}

int64_t StepUnits::Tokens(int rank) const { return rank == kEveryRank ? tokens_max_ : workload_.TokensOf(rank); }

int64_t StepUnits::TokensOfWave(const Task& task, const Schedule& schedule, int rank) const {
  const int64_t tokens = Tokens(rank);
  if (task.wave < 0) return tokens;
  return EvenPart(tokens / workload_.sequence_tokens, schedule.waves, task.wave).count * workload_.sequence_tokens;
}

// Of the rows of all waves.
double StepUnits::ShareOfChunk(const Task& task, const Schedule& schedule, int rank) const {
  const LayerSchedule& layer = schedule.layers[At(task.layer)];
  const int chunks = task.phase == Phase::kBackward ? layer.backward_chunks : layer.forward_chunks;
  const int64_t tokens = Tokens(rank), of_wave = TokensOfWave(task, schedule, rank);
  const double wave = task.wave < 0 ? 1
                      : tokens == 0 ? 1.0 / schedule.waves
                                    : static_cast<double>(of_wave) / static_cast<double>(tokens);
  return wave * Fraction(of_wave, chunks, task.chunk);
}

double StepUnits::ElementsOwned(int rank) const {
  double elements = 0;
  for (int64_t bucket : workload_.bucket_elements) elements += static_cast<double>(bucket) / ranks_;
  for (size_t layer = 0; layer < workload_.experts_of_layer.size(); ++layer) {
    if (workload_.experts_of_layer[layer] < 0) continue;
    elements += Share(static_cast<int>(layer), rank).owned * static_cast<double>(workload_.expert_elements);
  }
  return elements;
}

std::vector<double> StepUnits::KeyOfRank(int rank) const {
  std::vector<double> key = {static_cast<double>(Tokens(rank))};
  for (const std::vector<ExpertShare>& shares : shares_) {
    const ExpertShare& share = shares[At(rank)];
    key.insert(key.end(), {share.rows, share.arrived, share.stay, share.intra, share.inter, share.copies, share.owned});
  }
  return key;
}

double StepUnits::Of(const Task& task, const Schedule& schedule, int rank) const {
  const double row_bytes = static_cast<double>(workload_.row_bytes);
  const auto piece = [&] { return ShareOfChunk(task, schedule, rank); };
  switch (task.op) {
    case Op::kGather:
      return static_cast<double>(workload_.bucket_bytes[At(task.chunk)]);
    case Op::kRelease:
    case Op::kBalance:
    case Op::kCalibrate:  // What is expected was planned.
      return 0;
    case Op::kMaterialise:
      return Share(task.layer, rank).copies * static_cast<double>(workload_.expert_weight_bytes);
    case Op::kReduceExperts:
      return Share(task.layer, rank).copies * static_cast<double>(workload_.expert_gradient_bytes);
    case Op::kEmbed:
    case Op::kAttention:
    case Op::kDense:
    case Op::kRoute:
    case Op::kArrange:
    case Op::kShared:
    case Op::kHead:
      return static_cast<double>(TokensOfWave(task, schedule, rank));
    case Op::kExchange:
      return static_cast<double>(workload_.summary_bytes * ranks_);
    case Op::kTotals:
      return static_cast<double>(workload_.totals_bytes);
    case Op::kNormSum:
      return static_cast<double>(workload_.norm_bytes);
    case Op::kPack:
    case Op::kCombine:
      return Share(task.layer, rank).rows * piece();
    case Op::kStay:
      return Share(task.layer, rank).stay * piece() * row_bytes;
    case Op::kDispatch:
    case Op::kReturn:
      return (task.lane == Lane::kInter ? Share(task.layer, rank).inter : Share(task.layer, rank).intra) * piece() * row_bytes;
    case Op::kExperts:
    case Op::kExpertsWeight:
      return Share(task.layer, rank).arrived * piece();
    case Op::kReduce:
      return static_cast<double>(schedule.gradients[At(task.slice)].count * workload_.gradient_bytes);
    case Op::kNorm:
      return ElementsOwned(rank);
    case Op::kUpdate:
      if (task.layer >= 0) return Share(task.layer, rank).owned * static_cast<double>(workload_.expert_elements);
      return static_cast<double>(workload_.bucket_elements[At(task.chunk)]) / ranks_;
  }
  return 0;
}

void FillUnits(const Workload& workload, const Topology& topology, const Schedule& schedule, int rank, Graph* graph) {
  const StepUnits units(workload, topology);
  for (Task& task : graph->tasks) task.units = units.Of(task, schedule, rank);
}

void DescribeTraffic(const Workload& workload, const Topology& topology, StepShape* shape) {
  shape->ranks = topology.ranks();
  shape->inter = topology.hosts() > 1;
  shape->intra = topology.hosts() < topology.ranks();
  shape->dispatch = shape->materialise = false;
  for (const ExpertWork& experts : workload.experts) {
    for (const ExpertCopies& copies : experts.placement) {
      if (static_cast<int>(copies.holders.size()) + 1 < topology.ranks()) shape->dispatch = true;
      if (!copies.holders.empty()) shape->materialise = true;
    }
  }
}

}  // namespace shoal
