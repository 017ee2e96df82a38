#include "parallel/schedule/profiler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "runtime/base/check.h"

namespace shoal {
namespace {

// MeasuredTimes::least orders by duration; the share of overlap of whoever was fastest rides along in the low bits.
constexpr int kOverlapBits = 10;
constexpr int64_t kOverlapMax = (int64_t{1} << kOverlapBits) - 1;
// Units closer than this are one class.
constexpr double kClassWidth = 1.05;
// Residuals beyond so many standard deviations are outliers.
constexpr double kHuber = 1.5;
constexpr double kLeastNoise = 0.01;
// The fixed part is expected within this share of the whole time of what was known of it: decides where units hardly differ.
// As long as nothing is known, of zero.
constexpr double kFixedShare = 0.5, kKnownFixedShare = 0.05;
// It is known when samples tell it to this share of the whole time.
constexpr double kKnownAccuracy = 0.02;
// Units that vary by less than this share hardly differ.
constexpr double kAlike = 0.1;
constexpr int kRounds = 4;
// Fitting costs as much as a few small tasks: not after every step.
constexpr int64_t kEagerSteps = 8, kFitInterval = 4;
constexpr double kMostInterference = 4;
constexpr double kNearUnits = 1.25;  // Beyond the units seen so far by more than this a prediction is a guess.
// The variance of overlap that says anything about interference.
constexpr double kLeastSpread = 0.01;
// Plans are made anew for tasks that together take more than this share of what all take.
constexpr double kMatters = 0.01;
// What is known from before counts as so many tasks at either end of its range.
constexpr double kMostPriorSamples = 16;

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

struct Interval {
  int64_t begin, end;
};

// How much of `own` lies in `others`, which are ascending and apart.
int64_t Covered(const Interval& own, const std::vector<Interval>& others) {
  auto other = std::lower_bound(others.begin(), others.end(), own.begin, [](const Interval& i, int64_t t) { return i.end <= t; });
  int64_t covered = 0;
  for (; other != others.end() && other->begin < own.end; ++other) {
    covered += std::min(own.end, other->end) - std::max(own.begin, other->begin);
  }
  return covered;
}

struct Point {
  double units, ns;
  double weight;
};
struct Line {
  CostModel model;
  double residual = 0.05;       // Relative.
  bool fixed_is_known = false;  // From the points alone.
};
struct ExpectedFixed {
  double ns = 0, share = kFixedShare;
};

// Least squares of relative errors, (ns - line) / predicted, with non-negative parameters. Sets all but the residual.
void SolveLine(const std::vector<Point>& points, const std::vector<double>& predicted, const std::vector<double>& weights,
               double scale, const ExpectedFixed& expected, Line* line) {
  const double noise = line->residual;
  double s = 0, sx = 0, sxx = 0, sy = 0, sxy = 0, samples = 0;
  for (size_t i = 0; i < points.size(); ++i) {
    const double w = weights[i] / (predicted[i] * predicted[i]), x = points[i].units / scale, y = points[i].ns;
    samples += weights[i];
    s += w;
    sx += w * x;
    sxx += w * x * x;
    sy += w * y;
    sxy += w * x * y;
  }
  const double spread = s * sxx - sx * sx;
  line->fixed_is_known = spread * kKnownAccuracy * kKnownAccuracy * samples > noise * noise * sxx * s;
  const double pull = (noise / expected.share) * (noise / expected.share) * s / samples;
  const double held = s + pull, sum = sy + pull * expected.ns, determinant = held * sxx - sx * sx;
  line->model = {.fixed_ns = sy / s, .ns_per_unit = 0};
  if (sxx == 0) return;
  // Units that hardly differ tell the mean; a slope would be that of whatever else differs.
  const double rest = sy / s - expected.ns;
  if (spread < kAlike * kAlike * sxx * s && rest > 0) {
    line->model = {.fixed_ns = expected.ns, .ns_per_unit = rest * s / sx / scale};
    return;
  }
  if (determinant <= 0) return;
  const double fixed = (sxx * sum - sx * sxy) / determinant, slope = (held * sxy - sx * sum) / determinant;
  if (slope < 0) return;
  line->model = fixed < 0 ? CostModel{.fixed_ns = 0, .ns_per_unit = sxy / sxx / scale}
                          : CostModel{.fixed_ns = fixed, .ns_per_unit = slope / scale};
}

// Weights of outliers shrink from round to round (iteratively re-weighted least squares).
Line FitLine(const std::vector<Point>& points, const ExpectedFixed& expected) {
  Line line;
  double scale = 1;
  std::vector<double> predicted, weights, errors(points.size());
  for (const Point& point : points) {
    scale = std::max(scale, point.units);
    predicted.push_back(std::max(point.ns, 1.0));
    weights.push_back(point.weight);
  }
  for (int round = 0; round < kRounds; ++round) {
    SolveLine(points, predicted, weights, scale, expected, &line);
    for (size_t i = 0; i < points.size(); ++i) {
      predicted[i] = std::max(line.model.Predict(points[i].units), 1.0);
      errors[i] = std::abs(points[i].ns - predicted[i]) / predicted[i];
    }
    const double noise = std::max(1.4826 * Median(errors), kLeastNoise);
    double sum = 0, squares = 0;
    for (size_t i = 0; i < points.size(); ++i) {
      weights[i] = points[i].weight * (errors[i] > kHuber * noise ? kHuber * noise / errors[i] : 1.0);
      sum += weights[i];
      squares += weights[i] * errors[i] * errors[i];
    }
    line.residual = std::sqrt(squares / sum);
  }
  return line;
}

}  // namespace

MeasuredTimes TimesOf(const Graph& graph, const StepRecord& record) {
  SHOAL_CHECK_EQ(graph.tasks.size(), record.tasks.size());
  std::array<std::vector<Interval>, kLanes> busy;  // A lane runs one task at a time, so they are ascending.
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    busy[static_cast<size_t>(graph.tasks[i].lane)].push_back({record.tasks[i].begin_ns, record.tasks[i].end_ns});
  }
  MeasuredTimes times;
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    const TaskRecord& task = record.tasks[i];
    const Lane lane = graph.tasks[i].lane;
    const int64_t ns = std::max<int64_t>(task.end_ns - task.begin_ns, 1), units = std::llround(task.units);
    if (!IsCommunication(lane)) {
      times.total.insert(times.total.end(), {ns, units});
      continue;
    }
    int64_t overlap = 0;
    if (lane != Lane::kControl) {
      const Lane other = lane == Lane::kIntra ? Lane::kInter : Lane::kIntra;
      overlap = Covered({task.begin_ns, task.end_ns}, busy[static_cast<size_t>(other)]) * kOverlapMax / ns;
    }
    times.least.insert(times.least.end(), {(ns << kOverlapBits) | overlap, -units});
  }
  return times;
}

