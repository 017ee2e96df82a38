#include "launch/status/loss_curve.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/status/progress.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr double kWidth = 880, kHeight = 480;
constexpr double kLeft = 68, kRight = 28, kTop = 84, kBottom = 56;  // Margins around the plot.
// More points than this cannot be told apart at the picture's width.
constexpr size_t kDrawnMax = 1200;

constexpr const char* kInk = "#1f2933";
constexpr const char* kQuiet = "#7b8794";
constexpr const char* kGrid = "#e7ebef";
constexpr const char* kAccent = "#0b6e99";
constexpr const char* kValidation = "#d9622b";

std::string Escaped(std::string_view text) {
  std::string escaped;
  for (const char letter : text) {
    switch (letter) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += static_cast<unsigned char>(letter) < 0x20 ? ' ' : letter;
    }
  }
  return escaped;
}

CurvePoints Finite(const CurvePoints& points) {
  CurvePoints finite;
  std::copy_if(points.begin(), points.end(), std::back_inserter(finite),
               [](const auto& point) { return std::isfinite(point.second); });
  return finite;
}

// At most about kDrawnMax points that keep the extremes of what they stand for.
CurvePoints Thinned(const CurvePoints& points) {
  if (points.size() <= kDrawnMax) return points;
  const size_t buckets = kDrawnMax / 2;
  CurvePoints thinned;
  for (size_t bucket = 0; bucket < buckets; ++bucket) {
    const auto begin = points.begin() + static_cast<int64_t>(bucket * points.size() / buckets);
    const auto end = points.begin() + static_cast<int64_t>((bucket + 1) * points.size() / buckets);
    auto [low, high] =
        std::minmax_element(begin, end, [](const auto& a, const auto& b) { return a.second < b.second; });
    if (low > high) std::swap(low, high);
    thinned.push_back(*low);
    if (high != low) thinned.push_back(*high);
  }
  return thinned;
}

// The plot's ranges and the way from data to the picture.
struct Frame {
  double step_low = 0, step_high = 1, loss_low = 0, loss_high = 1;
  double X(double step) const {
    return kLeft + (step - step_low) / (step_high - step_low) * (kWidth - kLeft - kRight);
  }
  double Y(double loss) const {
    return kHeight - kBottom - (loss - loss_low) / (loss_high - loss_low) * (kHeight - kTop - kBottom);
  }
};

Frame FrameFor(const CurvePoints& train, const CurvePoints& validation) {
  Frame frame;
  std::vector<double> losses;
  int64_t first = INT64_MAX, last = INT64_MIN;
  for (const CurvePoints* points : {&train, &validation}) {
    for (const auto& [step, loss] : *points) {
      losses.push_back(loss);
      first = std::min(first, step);
      last = std::max(last, step);
    }
  }
  if (losses.empty()) return frame;
  // A run from the start shows the 0; one whose beginning is lost starts where its records do.
  frame.step_low = first <= 1 + last / 50 ? 0 : static_cast<double>(first);
  frame.step_high = static_cast<double>(std::max(last, first + 1));
  std::sort(losses.begin(), losses.end());
  // The first few steps of a long run are far above all others and would flatten the rest; they leave the
  // picture at its top.
  const double high = losses[losses.size() - 1 - losses.size() / 100];
  const double low = losses.front();
  const double room = std::max((high - low) * 0.06, std::abs(high) * 0.01 + 1e-9);
  frame.loss_low = low - room;
  frame.loss_high = high + room;
  return frame;
}

std::string Path(const Frame& frame, const CurvePoints& points) {
  std::string path;
  for (const auto& [step, loss] : points) {
    absl::StrAppendFormat(&path, "%c%.1f %.1f", path.empty() ? 'M' : 'L', frame.X(static_cast<double>(step)),
                          frame.Y(loss));
  }
  return path;
}

std::string TickText(double value, double distance) {
  const int digits = std::max(0, static_cast<int>(std::ceil(-std::log10(distance) - 1e-9)));
  // 0.25 needs one digit more than its power of ten.
  const bool quarter =
      std::abs(distance * std::pow(10, digits) - std::round(distance * std::pow(10, digits))) > 1e-6;
  return absl::StrFormat("%.*f", digits + (quarter ? 1 : 0), value);
}

std::string Axes(const Frame& frame) {
  std::string svg;
  const std::vector<double> losses = RoundTicks(frame.loss_low, frame.loss_high, 6);
  const double distance = losses.size() > 1 ? losses[1] - losses[0] : 1;
  for (const double loss : losses) {
    const double y = frame.Y(loss);
    absl::StrAppendFormat(&svg, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n",
                          kLeft, y, kWidth - kRight, y, kGrid);
    absl::StrAppendFormat(&svg, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\" class=\"tick\">%s</text>\n",
                          kLeft - 10, y + 4, TickText(loss, distance));
  }
  const double base = kHeight - kBottom;
  absl::StrAppendFormat(&svg, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n",
                        kLeft, base, kWidth - kRight, base, kQuiet);
  for (const double step : RoundTicks(frame.step_low, frame.step_high, 8)) {
    if (step != std::floor(step)) continue;
    const double x = frame.X(step);
    absl::StrAppendFormat(&svg, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n", x,
                          base, x, base + 5, kQuiet);
    absl::StrAppendFormat(&svg,
                          "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" class=\"tick\">%s</text>\n", x,
                          base + 20, FormatInteger(static_cast<int64_t>(step)));
  }
  absl::StrAppendFormat(&svg,
                        "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" class=\"axis\">step</text>\n",
                        (kLeft + kWidth - kRight) / 2, kHeight - 14);
  absl::StrAppendFormat(
      &svg,
      "<text transform=\"translate(18 %.1f) rotate(-90)\" text-anchor=\"middle\" class=\"axis\">"
      "loss (nats per token)</text>\n",
      (kTop + base) / 2);
  return svg;
}

