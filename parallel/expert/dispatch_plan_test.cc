#include "parallel/expert/dispatch_plan.h"

#include <functional>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "parallel/expert/testing.h"

namespace shoal {
namespace {

using expert_testing::Draw;
using expert_testing::Pair;
using expert_testing::RandomRouting;
using expert_testing::RandomTopology;
using expert_testing::Routing;
using Direction = DispatchPlan::Direction;
using Route = DispatchPlan::Route;
using RowRun = DispatchPlan::Run;

constexpr Direction kDirections[] = {Direction::kForward, Direction::kBackward};
constexpr Route kRoutes[] = {Route::kInter, Route::kIntra, Route::kStay};

int Chunks(const DispatchPlan& plan, Direction direction) {
  return direction == Direction::kForward ? plan.forward_chunks() : plan.backward_chunks();
}

// The plans of all ranks, and where every pair lies on them.
struct World {
  explicit World(const Routing& with) : routing(with) {
    for (int rank = 0; rank < routing.ranks(); ++rank) {
      plans.push_back(routing.PlanOf(rank));
      const size_t at = static_cast<size_t>(rank);
      slot.push_back(Empty({plans[at].sent()}, DType::kI32));
      token.push_back(Empty({plans[at].sent()}, DType::kI32));
      plans[at].OrderRows(routing.offset[at], routing.expert[at], slot[at], token[at]);
    }
  }
  // The S rows of a rank, in their order.
  std::vector<Pair> Sent(int rank) const {
    const std::vector<Pair> pairs = routing.PairsOf(rank);
    std::vector<Pair> rows(pairs.size());
    for (size_t i = 0; i < pairs.size(); ++i) {
      rows[static_cast<size_t>(slot[static_cast<size_t>(rank)].data<int32_t>()[i])] = pairs[i];
    }
    return rows;
  }