Profiler::Key Profiler::Pack(const CostKey& key) {
  return {static_cast<uint8_t>(key.op), static_cast<uint8_t>(key.phase), static_cast<uint8_t>(key.lane)};
}

// Sorts the samples of a step into classes of overlap and units: each becomes one sample.
std::vector<Profiler::Sample> Profiler::Condense(std::vector<Sample> samples) {
  const auto overlap_class = [](const Sample& sample) { return static_cast<int>(sample.overlap * 3.999); };
  std::sort(samples.begin(), samples.end(), [&](const Sample& a, const Sample& b) {
    return std::pair(overlap_class(a), a.units) < std::pair(overlap_class(b), b.units);
  });
  std::vector<Sample> classes;
  for (size_t begin = 0, end = 0; begin < samples.size(); begin = end) {
    const int overlap = overlap_class(samples[begin]);
    const double limit = samples[begin].units * kClassWidth;
    Sample sum{.step = samples[begin].step};
    std::vector<double> ns;
    for (; end < samples.size() && overlap_class(samples[end]) == overlap && samples[end].units <= limit; ++end) {
      sum.units += samples[end].units;
      sum.overlap += samples[end].overlap;
      ns.push_back(samples[end].ns);
    }
    sum.weight = static_cast<double>(ns.size());
    sum.units /= sum.weight;
    sum.overlap /= sum.weight;
    sum.ns = Median(std::move(ns));
    classes.push_back(sum);
  }
  return classes;
}

