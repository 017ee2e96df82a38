#include "parallel/placement/expert_placement.h"

#include <algorithm>
#include <map>

#include "parallel/placement/placement.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

// FNV-1a over 64-bit words.
void Mix(uint64_t* hash, uint64_t word) { *hash = (*hash ^ word) * 0x100000001b3ULL + (word >> 32); }

}  // namespace

bool ExpertCopies::On(int rank) const {
  return rank == owner || std::binary_search(holders.begin(), holders.end(), rank);
}

ExpertPlacement OwnersOnly(absl::Span<const int> owners) {
  ExpertPlacement placement;
  for (int owner : owners) placement.push_back({owner, {}});
  return placement;
}

OwnerMap EvenOwners(int layers, int experts, int ranks) {
  OwnerMap owners(static_cast<size_t>(layers));
  int64_t turn = 0;
  for (std::vector<int>& layer : owners) {
    for (int expert = 0; expert < experts; ++expert) layer.push_back(static_cast<int>(turn++ % ranks));
  }
  return owners;
}

std::vector<ExpertPlacement> GroupedPlacement(int layers, int experts, int ranks, int group) {
  SHOAL_CHECK(group >= 1 && ranks % group == 0);
  const int replicas = ranks / group;
  std::vector<ExpertPlacement> result(static_cast<size_t>(layers), ExpertPlacement(static_cast<size_t>(experts)));
  for (int place = 0; place < group; ++place) {
    const Range mine = EvenPart(experts, group, place);
    int64_t turn = 0;
    for (ExpertPlacement& layer : result) {
      for (int64_t e = mine.begin; e < mine.begin + mine.count; ++e, ++turn) {
        ExpertCopies& copies = layer[static_cast<size_t>(e)];
        copies.owner = static_cast<int>(turn % replicas) * group + place;
        for (int replica = 0; replica < replicas; ++replica) {
          const int rank = replica * group + place;
          if (rank != copies.owner) copies.holders.push_back(rank);
        }
      }
    }
  }
  return result;
}

std::vector<int> LocalExperts(const ExpertPlacement& placement, int rank) {
  std::vector<int> local;
  for (size_t e = 0; e < placement.size(); ++e) {
    if (placement[e].On(rank)) local.push_back(static_cast<int>(e));
  }
  return local;
}

int CopiesOfRank(const ExpertPlacement& placement, int ranks) {
  std::vector<int> copies(static_cast<size_t>(ranks));
  for (const ExpertCopies& expert : placement) {
    for (int holder : expert.holders) ++copies[static_cast<size_t>(holder)];
  }
  return *std::max_element(copies.begin(), copies.end());
}

std::vector<int64_t> MovedExperts(const ExpertPlacement& placement, const Topology& topology) {
  std::vector<int64_t> sent(static_cast<size_t>(topology.ranks())), received = sent;
  for (size_t expert = 0; expert < placement.size(); ++expert) {
    const ExpertCopies& copies = placement[expert];
    std::map<int, std::vector<int>> holders_of;  // By host.
    for (int holder : copies.holders) {
      holders_of[topology.HostOf(holder)].push_back(holder);
      ++received[static_cast<size_t>(holder)];
    }
    for (const auto& [host, holders] : holders_of) {
      const bool owners = host == topology.HostOf(copies.owner);
      const int64_t others = static_cast<int64_t>(holders.size()) - (owners ? 0 : 1);
      const int leader = owners ? copies.owner : holders[expert % holders.size()];  // Rotated: their links share the load.
      if (!owners) ++sent[static_cast<size_t>(copies.owner)];
      sent[static_cast<size_t>(leader)] += others;
    }
  }
  for (size_t rank = 0; rank < sent.size(); ++rank) sent[rank] = std::max(sent[rank], received[rank]);
  return sent;
}

OwnerMap OwnersOf(absl::Span<const ExpertPlacement> layers) {
  OwnerMap owners;
  for (const ExpertPlacement& layer : layers) {
    owners.emplace_back();
    for (const ExpertCopies& copies : layer) owners.back().push_back(copies.owner);
  }
  return owners;
}

uint64_t Fingerprint(absl::Span<const ExpertPlacement> layers) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const ExpertPlacement& layer : layers) {
    Mix(&hash, layer.size());
    for (const ExpertCopies& copies : layer) {
      Mix(&hash, static_cast<uint64_t>(copies.owner));
      Mix(&hash, copies.holders.size());
      for (int holder : copies.holders) Mix(&hash, static_cast<uint64_t>(holder) + 1);
    }
  }
  return hash;
}

}  // namespace shoal
