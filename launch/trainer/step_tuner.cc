#include "launch/trainer/step_tuner.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr size_t kProbeSteps = 5;    // That a schedule is measured for.
// Between looks at what another schedule would give; twice as many after each, as long as tasks take what they took.
constexpr size_t kReplanSteps = 10, kReplanStepsMax = 320;
constexpr size_t kRecentSteps = 10;  // That say what a schedule takes now.
constexpr size_t kProbesMax = 6, kProbesAgainMax = 3;
constexpr ptrdiff_t kJumpSteps = 3;  // Steps that show that tasks take something else now.
// A schedule is measured when it is predicted to take at most so much more than the best prediction: at the start, and when what
// tasks take has changed in mid-run, where every step with a slow schedule counts.
constexpr double kPlausible = 1.15, kPlausibleAgain = 1.03;
// Later on, when it is predicted to take at most so much of what the schedule in use is predicted to take.
constexpr double kWorthTrying = 0.98;
// A schedule goes when another one was faster by more than this.
constexpr double kSlower = 1.005;

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
  if (options_.start_apart && schedule_.waves > 1 && WavesMayPart(shape_)) {
    schedule_.turns = ChooseTurns(shape_, schedule_, {}, [](const Task&) { return 1.0; });
  }
  if (!options_.choose || shape_.ranks == 1) return;
  probing_ = learning_ = true;
  if (fixed.waves.size() > 1) {
    Schedule waves = schedule_;
    waves.waves = fixed.waves.back();
    waves.turns.clear();
    probes_.push_back({std::move(waves), {}, 0});
  }
  if (!shape_.dispatch || (fixed.chunks_forward > 0 && fixed.chunks_backward > 0)) return;
  probes_.push_back({WithChunks(plain, fixed.chunks_forward > 0 ? fixed.chunks_forward : 2,
                                fixed.chunks_backward > 0 ? fixed.chunks_backward : 2),
                     {}, 0});
}

absl::StatusOr<int64_t> StepTuner::Learn(const Graph& graph, const StepRecord& record, int64_t request) {
  MeasuredTimes times = TimesOf(graph, record);
  int64_t step_ns = record.end_ns - record.begin_ns;
  request_ = request;
  if (control_ != nullptr) {
    times.least.insert(times.least.end(), {-request, -step_ns});  // The highest, and the slowest rank's.
    const auto reduce = [&](std::vector<int64_t>* values, ReduceOp op) {
      const Tensor tensor(values->data(), {static_cast<int64_t>(values->size())}, DType::kI64);
      return control_->AllReduce(tensor, tensor, op, {.label = "task times"}).Await();
    };
    SHOAL_RETURN_IF_ERROR(reduce(&times.least, ReduceOp::kMin), "sharing task times");
    SHOAL_RETURN_IF_ERROR(reduce(&times.total, ReduceOp::kSum), "sharing task times");
    step_ns = -times.least.back();
    times.least.pop_back();
    request_ = -times.least.back();
    times.least.pop_back();
  }
  // The first step with a schedule meets memory that nobody has touched yet: what its tasks take says nothing of those to come.
  if (!steps_ns_.empty()) profiler_.Add(graph, times, shape_.ranks);
  return step_ns;
}

absl::StatusOr<bool> StepTuner::AfterStep(const Graph& graph, const StepRecord& record, std::vector<ExpertWork> experts,
                                          int64_t request) {
  workload_.experts = std::move(experts);
  SHOAL_ASSIGN_OR_RETURN(const int64_t step_ns, Learn(graph, record, request));
  steps_ns_.push_back(step_ns);
  predicted_ns_ = PredictStep(shape_, profiler_.table(), workload_, topology_, schedule_);
  if (!options_.choose || shape_.ranks == 1) return false;
  if (probing_) {
    if (steps_ns_.size() < kProbeSteps) return false;
    Remember();
    return NextProbe();
  }
  if (!options_.replan) return false;
  if (std::exchange(jumps_, profiler_.jumps()) != profiler_.jumps() && steps_ns_.size() > kProbeSteps) {
    // Not the schedule has changed, but what tasks take: what was measured before may be different now.
    tried_.clear();
    steps_ns_.erase(steps_ns_.begin(), steps_ns_.end() - kJumpSteps);
    Remember();
    replan_steps_ = kReplanSteps;
    PlanProbes(kPlausibleAgain);
    if (probes_.size() > kProbesAgainMax) probes_.resize(kProbesAgainMax);
    return NextProbe();
  }
  if (steps_ns_.size() % replan_steps_ != 0) return false;
  replan_steps_ = std::min(2 * replan_steps_, kReplanStepsMax);
  Remember();
  ScheduleChoice choice = Choose();
  const double noise = std::isfinite(profiler_.prediction_error()) ? profiler_.prediction_error() : 0;
  if (choice.predicted_ns > predicted_ns_ * kWorthTrying || !WorthReplanning(predicted_ns_, choice.predicted_ns, noise)) return false;
  AddProbe(std::move(choice.schedule), std::move(choice.reasons));
  return NextProbe();
}

