#include "parallel/schedule/step_graph.h"

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace shoal {
namespace {

using Random = std::mt19937_64;

int Pick(Random& random, int low, int high) {
  return low + static_cast<int>(random() % static_cast<uint64_t>(high - low + 1));
}
bool Coin(Random& random) { return random() % 2 == 0; }

struct Case {
  StepShape shape;
  Schedule schedule;
  bool of_layer(int bucket) const { return shape.buckets().IsLayer(bucket); }
  bool sharded() const { return shape.dense == DensePolicy::kSharded && shape.ranks > 1; }
  bool sharded(int bucket) const { return sharded() && shape.buckets().Shardable(bucket); }
  bool rematerialise() const { return shape.materialise && shape.experts == ExpertPolicy::kRematerialise; }
  int layers() const { return static_cast<int>(shape.layers.size()); }
};

StepShape RandomShape(Random& random) {
  StepShape shape;
  shape.mode = Pick(random, 0, 4) == 0 ? StepShape::Mode::kForward : StepShape::Mode::kTrain;
  for (int layers = Pick(random, 1, 6); layers > 0; --layers) {
    shape.layers.push_back({.moe = Pick(random, 0, 2) > 0, .shared_expert = Coin(random)});
  }
  shape.tied_head = Coin(random);
  shape.parts = shape.mode == StepShape::Mode::kTrain ? Pick(random, 1, 3) : 1;
  shape.recompute = Coin(random);
  shape.ranks = Coin(random) ? 4 : 1;
  if (shape.ranks > 1) {
    shape.inter = Coin(random);
    shape.intra = !shape.inter || Coin(random);
    shape.dispatch = Coin(random);
    shape.materialise = Coin(random);
  }
  shape.dense = Coin(random) ? DensePolicy::kSharded : DensePolicy::kReplicated;
  shape.experts = Coin(random) ? ExpertPolicy::kRematerialise : ExpertPolicy::kKeep;
  shape.calibrate = shape.materialise && Coin(random);
  shape.balance = Coin(random);
  shape.streams = Pick(random, 0, 3) == 0;
  return shape;
}

// Every bucket in 1 to 3 slices, each at a place that GradientSlice allows.
std::vector<GradientSlice> RandomSlices(Random& random, const StepShape& shape, int prefetch) {
  std::vector<GradientSlice> slices;
  for (int bucket = 0; bucket < shape.buckets().count(); ++bucket) {
    const int completed = CompletedBy(shape, bucket);
    const bool head = completed == static_cast<int>(shape.layers.size());
    const int lowest = shape.dense == DensePolicy::kReplicated ? -1 : head ? 0 : std::max(-1, completed - prefetch);
    int64_t begin = 0;
    for (int64_t end : {Pick(random, 0, 50), Pick(random, 50, 99), 100}) {
      if (end == begin) continue;
      slices.push_back({bucket, begin, end - begin, completed < 0 ? -1 : Pick(random, lowest, completed - 1)});
      begin = end;
    }
  }
  std::shuffle(slices.begin(), slices.end(), random);
  std::stable_sort(slices.begin(), slices.end(),
                   [](const GradientSlice& a, const GradientSlice& b) { return a.before_layer > b.before_layer; });
  return slices;
}

Case RandomCase(uint64_t seed) {
  Random random(seed);
  Case one;
  one.shape = RandomShape(random);
  one.schedule.prefetch = Pick(random, 1, 3);
  for (int layer = 0; layer < one.layers(); ++layer) {
    one.schedule.layers.push_back({.forward_chunks = Pick(random, 1, 8), .backward_chunks = Pick(random, 1, 8)});
  }
  one.schedule.gradients = RandomSlices(random, one.shape, one.schedule.prefetch);
  one.schedule.waves = Pick(random, 1, 3);
  if (WavesMayPart(one.shape) && Pick(random, 0, 3) > 0) {
    const TurnRule rule = {.forward_waves = Pick(random, 1, 3), .hungry_ns = static_cast<double>(Pick(random, 0, 20))};
    one.schedule.turns = ChooseTurns(one.shape, one.schedule, rule, [&](const Task&) { return Pick(random, 0, 10); });
  }
  return one;
}

// What must have ended before a task begins, however fast each lane is.
class Order {
 public:
  explicit Order(const Graph& graph) : words_((graph.tasks.size() + 63) / 64), bits_(graph.tasks.size() * words_, 0) {
    std::map<std::pair<Lane, int>, int> last;
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      for (int before : task.after) Join(i, before);
      const int wave = graph.waves_apart && IsLocal(task.lane) ? task.wave : 0;
      int& previous = last.try_emplace({task.lane, wave}, -1).first->second;
      Join(i, previous);
      previous = static_cast<int>(i);
    }
  }
  bool Before(size_t a, size_t b) const { return (bits_[b * words_ + a / 64] >> (a % 64) & 1) != 0; }

 private:
  void Join(size_t task, int before) {
    if (before < 0) return;
    const size_t from = static_cast<size_t>(before);
    for (size_t w = 0; w < words_; ++w) bits_[task * words_ + w] |= bits_[from * words_ + w];
    bits_[task * words_ + from / 64] |= uint64_t{1} << (from % 64);
  }
  size_t words_;
  std::vector<uint64_t> bits_;
};

class StepGraph : public testing::Test {
 protected:
  static constexpr uint64_t kSeeds = 600;
  template <class Check> static void ForEachCase(const Check& check) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      SCOPED_TRACE(absl::StrCat("seed ", seed));
      const Case one = RandomCase(seed);
      check(one, EmitStep(one.shape, one.schedule));
      if (HasFatalFailure()) return;
    }
  }
};

