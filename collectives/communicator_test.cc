// Every operation against a serial reference: sizes, transports, element types, counts, places of buffers.

#include "collectives/communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "collectives/operation_checker.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using ::testing::Combine;
using ::testing::Values;

constexpr DType kTypes[] = {DType::kF32, DType::kF64, DType::kBF16, DType::kI8,
                            DType::kU8,  DType::kI32, DType::kI64};
constexpr ReduceOp kReductions[] = {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax};

class Operations : public ::testing::TestWithParam<std::tuple<int, std::string, Place>> {
 protected:
  void Run(const std::function<void(Checker&, Communicator&)>& body) {
    const auto& [size, transport, place] = GetParam();
    RunRanks(size, transport, [&, place = place](Communicator& group) {
      Checker checker(group, place);
      body(checker, group);
    });
  }
};

TEST_P(Operations, EqualTheReferenceForEveryTypeAndReduction) {
  Run([](Checker& checker, Communicator& group) {
    for (int64_t elements : {0, 1, 37, 1500, 9001}) {
      for (DType dtype : kTypes) {
        for (ReduceOp op : kReductions) {
          checker.AllReduce(elements, dtype, op, elements);
          checker.ReduceScatter(UnevenCounts(group.size(), elements), dtype, op, elements % 2 == 0, elements);
        }
        checker.AllGather(UnevenCounts(group.size(), elements), dtype, elements % 2 == 1, elements);
        checker.AllToAll(UnevenMatrix(group.size(), elements), dtype, elements);
        checker.Broadcast(elements, dtype, static_cast<int>(elements) % group.size(), elements);
      }
    }
  });
}

TEST_P(Operations, OfOneRootOfPairsAndOfChunksEqualTheReference) {
  Run([](Checker& checker, Communicator& group) {
    for (int64_t elements : {0, 1, 37, 9001, 70'001}) {
      const DType dtype = kTypes[elements % std::size(kTypes)];
      const int root = static_cast<int>(elements) % group.size();
      const bool in_place = elements % 2 == 0;
      checker.Reduce(elements, dtype, ReduceOp::kSum, root, in_place, elements);
      checker.Reduce(elements, DType::kI64, ReduceOp::kProduct, root, !in_place, elements);
      checker.Gather(UnevenCounts(group.size(), elements), dtype, root, in_place, elements);
      checker.Scatter(UnevenCounts(group.size(), elements), dtype, root, in_place, elements);
      checker.Exchange(elements, dtype, elements);
      checker.Sparse(elements, dtype, elements);
      checker.OutOfPlace(elements, dtype, ReduceOp::kMax, elements);
      checker.OutOfPlace(elements, DType::kI32, ReduceOp::kProduct, elements);
      if (elements > 0) checker.EvenAllToAll(elements, dtype, elements);
    }
  });
}

TEST_P(Operations, EqualTheReferenceWhenLarge) {
  Run([](Checker& checker, Communicator& group) {
    constexpr int64_t kElements = (8 << 20) / 4 + 3;
    checker.AllReduce(kElements, DType::kF32, ReduceOp::kSum, 1);
    checker.ReduceScatter(UnevenCounts(group.size(), kElements), DType::kF32, ReduceOp::kSum, true, 2);
    checker.ReduceScatter(UnevenCounts(group.size(), kElements), DType::kBF16, ReduceOp::kMax, false, 3);
    checker.AllGather(UnevenCounts(group.size(), kElements), DType::kF32, true, 4);
    checker.AllGather(UnevenCounts(group.size(), kElements), DType::kBF16, false, 5);
    checker.AllToAll(UnevenMatrix(group.size(), kElements), DType::kF32, 6);
    checker.Broadcast(kElements, DType::kF32, group.size() - 1, 7);
  });
}

std::string PlaceName(Place place) {
  return place == Place::kShared ? "shared" : place == Place::kPrivate ? "private" : "mixed";
}

INSTANTIATE_TEST_SUITE_P(All, Operations,
                         Combine(Values(1, 2, 3, 4, 8), Values("auto", "tcp"),
                                 Values(Place::kShared, Place::kPrivate, Place::kMixed)),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_", std::get<1>(info.param), "_",
                                               PlaceName(std::get<2>(info.param)));
                         });

class Transports : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Transports, Values("auto", "tcp"), [](const auto& info) { return info.param; });

// The same sequence of operations on every rank, from one seed. SHOAL_TEST_SEED replays.
TEST_P(Transports, RandomSequencesEqualTheReference) {
  const char* given = std::getenv("SHOAL_TEST_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
  SCOPED_TRACE(absl::StrCat("SHOAL_TEST_SEED=", seed));
  std::printf("SHOAL_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  const int size = 2 + static_cast<int>(seed % 3);
  RunRanks(size, GetParam(), [&](Communicator& group) {
    std::mt19937_64 random(seed);
    for (int i = 0; i < 150; ++i) {
      Checker checker(group, static_cast<Place>(random() % 3));
      const DType dtype = kTypes[random() % std::size(kTypes)];
      const ReduceOp op = kReductions[random() % 3];
      const int64_t scale = int64_t{1} << random() % 18;
      const bool in_place = random() % 2 == 0;
      std::vector<int64_t> counts(size);
      for (int64_t& count : counts) count = random() % 4 == 0 ? 0 : random() % scale;
      std::vector<std::vector<int64_t>> matrix(size, counts);
      for (auto& row : matrix) std::shuffle(row.begin(), row.end(), random);
      const uint64_t values = random();
      switch (random() % 6) {
        case 0:
          checker.AllReduce(counts[0], dtype, op, values);
          break;
        case 1:
          checker.ReduceScatter(counts, dtype, op, in_place, values);
          break;
        case 2:
          checker.AllGather(counts, dtype, in_place, values);
          break;
        case 3:
          checker.AllToAll(matrix, dtype, values);
          break;
        case 4:
          checker.Broadcast(counts[0], dtype, static_cast<int>(values % size), values);
          break;
        case 5:
          EXPECT_TRUE(group.Barrier({}).Await().ok());
          break;
      }
      if (::testing::Test::HasFailure()) return;
    }
  });
}

}  // namespace
}  // namespace shoal
