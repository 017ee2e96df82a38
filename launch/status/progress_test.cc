#include "launch/status/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "absl/strings/str_split.h"

namespace shoal {
namespace {

using ::testing::Each;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

Progress Example() {
  Progress progress;
  progress.step = 120;
  progress.total_steps = 1000;
  progress.eta_seconds = 133;
  progress.loss = 1.83421;
  progress.learning_rate = 2.96e-4;
  progress.grad_norm = 0.834;
  progress.tokens_per_second = 22345;
  progress.flops_per_second = 312.4e9;
  progress.peak_share = 0.668;
  progress.expert_balance = 1.118;
  return progress;
}

TEST(FormatProgress, FillsTheColumnsThatThereAre) {
  const std::string wide =
      "step  120/1000  eta  2m13s  loss 1.8342  lr 3.0e-04  grad 0.83  22.3k tok/s   312 GFLOP/s   67% peak  "
      "bal 1.12";
  EXPECT_EQ(FormatProgress(Example(), 200, Colour::kNone), wide);
  EXPECT_EQ(FormatProgress(Example(), 110, Colour::kNone), wide);
  EXPECT_EQ(FormatProgress(Example(), 80, Colour::kNone),
            "step  120/1000  eta  2m13s  loss 1.8342  22.3k tok/s   67% peak  bal 1.12");
  EXPECT_EQ(FormatProgress(Example(), 40, Colour::kNone), "step  120/1000  eta  2m13s  loss 1.8342");
}

TEST(FormatProgress, NeverIsWiderThanAllowed) {
  for (const int64_t total : {10, 1000, 123456789}) {
    for (int columns = 1; columns <= 130; ++columns) {
      Progress progress = Example();
      progress.total_steps = total;
      progress.step = total / 2;
      EXPECT_THAT(FormatProgress(progress, columns, Colour::kNone),
                  SizeIs(Le(std::min(columns, kColumnsMax))));
    }
  }
}

TEST(FormatProgress, ColumnsStayInPlaceAsNumbersChange) {
  const std::string first = FormatProgress(Example(), 110, Colour::kNone);
  Progress later = Example();
  later.step = 1000;
  later.eta_seconds = 0;
  later.loss = 10.8198;
  later.grad_norm = 104.3;
  later.tokens_per_second = 987;
  later.flops_per_second = 9.81e9;
  later.peak_share = 0.02;
  EXPECT_EQ(FormatProgress(later, 110, Colour::kNone),
            "step 1000/1000  eta     0s  loss  10.82  lr 3.0e-04  grad  104    987 tok/s   9.8 GFLOP/s    2% "
            "peak  bal "
            "1.12");
  EXPECT_EQ(FormatProgress(later, 110, Colour::kNone).size(), first.size());
}

TEST(FormatProgress, LeavesUnknownFieldsOutAndShowsWhatIsNoNumber) {
  Progress progress;
  progress.step = 1;
  progress.total_steps = 50;
  progress.grad_norm = std::numeric_limits<double>::infinity();
  EXPECT_EQ(FormatProgress(progress, 110, Colour::kNone),
            "step  1/50  eta     --  loss    nan  grad norm  inf");
}

TEST(FormatProgress, ColoursOnlyAddEscapes) {
  std::string coloured = FormatProgress(Example(), 110, Colour::kTerminal);
  EXPECT_THAT(coloured, HasSubstr("\x1b["));
  for (size_t at; (at = coloured.find("\x1b[")) != std::string::npos;) {
    coloured.erase(at, coloured.find('m', at) - at + 1);
  }
  EXPECT_EQ(coloured, FormatProgress(Example(), 110, Colour::kNone));
}

TEST(EtaSeconds, IgnoresOneSlowStepAndCountsWhatStepsCostBeside) {
  EXPECT_TRUE(std::isnan(EtaSeconds({}, 100, 0)));
  EXPECT_DOUBLE_EQ(EtaSeconds({0.5}, 100, 0), 50);
  EXPECT_DOUBLE_EQ(EtaSeconds({0.2, 0.2, 30.0, 0.2, 0.2, 0.2}, 100, 0), 20);
  EXPECT_DOUBLE_EQ(EtaSeconds({0.2, 0.2, 0.2}, 100, 0.1), 30);
  EXPECT_DOUBLE_EQ(EtaSeconds({0.2}, 0, 0), 0);
  // Steps that differ by design count all, up to the trimming.
  EXPECT_NEAR(EtaSeconds({1, 2, 1, 2, 1, 2, 1, 2, 1, 2}, 10, 0), 15, 1e-9);
}

TEST(ExpertBalance, IsThatOfTheWorstLayer) {
  const std::vector<std::vector<int64_t>> counts = {{10, 10, 10, 10}, {0, 40, 20, 20}, {0, 0}};
  EXPECT_DOUBLE_EQ(ExpertBalance(counts), 2);
  EXPECT_TRUE(std::isnan(ExpertBalance({})));
}

TEST(FormatNumbers, AreShortAndCarryUnits) {
  EXPECT_EQ(FormatSeconds(kUnknown), "--");
  EXPECT_EQ(FormatSeconds(8.44), "8.4s");
  EXPECT_EQ(FormatSeconds(9.96), "10s");
  EXPECT_EQ(FormatSeconds(59.6), "1m00s");
  EXPECT_EQ(FormatSeconds(3599.7), "1h00m");
  EXPECT_EQ(FormatSeconds(86400 * 3 + 3600 * 4), "3d04h");
  EXPECT_EQ(FormatSeconds(1e300).substr(0, 3), "115");
  EXPECT_EQ(FormatCount(812), "812");
  EXPECT_EQ(FormatCount(999.7), "1.00k");
  EXPECT_EQ(FormatCount(22345), "22.3k");
  EXPECT_EQ(FormatCount(99960), "100k");
  EXPECT_EQ(FormatCount(5243000), "5.24M");
  EXPECT_EQ(FormatInteger(0), "0");
  EXPECT_EQ(FormatInteger(999), "999");
  EXPECT_EQ(FormatInteger(-1234), "-1,234");
  EXPECT_EQ(FormatInteger(-123), "-123");
  EXPECT_EQ(FormatInteger(1234567), "1,234,567");
  EXPECT_EQ(FormatBytes(512), "512 B");
  EXPECT_EQ(FormatBytes(1.5 * (1 << 20)), "1.50 MiB");
  EXPECT_EQ(FormatFlops(9.81e9), "9.8 GFLOP/s");
  EXPECT_EQ(FormatFlops(12.34e12), "12.3 TFLOP/s");
}

TEST(FormatTable, AlignsValuesAndWrapsLongOnes) {
  EXPECT_EQ(
      FormatTable("done", {{{"steps", "1,000"}, {"validation loss", "1.2"}, {"empty", ""}}}, Colour::kNone),
      "done\n"
      "  steps            1,000\n"
      "  validation loss  1.2\n"
      "  empty            \n");
  std::string words;
  for (int i = 0; i < 60; ++i) words += "word ";
  const std::string table = FormatTable("t", {{{"a", words}}}, Colour::kNone);
  const std::vector<std::string> lines = absl::StrSplit(table, '\n');
  ASSERT_GT(lines.size(), 4u);
  EXPECT_THAT(lines, Each(SizeIs(Le(kColumnsMax))));
  EXPECT_THAT(lines[2], StartsWith("     word"));
}

TEST(FormatSample, IsSafeForATerminal) {
  EXPECT_EQ(FormatSample("plain\ttext\n\nnext", 40, "> "), "> plain text\n> \n> next\n");
  EXPECT_EQ(FormatSample("a\x1b[31mb\x07\x7f", 40, ""), "a?[31mb??\n");
  EXPECT_EQ(FormatSample("\xe2\x80\x94 caf\xc3\xa9", 40, ""), "\xe2\x80\x94 caf\xc3\xa9\n");
  // Broken: a lone lead byte, a lone continuation, an overlong form, a surrogate, beyond Unicode, a C1
  // control.
  EXPECT_EQ(FormatSample("\xe2\x80|\x80|\xc0\xaf|\xed\xa0\x80|\xf4\x90\x80\x80|\xc2\x9b", 40, ""),
            "??|?|??|???|????|??\n");
}

TEST(FormatSample, WrapsAtSpacesAndBreaksLongWords) {
  EXPECT_EQ(FormatSample("one two three", 7, ""), "one two\nthree\n");
  EXPECT_EQ(FormatSample("abcdefghij", 4, ""), "abcd\nefgh\nij\n");
  // Characters count, not bytes.
  EXPECT_EQ(FormatSample("\xc3\xa9\xc3\xa9\xc3\xa9 x", 3, ""), "\xc3\xa9\xc3\xa9\xc3\xa9\nx\n");
}

}  // namespace
}  // namespace shoal