std::map<Profiler::Key, std::vector<Profiler::Sample>> Profiler::SamplesOf(const Graph& graph, const MeasuredTimes& times,
                                                                           int ranks) const {
  std::map<Key, std::vector<Sample>> samples;
  size_t least = 0, total = 0;
  for (const Task& task : graph.tasks) {
    Sample sample{.step = step_, .weight = 1};
    if (IsCommunication(task.lane)) {
      SHOAL_CHECK_LT(least + 1, times.least.size());
      sample.ns = static_cast<double>(times.least[least] >> kOverlapBits);
      sample.overlap = static_cast<double>(times.least[least] & kOverlapMax) / static_cast<double>(kOverlapMax);
      sample.units = static_cast<double>(-times.least[least + 1]);
      least += 2;
    } else {
      SHOAL_CHECK_LT(total + 1, times.total.size());
      sample.ns = static_cast<double>(times.total[total]) / ranks;
      sample.units = static_cast<double>(times.total[total + 1]) / ranks;
      total += 2;
    }
    samples[Pack(KeyOf(task))].push_back(sample);
  }
  SHOAL_CHECK_EQ(least, times.least.size());
  SHOAL_CHECK_EQ(total, times.total.size());
  for (auto& [key, of_key] : samples) of_key = Condense(std::move(of_key));
  return samples;
}

void Profiler::Add(const Graph& graph, const MeasuredTimes& times, int ranks) {
  double measured = 0, wrong = 0, jumped_ns = 0;
  bool jumped = false, known = true;
  for (const auto& [key, fresh] : SamplesOf(graph, times, ranks)) {
    History& history = histories_[key];
    known = known && !history.samples.empty();
    history.last_ns = 0;
    for (const Sample& sample : fresh) {
      history.last_ns += sample.ns * sample.weight;
      measured += sample.ns * sample.weight;
      wrong += std::abs(Predict(history, sample) - sample.ns) * sample.weight;
    }
    if (NoticeJump(fresh, &history)) {
      jumped = true;
      jumped_ns += history.last_ns;
    }
    history.samples.insert(history.samples.end(), fresh.begin(), fresh.end());
    while (history.samples.front().step <= step_ - options_.window_steps) history.samples.pop_front();
  }
  if (jumped_ns > kMatters * measured) ++jumps_;
  prediction_error_ = known && measured > 0 ? wrong / measured : std::numeric_limits<double>::quiet_NaN();
  if (jumped || !known || step_ < kEagerSteps || step_ % kFitInterval == 0) FitAll();
  ++step_;
}

double Profiler::Predict(const History& history, const Sample& sample) const {
  return history.line.model.Predict(sample.units) * (1 + (interference_ - 1) * sample.overlap);
}

bool Profiler::NoticeJump(const std::vector<Sample>& fresh, History* history) {
  const auto by_units = [](const Sample& a, const Sample& b) { return a.units < b.units; };
  if (history->samples.empty()) return false;
  const auto [low, high] = std::minmax_element(history->samples.begin(), history->samples.end(), by_units);
  std::vector<double> ratios;
  for (const Sample& sample : fresh) {
    // Far from what was seen a wrong prediction tells of fixed costs that were not known, not of another level.
    if (sample.units < low->units / kNearUnits || sample.units > high->units * kNearUnits) continue;
    const double predicted = Predict(*history, sample);
    if (predicted > 0) ratios.push_back(sample.ns / predicted);
  }
  if (ratios.empty()) return false;
  const double ratio = Median(std::move(ratios));
  const double threshold = std::max(options_.jump, 1 + 3 * history->line.residual);
  const int direction = ratio > threshold ? 1 : ratio < 1 / threshold ? -1 : 0;
  history->row = direction == 0 ? 0 : direction == history->direction ? history->row + 1 : 1;
  history->direction = direction;
  if (history->row < options_.jump_steps) return false;
  std::erase_if(history->samples, [&](const Sample& sample) { return sample.step <= step_ - options_.jump_steps; });
  history->row = history->direction = 0;
  return true;
}

