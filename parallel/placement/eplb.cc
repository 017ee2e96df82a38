#include "parallel/placement/eplb.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "parallel/placement/apportion.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

// Items by pack, each pack in the order in which it got them; equally many in each. Heaviest first, to the lightest pack with
// room. One item per pack: the order that they come in.
std::vector<std::vector<int>> PackEqually(absl::Span<const int64_t> weights, int packs) {
  const size_t each = weights.size() / static_cast<size_t>(packs);
  std::vector<std::vector<int>> members(static_cast<size_t>(packs));
  if (each == 1) {
    for (int i = 0; i < packs; ++i) members[static_cast<size_t>(i)] = {i};
    return members;
  }
  std::vector<int64_t> filled(members.size());
  for (int item : ByDescending(weights)) {
    size_t lightest = members.size();
    for (size_t pack = 0; pack < members.size(); ++pack) {
      if (members[pack].size() == each) continue;
      if (lightest == members.size() || filled[pack] < filled[lightest]) lightest = pack;
    }
    filled[lightest] += weights[static_cast<size_t>(item)];
    members[lightest].push_back(item);
  }
  return members;
}

// The expert of each of `slots` replicas: one each in order, then one more, again and again, of that with the highest load per
// replica.
std::vector<int> Replicate(absl::Span<const int64_t> loads, int slots) {
  std::vector<int> expert_of_replica(loads.size());
  std::iota(expert_of_replica.begin(), expert_of_replica.end(), 0);
  std::vector<int64_t> replicas(loads.size(), 1);
  while (static_cast<int>(expert_of_replica.size()) < slots) {
    size_t hottest = 0;
    for (size_t e = 1; e < loads.size(); ++e) {
      if (loads[e] * replicas[hottest] > loads[hottest] * replicas[e]) hottest = e;
    }
    ++replicas[hottest];
    expert_of_replica.push_back(static_cast<int>(hottest));
  }
  return expert_of_replica;
}

absl::Status CheckShape(int experts, const EplbShape& shape) {
  const auto divides = [](int a, int b) { return a >= 1 && b % a == 0; };
  if (experts >= 1 && shape.slots >= experts && divides(shape.hosts, shape.ranks) && divides(shape.ranks, shape.slots) &&
      divides(shape.groups, experts)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrFormat(
      "%d slots for %d experts in %d groups on %d ranks of %d hosts: needs a slot per expert, hosts that divide ranks, ranks "
      "that divide slots, groups that divide experts",
      shape.slots, experts, shape.groups, shape.ranks, shape.hosts));
}

}  // namespace

absl::StatusOr<std::vector<int>> BalanceReplicas(absl::Span<const int64_t> loads, const EplbShape& given) {
  const int experts = static_cast<int>(loads.size());
  SHOAL_RETURN_IF_ERROR(CheckShape(experts, given), "EPLB");
  EplbShape shape = given;
  if (shape.groups % shape.hosts != 0) shape.groups = shape.hosts = 1;
  const int group_size = experts / shape.groups;
  std::vector<int64_t> group_load(static_cast<size_t>(shape.groups));
  for (int e = 0; e < experts; ++e) group_load[static_cast<size_t>(e / group_size)] += loads[static_cast<size_t>(e)];

  std::vector<int> expert_of_slot;
  for (const std::vector<int>& groups : PackEqually(group_load, shape.hosts)) {
    std::vector<int> host_experts;
    std::vector<int64_t> host_loads;
    for (int group : groups) {
      for (int e = group * group_size; e < (group + 1) * group_size; ++e) {
        host_experts.push_back(e);
        host_loads.push_back(loads[static_cast<size_t>(e)]);
      }
    }
    const std::vector<int> replicas = Replicate(host_loads, shape.slots / shape.hosts);
    std::vector<int64_t> count(host_experts.size()), weights;
    for (int expert : replicas) ++count[static_cast<size_t>(expert)];
    // Load per replica in units of 2^-16 rows.
    for (int expert : replicas) {
      weights.push_back(host_loads[static_cast<size_t>(expert)] * 65536 / count[static_cast<size_t>(expert)]);
    }
    for (const std::vector<int>& slots : PackEqually(weights, shape.ranks / shape.hosts)) {
      for (int replica : slots) {
        expert_of_slot.push_back(host_experts[static_cast<size_t>(replicas[static_cast<size_t>(replica)])]);
      }
    }
  }
  return expert_of_slot;
}

ExpertPlacement PlacementOfSlots(absl::Span<const int> expert_of_slot, int experts, int ranks) {
  SHOAL_CHECK_EQ(expert_of_slot.size() % static_cast<size_t>(ranks), 0u);
  const size_t slots_per_rank = expert_of_slot.size() / static_cast<size_t>(ranks);
  ExpertPlacement placement(static_cast<size_t>(experts), ExpertCopies{-1, {}});
  for (size_t slot = 0; slot < expert_of_slot.size(); ++slot) {
    ExpertCopies& copies = placement[static_cast<size_t>(expert_of_slot[slot])];
    const int rank = static_cast<int>(slot / slots_per_rank);
    if (copies.owner < 0) {
      copies.owner = rank;
    } else if (!copies.On(rank)) {
      copies.holders.push_back(rank);  // Slots are in order of ranks.
    }
  }
  for (const ExpertCopies& copies : placement) SHOAL_CHECK_GE(copies.owner, 0);
  return placement;
}

}  // namespace shoal
