#include "parallel/expert/token_exchange.h"

#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "parallel/expert/testing.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using expert_testing::Draw;
using expert_testing::Pair;
using expert_testing::RandomRouting;
using expert_testing::Routing;
using Direction = DispatchPlan::Direction;
using Way = TokenExchange::Way;
using Use = TokenExchange::Use;

constexpr int64_t kWidth = 5;

// What a row of a pair holds: nothing else in any wave or direction holds the same.
void Write(const Pair& pair, int mark, float* row) {
  for (int64_t i = 0; i < kWidth; ++i) {
    row[i] = static_cast<float>(mark * 1000000 + pair.source * 100000 + pair.token * 1000 + pair.expert * 10 + i);
  }
}
bool Holds(const float* row, const Pair& pair, int mark) {
  float want[kWidth];
  Write(pair, mark, want);
  return std::memcmp(row, want, sizeof(want)) == 0;
}

// One rank with its lanes.
class Fixture {
 public:
  Fixture(Communicator& world, const Topology& topology) : rank_(world.index()) {
    const std::vector<int> here = topology.RanksOf(topology.HostOf(rank_));
    if (topology.hosts() > 1 && here.size() > 1) intra_ = *world.Split(here);
    exchange = std::make_unique<TokenExchange>(topology.hosts() > 1 ? &world : nullptr,
                                               topology.hosts() > 1 ? intra_.get() : &world, topology, rank_);
  }

  // All chunks of a pass, each lane on a thread of its own, as the executor runs them.
  void Move(const DispatchPlan& plan, Direction direction, Way way, const Tensor& from, const Tensor& to) {
    const int chunks = direction == Direction::kForward ? plan.forward_chunks() : plan.backward_chunks();
    const auto lane = [&](Lane lane) {
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const absl::StatusOr<int64_t> bytes = exchange->Travel(plan, {direction, chunk, way}, lane, from, to);
        EXPECT_TRUE(bytes.ok()) << bytes.status();
        EXPECT_EQ(*bytes % (kWidth * 4), 0);
      }
    };
    std::thread intra([&] { lane(Lane::kIntra); });
    lane(Lane::kInter);
    int64_t stayed = 0;
    Stream stream;
    for (int chunk = 0; chunk < chunks; ++chunk) stayed += exchange->Stay(plan, {direction, chunk, way}, from, to, stream);
    intra.join();
    int64_t rows = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (const auto& run : plan.Runs(direction, chunk, DispatchPlan::Route::kStay, /*sends=*/true)) rows += run.rows;
    }
    EXPECT_EQ(stayed, plan.all_stay() ? 0 : rows * kWidth * 4);
  }

  std::unique_ptr<TokenExchange> exchange;

 private:
  int rank_;
  std::unique_ptr<Communicator> intra_;
};

// The rows of one wave of one rank.
struct Wave {
  Wave(const Routing& with, int rank) : routing(with), plan(with.PlanOf(rank)), pairs(with.PairsOf(rank)) {
    const size_t at = static_cast<size_t>(rank);
    slot = Empty({plan.sent()}, DType::kI32);
    const Tensor token = Empty({plan.sent()}, DType::kI32);
    plan.OrderRows(routing.offset[at], routing.expert[at], slot, token);
  }
  void Fill(const Tensor& sent, int mark) const {
    for (size_t i = 0; i < pairs.size(); ++i) Write(pairs[i], mark, Row(sent, slot.data<int32_t>()[i]));
  }
  static float* Row(const Tensor& rows, int64_t row) { return rows.data<float>() + row * kWidth; }

  Routing routing;
  DispatchPlan plan;
  std::vector<Pair> pairs;
  Tensor slot;
};

// Rows with mark `mark` there; the rank that computes them marks them anew and back they go.
void ThereAndBack(Fixture* fixture, const Wave& wave, int index, int rank, Direction direction, int mark) {
  const Tensor sent = *fixture->exchange->SendBuffer(Use::kDispatch, index, wave.plan.sent(), kWidth, DType::kF32);
  wave.Fill(sent, mark);
  const Tensor arrived = wave.plan.all_stay() ? sent : Zeros({wave.plan.arrived(), kWidth}, DType::kF32);
  fixture->Move(wave.plan, direction, Way::kThere, sent, arrived);
  const Tensor results = *fixture->exchange->SendBuffer(Use::kReturn, index, wave.plan.arrived(), kWidth, DType::kF32);
  const std::vector<int> local = wave.routing.Local(rank);
  const int chunks = direction == Direction::kForward ? wave.plan.forward_chunks() : wave.plan.backward_chunks();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for (const kernels::Segment& segment : wave.plan.Segments(direction, chunk)) {
      for (int64_t row = segment.begin; row < segment.begin + segment.count; ++row) {
        const float* got = Wave::Row(arrived, row);
        const int name = static_cast<int>(got[0]) % 1000000;
        const Pair pair{name / 100000, name / 1000 % 100, name / 10 % 100};
        ASSERT_TRUE(Holds(got, pair, mark)) << "row " << row << " of rank " << rank << ": " << got[0];
        EXPECT_EQ(pair.expert, local[static_cast<size_t>(segment.expert)]);
        Write(pair, mark + 1, Wave::Row(results, row));
      }
    }
  }
  const Tensor home = wave.plan.all_stay() ? results : Zeros({wave.plan.sent(), kWidth}, DType::kF32);
  fixture->Move(wave.plan, direction, Way::kBack, results, home);
  for (size_t i = 0; i < wave.pairs.size(); ++i) {
    ASSERT_TRUE(Holds(Wave::Row(home, wave.slot.data<int32_t>()[i]), wave.pairs[i], mark + 1)) << "pair " << i << " of rank " << rank;
  }
}

