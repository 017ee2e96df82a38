#include "launch/bench/own_ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace shoal {
namespace {

using ::testing::HasSubstr;

TEST(ParseOpOptions, TakesPartsInAnyOrder) {
  OwnOptions options;
  ASSERT_TRUE(ParseOpOptions("algorithm=ring,wire=int8,order=fixed", &options).ok());
  EXPECT_EQ(options.wire, WireFormat::kInt8);
  EXPECT_EQ(options.order, Order::kFixed);
  EXPECT_EQ(options.algorithm, "ring");
  EXPECT_TRUE(ParseOpOptions("", &options).ok());
}

TEST(ParseOpOptions, NamesWhatItDoesNotKnow) {
  OwnOptions options;
  EXPECT_THAT(std::string(ParseOpOptions("wire=int4", &options).message()),
              HasSubstr("\"int4\": there are as_is, bf16"));
  EXPECT_THAT(std::string(ParseOpOptions("root=1", &options).message()), HasSubstr("\"root\""));
}

// Rank r's element i of its input is (r + 1) (1 + i % 7).
TEST(ExpectedElement, IsWhatEachOperationMustGive) {
  const auto expected = [](std::string_view op, int rank, int64_t i) {
    return ExpectedElement(op, ReduceOp::kSum, rank, /*ranks=*/3, /*part=*/10, i);
  };
  EXPECT_EQ(expected("all_reduce", 1, 9), 6 * 3);
  EXPECT_EQ(expected("reduce_scatter", 1, 0), 6 * 4);
  EXPECT_EQ(expected("all_gather", 0, 25), 3 * 6);
  EXPECT_EQ(expected("all_to_all", 2, 11), 2 * 1);  // Rank 1's element 21.
  EXPECT_EQ(expected("broadcast", 2, 8), 2);
  EXPECT_EQ(expected("scatter", 1, 1), 5);
  EXPECT_EQ(ExpectedElement("reduce", ReduceOp::kProduct, 0, 3, 10, 1), 6 * 8);
  EXPECT_EQ(ExpectedElement("reduce", ReduceOp::kAverage, 0, 3, 10, 1), 4);
  EXPECT_EQ(ExpectedElement("reduce", ReduceOp::kMax, 0, 3, 10, 1), 6);
}

TEST(CheckedElements, AreThoseThatTheRankReceives) {
  EXPECT_EQ(CheckedElements("reduce", 0, 3, 10), 30);
  EXPECT_EQ(CheckedElements("reduce", 1, 3, 10), 0);
  EXPECT_EQ(CheckedElements("scatter", 1, 3, 10), 10);
  EXPECT_EQ(CheckedElements("pingpong", 2, 3, 10), 0);
}

}  // namespace
}  // namespace shoal
