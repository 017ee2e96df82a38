#include "parallel/schedule/lane_order.h"

#include <initializer_list>

#include "gtest/gtest.h"

namespace shoal {
namespace {

void Add(Graph* graph, Lane lane, int wave, std::initializer_list<int> after) {
  Task task;
  task.lane = lane;
  task.wave = wave;
  task.after.assign(after.begin(), after.end());
  graph->tasks.push_back(std::move(task));
}

// Two waves whose rows arrive by tasks 0 and 1.
Graph TwoWaves(Lane lane, bool apart) {
  Graph graph;
  graph.waves_apart = apart;
  Add(&graph, Lane::kInter, 0, {});
  Add(&graph, Lane::kInter, 1, {});
  Add(&graph, lane, 0, {0});
  Add(&graph, lane, 1, {1});
  Add(&graph, lane, 0, {});
  Add(&graph, lane, -1, {3, 4});
  return graph;
}

TEST(LaneOrder, IsThatOfTheListUnlessWavesPart) {
  for (const bool apart : {false, true}) {
    const Lane lane = apart ? Lane::kControl : Lane::kCompute;  // A lane with others on it keeps to the list in any case.
    const Graph graph = TwoWaves(lane, apart);
    const LaneOrder order(graph, lane);
    LaneOrder::Cursor cursor(order);
    std::vector<uint8_t> done(graph.tasks.size());
    done[1] = 1;
    EXPECT_EQ(cursor.Take(done), LaneOrder::kNone);
    EXPECT_TRUE(cursor.Awaits(0));
    EXPECT_FALSE(cursor.Awaits(1));
    done[0] = 1;
    for (int task : {2, 3, 4}) {
      EXPECT_FALSE(cursor.AllTaken());
      EXPECT_EQ(cursor.Take(done), task);
      done[static_cast<size_t>(task)] = 1;
    }
    EXPECT_EQ(cursor.Take(done), 5);
    EXPECT_TRUE(cursor.AllTaken());
    EXPECT_EQ(cursor.Take(done), LaneOrder::kNone);
  }
}

TEST(LaneOrder, TakesTheFirstOfTheWavesThatMayGoOn) {
  for (const Lane lane : {Lane::kCompute, Lane::kCopy}) {
    const Graph graph = TwoWaves(lane, /*apart=*/true);
    const LaneOrder order(graph, lane);
    LaneOrder::Cursor cursor(order);
    std::vector<uint8_t> done(graph.tasks.size());
    EXPECT_EQ(cursor.Take(done), LaneOrder::kNone);
    EXPECT_TRUE(cursor.Awaits(0));
    EXPECT_TRUE(cursor.Awaits(1));
    EXPECT_TRUE(cursor.Awaits(3));  // What is for all waves.
    EXPECT_FALSE(cursor.Awaits(4));  // Behind 2.
    done[1] = 1;
    EXPECT_EQ(cursor.Take(done), 3);
    done[3] = 1;
    EXPECT_EQ(cursor.Take(done), LaneOrder::kNone);
    EXPECT_TRUE(cursor.Awaits(4));
    done[0] = 1;
    EXPECT_EQ(cursor.Take(done), 2);
    done[2] = 1;
    EXPECT_EQ(cursor.Take(done), 4);
    EXPECT_FALSE(cursor.AllTaken());
    EXPECT_EQ(cursor.Take(done), LaneOrder::kNone);
    done[4] = 1;
    EXPECT_EQ(cursor.Take(done), 5);
    EXPECT_TRUE(cursor.AllTaken());
  }
}

}  // namespace
}  // namespace shoal
