#include "launch/bench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(ParseSizes, RangesHaveTheirEndsAndThePowersOfFourBetween) {
  EXPECT_THAT(*ParseSizes("8:2K"), ElementsAre(8, 16, 64, 256, 1024, 2048));
  EXPECT_THAT(*ParseSizes("16:64"), ElementsAre(16, 64));
  EXPECT_THAT(*ParseSizes("5:5"), ElementsAre(5));
  EXPECT_EQ(ParseSizes("8:256M")->size(), 14u);
}

TEST(ParseSizes, ListsAreSortedAndHaveNoRepetitions) {
  EXPECT_THAT(*ParseSizes("1M,8,1k,8"), ElementsAre(8, 1 << 10, 1 << 20));
  EXPECT_THAT(*ParseSizes("1G,8:16"), ElementsAre(8, 16, 1 << 30));
}

TEST(ParseSizes, WrongPartsAreNamed) {
  for (const char* text : {"", "8,", "x", "0", "-4", "8:4", "1:2:3", "K", "9999999999G", "8:"}) {
    EXPECT_FALSE(ParseSizes(text).ok()) << text;
  }
  EXPECT_THAT(std::string(ParseSizes("8,1Q").status().message()), HasSubstr("\"1Q\""));
}

TEST(SizeName, UsesTheLargestUnitThatDivides) {
  EXPECT_EQ(SizeName(8), "8");
  EXPECT_EQ(SizeName(1024), "1K");
  EXPECT_EQ(SizeName(1536), "1536");
  EXPECT_EQ(SizeName(256 << 20), "256M");
}

TEST(BusFactor, IsThatOfNcclTests) {
  EXPECT_DOUBLE_EQ(BusFactor("all_reduce", 4), 1.5);
  for (const char* op : {"reduce_scatter", "all_gather", "all_to_all", "gather", "scatter"}) {
    EXPECT_DOUBLE_EQ(BusFactor(op, 4), 0.75) << op;
  }
  for (const char* op : {"broadcast", "reduce", "pingpong"}) EXPECT_DOUBLE_EQ(BusFactor(op, 4), 1) << op;
}

TEST(Summarise, TakesTheMedianOfRoundsAndPercentilesOfSamples) {
  const std::vector<std::vector<double>> rounds = {{3, 1, 2}, {10, 30, 20}, {5, 5, 5}};
  const Spread spread = Summarise(rounds);
  EXPECT_DOUBLE_EQ(spread.median, 5);
  EXPECT_DOUBLE_EQ(spread.p10, 1.8);  // Of 1 2 3 5 5 5 10 20 30.
  EXPECT_DOUBLE_EQ(spread.p90, 22);
}

BenchRow Row(const std::string& library, int64_t bytes, double us, const std::string& op = "all_reduce",
             int ranks = 2) {
  return {library, "shm", op, bytes, ranks, {us, us / 2, us * 2}};
}

TEST(Csv, ComesBackAsItWas) {
  const std::vector<BenchRow> rows = {Row("shoal", 8, 0.125),
                                      Row("gloo", 8, std::numeric_limits<double>::quiet_NaN())};
  const auto back = ParseCsv(CsvText(rows));
  ASSERT_TRUE(back.ok()) << back.status();
  ASSERT_EQ(back->size(), 2u);
  EXPECT_EQ((*back)[0].library, "shoal");
  EXPECT_DOUBLE_EQ((*back)[0].us.p90, 0.25);
  EXPECT_TRUE(std::isnan((*back)[1].us.median));
}

TEST(Csv, OfSeveralRowsTheLastCounts) {
  const auto rows =
      ParseCsv(CsvText(std::vector<BenchRow>{Row("shoal", 8, 1), Row("shoal", 16, 2), Row("shoal", 8, 3)}));
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_DOUBLE_EQ((*rows)[0].us.median, 3);
}

TEST(Csv, WrongLinesAreNamed) {
  const auto rows =
      ParseCsv("library,transport,op,bytes,ranks,median_us,p10_us,p90_us\nshoal,shm,all_reduce,8,2,1,1\n");
  EXPECT_THAT(std::string(rows.status().message()), HasSubstr("line 2"));
  EXPECT_FALSE(ParseCsv("shoal,shm,all_reduce,8,0,1,1,1\n").ok());
}