TEST_F(StepGraph, TasksWaitForEarlierOnesOnce) {
  ForEachCase([](const Case& one, const Graph& graph) {
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      const std::set<int> different(task.after.begin(), task.after.end());
      EXPECT_EQ(different.size(), task.after.size()) << Name(task);
      for (int before : task.after) {
        ASSERT_GE(before, 0) << Name(task);
        ASSERT_LT(before, static_cast<int>(i)) << Name(task);
      }
      if (one.shape.ranks == 1) {
        EXPECT_EQ(task.lane, Lane::kCompute) << Name(task);
      }
      if (!one.shape.inter) {
        EXPECT_NE(task.lane, Lane::kInter) << Name(task);
      }
    }
  });
}

// (op, phase, lane, back, part, wave, layer, chunk)
using Identity = std::tuple<Op, Phase, Lane, bool, int, int, int, int>;

class Expected {
 public:
  explicit Expected(const Case& one) : one_(one) {
    const bool training = one.shape.mode == StepShape::Mode::kTrain;
    for (part_ = 0; part_ < one.shape.parts; ++part_) {
      for (layer_ = 0; layer_ < one.layers(); ++layer_) {
        const bool moe = one.shape.layers[static_cast<size_t>(layer_)].moe;
        for (Phase phase : {Phase::kForward, Phase::kRecompute, Phase::kBackward}) {
          if (phase != Phase::kForward && !training) continue;
          if (phase == Phase::kRecompute && !one.shape.recompute) continue;
          for (wave_ = 0; wave_ < one.schedule.waves; ++wave_) {
            Add(Op::kAttention, phase, -1);
            if (moe) AddExperts(phase);
            if (!moe) Add(Op::kDense, phase, -1);
          }
        }
      }
    }
  }
  const std::set<Identity>& tasks() const { return tasks_; }

 private:
  void Add(Op op, Phase phase, int chunk, Lane lane = Lane::kCompute, bool back = false) {
    tasks_.emplace(op, phase, lane, back, part_, wave_, layer_, chunk);
  }
  void Travel(Op op, Phase phase, int chunk) {
    if (!one_.shape.dispatch) return;
    if (one_.shape.inter) Add(op, phase, chunk, Lane::kInter);
    if (one_.shape.intra) Add(op, phase, chunk, Lane::kIntra);
    Add(Op::kStay, phase, chunk, Lane::kCopy, op == Op::kReturn);
  }
  void AddExperts(Phase phase) {
    const bool backward = phase == Phase::kBackward;
    // Beside another wave's computation.
    const Lane lane = !backward && one_.shape.dispatch && one_.schedule.waves > 1 ? Lane::kCopy : Lane::kCompute;
    Add(Op::kRoute, phase, -1);
    if (!backward) Add(Op::kArrange, phase, -1, lane);
    if (phase == Phase::kForward && one_.shape.ranks > 1) Add(Op::kExchange, phase, -1, Lane::kControl);
    if (one_.shape.layers[static_cast<size_t>(layer_)].shared_expert) Add(Op::kShared, phase, -1);
    const LayerSchedule& chunks = one_.schedule.layers[static_cast<size_t>(layer_)];
    for (int chunk = 0; chunk < (backward ? chunks.backward_chunks : chunks.forward_chunks); ++chunk) {
      Add(Op::kPack, phase, chunk, lane);
      Travel(Op::kDispatch, phase, chunk);
      Add(Op::kExperts, phase, chunk);
      Travel(Op::kReturn, phase, chunk);
      if (phase == Phase::kForward) Add(Op::kCombine, phase, chunk);
      if (backward) Add(Op::kExpertsWeight, phase, chunk);
    }
  }

