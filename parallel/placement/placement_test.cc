#include "parallel/placement/placement.h"

#include <numeric>

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(EvenPart, DealsEverythingOnceInOrder) {
  for (int64_t total = 0; total < 20; ++total) {
    for (int parts = 1; parts < 9; ++parts) {
      int64_t next = 0;
      for (int i = 0; i < parts; ++i) {
        const Range part = EvenPart(total, parts, i);
        EXPECT_EQ(part.begin, next);
        EXPECT_GE(part.count, total / parts);
        EXPECT_LE(part.count, (total + parts - 1) / parts);
        next += part.count;
      }
      EXPECT_EQ(next, total);
    }
  }
}

TEST(ContiguousPartition, PiecesAreInOrderAndNearlyEqual) {
  std::vector<int64_t> sizes;
  for (int i = 0; i < 200; ++i) sizes.push_back(1000 + 37 * (i % 11));
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  for (int parts : {1, 2, 3, 4, 7}) {
    const std::vector<int> piece = ContiguousPartition(sizes, parts);
    std::vector<int64_t> of_piece(static_cast<size_t>(parts));
    for (size_t i = 0; i < sizes.size(); ++i) {
      EXPECT_GE(piece[i], i == 0 ? 0 : piece[i - 1]);
      of_piece[static_cast<size_t>(piece[i])] += sizes[i];
    }
    for (int64_t elements : of_piece) EXPECT_NEAR(static_cast<double>(elements), static_cast<double>(total) / parts, 1500.0);
  }
}

TEST(CheckLayout, TakesGroupsThatDivideTheRanksAndHaveExperts) {
  for (int ranks = 1; ranks <= 12; ++ranks) {
    for (int expert = 1; expert <= ranks; ++expert) {
      EXPECT_EQ(CheckLayout({ranks, expert, 8}).ok(), ranks % expert == 0 && expert <= 8) << ranks << " " << expert;
    }
  }
}

TEST(CheckLayout, ErrorSaysWhatWouldFit) {
  const absl::Status status = CheckLayout({6, 4, 4});
  EXPECT_NE(status.message().find("sizes that fit: 1, 2, 3"), absl::string_view::npos) << status;
}

}  // namespace
}  // namespace shoal
