// What tasks take on a described cluster.
#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "parallel/planner/layout.h"

namespace shoal {
namespace {

constexpr double kF32 = 4;

double Log2(int n) { return n <= 1 ? 0 : std::ceil(std::log2(n)); }

class CostBuilder {
 public:
  CostBuilder(const ModelShape& model, const Cluster& cluster, const Workload& work, const Topology& topology)
      : model_(model),
        cluster_(cluster),
        work_(work),
        topology_(topology),
        b_(static_cast<double>(model.compute_bytes)),
        width_(static_cast<double>(model.width)),
        flops_per_ns_(model.compute_bytes == 2 ? cluster.bf16_flops_per_ns : cluster.fp32_flops_per_ns) {
    costs_.interference = cluster.interference;
    costs_.compute_share[static_cast<size_t>(Lane::kIntra)] = cluster.intra_compute_share;
    costs_.compute_share[static_cast<size_t>(Lane::kInter)] = cluster.inter_compute_share;
  }

  CostTable Build() {
    AddDense();
    AddExperts();
    AddMemoryBound();
    AddLinks();
    return std::move(costs_);
  }

 private:
  void Set(Op op, Phase phase, Lane lane, double fixed_ns, double ns_per_unit) {
    costs_.models[{op, phase, lane}] = {fixed_ns, ns_per_unit};
  }
  // A task that computes: operations and bytes of a unit, and bytes of weights that it reads however few its units.
  void Compute(Op op, Phase phase, double flops, double bytes, double weight_bytes) {
    Set(op, phase, Lane::kCompute, cluster_.task_ns + weight_bytes / cluster_.memory_bytes_per_ns,
        flops / flops_per_ns_ + bytes / cluster_.memory_bytes_per_ns);
  }

  void AddDense() {
    const double q = static_cast<double>(model_.query_size), kv = static_cast<double>(model_.kv_size);
    const double seq = static_cast<double>(model_.sequence_length);
    const double projections = 2 * static_cast<double>(model_.AttentionElements()), scores = 2 * q * seq;
    const double moved = width_ * (2 * kF32 + 3 * b_) + (2 * q + 2 * kv) * 3 * b_;
    const double weights = static_cast<double>(model_.AttentionElements()) * b_;
    Compute(Op::kAttention, Phase::kForward, projections + scores, moved, weights);
    Compute(Op::kAttention, Phase::kBackward, 2 * projections + 2.5 * scores, 2.5 * moved, 3 * weights);
    const double dense = 3 * width_ * static_cast<double>(model_.dense_inner), inner = static_cast<double>(model_.dense_inner);
    Compute(Op::kDense, Phase::kForward, 2 * dense, width_ * 4 * kF32 + inner * 5 * b_, dense * b_);
    Compute(Op::kDense, Phase::kBackward, 4 * dense, width_ * 8 * kF32 + inner * 9 * b_, 3 * dense * b_);
    const double shared = 3 * width_ * static_cast<double>(model_.shared_inner),
                 narrow = static_cast<double>(model_.shared_inner);
    Compute(Op::kShared, Phase::kForward, 2 * shared, width_ * 3 * kF32 + narrow * 5 * b_, shared * b_);
    Compute(Op::kShared, Phase::kBackward, 4 * shared, width_ * 6 * kF32 + narrow * 9 * b_, 3 * shared * b_);
    const double vocab = static_cast<double>(model_.vocab);
    // Loss and gradients together.
    Compute(Op::kHead, Phase::kForward, 6 * width_ * vocab, vocab * (3 * kF32 + 2 * b_), 3 * width_ * vocab * b_);
    Compute(Op::kHead, Phase::kBackward, 0, width_ * 5 * kF32, 0);
  }

  void AddExperts() {
    const double expert = static_cast<double>(model_.expert_elements()), inner = static_cast<double>(model_.expert_inner);
    double here = 0;  // Experts of the rank with the most.
    for (const ExpertWork& experts : work_.experts) {
      std::vector<double> on_rank(static_cast<size_t>(topology_.ranks()));
      for (const ExpertCopies& copies : experts.placement) {
        ++on_rank[static_cast<size_t>(copies.owner)];
        for (int holder : copies.holders) ++on_rank[static_cast<size_t>(holder)];
      }
      here = std::max(here, *std::max_element(on_rank.begin(), on_rank.end()));
    }
    const double weights = here * expert * b_;
    Compute(Op::kExperts, Phase::kForward, 2 * expert, (2 * width_ + 5 * inner) * b_, weights);
    Compute(Op::kExperts, Phase::kBackward, 2 * expert, (2 * width_ + 7 * inner) * b_, weights);
    Compute(Op::kExpertsWeight, Phase::kBackward, 2 * expert, (2 * width_ + 3 * inner) * b_, here * expert * kF32);
    const double experts = static_cast<double>(model_.experts);
    Compute(Op::kRoute, Phase::kForward, 2 * width_ * experts, width_ * (3 * kF32 + 2 * b_) + experts * 3 * kF32, 0);
    Compute(Op::kRoute, Phase::kBackward, 4 * width_ * experts, width_ * (6 * kF32 + model_.choices * b_) + experts * 4 * kF32,
            0);
  }

