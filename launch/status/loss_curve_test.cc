#include "launch/status/loss_curve.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <regex>

#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::Not;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Opened and closed elements match, attributes are quoted, and no stray & or <.
bool IsWellFormed(const std::string& xml) {
  static const std::regex kTag("<(/?)([A-Za-z]+)((?:\\s+[A-Za-z0-9:-]+=\"[^\"<]*\")*)\\s*(/?)>");
  std::vector<std::string> open;
  size_t at = 0;
  const auto text_ok = [](const std::string& text) {
    return text.find('<') == std::string::npos &&
           std::regex_replace(text, std::regex("&(amp|lt|gt|quot);"), "").find('&') == std::string::npos;
  };
  for (std::sregex_iterator tag(xml.begin(), xml.end(), kTag), end; tag != end; ++tag) {
    const auto begin = static_cast<size_t>(tag->position());
    if (!text_ok(xml.substr(at, begin - at))) return false;
    at = begin + static_cast<size_t>(tag->length());
    if ((*tag)[1].length() > 0) {
      if (open.empty() || open.back() != (*tag)[2].str()) return false;
      open.pop_back();
    } else if ((*tag)[4].length() == 0) {
      open.push_back((*tag)[2].str());
    }
  }
  return open.empty() && text_ok(xml.substr(at));
}

// The points of the n-th path.
CurvePoints PathPoints(const std::string& svg, int n) {
  size_t at = 0;
  for (int i = 0; i <= n; ++i) at = svg.find("<path d=\"", at + 1);
  CurvePoints points;
  double x = 0, y = 0;
  const char* text = svg.c_str() + at + 9;
  for (int used = 0; *text != '"'; text += used) {
    if (std::sscanf(text, "%*1[ML]%lf %lf%n", &x, &y, &used) != 2) break;
    points.emplace_back(static_cast<int64_t>(std::lround(x)), y);
  }
  return points;
}

LossCurve Falling(int64_t steps) {
  LossCurve curve{.title = "run", .subtitle = "facts", .train = {}, .validation = {}};
  for (int64_t step = 1; step <= steps; ++step) {
    curve.train.emplace_back(step,
                             1 + 4 * std::exp(-static_cast<double>(step) / 50) + 0.1 * ((step % 2) - 0.5));
  }
  return curve;
}

TEST(LossCurveSvg, IsWellFormedWhateverTheTitle) {
  LossCurve curve = Falling(500);
  curve.title = "a < b & \"c\" > d\x01";
  curve.validation = {{100, 2.5}, {500, 1.1}};
  const std::string svg = LossCurveSvg(curve);
  EXPECT_TRUE(IsWellFormed(svg)) << svg;
  EXPECT_THAT(svg, HasSubstr("a &lt; b &amp; &quot;c&quot; &gt; d <"));
  EXPECT_FALSE(IsWellFormed("<svg><g></svg>"));
  EXPECT_FALSE(IsWellFormed("<svg>a & b</svg>"));
}

TEST(LossCurveSvg, IsXmlToAnIndependentParser) {
  if (testing::FindCommand("xmllint").empty()) GTEST_SKIP() << "needs xmllint";
  const testing::TempDir folder;
  testing::WriteFile(folder / "loss.svg", LossCurveSvg(Falling(300)));
  const auto result =
      testing::RunProcess({.args = {"xmllint", "--noout", folder / "loss.svg"}}, absl::Seconds(60));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->ok()) << result->ToString();
}

TEST(LossCurveSvg, DrawsEachPointWhereItBelongs) {
  LossCurve curve{
      .title = "t", .subtitle = "", .train = {{1, 4.0}, {2, 2.0}, {4, 1.0}}, .validation = {{4, 1.5}}};
  const std::string svg = LossCurveSvg(curve);
  // 4 steps over 784 units from x = 68.
  const CurvePoints points = PathPoints(svg, 0);
  ASSERT_EQ(points.size(), 3u);
  EXPECT_EQ(points[0].first, 264);
  EXPECT_EQ(points[1].first, 460);
  EXPECT_EQ(points[2].first, 852);
  // y is linear in the loss: 4 -> 2 is twice 2 -> 1.
  EXPECT_NEAR(points[1].second - points[0].second, 2 * (points[2].second - points[1].second), 0.3);
  EXPECT_LT(points[0].second, points[2].second);
  EXPECT_THAT(svg, HasSubstr(">1.500</text>"));
}

