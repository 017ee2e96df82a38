// The loss curve of a run as a self-contained SVG that a browser or a README shows. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace shoal {

using CurvePoints = std::vector<std::pair<int64_t, double>>;  // (steps done, loss), ascending steps.

struct LossCurve {
  std::string title;
  std::string subtitle;  // One line of facts below the title; may be empty.
  CurvePoints train;  // Drawn faint as it is, and smoothed on top. Values that are not finite are left out.
  CurvePoints validation;  // Drawn as points on a line.
};

// Means of up to `window` points around each point, fewer towards the ends, so that the curve does not lag
// behind. Values that are not finite do not enter.
CurvePoints Smoothed(const CurvePoints& points, int64_t window);

// Round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high], about `about` of them.
std::vector<double> RoundTicks(double low, double high, int about);

// A whole SVG document, at most some 100 KB whatever the number of steps. Without finite points: axes and a
// note.
std::string LossCurveSvg(const LossCurve& curve);

}  // namespace shoal
