#include "collectives/program/cost.h"

#include <chrono>
#include <numeric>
#include <random>

#include "gtest/gtest.h"

namespace shoal {
namespace {

// `hosts` hosts of equal size: 10 GB/s and 1 us within, `across` without.
CostModel Model(int size, int hosts, Link across = {30'000, 1'000'000}) {
  CostModel model;
  for (int r = 0; r < size; ++r) model.topology.host.push_back(r * hosts / size);
  for (int a = 0; a < size; ++a) {
    for (int b = 0; b < size; ++b) {
      model.links.push_back(model.topology.host[a] == model.topology.host[b] ? Link{1'000, 10'000'000} : across);
    }
  }
  model.reduce_bytes_per_ms = 8'000'000;
  model.instruction_ns = 200;
  model.cores_per_host = 64;
  return model;
}

Problem AllReduceOf(const CostModel& model, int size, int64_t elements) {
  return {.kind = OpKind::kAllReduce, .size = size, .elements = elements, .topology = &model.topology};
}

std::vector<Program> ProgramsOf(std::string_view name, Problem p) {
  std::vector<Program> programs;
  for (p.rank = 0; p.rank < p.size; ++p.rank) programs.push_back((*FindAlgorithm(name, p))->make(p));
  return programs;
}

TEST(PredictNs, AddsLatencyTransferAndOverhead) {
  CostModel model = Model(2, 2);
  model.instruction_ns = 0;
  Problem p{.kind = OpKind::kBroadcast, .size = 2, .elements = 1'000'000};
  EXPECT_EQ(PredictNs(model, ProgramsOf("direct", p), 4), 30'000 + 4'000'000);
  model.instruction_ns = 100;  // The send's; the receive was posted meanwhile.
  EXPECT_EQ(PredictNs(model, ProgramsOf("direct", p), 4), 100 + 30'000 + 4'000'000);
  model.links[1].bytes_per_ms = 2'000'000;
  EXPECT_EQ(PredictNs(model, ProgramsOf("direct", p), 4), 100 + 30'000 + 2'000'000);
}

TEST(PredictNs, LetsMessagesOfOneRankQueue) {
  CostModel model = Model(5, 5);
  model.instruction_ns = 0;
  Problem p{.kind = OpKind::kBroadcast, .size = 5, .elements = 1'000'000};
  EXPECT_EQ(PredictNs(model, ProgramsOf("direct", p), 4), 30'000 + 4 * 4'000'000);
}

TEST(PredictNs, OverlapsPieces) {
  CostModel model = Model(8, 8);
  Problem p{.kind = OpKind::kBroadcast, .size = 8, .elements = 1'000'000};
  const int64_t whole = PredictNs(model, ProgramsOf("ring", p), 4);
  p.piece = 50'000;
  const int64_t pieces = PredictNs(model, ProgramsOf("ring", p), 4);
  EXPECT_GT(whole, 7 * 4'000'000);
  EXPECT_LT(pieces, 2 * 4'000'000);
}

TEST(PredictNs, SharesCores) {
  CostModel model = Model(4, 1);
  Problem p{.kind = OpKind::kAllReduce, .size = 4, .elements = 4 << 20};
  const int64_t many = PredictNs(model, ProgramsOf("direct", p), 4);
  model.cores_per_host = 2;
  const int64_t two = PredictNs(model, ProgramsOf("direct", p), 4);
  model.cores_per_host = 1;
  const int64_t one = PredictNs(model, ProgramsOf("direct", p), 4);
  EXPECT_NEAR(static_cast<double>(two) / many, 2, 0.1);
  EXPECT_NEAR(static_cast<double>(one) / many, 4, 0.2);
}

TEST(PredictNs, ReadsInPlaceOnSharedMemoryOnly) {
  CostModel model = Model(2, 1);
  Problem p{.kind = OpKind::kReduce, .size = 2, .elements = 1 << 20};
  const int64_t shared = PredictNs(model, ProgramsOf("direct", p), 4);
  model.shared_memory = false;
  EXPECT_GT(PredictNs(model, ProgramsOf("direct", p), 4), shared + 400'000);
}

TEST(RankAlgorithms, ChoosesWhatFitsTheSize) {
  const CostModel network = Model(16, 16);
  const std::vector<Choice> small = RankAlgorithms(network, AllReduceOf(network, 16, 2), 4);
  // Few steps for a few bytes, least bytes for many.
  EXPECT_TRUE(small[0].algorithm->name == "direct1" || small[0].algorithm->name == "recursive_doubling")
      << small[0].algorithm->name;
  const std::vector<Choice> large = RankAlgorithms(network, AllReduceOf(network, 16, 16 << 20), 4);
  EXPECT_NE(large[0].algorithm->name, "direct1");
  EXPECT_NE(large[0].algorithm->name, "recursive_doubling");
  // At least 2 (n - 1) / n of the bytes, at 1 GB/s.
  EXPECT_GE(large[0].predicted_ns, int64_t{2} * (64 << 20) * 15 / 16);
  EXPECT_LE(large[0].predicted_ns, int64_t{3} * (64 << 20));
  for (size_t i = 1; i < large.size(); ++i) EXPECT_LE(large[i - 1].predicted_ns, large[i].predicted_ns);
}

TEST(RankAlgorithms, TakesTwoLevelsWhenHostsAreFarApart) {
  const CostModel model = Model(16, 4, {50'000, 200'000});
  EXPECT_EQ(RankAlgorithms(model, AllReduceOf(model, 16, 4 << 20), 4)[0].algorithm->name.substr(0, 9), "two_level");
  const CostModel one = Model(2, 1);
  EXPECT_EQ(RankAlgorithms(one, AllReduceOf(one, 2, 4 << 20), 4)[0].algorithm->name, "direct");
}

TEST(RankAlgorithms, IsEqualOnAllRanks) {
  const CostModel model = Model(6, 2);
  for (OpKind kind : {OpKind::kAllReduce, OpKind::kAllGather, OpKind::kReduceScatter, OpKind::kAllToAll}) {
    std::vector<Choice> first;
    for (int r = 0; r < 6; ++r) {
      Problem p = AllReduceOf(model, 6, 100'000);
      p.kind = kind;
      p.rank = r;
      p.in_place = r % 2 == 0;
      p.counts = p.recv_counts = {5'000, 0, 90'000, 7, 8, 70'000};
      const std::vector<Choice> choices = RankAlgorithms(model, p, 4);
      if (r == 0) first = choices;
      ASSERT_EQ(choices.size(), first.size());
      for (size_t i = 0; i < choices.size(); ++i) {
        EXPECT_EQ(choices[i].algorithm, first[i].algorithm);
        EXPECT_EQ(choices[i].piece, first[i].piece);
        EXPECT_EQ(choices[i].predicted_ns, first[i].predicted_ns);
      }
    }
  }
}

// What is simulated in part comes close to what is simulated whole.
TEST(RankAlgorithms, ExtrapolatesLongOperations) {
  const CostModel model = Model(4, 2);
  Problem p = AllReduceOf(model, 4, 8 << 20);
  for (const Choice& choice : RankAlgorithms(model, p, 4)) {
    p.piece = choice.piece;
    const int64_t whole = PredictNs(model, ProgramsOf(choice.algorithm->name, p), 4);
    EXPECT_LE(BusiestNs(model, ProgramsOf(choice.algorithm->name, p), 4), whole);
    EXPECT_NEAR(static_cast<double>(choice.predicted_ns) / whole, 1, 0.15) << choice.algorithm->name << " " << p.piece;
  }
}

TEST(RankAlgorithms, HasAnAnswerForEveryKindAndSize) {
  for (int size : {1, 2, 3, 64, 65, 256}) {
    const CostModel model = Model(size, std::min(size, 4));
    for (OpKind kind : {OpKind::kAllReduce, OpKind::kReduceScatter, OpKind::kAllGather, OpKind::kAllToAll,
                        OpKind::kBroadcast, OpKind::kReduce, OpKind::kGather, OpKind::kScatter, OpKind::kBarrier,
                        OpKind::kSparseAllGather, OpKind::kSparseReduceScatter, OpKind::kSend}) {
      Problem p = AllReduceOf(model, size, 1000);
      p.kind = kind;
      p.counts.assign(size, 3);
      p.recv_counts = p.counts;
      p.even = true;
      p.moves = {{.chunk = 0, .owner = size - 1}};
      const std::vector<Choice> choices = RankAlgorithms(model, p, 4);
      ASSERT_FALSE(choices.empty()) << OpKindName(kind);
      for (const Choice& choice : choices) EXPECT_GE(choice.predicted_ns, 0) << choice.algorithm->name;
    }
  }
}

// Bounds are loose, for slow machines.
TEST(RankAlgorithms, IsQuick) {
  for (int size : {2, 8}) {
    for (int64_t elements : {2, 16 << 20}) {
      const CostModel model = Model(size, 1);
      auto best = std::chrono::nanoseconds::max();
      size_t candidates = 0;
      for (int i = 0; i < 3; ++i) {
        const auto start = std::chrono::steady_clock::now();
        candidates = RankAlgorithms(model, AllReduceOf(model, size, elements), 4).size();
        best = std::min<std::chrono::nanoseconds>(best, std::chrono::steady_clock::now() - start);
      }
      std::printf("all_reduce of %d elements, %d ranks: %d candidates in %d us\n", static_cast<int>(elements), size,
                  static_cast<int>(candidates), static_cast<int>(best.count() / 1000));
      EXPECT_LT(best, std::chrono::milliseconds(200));
    }
  }
}

std::vector<Link> Mesh(int size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Link> links(size * size);
  for (int a = 0; a < size; ++a) {
    for (int b = a + 1; b < size; ++b) {
      // U(50, 100) Mbit/s, in bytes per ms.
      links[a * size + b] = links[b * size + a] = {1'000'000, 6250 + static_cast<int64_t>(random() % 6251)};
    }
  }
  return links;
}

int64_t SlowestLink(const std::vector<Link>& links, const std::vector<int>& order) {
  const int n = static_cast<int>(order.size());
  int64_t slowest = links[1].bytes_per_ms;
  for (int i = 0; i < n; ++i) slowest = std::min(slowest, links[order[i] * n + order[(i + 1) % n]].bytes_per_ms);
  return slowest;
}

std::vector<int> ByIndex(int size) {
  std::vector<int> order(size);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

TEST(RingOrder, AvoidsSlowLinks) {
  double gain = 0;
  constexpr int kSeeds = 20;
  for (unsigned seed = 1; seed <= kSeeds; ++seed) {
    const std::vector<Link> links = Mesh(16, seed);
    const std::vector<int> order = RingOrder(links, 16);
    std::vector<int> sorted = order;
    std::sort(sorted.begin(), sorted.end());
    ASSERT_EQ(sorted, ByIndex(16)) << "seed " << seed;
    const double better = static_cast<double>(SlowestLink(links, order)) / SlowestLink(links, ByIndex(16));
    EXPECT_GE(better, 1.0) << "seed " << seed;
    gain += better / kSeeds;
  }
  std::printf("ring of 16 against rank order: %.2fx\n", gain);
  EXPECT_GE(gain, 1.3);
}

TEST(RingOrder, ComesCloseToTheBestOf8) {
  double share = 0;
  constexpr int kSeeds = 10;
  for (unsigned seed = 1; seed <= kSeeds; ++seed) {
    const std::vector<Link> links = Mesh(8, seed);
    std::vector<int> order = ByIndex(8);
    int64_t best = 0;
    do {
      best = std::max(best, SlowestLink(links, order));
    } while (std::next_permutation(order.begin() + 1, order.end()));
    share += static_cast<double>(SlowestLink(links, RingOrder(links, 8))) / best / kSeeds;
  }
  std::printf("ring of 8 against the best: %.3f\n", share);
  EXPECT_GE(share, 0.95);
}

TEST(RingOrder, TakesAnySize) {
  for (int size : {1, 2, 3, 4, 5, 100, 256}) EXPECT_EQ(RingOrder(Mesh(size, 3), size).size(), static_cast<size_t>(size));
}

}  // namespace
}  // namespace shoal