  void AddMemoryBound() {
    Compute(Op::kEmbed, Phase::kForward, 0, width_ * (kF32 + b_), 0);
    Compute(Op::kEmbed, Phase::kBackward, 0, width_ * 3 * kF32, 0);
    Compute(Op::kArrange, Phase::kForward, 0, 12 * kF32 * model_.choices, 0);
    Compute(Op::kPack, Phase::kForward, 0, 2 * width_ * b_, 0);
    Compute(Op::kPack, Phase::kBackward, 0, width_ * (2 * b_ + kF32), 0);
    Compute(Op::kCombine, Phase::kForward, 0, width_ * (b_ + 2 * kF32 / model_.choices), 0);
    Compute(Op::kBalance, Phase::kForward, 0, 0, 0);
    Compute(Op::kNorm, Phase::kUpdate, 0, kF32, 0);
    Compute(Op::kUpdate, Phase::kUpdate, 0, 7 * kF32 + (b_ < kF32 ? b_ : 0), 0);
    for (const Phase phase : {Phase::kForward, Phase::kBackward}) {
      Set(Op::kStay, phase, Lane::kCopy, cluster_.task_ns, 2 / cluster_.memory_bytes_per_ns);
    }
  }

  void AddLinks() {
    const int hosts = cluster_.hosts, devices = cluster_.devices_per_host, ranks = cluster_.ranks();
    const bool far = hosts > 1;
    const Lane world = far ? Lane::kInter : Lane::kIntra;
    const double latency = Log2(hosts) * cluster_.inter_latency_ns + Log2(devices) * cluster_.intra_latency_ns + cluster_.task_ns;
    const double near_ns = 1 / cluster_.intra_bytes_per_ns, far_ns = 1 / cluster_.inter_bytes_per_ns;
    // Every byte enters every host once and every rank once, the two in a pipeline.
    const double gather_ns = std::max(far ? far_ns * (hosts - 1) / hosts : 0, near_ns * (ranks - 1) / ranks);
    const double copies_ns = std::max(far ? far_ns * EntriesPerCopy() : 0, near_ns);
    const double peers = PeersOfRank(), near_peers = std::min<double>(devices, peers) - 1, far_peers = peers - 1 - near_peers;
    const auto exchange_ns = [&](double latency_ns, double of_peers, double message_ns) {
      return cluster_.task_ns + latency_ns + std::max(0.0, of_peers - 1) * message_ns;
    };
    for (const Phase phase : {Phase::kForward, Phase::kBackward}) {
      Set(Op::kGather, phase, world, latency, gather_ns);
      Set(Op::kReduce, phase, world, latency, gather_ns);
      Set(Op::kMaterialise, phase, world, latency, copies_ns);
      Set(Op::kReduceExperts, phase, world, latency, copies_ns);
      for (const Op op : {Op::kDispatch, Op::kReturn}) {
        Set(op, phase, Lane::kIntra, exchange_ns(cluster_.intra_latency_ns, near_peers, cluster_.intra_message_ns), near_ns);
        // All devices of a host send at the same time.
        const double far_fixed_ns = exchange_ns(cluster_.inter_latency_ns, far_peers, cluster_.inter_message_ns);
        if (far) Set(op, phase, Lane::kInter, far_fixed_ns, far_ns * devices);
      }
    }
    for (const auto& [op, phase] : {std::pair{Op::kExchange, Phase::kForward}, std::pair{Op::kTotals, Phase::kForward},
                                    std::pair{Op::kNormSum, Phase::kUpdate}}) {
      Set(op, phase, Lane::kControl, latency, far ? far_ns : near_ns);
    }
  }

  // Ranks that a rank's rows go to, itself included. Copies of an expert share the ranks among them.
  double PeersOfRank() const {
    double peers = 1;
    for (const ExpertWork& experts : work_.experts) {
      std::vector<bool> holds(static_cast<size_t>(topology_.ranks()));
      size_t members = 0;
      for (const ExpertCopies& copies : experts.placement) {
        holds[static_cast<size_t>(copies.owner)] = true;
        for (int holder : copies.holders) holds[static_cast<size_t>(holder)] = true;
        members += 1 + copies.holders.size();
      }
      const double ranks = static_cast<double>(std::count(holds.begin(), holds.end(), true));
      peers = std::max(peers, ranks * static_cast<double>(experts.placement.size()) / static_cast<double>(members));
    }
    return peers;
  }

  // Experts that enter or leave the busiest host for each that the busiest rank sends or receives: its ranks share its link.
  double EntriesPerCopy() const {
    double entries = 0, copies_max = 0;
    for (const ExpertWork& experts : work_.experts) {
      std::vector<double> in(static_cast<size_t>(topology_.hosts())), leaving(in.size());
      for (const ExpertCopies& copies : experts.placement) {
        std::set<int> hosts;
        for (int holder : copies.holders) hosts.insert(topology_.HostOf(holder));
        hosts.erase(topology_.HostOf(copies.owner));
        for (int host : hosts) ++in[static_cast<size_t>(host)];
        leaving[static_cast<size_t>(topology_.HostOf(copies.owner))] += static_cast<double>(hosts.size());
      }
      entries = std::max({entries, *std::max_element(in.begin(), in.end()), *std::max_element(leaving.begin(), leaving.end())});
      // Copies do not depend on rows, and even ones are quick to spread.
      const ExpertWork even = {experts.placement, {}};
      for (const ExpertShare& share : ShareExperts(work_, even, topology_)) copies_max = std::max(copies_max, share.copies);
    }
    return copies_max == 0 ? 1 : entries / copies_max;
  }

  const ModelShape& model_;
  const Cluster& cluster_;
  const Workload& work_;
  const Topology& topology_;
  const double b_, width_, flops_per_ns_;
  CostTable costs_;
};

}  // namespace

CostTable CostsOf(const ModelShape& model, const Cluster& cluster, const Workload& work, const Topology& topology) {
  return CostBuilder(model, cluster, work, topology).Build();
}

}  // namespace shoal