struct Case {
  std::vector<int64_t> hosts;  // By rank.
  const char* transport = "auto";
};
void PrintTo(const Case& c, std::ostream* os) {
  *os << c.transport;
  for (int64_t host : c.hosts) *os << "_" << host;
}

class TokenExchangeRanks : public testing::TestWithParam<Case> {};

TEST_P(TokenExchangeRanks, RowsTravelThereAndBack) {
  const Topology topology = TopologyOf(GetParam().hosts);
  RunRanks(topology.ranks(), GetParam().transport, [&](Communicator& world) {
    Fixture fixture(world, topology);
    std::mt19937 random(7);
    for (int forward = 1; forward <= 4; ++forward) {
      for (int backward = 1; backward <= 3; ++backward) {
        SCOPED_TRACE(absl::StrCat("seed 7, chunks ", forward, " and ", backward));
        const Wave wave(RandomRouting(topology, forward, backward, &random), world.index());
        ThereAndBack(&fixture, wave, 0, world.index(), Direction::kForward, 1);
        ThereAndBack(&fixture, wave, 0, world.index(), Direction::kBackward, 3);
      }
    }
  });
}

TEST_P(TokenExchangeRanks, WavesHaveBuffersOfTheirOwn) {
  const Topology topology = TopologyOf(GetParam().hosts);
  RunRanks(topology.ranks(), GetParam().transport, [&](Communicator& world) {
    Fixture fixture(world, topology);
    std::mt19937 random(8);
    const Wave first(RandomRouting(topology, 2, 1, &random), world.index());
    const Wave second(RandomRouting(topology, 2, 1, &random), world.index());
    TokenExchange& exchange = *fixture.exchange;
    const Tensor sent = *exchange.SendBuffer(Use::kDispatch, 0, first.plan.sent(), kWidth, DType::kF32);
    first.Fill(sent, 1);
    // The second wave comes and goes while the rows of the first wait.
    ThereAndBack(&fixture, second, 1, world.index(), Direction::kForward, 5);
    const Tensor arrived = first.plan.all_stay() ? sent : Zeros({first.plan.arrived(), kWidth}, DType::kF32);
    fixture.Move(first.plan, Direction::kForward, Way::kThere, sent, arrived);
    for (int64_t row = 0; row < first.plan.arrived(); ++row) {
      EXPECT_EQ(static_cast<int>(Wave::Row(arrived, row)[0]) / 1000000, 1) << "row " << row;
    }
  });
}

std::vector<Case> Cases() {
  return {{{0}}, {{0, 0}}, {{0, 1}}, {{0, 0, 1}}, {{3, 5, 3}}, {{0, 0, 0, 0}}, {{0, 1, 0, 1}}, {{0, 1, 2, 1}, "tcp"}};
}
INSTANTIATE_TEST_SUITE_P(Hosts, TokenExchangeRanks, testing::ValuesIn(Cases()), testing::PrintToStringParamName());

TEST(TokenExchange, BufferGrowsWithTheRows) {
  RunRanks(2, "auto", [](Communicator& world) {
    TokenExchange exchange(nullptr, &world, Topology::OneHost(2), world.index());
    const Tensor few = *exchange.SendBuffer(Use::kReturn, 2, 3, kWidth, DType::kF32);
    EXPECT_EQ(few.shape(), (Shape{3, kWidth}));
    const Tensor many = *exchange.SendBuffer(Use::kReturn, 2, 3000, kWidth, DType::kBF16);
    EXPECT_EQ(many.bytes(), 3000 * kWidth * 2);
    std::memset(many.raw(), 1, static_cast<size_t>(many.bytes()));
    EXPECT_EQ(exchange.SendBuffer(Use::kReturn, 2, 2000, kWidth, DType::kF32)->raw() == nullptr, false);
    EXPECT_EQ(exchange.SendBuffer(Use::kReturn, 2, 0, kWidth, DType::kF32)->elements(), 0);
  });
}

}  // namespace
}  // namespace shoal