  const Case& one_;
  int part_ = 0, wave_ = 0, layer_ = 0;
  std::set<Identity> tasks_;
};

TEST_F(StepGraph, EveryLayerIsDoneOncePerChunkWavePassAndPart) {
  ForEachCase([](const Case& one, const Graph& graph) {
    std::set<Identity> tasks;
    for (const Task& task : graph.tasks) {
      if (task.layer < 0 || task.phase == Phase::kUpdate) continue;
      if (task.op == Op::kMaterialise || task.op == Op::kCalibrate || task.op == Op::kReduceExperts || task.op == Op::kRelease) continue;
      EXPECT_TRUE(tasks.emplace(task.op, task.phase, task.lane, task.back, task.part, task.wave, task.layer, task.chunk).second)
          << Name(task) << " twice";
    }
    EXPECT_TRUE(tasks == Expected(one).tasks()) << tasks.size() << " tasks, expected " << Expected(one).tasks().size();
  });
}

TEST_F(StepGraph, RowsTravelBetweenWhatMakesThemAndWhatNeedsThem) {
  ForEachCase([](const Case& one, const Graph& graph) {
    if (!one.shape.dispatch) return;
    const Order order(graph);
    std::map<std::tuple<Op, Phase, int, int, int, int>, std::vector<size_t>> found;  // op, phase, part, wave, layer, chunk
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      const Op op = task.op != Op::kStay ? task.op : task.back ? Op::kReturn : Op::kDispatch;
      found[{op, task.phase, task.part, task.wave, task.layer, task.chunk}].push_back(i);
    }
    for (const auto& [key, tasks] : found) {
      const auto& [op, phase, part, wave, layer, chunk] = key;
      if (op != Op::kDispatch && op != Op::kReturn) continue;
      const bool forth = op == Op::kDispatch;
      const Op made_by = forth ? Op::kPack : Op::kExperts;
      const Op needed_by = forth ? Op::kExperts : phase == Phase::kForward ? Op::kCombine : Op::kRoute;
      for (size_t travel : tasks) {
        EXPECT_TRUE(order.Before(found.at({made_by, phase, part, wave, layer, chunk}).front(), travel)) << Name(graph.tasks[travel]);
        // What is computed again is needed by the backward pass.
        const auto needing = forth || phase == Phase::kForward
                                 ? found.at({needed_by, phase, part, wave, layer, chunk})
                                 : found.at({Op::kRoute, Phase::kBackward, part, wave, layer, -1});
        EXPECT_TRUE(order.Before(travel, needing.front())) << Name(graph.tasks[travel]);
      }
    }
  });
}

// The first embedding of a part begins it, and drops what is left of the part before.
TEST_F(StepGraph, PartsDoNotOverlapButForWeightsAndGradients) {
  ForEachCase([](const Case& one, const Graph& graph) {
    const Order order(graph);
    std::vector<size_t> begins;
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      if (task.op == Op::kEmbed && task.phase == Phase::kForward && task.wave == 0) begins.push_back(i);
    }
    ASSERT_EQ(begins.size(), static_cast<size_t>(one.shape.parts));
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      const bool of_store = task.op == Op::kGather || task.op == Op::kRelease || task.op == Op::kMaterialise ||
                            task.op == Op::kReduce || task.op == Op::kReduceExperts;
      if (of_store || task.part < 0) continue;
      const size_t part = static_cast<size_t>(task.part);
      EXPECT_TRUE(i == begins[part] || order.Before(begins[part], i)) << Name(task);
      if (part + 1 < begins.size()) {
        EXPECT_TRUE(order.Before(i, begins[part + 1])) << Name(task);
      }
    }
  });
}