double Profiler::AgedWeight(const Sample& sample) const {
  return sample.weight * std::exp2(static_cast<double>(sample.step - step_) / options_.half_life_steps);
}

void Profiler::FitAll() {
  FitInterference();
  std::vector<Point> points;
  for (auto& [key, history] : histories_) {
    if (history.row > 0) continue;  // On its way to another level or not: the next steps will tell.
    points.clear();
    for (const Sample& sample : history.samples) {
      points.push_back({sample.units, sample.ns / (1 + (interference_ - 1) * sample.overlap), AgedWeight(sample)});
    }
    const Line line = FitLine(points, history.fixed_ns ? ExpectedFixed{*history.fixed_ns, kKnownFixedShare} : ExpectedFixed{});
    history.line = {line.model, line.residual};
    if (line.fixed_is_known) history.fixed_ns = line.model.fixed_ns;
  }
}

// How times over predicted ones grow with the overlap, within each key: the level of a key says nothing, because what it takes
// alone may never have been seen.
void Profiler::FitInterference() {
  double spread = 0, growth = 0;
  for (const auto& [key, history] : histories_) {
    const Lane lane = static_cast<Lane>(key[2]);
    if (lane != Lane::kIntra && lane != Lane::kInter) continue;
    double w = 0, o = 0, r = 0, oo = 0, o_r = 0;
    for (const Sample& sample : history.samples) {
      const double alone = history.line.model.Predict(sample.units);
      if (alone <= 0) continue;
      const double weight = AgedWeight(sample), ratio = std::min(sample.ns / alone, kMostInterference * 2);
      w += weight;
      o += weight * sample.overlap;
      r += weight * ratio;
      oo += weight * sample.overlap * sample.overlap;
      o_r += weight * sample.overlap * ratio;
    }
    const double own_spread = w > 0 ? oo - o * o / w : 0;
    if (own_spread < kLeastSpread * w || w == 0) continue;
    const double slope = (o_r - o * r / w) / own_spread, intercept = (r - slope * o) / w;
    spread += own_spread;
    if (intercept > 0) growth += own_spread * slope / intercept;
  }
  if (spread > 0) interference_ = std::clamp(1 + growth / spread, 1.0, kMostInterference);
}

std::vector<CostEstimate> Profiler::estimates() const {
  std::vector<CostEstimate> estimates;
  for (const auto& [key, history] : histories_) {
    CostEstimate estimate{.key = {static_cast<Op>(key[0]), static_cast<Phase>(key[1]), static_cast<Lane>(key[2])},
                          .model = history.line.model,
                          .residual = history.line.residual,
                          .units_low = std::numeric_limits<double>::infinity(),
                          .step_ns = history.last_ns};
    double samples = 0;
    for (const Sample& sample : history.samples) {
      samples += sample.weight;
      estimate.units_low = std::min(estimate.units_low, sample.units);
      estimate.units_high = std::max(estimate.units_high, sample.units);
    }
    estimate.samples = std::llround(samples);
    estimates.push_back(estimate);
  }
  return estimates;
}

CostTable Profiler::table() const {
  CostTable table;
  for (const CostEstimate& estimate : estimates()) table.models[estimate.key] = estimate.model;
  table.interference = interference_;
  return table;
}

Profile Profiler::profile() const { return {.interference = interference_, .costs = estimates()}; }

void Profiler::StartFrom(const Profile& profile) {
  interference_ = std::clamp(profile.interference, 1.0, kMostInterference);
  for (const CostEstimate& estimate : profile.costs) {
    History& history = histories_[Pack(estimate.key)];
    history = {};
    history.line = {estimate.model, estimate.residual};
    if (estimate.units_high > estimate.units_low * kNearUnits) history.fixed_ns = estimate.model.fixed_ns;
    const double weight = std::min(kMostPriorSamples, static_cast<double>(std::max<int64_t>(estimate.samples, 1)) / 2);
    for (double units : {estimate.units_low, estimate.units_high}) {
      history.samples.push_back({.step = step_, .units = units, .ns = estimate.model.Predict(units), .weight = weight});
    }
  }
}

}  // namespace shoal