TEST(LossCurveSvg, LeavesOutWhatIsNotFinite) {
  LossCurve curve = Falling(3);
  curve.train[1].second = kNaN;
  curve.validation = {{3, std::numeric_limits<double>::infinity()}};
  const std::string svg = LossCurveSvg(curve);
  EXPECT_EQ(PathPoints(svg, 0).size(), 2u);
  EXPECT_THAT(svg, AllOf(Not(HasSubstr("nan")), Not(HasSubstr("inf"))));
}

TEST(LossCurveSvg, WithoutPointsSaysSo) {
  const std::string svg = LossCurveSvg({.title = "t", .subtitle = "", .train = {}, .validation = {}});
  EXPECT_TRUE(IsWellFormed(svg));
  EXPECT_THAT(svg, HasSubstr("no steps yet"));
}

TEST(LossCurveSvg, OneAndEqualPointsHaveAFrame) {
  for (const int64_t steps : {1, 2, 100}) {
    LossCurve curve = Falling(steps);
    for (auto& [step, loss] : curve.train) loss = 2;
    const std::string svg = LossCurveSvg(curve);
    EXPECT_THAT(svg, AllOf(Not(HasSubstr("nan")), Not(HasSubstr("inf")))) << steps;
  }
}

TEST(LossCurveSvg, StaysSmallAndKeepsExtremes) {
  LossCurve curve = Falling(200000);
  curve.train[123456].second = 3.5;
  const std::string svg = LossCurveSvg(curve);
  EXPECT_LT(svg.size(), 120000u);
  double top = 1e9;
  for (const auto& [x, y] : PathPoints(svg, 0)) {
    if (x > 400) top = std::min(top, y);
  }
  double usual = 0;
  for (const auto& [x, y] : PathPoints(svg, 1)) usual = std::max(usual, y);
  EXPECT_LT(top, usual - 100);
}

TEST(Smoothed, KeepsAStraightLineAndAveragesNoise) {
  CurvePoints line, noise;
  for (int64_t i = 0; i < 100; ++i) {
    line.emplace_back(i, 3.0 - 0.01 * static_cast<double>(i));
    noise.emplace_back(i, i % 2 == 0 ? 1.0 : 2.0);
  }
  const CurvePoints straight = Smoothed(line, 20);
  for (size_t i = 0; i < line.size(); ++i) EXPECT_NEAR(straight[i].second, line[i].second, 1e-12);
  const CurvePoints smooth = Smoothed(noise, 20);
  for (size_t i = 10; i < 90; ++i) EXPECT_NEAR(smooth[i].second, 1.5, 0.03);
  EXPECT_EQ(Smoothed(noise, 1), noise);
  EXPECT_EQ(Smoothed({{1, kNaN}, {2, 5}}, 4), (CurvePoints{{2, 5}}));
}

TEST(RoundTicks, AreRoundAndInside) {
  EXPECT_THAT(RoundTicks(0, 1000, 8), ElementsAre(0, 200, 400, 600, 800, 1000));
  EXPECT_THAT(RoundTicks(0.9, 5.6, 6), ElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(RoundTicks(1.11, 1.34, 6), ElementsAre(DoubleNear(1.15, 1e-9), DoubleNear(1.2, 1e-9),
                                                     DoubleNear(1.25, 1e-9), DoubleNear(1.3, 1e-9)));
  EXPECT_TRUE(RoundTicks(1, 1, 6).empty());
  for (double high = 1e-6; high < 1e9; high *= 1.7) {
    const std::vector<double> ticks = RoundTicks(0, high, 6);
    EXPECT_THAT(ticks.size(), AllOf(Ge(3u), Le(9u))) << high;
    EXPECT_LE(ticks.back(), high * (1 + 1e-9));
  }
}

}  // namespace
}  // namespace shoal