TEST_F(StepGraph, TotalsAreThoseOfAllRouters) {
  ForEachCase([](const Case& one, const Graph& graph) {
    const Order order(graph);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& totals = graph.tasks[i];
      if (totals.op != Op::kTotals) continue;
      EXPECT_GT(one.shape.ranks, 1);
      for (size_t j = 0; j < graph.tasks.size(); ++j) {
        const Task& task = graph.tasks[j];
        if (task.part != totals.part) continue;
        if (task.op == Op::kArrange && task.phase == Phase::kForward) {
          EXPECT_TRUE(order.Before(j, i)) << Name(task);
        }
        if (task.op == Op::kBalance) {
          EXPECT_TRUE(order.Before(i, j)) << Name(task);
        }
      }
    }
  });
}

// Gradients of a layer are overwritten by the first wave of the first part, then added to.
TEST_F(StepGraph, AWaveIsNeverAheadOfAnEarlierOne) {
  ForEachCase([](const Case&, const Graph& graph) {
    const Order order(graph);
    std::map<Identity, size_t> last;  // Of the local lanes, without the wave.
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      if (!IsLocal(task.lane) || task.wave < 0) continue;
      const auto [entry, first] = last.try_emplace({task.op, task.phase, task.lane, task.back, task.part, 0, task.layer, task.chunk}, i);
      if (first) {
        EXPECT_EQ(task.wave, 0) << Name(task);
        continue;
      }
      EXPECT_EQ(task.wave, graph.tasks[entry->second].wave + 1) << Name(task);
      EXPECT_TRUE(order.Before(entry->second, i)) << Name(task);
      entry->second = i;
    }
  });
}

TEST_F(StepGraph, WavesApartKeepPartsAndWhatIsForAllOfThemInOrder) {
  ForEachCase([](const Case& one, const Graph& graph) {
    EXPECT_EQ(graph.waves_apart, !one.schedule.turns.empty() && !one.shape.tied_head && !one.shape.streams);
    const Order order(graph);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      if (!IsLocal(task.lane)) continue;
      for (size_t before = 0; before < i; ++before) {
        const Task& other = graph.tasks[before];
        if (!IsLocal(other.lane)) continue;
        const bool ends_all = task.wave < 0 && task.lane == Lane::kCompute && other.lane == Lane::kCompute;
        const bool next_part = task.part != other.part && task.lane == Lane::kCompute && other.lane == Lane::kCompute;
        if (ends_all || next_part) {
          EXPECT_TRUE(order.Before(before, i)) << Name(other) << " before " << Name(task);
        }
      }
    }
  });
}

TEST(ChooseTurns, EarlyWavesGoBackBesideLateOnes) {
  StepShape shape;
  shape.layers.resize(4);
  shape.ranks = 2;
  shape.inter = shape.dispatch = true;
  shape.balance = false;
  Schedule schedule = PlainSchedule(shape, std::vector<int64_t>(7, 100));
  schedule.waves = 6;
  const auto cost = [](const Task& task) { return task.lane == Lane::kInter ? 2.0 : task.lane == Lane::kCompute ? 1.0 : 0.0; };
  for (int forward_waves : {1, 2, 3}) {
    schedule.turns = ChooseTurns(shape, schedule, {.forward_waves = forward_waves, .hungry_ns = 1}, cost);
    EXPECT_EQ(schedule.turns.size(), 6u * (2 * 4 + 1 + 2 * 4 + 1));
    std::set<int> forward;  // Waves that have begun and are not back at the head.
    size_t most = 0;
    bool beside = false;
    for (const Task& task : EmitStep(shape, schedule).tasks) {
      if (task.lane != Lane::kCompute || task.wave < 0) continue;
      if (task.op == Op::kAttention && task.phase == Phase::kForward) forward.insert(task.wave);
      if (task.op == Op::kHead) forward.erase(task.wave);
      beside = beside || (task.op == Op::kExpertsWeight && !forward.empty());
      most = std::max(most, forward.size());
    }
    EXPECT_LE(most, static_cast<size_t>(forward_waves));
    EXPECT_TRUE(beside) << forward_waves;
    schedule.turns.clear();
  }
}

TEST(WavesMayPart, NeedsWeightsThatStayAndNoSharedChoice) {
  StepShape shape;
  shape.layers.resize(1);
  shape.balance = false;
  EXPECT_TRUE(WavesMayPart(shape));
  const auto refuses = [&](const auto& change) {
    StepShape other = shape;
    change(&other);
    return !WavesMayPart(other);
  };
  EXPECT_TRUE(refuses([](StepShape* s) { s->balance = true; }));
  EXPECT_TRUE(refuses([](StepShape* s) { s->dense = DensePolicy::kSharded; }));
  EXPECT_TRUE(refuses([](StepShape* s) { s->mode = StepShape::Mode::kForward; }));
  EXPECT_TRUE(refuses([](StepShape* s) { s->materialise = true, s->experts = ExpertPolicy::kRematerialise; }));
}