std::string Legend(bool with_validation, int64_t window) {
  const double y = kTop - 16;
  const std::string training =
      window > 1 ? absl::StrCat("training, mean of ", window / 2 * 2 + 1, " steps") : std::string("training");
  std::string svg = absl::StrFormat(
      "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"2.5\"/>\n"
      "<text x=\"%.1f\" y=\"%.1f\" class=\"tick\">%s</text>\n",
      kLeft, y - 4, kLeft + 24, y - 4, kAccent, kLeft + 31, y, training);
  if (!with_validation) return svg;
  // 7 units a letter is a little more than the font's mean.
  const double x = kLeft + 31 + 7 * static_cast<double>(training.size()) + 20;
  absl::StrAppendFormat(
      &svg,
      "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"1.5\"/>\n"
      "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n"
      "<text x=\"%.1f\" y=\"%.1f\" class=\"tick\">validation</text>\n",
      x, y - 4, x + 24, y - 4, kValidation, x + 12, y - 4, kValidation, x + 31, y);
  return svg;
}

// The validation points, and the last one's value beside it.
std::string ValidationMarks(const Frame& frame, const CurvePoints& validation) {
  if (validation.empty()) return "";
  std::string svg = absl::StrFormat("<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\"/>\n",
                                    Path(frame, validation), kValidation);
  for (const auto& [step, loss] : validation) {
    absl::StrAppendFormat(&svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\" stroke=\"#ffffff\"/>\n",
                          frame.X(static_cast<double>(step)), frame.Y(loss), kValidation);
  }
  const auto& [step, loss] = validation.back();
  absl::StrAppendFormat(
      &svg, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\" class=\"value\" style=\"fill:%s\">%.3f</text>\n",
      frame.X(static_cast<double>(step)) + 4, frame.Y(loss) - 12, kValidation, loss);
  return svg;
}

}  // namespace

CurvePoints Smoothed(const CurvePoints& points, int64_t window) {
  CurvePoints smoothed = Finite(points);
  const auto count = static_cast<int64_t>(smoothed.size());
  std::vector<double> sums = {0};  // sums[i]: of the first i.
  for (const auto& [step, loss] : smoothed) sums.push_back(sums.back() + loss);
  for (int64_t i = 0; i < count; ++i) {
    // Symmetric, so that a falling curve is not shifted.
    const int64_t reach = std::min({window / 2, i, count - 1 - i});
    const double sum = sums[static_cast<size_t>(i + reach + 1)] - sums[static_cast<size_t>(i - reach)];
    smoothed[static_cast<size_t>(i)].second = sum / static_cast<double>(2 * reach + 1);
  }
  return smoothed;
}

std::vector<double> RoundTicks(double low, double high, int about) {
  const double wanted = (high - low) / std::max(about, 1);
  if (!(wanted > 0) || !std::isfinite(wanted)) return {};
  const double power = std::pow(10, std::floor(std::log10(wanted)));
  double distance = 10 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0}) {
    if (factor * power >= wanted * 0.85) {
      distance = factor * power;
      break;
    }
  }
  std::vector<double> ticks;
  for (double n = std::ceil(low / distance - 1e-9); n * distance <= high + distance * 1e-9; ++n) {
    ticks.push_back(n * distance);
  }
  return ticks;
}

std::string LossCurveSvg(const LossCurve& curve) {
  const CurvePoints train = Finite(curve.train), validation = Finite(curve.validation);
  const Frame frame = FrameFor(train, validation);
  const auto window = static_cast<int64_t>(train.size() / 50);
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
      "role=\"img\">\n"
      "<title>%s</title>\n<style>text{font-family:Inter,\"Segoe UI\",\"Helvetica Neue\",\"DejaVu "
      "Sans\",Arial,sans-serif;"
      "fill:%s}.tick{font-size:12px;fill:%s}.axis{font-size:13px}.value{font-size:13px;font-weight:600}</"
      "style>\n"
      "<rect width=\"%.0f\" height=\"%.0f\" fill=\"#ffffff\"/>\n",
      kWidth, kHeight, kWidth, kHeight, Escaped(curve.title), kInk, "#52606d", kWidth, kHeight);
  absl::StrAppendFormat(&svg, "<text x=\"%.1f\" y=\"30\" font-size=\"18\" font-weight=\"600\">%s</text>\n",
                        kLeft, Escaped(curve.title));
  absl::StrAppendFormat(&svg, "<text x=\"%.1f\" y=\"49\" class=\"tick\">%s</text>\n", kLeft,
                        Escaped(curve.subtitle));
  svg += Axes(frame);
  svg += Legend(!validation.empty(), window);
  absl::StrAppendFormat(
      &svg, "<clipPath id=\"plot\"><rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/></clipPath>\n",
      kLeft, kTop - 6, kWidth - kLeft - kRight + 6, kHeight - kTop - kBottom + 6);
  svg += "<g clip-path=\"url(#plot)\" stroke-linejoin=\"round\">\n";
  if (window > 1) {
    absl::StrAppendFormat(&svg, "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-opacity=\"0.22\"/>\n",
                          Path(frame, Thinned(train)), kAccent);
  }
  absl::StrAppendFormat(&svg, "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2.5\"/>\n",
                        Path(frame, Thinned(Smoothed(train, window))), kAccent);
  svg += ValidationMarks(frame, validation);
  svg += "</g>\n";
  if (train.empty() && validation.empty()) {
    absl::StrAppendFormat(
        &svg, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" class=\"axis\">no steps yet</text>\n",
        kWidth / 2, kHeight / 2);
  }
  return svg + "</svg>\n";
}

}  // namespace shoal
