#include "collectives/engine/tuner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "collectives/engine/planner.h"

namespace shoal {
namespace {

uint64_t Seed() {
  const char* given = std::getenv("SHOAL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
  std::printf("SHOAL_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

Topology OnHosts(std::vector<int> hosts) {
  Topology topology;
  topology.host = std::move(hosts);
  return topology;
}

// As each rank of a group would make it; tensors without memory.
Operation AllReduceOf(int64_t elements, DType dtype = DType::kF32) {
  Operation op;
  op.kind = OpKind::kAllReduce;
  op.dtype = dtype;
  op.in = op.out = Tensor(nullptr, {elements}, dtype);
  return op;
}

Operation RandomOp(std::mt19937_64* random, int size) {
  const auto pick = [&](int64_t n) { return static_cast<int64_t>((*random)() % n); };
  constexpr OpKind kKinds[] = {OpKind::kAllReduce, OpKind::kReduceScatter, OpKind::kAllGather, OpKind::kBroadcast,
                               OpKind::kReduce,    OpKind::kGather,        OpKind::kScatter,   OpKind::kBarrier};
  constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kI8, DType::kF64};
  Operation op = AllReduceOf(pick(int64_t{1} << pick(22)) + 1, kTypes[pick(4)]);
  op.kind = kKinds[pick(8)];
  op.order = pick(4) == 0 ? Order::kFixed : Order::kFast;
  op.root = static_cast<int>(pick(size));
  for (int rank = 0; rank < size; ++rank) op.counts.push_back(pick(int64_t{1} << pick(18)));
  return op;
}

CostModel RandomModel(std::mt19937_64* random, int size) {
  Topology topology;
  const int hosts = 1 + static_cast<int>((*random)() % 3);
  for (int rank = 0; rank < size; ++rank) topology.host.push_back(static_cast<int>((*random)() % hosts));
  CostModel model = DefaultCostModel(topology, 1 + (*random)() % 8);
  for (Link& link : model.links) {
    link.latency_ns = 200 + (*random)() % 100'000;
    link.bytes_per_ms = 10'000 + (*random)() % 20'000'000;
  }
  return model;
}

// One rank's side of a group.
struct Rank {
  Rank(int index, const CostModel& model)
      : index(index), size(static_cast<int>(model.topology.host.size())), topology(model.topology), tuner(model) {}
  Tuner::Decision Choose(const Operation& op) { return tuner.Choose(op, ProblemOf(op, index, size, &topology)); }

  const int index, size;
  const Topology topology;
  Tuner tuner;
};

void Exchange(std::vector<std::unique_ptr<Rank>>* ranks) {
  std::vector<int64_t> all;
  for (auto& rank : *ranks) {
    std::vector<int64_t> own(Tuner::kExchanged);
    rank->tuner.FillExchange(absl::MakeSpan(own));
    all.insert(all.end(), own.begin(), own.end());
  }
  for (auto& rank : *ranks) rank->tuner.ApplyExchange(all);
}

TEST(Tuner, AllRanksChooseAlikeWhateverTheyObserve) {
  const uint64_t seed = Seed();
  SCOPED_TRACE(absl::StrCat("SHOAL_TEST_SEED=", seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 12; ++round) {
    const int size = 2 + static_cast<int>(random() % 5);
    const CostModel model = RandomModel(&random, size);
    std::vector<std::unique_ptr<Rank>> ranks;
    for (int rank = 0; rank < size; ++rank) ranks.push_back(std::make_unique<Rank>(rank, model));
    std::vector<Operation> ops;
    for (int i = 0; i < 6; ++i) ops.push_back(RandomOp(&random, size));
    for (int step = 1; step <= 100; ++step) {
      if (step % 25 == 0) Exchange(&ranks);
      const Operation& op = ops[random() % ops.size()];
      const Tuner::Decision first = ranks[0]->Choose(op);
      for (auto& rank : ranks) {
        const Tuner::Decision own = rank == ranks[0] ? first : rank->Choose(op);
        ASSERT_EQ(own.algorithm->name, first.algorithm->name) << OpName(op) << " on rank " << rank->index;
        ASSERT_EQ(own.piece_bytes, first.piece_bytes) << OpName(op) << " on rank " << rank->index;
        rank->tuner.Observe(1 + random() % 1'000'000);
      }
    }
  }
}

TEST(Tuner, FixedOrdersAndWireFormatsReduceInIndexOrder) {
  Rank rank(0, DefaultCostModel(OnHosts({0, 1, 2, 3, 4, 5, 6, 7}), 2));
  for (int64_t elements : {1, 1000, 1 << 20}) {
    Operation op = AllReduceOf(elements);
    op.order = Order::kFixed;
    EXPECT_TRUE(rank.Choose(op).algorithm->index_order);
    op.order = Order::kFast;
    op.wire = WireFormat::kInt8;
    EXPECT_EQ(rank.Choose(op).algorithm->name, "direct");
  }
}

// Whoever is observed to be slower than another one by enough gives way to it; noise changes nothing.
TEST(Tuner, ObservationsDecideBetweenCandidatesWithHysteresis) {
  EXPECT_EQ(BestObserved({1000, 950, 0}, 0), 0u);
  EXPECT_EQ(BestObserved({1000, 850, 0}, 0), 1u);
  EXPECT_EQ(BestObserved({1000, 850, 0}, 1), 1u);
  EXPECT_EQ(BestObserved({1000, 0, 0}, 0), 0u);
  EXPECT_EQ(BestObserved({1000, 850, 700}, 0), 2u);
}

TEST(Tuner, ACloseRivalIsTriedAndTakenWhenItIsFaster) {
  std::vector<std::unique_ptr<Rank>> ranks;
  const CostModel model = DefaultCostModel(OnHosts({0, 1, 2, 3}), 2);
  for (int rank = 0; rank < 4; ++rank) ranks.push_back(std::make_unique<Rank>(rank, model));
  // A size that has a rival.
  std::set<std::string> seen;
  for (int64_t elements = 1 << 12; elements <= 1 << 22 && seen.size() < 2; elements *= 2) {
    const Operation op = AllReduceOf(elements);
    const auto name = [](const Tuner::Decision& d) { return absl::StrCat(AbslSv(d.algorithm->name), ":", d.piece_bytes); };
    const std::string best = name(ranks[0]->Choose(op));
    seen = {best};
    const auto run = [&](int operations) {
      for (int i = 0; i < operations; ++i) {
        for (auto& rank : ranks) {
          const std::string used = name(rank->Choose(op));
          seen.insert(used);
          rank->tuner.Observe(used == best ? 10'000 : 5'000);
        }
      }
    };
    run(10);
    Exchange(&ranks);
    run(20);
    EXPECT_EQ(name(ranks[0]->Choose(op)), best) << "a trial does not last";
    Exchange(&ranks);
    if (seen.size() < 2) continue;
    for (int i = 0; i < 20; ++i) (void)ranks[0]->Choose(op);  // Past further trials.
    EXPECT_NE(name(ranks[0]->Choose(op)), best);
    bool tried = false;
    for (const TuningRow& row : ranks[0]->tuner.Rows()) tried |= row.chosen && row.why.find("observed") == 0;
    EXPECT_TRUE(tried);
  }
  EXPECT_GE(seen.size(), 2u) << "no size has a rival";
}

TEST(Tuner, ExchangesAreRare) {
  std::vector<uint64_t> numbers;
  for (uint64_t number = 0; number < 5000; ++number) {
    if (Tuner::ExchangesBefore(number)) numbers.push_back(number);
  }
  EXPECT_EQ(numbers, (std::vector<uint64_t>{64, 256, 1024, 4096}));
}

}  // namespace
}  // namespace shoal