// The layer's weights, or bucket's, that a task reads; -1: none.
int ReadBucket(const StepShape& shape, const Task& task) {
  if (task.lane != Lane::kCompute || task.phase == Phase::kUpdate) return -1;
  if (task.op == Op::kEmbed && task.phase == Phase::kForward) return BucketIndex::kEmbedding;
  if (task.op == Op::kHead && task.phase == Phase::kForward) return shape.buckets().OfHead();
  const bool reads = task.op == Op::kAttention || task.op == Op::kDense || task.op == Op::kRoute || task.op == Op::kShared;
  return reads && task.layer >= 0 ? shape.buckets().OfLayer(task.layer) : -1;
}

TEST_F(StepGraph, WeightsAreThereFromTheirGatherToTheirRelease) {
  ForEachCase([](const Case& one, const Graph& graph) {
    if (one.shape.ranks == 1) return;
    const Order order(graph);
    const size_t buckets = static_cast<size_t>(one.shape.buckets().count());
    std::vector<int> gather(buckets, -1), release(buckets, -1), gathers(buckets, 0);
    std::vector<std::vector<size_t>> uses(buckets);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      if (task.op == Op::kGather) {
        const size_t bucket = static_cast<size_t>(task.chunk);
        for (size_t use : uses[bucket]) EXPECT_TRUE(order.Before(use, i)) << Name(graph.tasks[use]);
        EXPECT_TRUE(gathers[bucket]++ == 0 || (release[bucket] >= 0 && order.Before(static_cast<size_t>(release[bucket]), i)))
            << "bucket " << bucket << " is gathered although it is here";
        gather[bucket] = static_cast<int>(i);
        release[bucket] = -1;
        uses[bucket].clear();
      } else if (task.op == Op::kRelease && task.layer < 0) {
        const size_t bucket = static_cast<size_t>(task.chunk);
        for (size_t use : uses[bucket]) EXPECT_TRUE(order.Before(use, i)) << Name(graph.tasks[use]);
        release[bucket] = static_cast<int>(i);
      } else if (const int read = ReadBucket(one.shape, task); read >= 0) {
        const size_t bucket = static_cast<size_t>(read);
        ASSERT_GE(gather[bucket], 0) << Name(task);
        EXPECT_TRUE(order.Before(static_cast<size_t>(gather[bucket]), i)) << Name(task);
        EXPECT_LT(release[bucket], 0) << Name(task) << " needs what was released";
        uses[bucket].push_back(i);
      }
    }
    for (size_t bucket = 0; bucket < buckets; ++bucket) {
      if (one.sharded(static_cast<int>(bucket))) {
        EXPECT_GE(release[bucket], 0) << "bucket " << bucket << " stays";
      } else {
        EXPECT_EQ(gathers[bucket], 1) << "bucket " << bucket;
        EXPECT_LT(release[bucket], 0) << "bucket " << bucket;
      }
    }
  });
}

// Communication as early, computation as late as the graph allows.
TEST_F(StepGraph, NoMoreLayersAreGatheredThanThereAreBuffers) {
  ForEachCase([](const Case& one, const Graph& graph) {
    std::array<std::vector<size_t>, kLanes> lanes;
    for (size_t i = 0; i < graph.tasks.size(); ++i) lanes[static_cast<size_t>(graph.tasks[i].lane)].push_back(i);
    std::array<size_t, kLanes> next{};
    std::vector<bool> done(graph.tasks.size(), false);
    int live = 0, most = 0, live_ends = 0, most_ends = 0, live_experts = 0, most_experts = 0;
    for (size_t left = graph.tasks.size(); left > 0; --left) {
      bool ran = false;
      for (size_t lane = kLanes; lane-- > 0 && !ran;) {  // The compute lane last.
        if (next[lane] == lanes[lane].size()) continue;
        const size_t index = lanes[lane][next[lane]];
        const Task& task = graph.tasks[index];
        if (!std::all_of(task.after.begin(), task.after.end(), [&](int before) { return done[static_cast<size_t>(before)]; })) {
          continue;
        }
        if (task.op == Op::kGather && one.sharded(task.chunk)) {
          if (one.of_layer(task.chunk)) most = std::max(most, ++live);
          if (!one.of_layer(task.chunk)) most_ends = std::max(most_ends, ++live_ends);
        }
        if (task.op == Op::kRelease && task.layer < 0) --(one.of_layer(task.chunk) ? live : live_ends);
        if (one.rematerialise()) {
          if (task.op == Op::kMaterialise) most_experts = std::max(most_experts, ++live_experts);
          if ((task.op == Op::kRelease && task.layer >= 0) || task.op == Op::kReduceExperts) --live_experts;
        }
        done[index] = ran = true;
        ++next[lane];
      }
      ASSERT_TRUE(ran) << "deadlock";
    }
    EXPECT_LE(most, DenseBuffers(one.schedule.prefetch, one.schedule.waves));
    EXPECT_LE(most_ends, 1);
    EXPECT_LE(most_experts, one.schedule.prefetch + 1);
    EXPECT_EQ(live, 0);
    EXPECT_EQ(live_ends, 0);
    EXPECT_EQ(live_experts, 0);
  });
}

