#include "parallel/planner/sweeps.h"

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

namespace shoal {
namespace {

// The numbers of the line that begins with `name`, after it.
std::vector<double> Numbers(const std::string& report, const std::string& name) {
  const size_t at = report.find("\n" + name);
  EXPECT_NE(at, std::string::npos) << name << " in\n" << report;
  if (at == std::string::npos) return std::vector<double>(16, 0);
  std::istringstream line(report.substr(at + 1 + name.size(), report.find('\n', at + 1) - at - 1 - name.size()));
  std::vector<double> numbers;
  for (double number = 0; line >> number;) numbers.push_back(number);
  return numbers;
}

TEST(FsmoeSweep, IsNearThePaper) {
  const std::string report = FsmoeSweepReport();
  for (const char* name :
       {"gradients beside the dense part (Tutel improved)", "best chunks and slices, one communication at a time",
        "the same, both links at once, 1.4x slower meanwhile"}) {
    const std::vector<double> row = Numbers(report, name);  // Here and in the paper, on A and on B.
    ASSERT_EQ(row.size(), 4u);
    EXPECT_NEAR(row[0], row[1], 0.06) << name;
    EXPECT_NEAR(row[2], row[3], 0.06) << name;
  }
}

TEST(DispatchSweep, TwoLevelsPayWhereMessagesAreSmall) {
  const std::string report = DispatchSweepReport();
  const std::vector<double> large = Numbers(report, "wide "), small = Numbers(report, "small ");  // Their first rows: 32 ranks.
  ASSERT_EQ(large.size(), 6u);
  EXPECT_LT(large[4], 1);  // A hop more for the same bytes.
  EXPECT_GT(large[5], 1);  // Fewer bytes.
  const size_t last = report.rfind("small ");
  const std::vector<double> many = Numbers(report.substr(last - 1), "small ");
  ASSERT_EQ(many[0], 512);
  EXPECT_GT(many[4], small[4]);
  EXPECT_GT(many[4], 1.5);
}

}  // namespace
}  // namespace shoal