  Routing routing;
  std::vector<DispatchPlan> plans;
  std::vector<Tensor> slot, token;
};

void ForEachWorld(unsigned seeds, const std::function<void(const World&)>& body) {
  for (unsigned seed = 0; seed < seeds; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 random(seed);
    const Topology topology = RandomTopology(Draw(&random, 1, 6), &random);
    // Every pair of numbers of chunks comes up.
    body(World(RandomRouting(topology, 1 + static_cast<int>(seed % 4), 1 + static_cast<int>(seed / 4 % 4), &random)));
    if (testing::Test::HasFailure()) return;
  }
}

// Runs tile [0, rows): each row is in exactly one.
void ExpectTiles(std::vector<RowRun> runs, int64_t rows) {
  std::sort(runs.begin(), runs.end(), [](const RowRun& a, const RowRun& b) { return a.begin < b.begin; });
  int64_t at = 0;
  for (const RowRun& run : runs) {
    EXPECT_EQ(run.begin, at);
    EXPECT_GT(run.rows, 0);
    at = run.begin + run.rows;
  }
  EXPECT_EQ(at, rows);
}

TEST(DispatchPlan, EveryPairHasOneSlotWithItsToken) {
  ForEachWorld(96, [](const World& world) {
    for (int rank = 0; rank < world.routing.ranks(); ++rank) {
      const size_t at = static_cast<size_t>(rank);
      const std::vector<Pair> pairs = world.routing.PairsOf(rank);
      ASSERT_EQ(world.plans[at].sent(), static_cast<int64_t>(pairs.size()));
      std::vector<int> used(pairs.size(), 0);
      for (size_t i = 0; i < pairs.size(); ++i) {
        const int32_t slot = world.slot[at].data<int32_t>()[i];
        ASSERT_TRUE(slot >= 0 && static_cast<size_t>(slot) < pairs.size());
        ++used[static_cast<size_t>(slot)];
        EXPECT_EQ(world.token[at].data<int32_t>()[slot], pairs[i].token);
      }
      EXPECT_EQ(std::count(used.begin(), used.end(), 1), static_cast<int64_t>(pairs.size()));
    }
  });
}

TEST(DispatchPlan, SegmentsOfSourcesAreAllSegmentsAndSharesSayWhoHasThem) {
  int64_t known = 0;
  ForEachWorld(96, [&](const World& world) {
    for (int rank = 0; rank < world.routing.ranks(); ++rank) {
      const DispatchPlan& plan = world.plans[static_cast<size_t>(rank)];
      std::map<int64_t, std::pair<int, int64_t>> all, of_sources;
      for (int chunk = 0; chunk < plan.backward_chunks(); ++chunk) {
        for (const kernels::Segment& s : plan.Segments(Direction::kBackward, chunk)) all[s.begin] = {s.expert, s.count};
      }
      for (int source = 0; source < world.routing.ranks(); ++source) {
        const std::vector<kernels::Segment> segments = plan.SegmentsFrom(source);
        for (size_t i = 0; i < segments.size(); ++i) {
          EXPECT_TRUE(i == 0 || segments[i - 1].expert <= segments[i].expert);
          of_sources[segments[i].begin] = {segments[i].expert, segments[i].count};
        }
        if (plan.shares().empty()) continue;
        std::vector<int64_t> want, got;
        for (const DispatchShare& share : plan.shares()[static_cast<size_t>(source)]) {
          if (share.rank == rank) want.push_back(share.rows);
        }
        for (const kernels::Segment& segment : segments) got.push_back(segment.count);
        EXPECT_EQ(got, want) << "of rank " << source;
        known += static_cast<int64_t>(got.size());
      }
      EXPECT_EQ(of_sources, all);
    }
  });
  EXPECT_GT(known, 0);
}

// Carries every row of a direction to its rank: what a sends b, in order, into what b receives from a, in order.
std::vector<std::vector<Pair>> Carry(const World& world, Direction direction) {
  const int ranks = world.routing.ranks();
  std::vector<std::vector<Pair>> arrived;
  for (const DispatchPlan& plan : world.plans) arrived.emplace_back(static_cast<size_t>(plan.arrived()), Pair{-1, -1, -1});
  for (int chunk = 0; chunk < Chunks(world.plans.front(), direction); ++chunk) {
    std::map<std::pair<int, int>, std::vector<Pair>> travelling;
    for (int a = 0; a < ranks; ++a) {
      const std::vector<Pair> sent = world.Sent(a);
      for (Route route : kRoutes) {
        for (const RowRun& run : world.plans[static_cast<size_t>(a)].Runs(direction, chunk, route, /*sends=*/true)) {
          const bool here = world.routing.topology.HostOf(a) == world.routing.topology.HostOf(run.peer);
          EXPECT_EQ(route, run.peer == a ? Route::kStay : here ? Route::kIntra : Route::kInter);
          std::vector<Pair>& rows = travelling[{a, run.peer}];
          rows.insert(rows.end(), sent.begin() + run.begin, sent.begin() + run.begin + run.rows);
        }
      }
    }
    for (int b = 0; b < ranks; ++b) {
      std::map<int, size_t> taken;
      for (Route route : kRoutes) {
        for (const RowRun& run : world.plans[static_cast<size_t>(b)].Runs(direction, chunk, route, /*sends=*/false)) {
          const std::vector<Pair>& rows = travelling[{run.peer, b}];
          size_t& from = taken[run.peer];
          EXPECT_LE(from + static_cast<size_t>(run.rows), rows.size()) << run.peer << " to " << b;
          if (testing::Test::HasFailure()) return arrived;
          std::copy_n(rows.begin() + static_cast<ptrdiff_t>(from), run.rows,
                      arrived[static_cast<size_t>(b)].begin() + run.begin);
          from += static_cast<size_t>(run.rows);
        }
      }
      for (int a = 0; a < ranks; ++a) EXPECT_EQ(taken[a], (travelling[{a, b}].size())) << a << " to " << b;
    }
  }
  return arrived;
}

TEST(DispatchPlan, WhatOneSendsIsWhatTheOtherReceives) {
  ForEachWorld(96, [](const World& world) {
    std::vector<std::vector<Pair>> before;
    for (Direction direction : kDirections) {
      const std::vector<std::vector<Pair>> arrived = Carry(world, direction);
      for (int b = 0; b < world.routing.ranks(); ++b) {
        const size_t at = static_cast<size_t>(b);
        const std::vector<int> local = world.routing.Local(b);
        for (int chunk = 0; chunk < Chunks(world.plans[at], direction); ++chunk) {
          for (const kernels::Segment& segment : world.plans[at].Segments(direction, chunk)) {
            for (int64_t i = segment.begin; i < segment.begin + segment.count; ++i) {
              const Pair& pair = arrived[at][static_cast<size_t>(i)];
              ASSERT_EQ(pair.expert, local[static_cast<size_t>(segment.expert)]) << "row " << i << " of rank " << b;
              if (i == segment.begin) continue;
              const Pair& last = arrived[at][static_cast<size_t>(i) - 1];
              EXPECT_EQ(pair.source, last.source);
              EXPECT_GT(pair.token, last.token);
            }
          }
        }
      }
      // Both passes see a row in the same place.
      if (direction == Direction::kBackward) {
        EXPECT_EQ(arrived, before);
      }
      before = arrived;
    }
  });
}

TEST(DispatchPlan, ChunksTileTheRows) {
  ForEachWorld(96, [](const World& world) {
    for (int rank = 0; rank < world.routing.ranks(); ++rank) {
      const DispatchPlan& plan = world.plans[static_cast<size_t>(rank)];
      const std::vector<Pair> sent = world.Sent(rank);
      for (Direction direction : kDirections) {
        std::vector<RowRun> segments;
        for (bool sends : {true, false}) {
          std::vector<RowRun> rows, by_route;
          for (int chunk = 0; chunk < Chunks(plan, direction); ++chunk) {
            for (const RowRun& run : plan.Rows(direction, chunk, sends)) rows.push_back(run);
            for (Route route : kRoutes) {
              for (const RowRun& run : plan.Runs(direction, chunk, route, sends)) by_route.push_back(run);
            }
            if (sends) continue;
            for (const kernels::Segment& segment : plan.Segments(direction, chunk)) {
              segments.push_back({-1, segment.begin, segment.count});
            }
          }
          ExpectTiles(rows, sends ? plan.sent() : plan.arrived());
          ExpectTiles(by_route, sends ? plan.sent() : plan.arrived());
        }
        ExpectTiles(segments, plan.arrived());
      }
    }
  });
}

TEST(DispatchPlan, ChunkHasTheTokensOfItsPieces) {
  ForEachWorld(48, [](const World& world) {
    for (int rank = 0; rank < world.routing.ranks(); ++rank) {
      const DispatchPlan& plan = world.plans[static_cast<size_t>(rank)];
      const std::vector<Pair> sent = world.Sent(rank);
      for (Direction direction : kDirections) {
        const int each = plan.pieces() / Chunks(plan, direction);
        for (int chunk = 0; chunk < Chunks(plan, direction); ++chunk) {
          const int tokens = world.routing.tokens[static_cast<size_t>(rank)];
          const Range first = EvenPart(tokens, plan.pieces(), chunk * each);
          const Range last = EvenPart(tokens, plan.pieces(), (chunk + 1) * each - 1);
          for (const RowRun& run : plan.Rows(direction, chunk, /*sends=*/true)) {
            for (int64_t i = run.begin; i < run.begin + run.rows; ++i) {
              EXPECT_GE(sent[static_cast<size_t>(i)].token, first.begin);
              EXPECT_LT(sent[static_cast<size_t>(i)].token, last.begin + last.count);
            }
          }
        }
      }
    }
  });
}

TEST(DispatchPlan, ForwardChunkIsContiguousOnEachLane) {
  ForEachWorld(96, [](const World& world) {
    for (const DispatchPlan& plan : world.plans) {
      for (int chunk = 0; chunk < plan.forward_chunks(); ++chunk) {
        for (bool sends : {true, false}) {
          EXPECT_LE(plan.Rows(Direction::kForward, chunk, sends).size(), 1u);
          for (Route route : kRoutes) {
            const std::vector<RowRun> runs = plan.Runs(Direction::kForward, chunk, route, sends);
            for (size_t i = 1; i < runs.size(); ++i) EXPECT_EQ(runs[i].begin, runs[i - 1].begin + runs[i - 1].rows);
          }
        }
      }
    }
  });
}

TEST(DispatchPlan, AllStayExactlyWhereNoRowTravels) {
  int stayed = 0;
  ForEachWorld(200, [&](const World& world) {
    bool stay = true;
    for (int rank = 0; rank < world.routing.ranks(); ++rank) {
      const std::vector<int> local = world.routing.Local(rank);
      for (const Pair& pair : world.routing.PairsOf(rank)) {
        stay = stay && std::find(local.begin(), local.end(), pair.expert) != local.end();
      }
    }
    for (const DispatchPlan& plan : world.plans) EXPECT_EQ(plan.all_stay(), stay);
    stayed += stay ? 1 : 0;
  });
  EXPECT_GT(stayed, 5);  // Both happen.
  EXPECT_LT(stayed, 150);
}

TEST(DispatchPlan, OneRankKeepsTheOrderOfItsExperts) {
  Routing routing;
  routing.topology = Topology::OneHost(1);
  routing.placement = ExpertPlacement(2);
  routing.rows = {1, 2};
  routing.tokens = {2};
  routing.offset.push_back(Empty({3}, DType::kI32));
  routing.expert.push_back(Empty({3}, DType::kI32));
  std::copy_n(std::vector<int32_t>{0, 2, 3}.begin(), 3, routing.offset[0].data<int32_t>());
  std::copy_n(std::vector<int32_t>{1, 0, 1}.begin(), 3, routing.expert[0].data<int32_t>());
  const World world(routing);
  EXPECT_EQ(world.Sent(0), (std::vector<Pair>{{0, 0, 0}, {0, 0, 1}, {0, 1, 1}}));
  EXPECT_TRUE(world.plans[0].all_stay());
}

}  // namespace
}  // namespace shoal