// The tasks that write gradients of a bucket in a part.
bool WritesGradients(const StepShape& shape, const Task& task, int bucket) {
  if (task.lane != Lane::kCompute) return false;
  if (bucket == shape.buckets().OfHead() && task.op == Op::kHead && task.phase == Phase::kForward) return true;
  if (bucket == BucketIndex::kEmbedding) return task.op == Op::kEmbed && task.phase == Phase::kBackward;
  if (task.phase != Phase::kBackward) return false;
  if (bucket == BucketIndex::kVectors) {  // Of all norms.
    return task.op == Op::kAttention || task.op == Op::kDense || task.op == Op::kRoute || task.op == Op::kHead;
  }
  return ReadBucket(shape, task) == bucket;
}

TEST_F(StepGraph, GradientsAreSentOnceWhenTheyAreComplete) {
  ForEachCase([](const Case& one, const Graph& graph) {
    const Order order(graph);
    const bool training = one.shape.mode == StepShape::Mode::kTrain;
    std::map<std::pair<int, int>, int> sent;  // (part, slice)
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& reduce = graph.tasks[i];
      if (reduce.op != Op::kReduce) continue;
      ASSERT_GE(reduce.slice, 0);
      EXPECT_EQ(one.schedule.gradients[static_cast<size_t>(reduce.slice)].bucket, reduce.chunk);
      ++sent[{reduce.part, reduce.slice}];
      int writers = 0;
      for (size_t j = 0; j < graph.tasks.size(); ++j) {
        const Task& task = graph.tasks[j];
        if (!WritesGradients(one.shape, task, reduce.chunk)) continue;
        // Replicated: summed over the parts before they are sent. Sharded: each part's are sent before the next writes.
        const bool must_precede = one.sharded(reduce.chunk) ? task.part <= reduce.part : true;
        EXPECT_TRUE(must_precede ? order.Before(j, i) : order.Before(i, j))
            << Name(reduce) << " and " << Name(task) << " of part " << task.part;
        ++writers;
      }
      EXPECT_GT(writers, 0) << Name(reduce);
    }
    size_t expected = 0;
    for (const GradientSlice& slice : one.schedule.gradients) {
      if (one.shape.ranks > 1 && training) expected += one.sharded(slice.bucket) ? static_cast<size_t>(one.shape.parts) : 1;
    }
    EXPECT_EQ(sent.size(), expected);
    for (const auto& [key, times] : sent) EXPECT_EQ(times, 1) << "slice " << key.second << " of part " << key.first;
  });
}

TEST_F(StepGraph, GradientBuffersOfLayersAreSentBeforeTheyAreTakenAgain) {
  ForEachCase([](const Case& one, const Graph& graph) {
    if (!one.sharded()) return;
    const Order order(graph);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& reduce = graph.tasks[i];
      const int taker = reduce.chunk - 2 - (one.schedule.prefetch + 1);
      if (reduce.op != Op::kReduce || taker < 0 || taker + one.schedule.prefetch + 1 >= one.layers()) continue;
      for (size_t j = 0; j < graph.tasks.size(); ++j) {
        const Task& task = graph.tasks[j];
        if (task.part == reduce.part && WritesGradients(one.shape, task, one.shape.buckets().OfLayer(taker))) {
          EXPECT_TRUE(order.Before(i, j)) << Name(reduce) << " and " << Name(task);
        }
      }
    }
  });
}

