// Learns from the steps of a run what its tasks take: per cost key a line, time = fixed + per_unit * units (FSMoE, arXiv
// 2501.10714, section 4), fitted anew while training.
//
// What a rank measures of a communication task includes the wait for the ranks that come later, so that only the rank that came
// last sees the transfer alone: the duration that counts is the least over ranks, and the units are the most, because the
// busiest rank decides when a collective ends. Of tasks that a rank does alone the mean over ranks counts: sums of means are
// means of sums, so what is predicted of a rank's lane is right on average even where ranks share cores, while maxima would
// add up what different ranks met at different times. Both are integers that one reduction each brings together, in any order:
//   times = TimesOf(graph, record);  all_reduce(times.least, min);  all_reduce(times.total, sum);  profiler.Add(graph, times, ranks)
// so that every rank learns the same. Samples of one step with nearly equal units count as their median, so that a task that lost
// its core for a while costs nothing; what remains of outliers is damped (Huber). Old steps fade; a level that has changed for
// three steps in a row drops the steps before it.
//
// The fixed part belongs to software and latency, and stays when a link or a core becomes slower. So it is remembered when the
// samples that told it are gone, and what the time per unit follows from while all samples have about the same units; samples
// that differ correct both.
//
// Deterministic; not thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "parallel/schedule/cost_model.h"
#include "parallel/schedule/executor.h"
#include "parallel/schedule/graph.h"

namespace shoal {

// The lanes on which ranks wait for each other.
inline bool IsCommunication(Lane lane) { return lane == Lane::kIntra || lane == Lane::kInter || lane == Lane::kControl; }

// What one rank, or after the reductions all ranks, measured in a step. Equal graphs give equal sizes.
struct MeasuredTimes {
  std::vector<int64_t> least;  // Per communication task: duration and overlap with the other lane, packed; -units.
  std::vector<int64_t> total;  // Per other task: nanoseconds; units.
};
MeasuredTimes TimesOf(const Graph& graph, const StepRecord& record);

struct ProfilerOptions {
  double half_life_steps = 8;
  int window_steps = 32;  // Older steps are forgotten.
  double jump = 1.3;      // A step's times over the predicted ones, or the other way round, that may be a new level.
  int jump_steps = 3;     // So many in a row are one.
};

// What is known of one cost key.
struct CostEstimate {
  CostKey key;
  CostModel model;
  double residual = 0;   // Root mean square of the relative errors, outliers damped.
  int64_t samples = 0;   // Tasks that it was fitted to.
  double units_low = 0, units_high = 0;  // Their range; beyond it is a guess.
  double step_ns = 0;    // Of all tasks of the last step together.
};
// What a run has learnt, for files and people (profile_file.h).
struct Profile {
  double interference = 1;
  std::vector<CostEstimate> costs;  // By key.
};

class Profiler {
 public:
  explicit Profiler(const ProfilerOptions& options = {}) : options_(options) {}

  // Begins with what a run before has learnt: it fades as steps are added.
  void StartFrom(const Profile& profile);
  // After a step of `ranks` ranks, whose times were reduced as above. 0.3 ms for 400 tasks.
  void Add(const Graph& graph, const MeasuredTimes& times, int ranks);
  // Of one rank.
  void Add(const Graph& graph, const StepRecord& record) { Add(graph, TimesOf(graph, record), 1); }

  // Where all samples ever had about the same units, their time is taken for time per unit.
  Profile profile() const;
  CostTable table() const;
  // sum |predicted - measured| / sum measured over the tasks of the last step, by what was known before it; NaN while some key
  // is new.
  double prediction_error() const { return prediction_error_; }
  // How often the level of a key changed that takes a share of the step which matters: plans that were made before may be wrong.
  int64_t jumps() const { return jumps_; }

 private:
  // Tasks of one step with about the same units and overlap.
  struct Sample {
    int64_t step = 0;
    double units = 0, ns = 0, overlap = 0;
    double weight = 0;  // Tasks.
  };
  struct FittedLine {
    CostModel model;
    double residual = 0;
  };
  struct History {
    std::deque<Sample> samples;
    int row = 0;         // Steps in a row on another level, ...
    int direction = 0;   // ... all slower (1) or all faster (-1).
    double last_ns = 0;  // In the last step.
    FittedLine line;     // Without interference.
    std::optional<double> fixed_ns;  // Of the line when the samples' units last differed enough to tell.
  };
  using Key = std::array<uint8_t, 3>;  // Ordered, unlike CostKey: sums over keys must not depend on a hash.

  static Key Pack(const CostKey& key);
  static std::vector<Sample> Condense(std::vector<Sample> samples);
  std::map<Key, std::vector<Sample>> SamplesOf(const Graph& graph, const MeasuredTimes& times, int ranks) const;
  double Predict(const History& history, const Sample& sample) const;
  bool NoticeJump(const std::vector<Sample>& fresh, History* history);
  double AgedWeight(const Sample& sample) const;
  void FitAll();
  void FitInterference();
  std::vector<CostEstimate> estimates() const;

  ProfilerOptions options_;
  int64_t step_ = 0;
  std::map<Key, History> histories_;
  double interference_ = 1;
  double prediction_error_ = std::numeric_limits<double>::quiet_NaN();
  int64_t jumps_ = 0;
};

}  // namespace shoal
