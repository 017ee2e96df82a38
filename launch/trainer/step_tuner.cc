#include "launch/trainer/step_tuner.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kProbeSteps = 4;    // Of each schedule at the start.
constexpr size_t kTrialSteps = 5;    // Until a new schedule is judged.
constexpr size_t kReplanSteps = 10;  // Between looks at what another schedule would give.
// A schedule goes when another one was faster by more than this.
constexpr double kSlower = 1.005;
// A new schedule is tried when it is predicted to take at most this much of what one that was tried is predicted to take.
constexpr double kWorthTrying = 0.98;

Schedule WithChunks(Schedule schedule, int forward, int backward) {
  for (LayerSchedule& layer : schedule.layers) layer = {forward, backward};
  return schedule;
}

}  // namespace

StepTuner::StepTuner(const StepShape& shape, const Topology& topology, Workload workload, Communicator* control,
                     const Options& options)
    : shape_(shape), topology_(topology), workload_(std::move(workload)), control_(control), options_(options) {
  const SchedulerOptions& fixed = options_.scheduler;
  Schedule plain = PlainSchedule(shape_, workload_.bucket_elements);
  plain.prefetch = fixed.prefetch.front();
  plain.waves = fixed.waves.front();
  schedule_ = WithChunks(plain, std::max(1, fixed.chunks_forward), std::max(1, fixed.chunks_backward));
  if (!options_.choose || shape_.ranks == 1) return;
  state_ = State::kProbing;
  if (fixed.waves.size() > 1) {
    probes_.push_back(schedule_);
    probes_.back().waves = fixed.waves.back();
  }
  if (!shape_.dispatch || (fixed.chunks_forward > 0 && fixed.chunks_backward > 0)) return;
  probes_.push_back(WithChunks(plain, fixed.chunks_forward > 0 ? fixed.chunks_forward : 2,
                               fixed.chunks_backward > 0 ? fixed.chunks_backward : 2));
}

absl::StatusOr<int64_t> StepTuner::Learn(const Graph& graph, const StepRecord& record) {
  MeasuredTimes times = TimesOf(graph, record);
  int64_t step_ns = record.end_ns - record.begin_ns;
  if (control_ != nullptr) {
    times.least.push_back(-step_ns);  // The slowest rank's counts.
    const auto reduce = [&](std::vector<int64_t>* values, ReduceOp op) {
      const Tensor tensor(values->data(), {static_cast<int64_t>(values->size())}, DType::kI64);
      return control_->AllReduce(tensor, tensor, op, {.label = "task times"}).Await();
    };
    SHOAL_RETURN_IF_ERROR(reduce(&times.least, ReduceOp::kMin), "sharing task times");
    SHOAL_RETURN_IF_ERROR(reduce(&times.total, ReduceOp::kSum), "sharing task times");
    step_ns = -times.least.back();
    times.least.pop_back();
  }
  profiler_.Add(graph, times, shape_.ranks);
  return step_ns;
}

absl::StatusOr<bool> StepTuner::AfterStep(const Graph& graph, const StepRecord& record, std::vector<ExpertWork> experts) {
  workload_.experts = std::move(experts);
  SHOAL_ASSIGN_OR_RETURN(const int64_t step_ns, Learn(graph, record));
  steps_ns_.push_back(step_ns);
  predicted_ns_ = PredictStep(shape_, profiler_.table(), workload_, topology_, schedule_);
  if (!options_.choose || shape_.ranks == 1) return false;
  if (state_ == State::kProbing) return Probe();
  if (!options_.replan && state_ == State::kSettled) return false;
  if (std::exchange(jumps_, profiler_.jumps()) != profiler_.jumps() && steps_ns_.size() > kTrialSteps) {
    // Not the schedule has changed, but what tasks take: what was measured before may be different now.
    tried_.clear();
    steps_ns_.clear();
    state_ = State::kSettled;
    return Propose(/*first=*/false);
  }
  if (state_ == State::kTrying) return steps_ns_.size() > kTrialSteps && Judge();
  return steps_ns_.size() % kReplanSteps == 0 && Propose(/*first=*/false);
}

bool StepTuner::Probe() {
  if (steps_ns_.size() < kProbeSteps) return false;
  Remember();
  if (!probes_.empty()) {
    Schedule next = std::move(probes_.back());
    probes_.pop_back();
    return Take(std::move(next), {}, State::kProbing);
  }
  jumps_ = profiler_.jumps();
  state_ = State::kSettled;
  return Propose(/*first=*/true) || Judge();
}

bool StepTuner::Propose(bool first) {
  ScheduleChoice choice = ChooseSchedule(shape_, profiler_.table(), workload_, topology_, options_.scheduler);
  const uint64_t fingerprint = Fingerprint(EmitStep(shape_, choice.schedule));
  if (fingerprint == Fingerprint(EmitStep(shape_, schedule_)) || tried_.contains(fingerprint)) return false;
  const double noise = std::isfinite(profiler_.prediction_error()) ? profiler_.prediction_error() : 0;
  if (!first && !WorthReplanning(predicted_ns_, choice.predicted_ns, noise)) return false;
  // What has been measured is worth more than a prediction.
  for (const auto& [_, tried] : tried_) {
    const double predicted = PredictStep(shape_, profiler_.table(), workload_, topology_, tried.schedule);
    if (choice.predicted_ns > predicted * kWorthTrying) return false;
  }
  if (!steps_ns_.empty()) Remember();
  return Take(std::move(choice.schedule), std::move(choice.reasons), State::kTrying);
}

void StepTuner::Remember() { tried_[Fingerprint(EmitStep(shape_, schedule_))] = {schedule_, reasons_, Median()}; }

// The schedule that was fastest so far.
bool StepTuner::Judge() {
  Remember();
  state_ = State::kSettled;
  const auto best = std::min_element(tried_.begin(), tried_.end(), [](const auto& a, const auto& b) {
    return a.second.median_ns < b.second.median_ns;
  });
  if (best->second.median_ns * kSlower >= Median()) return false;
  return Take(best->second.schedule, best->second.reasons, State::kSettled);
}

bool StepTuner::Take(Schedule schedule, std::vector<std::string> reasons, State state) {
  schedule_ = std::move(schedule);
  reasons_ = std::move(reasons);
  state_ = state;
  steps_ns_.clear();
  return true;
}

double StepTuner::Median() const {
  std::vector<int64_t> steps(steps_ns_.begin() + (steps_ns_.size() > 1 ? 1 : 0), steps_ns_.end());
  if (steps.size() > kReplanSteps) steps.erase(steps.begin(), steps.end() - static_cast<ptrdiff_t>(kReplanSteps));
  if (steps.empty()) return 0;
  std::sort(steps.begin(), steps.end());
  return static_cast<double>(steps[steps.size() / 2]);
}

}  // namespace shoal