TEST_F(StepGraph, HeadAndEmbeddingHaveOneBufferForTheirGradients) {
  ForEachCase([](const Case& one, const Graph& graph) {
    if (!one.sharded(BucketIndex::kEmbedding)) return;
    const Order order(graph);
    const int head = one.shape.buckets().OfHead();
    // The head comes first in a part.
    const auto turn = [&](const Task& task, int bucket) { return 2 * task.part + (bucket == head ? 0 : 1); };
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& reduce = graph.tasks[i];
      if (reduce.op != Op::kReduce || (reduce.chunk != head && reduce.chunk != BucketIndex::kEmbedding)) continue;
      for (size_t j = 0; j < graph.tasks.size(); ++j) {
        const Task& task = graph.tasks[j];
        for (const int bucket : {head, static_cast<int>(BucketIndex::kEmbedding)}) {
          if (!WritesGradients(one.shape, task, bucket) || turn(task, bucket) <= turn(reduce, reduce.chunk)) continue;
          EXPECT_TRUE(order.Before(i, j)) << Name(reduce) << " and " << Name(task);
        }
      }
    }
  });
}

TEST_F(StepGraph, ExpertsAreThereWhenTheyAreNeededAndTheirGradientsAreReturned) {
  ForEachCase([](const Case& one, const Graph& graph) {
    const Order order(graph);
    std::vector<int> here(one.shape.layers.size(), -1), used(one.shape.layers.size(), -1);
    std::vector<int> materialised(one.shape.layers.size(), 0), returned(one.shape.layers.size(), 0);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      if (task.layer < 0) continue;
      const size_t layer = static_cast<size_t>(task.layer);
      if (task.op == Op::kMaterialise) {
        if (used[layer] >= 0) {
          EXPECT_TRUE(order.Before(static_cast<size_t>(used[layer]), i)) << Name(task);
        }
        here[layer] = static_cast<int>(i);
        ++materialised[layer];
      }
      if (task.op == Op::kReduceExperts) ++returned[layer];
      if (task.op == Op::kExperts && one.shape.materialise) {
        ASSERT_GE(here[layer], 0) << Name(task);
        EXPECT_TRUE(order.Before(static_cast<size_t>(here[layer]), i)) << Name(task);
        used[layer] = static_cast<int>(i);
      }
      if (task.op == Op::kExpertsWeight) {
        for (size_t j = i + 1; j < graph.tasks.size(); ++j) {
          const Task& other = graph.tasks[j];
          if (other.op == Op::kReduceExperts && other.layer == task.layer) {
            EXPECT_TRUE(order.Before(i, j)) << Name(task);
          }
        }
      }
    }
    const bool training = one.shape.mode == StepShape::Mode::kTrain, again = one.shape.experts == ExpertPolicy::kRematerialise;
    for (int layer = 0; layer < one.layers(); ++layer) {
      const bool moves = one.shape.materialise && one.shape.layers[static_cast<size_t>(layer)].moe;
      // Those of the last layer stay here from pass to pass.
      const int passes = !moves ? 0 : again ? one.shape.parts * (training && layer + 1 < one.layers() ? 2 : 1) : 1;
      EXPECT_EQ(materialised[static_cast<size_t>(layer)], passes) << "layer " << layer;
      EXPECT_EQ(returned[static_cast<size_t>(layer)], !moves || !training ? 0 : again ? one.shape.parts : 1) << "layer " << layer;
    }
  });
}

TEST_F(StepGraph, CopiesAreAddedOnceAStepBetweenThePlannedOnesAndTheExperts) {
  ForEachCase([](const Case& one, const Graph& graph) {
    const Order order(graph);
    std::vector<int> added(one.shape.layers.size(), 0);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& calibrate = graph.tasks[i];
      if (calibrate.op != Op::kCalibrate) continue;
      ++added[static_cast<size_t>(calibrate.layer)];
      EXPECT_EQ(calibrate.part, 0);
      for (size_t j = 0; j < graph.tasks.size(); ++j) {
        const Task& task = graph.tasks[j];
        if (task.layer != calibrate.layer) continue;
        const bool decides = task.op == Op::kArrange && task.phase == Phase::kForward && task.part == 0 && task.wave == 0;
        const bool planned = task.op == Op::kMaterialise && task.phase == Phase::kForward && task.part == 0;
        if (decides || planned) {
          EXPECT_TRUE(order.Before(j, i)) << Name(task);
        }
        const bool later = task.op == Op::kMaterialise && !planned;
        if (later || task.op == Op::kExperts || task.op == Op::kExpertsWeight || task.op == Op::kReduceExperts) {
          EXPECT_TRUE(order.Before(i, j)) << Name(task);
        }
      }
    }
    for (int layer = 0; layer < one.layers(); ++layer) {
      const bool may = one.shape.calibrate && one.shape.mode == StepShape::Mode::kTrain && one.shape.layers[static_cast<size_t>(layer)].moe;
      EXPECT_EQ(added[static_cast<size_t>(layer)], may ? 1 : 0) << "layer " << layer;
    }
  });
}

