// For the tests of rows on their way: random routing of several ranks, and every pair's journey by name.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "parallel/expert/dispatch_plan.h"
#include "parallel/placement/placement.h"

namespace shoal {
namespace expert_testing {

// A (token, expert) pair; `token` counts from 0 on its rank.
struct Pair {
  int source = 0, token = 0, expert = 0;
  friend bool operator==(const Pair&, const Pair&) = default;
};

// Who is where, and what each rank's tokens chose: the ragged list of a rank, and rows [ranks, pieces, experts] that all know.
struct Routing {
  Topology topology;
  ExpertPlacement placement;
  DispatchOptions options;  // Without rank.
  std::vector<int> tokens;  // By rank.
  std::vector<Tensor> offset, expert;
  std::vector<int64_t> rows;

  int ranks() const { return topology.ranks(); }
  std::vector<int> Local(int rank) const {
    std::vector<int> local;
    for (size_t e = 0; e < placement.size(); ++e) {
      if (placement[e].On(rank)) local.push_back(static_cast<int>(e));
    }
    return local;
  }
  DispatchPlan PlanOf(int rank) const {
    DispatchOptions own = options;
    own.rank = rank;
    return DispatchPlan::Make(topology, placement, Local(rank), rows, own);
  }
  // In the order of the rank's list.
  std::vector<Pair> PairsOf(int rank) const {
    std::vector<Pair> pairs;
    const size_t at = static_cast<size_t>(rank);
    for (int token = 0; token < tokens[at]; ++token) {
      for (int32_t i = offset[at].data<int32_t>()[token]; i < offset[at].data<int32_t>()[token + 1]; ++i) {
        pairs.push_back({rank, token, expert[at].data<int32_t>()[i]});
      }
    }
    return pairs;
  }
};

inline int Draw(std::mt19937* random, int low, int high) { return std::uniform_int_distribution<>(low, high)(*random); }

inline Topology RandomTopology(int ranks, std::mt19937* random) {
  std::vector<int64_t> labels;
  const int hosts = Draw(random, 1, 4);
  for (int rank = 0; rank < ranks; ++rank) labels.push_back(Draw(random, 1, hosts));
  return TopologyOf(labels);
}

inline ExpertPlacement RandomPlacement(int experts, int ranks, std::mt19937* random) {
  const double share = std::uniform_real_distribution<>(0, 1)(*random) * Draw(random, 0, 1);
  ExpertPlacement placement(static_cast<size_t>(experts));
  for (ExpertCopies& expert : placement) {
    expert.owner = Draw(random, 0, ranks - 1);
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank != expert.owner && std::bernoulli_distribution(share)(*random)) expert.holders.push_back(rank);
    }
  }
  return placement;
}

// Tokens choose 0 to 3 experts, low ones more often; some ranks have no tokens.
inline Routing RandomRouting(const Topology& topology, int forward_chunks, int backward_chunks, std::mt19937* random) {
  Routing routing;
  const int experts = Draw(random, 1, 7), ranks = topology.ranks();
  routing.topology = topology;
  routing.placement = RandomPlacement(experts, ranks, random);
  routing.options = {.forward_chunks = forward_chunks,
                     .backward_chunks = backward_chunks,
                     .rule = static_cast<DispatchRule>(Draw(random, 0, 3))};
  const int pieces = PiecesFor(forward_chunks, backward_chunks);
  routing.rows.assign(static_cast<size_t>(ranks * pieces * experts), 0);
  for (int rank = 0; rank < ranks; ++rank) {
    const int tokens = Draw(random, 0, 4) == 0 ? 0 : Draw(random, 0, 40);
    std::vector<int32_t> offset = {0}, chosen;
    for (int piece = 0; piece < pieces; ++piece) {
      for (int64_t token = 0; token < EvenPart(tokens, pieces, piece).count; ++token) {
        std::vector<int> all(static_cast<size_t>(experts));
        std::iota(all.begin(), all.end(), 0);
        for (int choice = std::min(experts, Draw(random, 0, 3)); choice > 0; --choice) {
          const auto taken = all.begin() + std::min(Draw(random, 0, static_cast<int>(all.size()) - 1),
                                                    Draw(random, 0, static_cast<int>(all.size()) - 1));
          chosen.push_back(*taken);
          ++routing.rows[static_cast<size_t>((rank * pieces + piece) * experts + *taken)];
          all.erase(taken);
        }
        offset.push_back(static_cast<int32_t>(chosen.size()));
      }
    }
    const auto tensor = [](const std::vector<int32_t>& values) {
      const Tensor to = Empty({static_cast<int64_t>(values.size())}, DType::kI32);
      std::copy(values.begin(), values.end(), to.data<int32_t>());
      return to;
    };
    routing.tokens.push_back(tokens);
    routing.offset.push_back(tensor(offset));
    routing.expert.push_back(tensor(chosen));
  }
  return routing;
}

// A calibration (ExpertContext::calibrate) that does not ask whether it pays: copies of experts with rows on ranks that depend on the
// rows, as many as there is room for.
inline ExpertPlacement AddCopies(const ExpertPlacement& planned, absl::Span<const int64_t> rows, int ranks, int room) {
  ExpertPlacement more = planned;
  std::vector<int> left(static_cast<size_t>(ranks), room);
  for (const ExpertCopies& expert : planned) {
    for (int holder : expert.holders) --left[static_cast<size_t>(holder)];
  }
  for (size_t e = 0; e < more.size(); ++e) {
    int64_t load = 0;
    for (size_t rank = 0; rank < static_cast<size_t>(ranks); ++rank) load += rows[rank * more.size() + e];
    for (int rank = static_cast<int>(load % 2); load > 0 && rank < ranks; rank += 2) {
      if (more[e].On(rank) || left[static_cast<size_t>(rank)] <= 0) continue;
      --left[static_cast<size_t>(rank)];
      more[e].holders.insert(std::upper_bound(more[e].holders.begin(), more[e].holders.end(), rank), rank);
    }
  }
  return more;
}

}  // namespace expert_testing
}  // namespace shoal
