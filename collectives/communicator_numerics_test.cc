// What results are to the last bit: the same on all ranks, whatever the algorithm; averages, wire formats, orders.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "collectives/communicator.h"
#include "collectives/engine/tuning.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::Values;

class Numerics : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Numerics, Values("auto", "tcp"), [](const auto& info) { return info.param; });

TEST_P(Numerics, SumsOfRoundingDataAreBitIdenticalOnAllRanks) {
  constexpr int kRanks = 3;
  constexpr int64_t kElements = 100'003;
  for (Order order : {Order::kFast, Order::kFixed}) {
    std::vector<std::vector<float>> results(kRanks);
    RunRanks(kRanks, GetParam(), [&](Communicator& group) {
      const Tensor data = *group.Allocate({kElements}, DType::kF32);
      std::mt19937 random(group.index());
      std::normal_distribution<float> normal;
      for (float& x : data.span<float>()) x = normal(random);
      ASSERT_TRUE(group.AllReduce(data, data, ReduceOp::kSum, {.order = order}).Await().ok());
      results[group.index()].assign(data.data<float>(), data.data<float>() + kElements);
    });
    for (int rank = 1; rank < kRanks; ++rank) {
      EXPECT_EQ(0, std::memcmp(results[0].data(), results[rank].data(), kElements * sizeof(float))) << rank;
    }
    if (order == Order::kFast) continue;
    // Index order: ((a + b) + c).
    std::vector<std::mt19937> randoms = {std::mt19937(0), std::mt19937(1), std::mt19937(2)};
    std::vector<std::normal_distribution<float>> normals(kRanks);
    for (int64_t i = 0; i < kElements; ++i) {
      float sum = normals[0](randoms[0]);
      sum += normals[1](randoms[1]);
      sum += normals[2](randoms[2]);
      ASSERT_EQ(sum, results[0][i]) << i;
    }
  }
}

// Past the points where ranks exchange what they observed, with operations whose best algorithm is not certain.
TEST_P(Numerics, ResultsStayRightWhileAlgorithmsAreTried) {
  constexpr int kRanks = 5;
  RunRanks(kRanks, GetParam(), [&](Communicator& group) {
    for (int64_t elements : {2'000, 20'000}) {
      const Tensor data = Zeros({elements}, DType::kF32);
      for (int i = 0; i < 300; ++i) {
        std::fill_n(data.data<float>(), elements, static_cast<float>(group.index() + i));
        ASSERT_EQ(group.AllReduce(data, data, ReduceOp::kSum, {}).Await().ToString(), "OK");
        const float sum = kRanks * (kRanks - 1) / 2 + kRanks * i;
        ASSERT_TRUE(std::all_of(data.data<float>(), data.data<float>() + elements, [&](float x) { return x == sum; }));
      }
    }
    const std::vector<TuningRow> rows = Tuning(group);
    ASSERT_FALSE(rows.empty());
    for (const TuningRow& row : rows) EXPECT_GT(row.observed_ns, 0) << row.algorithm;
  });
}

TEST_P(Numerics, APieceOfAnAlgorithmMayBeForced) {
  RunRanks(3, GetParam(), [&](Communicator& group) {
    const Tensor data = Zeros({10'000}, DType::kF32);
    std::fill_n(data.data<float>(), 10'000, 1.0f);
    EXPECT_EQ(group.AllReduce(data, data, ReduceOp::kSum, {.algorithm = "ring:4096"}).Await().ToString(), "OK");
    EXPECT_EQ(data.data<float>()[9'999], 3.0f);
    EXPECT_TRUE(absl::IsInvalidArgument(group.AllReduce(data, data, ReduceOp::kSum, {.algorithm = "ring:x"}).Await()));
  });
}

TEST_P(Numerics, AveragesDivideInThePrecisionOfTheSum) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    const Tensor floats = Zeros({1000}, DType::kF32), ints = Zeros({1000}, DType::kI32);
    std::fill_n(floats.data<float>(), 1000, static_cast<float>(group.index() * 2));
    std::fill_n(ints.data<int32_t>(), 1000, -group.index() - 1);
    EXPECT_EQ(group.AllReduce(floats, floats, ReduceOp::kAverage, {}).Await().ToString(), "OK");
    EXPECT_EQ(group.AllReduce(ints, ints, ReduceOp::kAverage, {}).Await().ToString(), "OK");
    EXPECT_EQ(floats.data<float>()[999], 2.0f);
    EXPECT_EQ(ints.data<int32_t>()[999], -2);
  });
}

TEST_P(Numerics, WireFormatsGiveEqualBitsOnAllRanksAndSmallErrors) {
  constexpr int kRanks = 3;
  constexpr int64_t kElements = 100'003;
  for (WireFormat wire : {WireFormat::kBf16, WireFormat::kInt8, WireFormat::kFp8}) {
    std::vector<std::vector<float>> results(kRanks), inputs(kRanks);
    RunRanks(kRanks, GetParam(), [&](Communicator& group) {
      const Tensor data = *group.Allocate({kElements}, DType::kF32), out = *group.Allocate({kElements}, DType::kF32);
      std::mt19937 random(group.index());
      std::normal_distribution<float> normal;
      for (float& x : data.span<float>()) x = normal(random);
      ASSERT_EQ(group.AllReduce(data, out, ReduceOp::kSum, {.wire = wire}).Await().ToString(), "OK");
      inputs[group.index()].assign(data.data<float>(), data.data<float>() + kElements);
      results[group.index()].assign(out.data<float>(), out.data<float>() + kElements);
    });
    for (int64_t i = 0; i < kElements; ++i) {
      ASSERT_NEAR(results[0][i], inputs[0][i] + inputs[1][i] + inputs[2][i], 1.5) << i;
      for (int rank = 1; rank < kRanks; ++rank) ASSERT_EQ(results[0][i], results[rank][i]) << i;
    }
  }
}

TEST_P(Numerics, AFixedOrderRepeatsItsBits) {
  RunRanks(3, GetParam(), [](Communicator& group) {
    constexpr int64_t kElements = 50'000;
    const Tensor in = Zeros({kElements}, DType::kF32), first = Zeros({kElements}, DType::kF32),
                 again = Zeros({kElements}, DType::kF32);
    std::mt19937 random(group.index());
    std::normal_distribution<float> normal;
    for (float& x : in.span<float>()) x = normal(random);
    const OpOptions fixed = {.order = Order::kFixed};
    ASSERT_TRUE(group.AllReduce(in, first, ReduceOp::kSum, fixed).Await().ok());
    for (int i = 0; i < 5; ++i) {
      ASSERT_TRUE(group.AllReduce(in, again, ReduceOp::kSum, fixed).Await().ok());
      ASSERT_EQ(std::memcmp(first.raw(), again.raw(), first.bytes()), 0);
    }
  });
}

}  // namespace
}  // namespace shoal