TEST_F(StepGraph, TheUpdateWaitsForAllGradients) {
  ForEachCase([](const Case& one, const Graph& graph) {
    if (one.shape.mode == StepShape::Mode::kForward) {
      for (const Task& task : graph.tasks) EXPECT_EQ(task.phase, Phase::kForward) << Name(task);
      return;
    }
    const Order order(graph);
    size_t norm = 0;
    int updates = 0;
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      if (graph.tasks[i].op == Op::kNorm) norm = i;
      if (graph.tasks[i].op == Op::kUpdate) ++updates;
    }
    ASSERT_GT(norm, 0u);
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      if (i == norm) continue;
      if (task.phase == Phase::kUpdate) {
        EXPECT_TRUE(order.Before(norm, i)) << Name(task);
      } else {
        EXPECT_TRUE(order.Before(i, norm)) << Name(task);
      }
    }
    const auto moe = std::count_if(one.shape.layers.begin(), one.shape.layers.end(), [](const LayerShape& l) { return l.moe; });
    EXPECT_EQ(updates, one.shape.buckets().count() + moe);
  });
}

TEST(Fingerprint, ChangesWithEachField) {
  const Case one = RandomCase(1);
  const Graph graph = EmitStep(one.shape, one.schedule);
  ASSERT_GT(graph.tasks.size(), 10u);
  std::set<uint64_t> seen = {Fingerprint(graph)};
  const auto expect_new = [&](const char* field, const auto& change) {
    Graph changed = graph;
    change(changed.tasks[5]);
    EXPECT_TRUE(seen.insert(Fingerprint(changed)).second) << field;
  };
  expect_new("op", [](Task& task) { task.op = Op::kNormSum; });
  expect_new("phase", [](Task& task) { task.phase = Phase::kUpdate; });
  expect_new("lane", [](Task& task) { task.lane = Lane::kCopy; });
  expect_new("back", [](Task& task) { task.back = !task.back; });
  expect_new("part", [](Task& task) { task.part += 1; });
  expect_new("layer", [](Task& task) { task.layer += 1; });
  expect_new("chunk", [](Task& task) { task.chunk += 1; });
  expect_new("slice", [](Task& task) { task.slice += 1; });
  expect_new("one more edge", [](Task& task) { task.after.push_back(0); });
  expect_new("another edge", [](Task& task) { task.after.push_back(1); });
  Graph longer = graph;
  longer.tasks.push_back(Task());
  EXPECT_TRUE(seen.insert(Fingerprint(longer)).second);
  Graph estimated = graph;
  estimated.tasks[5].units = 17;
  EXPECT_EQ(Fingerprint(estimated), Fingerprint(graph)) << "units are not part of what is run";
}

TEST(Fingerprint, IsThatOfTheCaseAlone) {
  std::map<uint64_t, uint64_t> seen;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const Case one = RandomCase(seed);
    EXPECT_EQ(Fingerprint(EmitStep(one.shape, one.schedule)), Fingerprint(EmitStep(one.shape, one.schedule)));
  }
}

TEST(PlainSchedule, SendsEachBucketWhenItIsComplete) {
  StepShape shape;
  shape.layers = {{}, {.moe = false}, {}};
  shape.ranks = 2;
  shape.intra = true;
  const Schedule schedule = PlainSchedule(shape, {1, 2, 3, 4, 5, 6});
  ASSERT_EQ(schedule.gradients.size(), 6u);
  EXPECT_EQ(schedule.gradients[0].bucket, shape.buckets().OfHead());
  EXPECT_EQ(schedule.gradients[0].before_layer, 2);
  EXPECT_EQ(schedule.gradients[1].bucket, shape.buckets().OfLayer(2));
  EXPECT_EQ(schedule.gradients[1].before_layer, 1);
  EXPECT_EQ(schedule.gradients[1].count, 5);
  EXPECT_EQ(schedule.gradients[5].bucket, BucketIndex::kVectors);
  EXPECT_EQ(schedule.gradients[5].before_layer, -1);
}

}  // namespace
}  // namespace shoal
