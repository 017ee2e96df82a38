#include "models/optimizer/expert_partials.h"

#include <random>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

constexpr int64_t kElements = 5;

// Any two sources differ.
float ValueOf(int source, int expert, int64_t i) {
  const float values[] = {1e8f, 1.0f, -1e8f, 3e-4f, 0.1f};
  return values[(source * 3 + expert + static_cast<int>(i)) % 5];
}

struct Scene {
  ExpertPlacement placement;
  std::vector<std::vector<DispatchShare>> shares;
};

Scene RandomScene(int ranks, std::mt19937* random) {
  Scene scene;
  std::vector<int64_t> rows;
  for (int expert = 0; expert < 4; ++expert) {
    ExpertCopies copies{static_cast<int>((*random)() % static_cast<uint32_t>(ranks)), {}};
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank != copies.owner && expert > 0 && (*random)() % 2 == 0) copies.holders.push_back(rank);
    }
    scene.placement.push_back(copies);
  }
  for (int i = 0; i < ranks * 4; ++i) rows.push_back((*random)() % 3);
  scene.shares = SplitTokens(DispatchRule::kNearestWhole, Topology::OneHost(ranks), scene.placement, rows);
  return scene;
}

// What the owners of experts with holders get, in the order of sources and the same as if they had all rows themselves.
TEST(ExpertPartials, OwnersAddInTheOrderOfSources) {
  for (int ranks : {1, 2, 3, 5}) {
    RunRanks(ranks, "auto", [&](Communicator& world) {
      ExpertPartials partials(world, kElements, /*layers=*/2);
      for (unsigned seed = 0; seed < 20; ++seed) {
        SCOPED_TRACE(absl::StrCat(ranks, " ranks, seed ", seed));
        std::mt19937 random(seed);
        const Scene scene = RandomScene(ranks, &random);
        const int layer = static_cast<int>(seed % 2), self = world.index();
        partials.Begin(layer, scene.placement, scene.shares);
        std::vector<std::pair<int, int>> want;  // Expert, source.
        for (int source = 0; source < ranks; ++source) {
          for (const DispatchShare& share : scene.shares[static_cast<size_t>(source)]) {
            const ExpertCopies& copies = scene.placement[static_cast<size_t>(share.expert)];
            if (copies.holders.empty()) continue;
            if (copies.owner == self) want.push_back({share.expert, source});
            if (share.rank != self) continue;
            const Tensor partial = Empty({kElements}, DType::kF32);
            for (int64_t i = 0; i < kElements; ++i) partial.data<float>()[i] = ValueOf(source, share.expert, i);
            partials.Keep(layer, share.expert, source, partial);
          }
        }
        size_t next = 0;
        Stream stream;
        const auto bytes = partials.Collect(layer, stream, [&](int expert, const Tensor& partial) {
          ASSERT_LT(next, want.size());
          EXPECT_EQ(expert, want[next].first);
          for (int64_t i = 0; i < kElements; ++i) EXPECT_EQ(partial.data<float>()[i], ValueOf(want[next].second, expert, i));
          ++next;
        });
        ASSERT_TRUE(bytes.ok()) << bytes.status();
        EXPECT_EQ(next, want.size());
        EXPECT_EQ(*bytes % (kElements * 4), 0);
      }
    });
  }
}

}  // namespace
}  // namespace shoal
