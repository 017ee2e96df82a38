#include "collectives/engine/link_probe.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "collectives/engine/tuner.h"
#include "runtime/base/mutex.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

TEST(PartnerIn, EachPairMeetsOnceAndNobodyIsInTwoPairsAtOnce) {
  for (int size = 2; size <= 17; ++size) {
    std::set<std::pair<int, int>> met;
    for (int round = 0; round < ProbeRounds(size); ++round) {
      for (int rank = 0; rank < size; ++rank) {
        const int partner = PartnerIn(round, rank, size);
        ASSERT_LT(partner, size);
        if (partner < 0) continue;
        EXPECT_NE(partner, rank);
        EXPECT_EQ(PartnerIn(round, partner, size), rank) << size << " ranks, round " << round;
        if (rank < partner) {
          EXPECT_TRUE(met.emplace(rank, partner).second);
        }
      }
    }
    EXPECT_EQ(met.size(), static_cast<size_t>(size * (size - 1) / 2));
  }
}

std::string TextOf(const CostModel& model) {
  std::string text = absl::StrJoin(model.topology.order, " ");
  for (const Link& link : model.links) absl::StrAppend(&text, ", ", link.latency_ns, " ns ", link.bytes_per_ms, " B/ms");
  return text;
}

// Which algorithm is taken follows from what is measured, on each rank by itself.
TEST(ProbeLinks, AllRanksHaveTheSameModelOfAllLinks) {
  constexpr int kSize = 5;
  Topology topology{std::vector<int>(kSize), {}};
  std::iota(topology.host.begin(), topology.host.end(), 0);
  const CostModel defaults = DefaultCostModel(topology, /*cores_per_host=*/1);
  Mutex mutex;
  std::vector<CostModel> models;
  RunRanks(kSize, "tcp", [&](Communicator& group) {
    const absl::StatusOr<CostModel> model = ProbeLinks(group, defaults, absl::Now() + absl::Seconds(60));
    ASSERT_TRUE(model.ok()) << model.status();
    MutexLock lock(&mutex);
    models.push_back(*model);
  });
  ASSERT_EQ(models.size(), static_cast<size_t>(kSize));
  for (const CostModel& model : models) EXPECT_EQ(TextOf(model), TextOf(models[0]));
  EXPECT_EQ(models[0].topology.order.size(), static_cast<size_t>(kSize));
  for (int from = 0; from < kSize; ++from) {
    for (int to = 0; to < kSize; ++to) {
      const Link link = models[0].links[from * kSize + to], none = defaults.links[from * kSize + to];
      // Nothing takes just as long as the defaults say.
      EXPECT_EQ(link.bytes_per_ms != none.bytes_per_ms, from != to) << from << " to " << to;
      EXPECT_EQ(link.bytes_per_ms, models[0].links[to * kSize + from].bytes_per_ms);
    }
  }
}

TEST(ProbeLinks, EndsWhenTheGroupDoes) {
  RunRanks(3, "tcp", [](Communicator& group) {
    (void)group.Barrier({}).Await();  // All have connected.
    if (group.index() == 1) return group.Abort(absl::CancelledError("enough"));
    const CostModel defaults = DefaultCostModel({{0, 1, 2}, {}}, /*cores_per_host=*/1);
    EXPECT_TRUE(absl::IsAborted(ProbeLinks(group, defaults, absl::Now() + absl::Seconds(60)).status()));
  });
}

}  // namespace
}  // namespace shoal