TEST(Table, RatiosAreOfTheBestPeerWithAndWithoutTheWarmOnes) {
  const std::vector<BenchRow> rows = {Row("openmpi", 64, 30),        Row("mpich", 64, 20),
                                      Row("openmpi_warm", 64, 10),   Row("shoal", 64, 5),
                                      Row("limit", 64, 4),           Row("gloo", 64, std::nan("")),
                                      Row("shoal", 8, std::nan("")), Row("mpich", 8, 1)};
  const std::vector<Table> tables = MakeTables(rows);
  ASSERT_EQ(tables.size(), 1u);
  ASSERT_EQ(tables[0].lines.size(), 2u);
  EXPECT_THAT(tables[0].libraries, ElementsAre("openmpi", "openmpi_warm", "mpich", "gloo"));
  EXPECT_DOUBLE_EQ(tables[0].lines[1].RatioShipped(), 4);
  EXPECT_DOUBLE_EQ(tables[0].lines[1].RatioBest(), 2);
  EXPECT_DOUBLE_EQ(tables[0].lines[1].RatioToLimit(), 1.25);
  EXPECT_DOUBLE_EQ(tables[0].lines[0].RatioShipped(), 0);  // Without own times there is nothing to compare.
}

TEST(Table, OneForEachTransportAndNumberOfRanksByOperationThenSize) {
  std::vector<BenchRow> rows = {Row("shoal", 64, 1, "broadcast"), Row("shoal", 64, 1), Row("shoal", 8, 1),
                                Row("shoal", 8, 1, "all_reduce", 4)};
  rows.push_back(Row("shoal", 8, 1));
  rows.back().transport = "tcp";
  const std::vector<Table> tables = MakeTables(rows);
  ASSERT_EQ(tables.size(), 3u);
  ASSERT_EQ(tables[0].lines.size(), 3u);
  EXPECT_EQ(tables[0].lines[0].own->bytes, 8);
  EXPECT_EQ(tables[0].lines[2].own->op, "broadcast");
}

TEST(Table, PrintsTimesBandwidthsWrongElementsAndFailures) {
  std::vector<BenchRow> rows = {Row("shoal", 1 << 20, 100), Row("openmpi", 1 << 20, 250),
                                Row("gloo", 1 << 20, 1)};
  rows[0].wrong = 7;
  rows[2].us.median = std::nan("");
  rows[2].failure = "hung";
  const std::vector<Table> tables = MakeTables(rows);
  const std::string text = TableText(tables[0], {});
  EXPECT_THAT(text,
              HasSubstr("    262144   f32     sum     100.00      50.00     200.00   10.49   10.49      7"));
  EXPECT_THAT(text, HasSubstr("hung"));
  EXPECT_THAT(text, HasSubstr("2.50x"));
  EXPECT_THAT(TableMarkdown(tables[0]),
              HasSubstr("| all_reduce | 1M | 100 (50.0..200) | 10.49 | 250 | hung | 2.50x | 2.50x |"));
}

TEST(Section, ListsWhereAPeerIsFaster) {
  const std::vector<BenchRow> rows = {Row("shoal", 8, 2), Row("mpich", 8, 1), Row("shoal", 64, 1),
                                      Row("mpich", 64, 2)};
  const std::string text = SectionMarkdown(MakeTables(rows));
  EXPECT_THAT(text,
              HasSubstr("- 2 ranks, shared memory, all_reduce, 8: MPICH takes 0.50x of Shoal's time\n"));
  EXPECT_THAT(text, Not(HasSubstr("all_reduce, 64:")));
  EXPECT_THAT(SectionMarkdown(MakeTables(absl::MakeConstSpan(rows).subspan(2))), HasSubstr("Nowhere"));
}

TEST(Table, OverTcpGlooHasARatioOfItsOwn) {
  std::vector<BenchRow> rows = {Row("shoal", 8, 2), Row("mpich", 8, 3), Row("gloo", 8, 5)};
  for (BenchRow& row : rows) row.transport = "tcp";
  EXPECT_THAT(TableMarkdown(MakeTables(rows)[0]), HasSubstr("| 1.50x | 1.50x | 2.50x |"));
}

}  // namespace
}  // namespace shoal