ScheduleChoice StepTuner::Choose() const {
  return ChooseSchedule(shape_, profiler_.table(), workload_, topology_, options_.scheduler);
}

// Not twice.
void StepTuner::AddProbe(Schedule schedule, std::vector<std::string> reasons) {
  const uint64_t fingerprint = Fingerprint(EmitStep(shape_, schedule));
  if (tried_.contains(fingerprint)) return;
  for (const Tried& probe : probes_) {
    if (Fingerprint(EmitStep(shape_, probe.schedule)) == fingerprint) return;
  }
  probes_.push_back({std::move(schedule), std::move(reasons), 0});
}

// What the scheduler chooses, then the same chunks in all layers, the best predictions first.
void StepTuner::PlanProbes(double plausible) {
  const CostTable costs = profiler_.table();
  const SchedulerOptions& fixed = options_.scheduler;
  const ScheduleChoice choice = Choose();
  AddProbe(choice.schedule, choice.reasons);
  if (!shape_.dispatch) return;  // No rows travel: chunks and waves have nothing to hide.
  // The best for each number of waves: what messages cost is known least.
  for (int waves : fixed.waves) {
    SchedulerOptions given = fixed;
    given.waves = {waves};
    ScheduleChoice other = ChooseSchedule(shape_, costs, workload_, topology_, given);
    if (other.predicted_ns <= choice.predicted_ns * plausible) AddProbe(std::move(other.schedule), std::move(other.reasons));
  }
  std::vector<std::pair<double, Schedule>> uniform;
  for (int waves : fixed.waves) {
    for (int chunks : fixed.chunks) {
      Schedule schedule = WithChunks(choice.schedule, fixed.chunks_forward > 0 ? fixed.chunks_forward : chunks,
                                     fixed.chunks_backward > 0 ? fixed.chunks_backward : chunks);
      schedule.waves = waves;
      schedule.turns.clear();
      const double predicted = PredictStep(shape_, costs, workload_, topology_, schedule);
      if (predicted <= choice.predicted_ns * plausible) uniform.emplace_back(predicted, std::move(schedule));
    }
  }
  std::stable_sort(uniform.begin(), uniform.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [_, schedule] : uniform) {
    if (probes_.size() < kProbesMax) AddProbe(std::move(schedule), {"the fastest of those that were measured"});
  }
}

bool StepTuner::NextProbe() {
  if (probes_.empty() && std::exchange(learning_, false)) PlanProbes(kPlausible);
  probing_ = !probes_.empty();
  if (!probing_) return Settle();
  Tried next = std::move(probes_.front());
  probes_.pop_front();
  return Take(std::move(next));
}

void StepTuner::Remember() { tried_[Fingerprint(EmitStep(shape_, schedule_))] = {schedule_, reasons_, Median()}; }

// With the schedule that was fastest.
bool StepTuner::Settle() {
  jumps_ = profiler_.jumps();
  const auto best = std::min_element(tried_.begin(), tried_.end(), [](const auto& a, const auto& b) {
    return a.second.median_ns < b.second.median_ns;
  });
  if (best == tried_.end() || best->second.median_ns * kSlower >= Median()) return false;
  return Take(best->second);
}

bool StepTuner::Take(Tried tried) {
  schedule_ = std::move(tried.schedule);
  reasons_ = std::move(tried.reasons);
  steps_ns_.clear();
  return true;
}

double StepTuner::Median() const {
  std::vector<int64_t> steps(steps_ns_.begin() + (steps_ns_.size() > 1 ? 1 : 0), steps_ns_.end());
  if (steps.size() > kRecentSteps) steps.erase(steps.begin(), steps.end() - static_cast<ptrdiff_t>(kRecentSteps));
  if (steps.empty()) return 0;
  std::sort(steps.begin(), steps.end());
  return static_cast<double>(steps[steps.size() / 2]);
}

}  // namespace shoal
