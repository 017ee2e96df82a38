#include "parallel/schedule/scheduler.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "parallel/schedule/gradient_slices.h"
#include "parallel/schedule/simulate.h"
#include "parallel/schedule/step_scorer.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

size_t At(int index) { return static_cast<size_t>(index); }

// A gain that is not rounding.
bool Better(double time, double than) { return time < than * (1 - 1e-9); }

// Layers that share their choice: of one kind, with the same rows.
struct LayerGroup {
  std::vector<int> layers;
  int forward = 1, backward = 1;
};

std::vector<LayerGroup> GroupLayers(const StepShape& shape, const Workload& workload) {
  std::map<std::pair<int, bool>, size_t> found;
  std::vector<LayerGroup> groups;
  for (size_t layer = 0; layer < shape.layers.size(); ++layer) {
    if (!shape.layers[layer].moe) continue;
    const auto key = std::make_pair(workload.experts_of_layer[layer], shape.layers[layer].shared_expert);
    const auto [entry, added] = found.try_emplace(key, groups.size());
    if (added) groups.emplace_back();
    groups[entry->second].layers.push_back(static_cast<int>(layer));
  }
  return groups;
}

void Apply(const LayerGroup& group, Schedule* schedule) {
  for (int layer : group.layers) schedule->layers[At(layer)] = {group.forward, group.backward};
}

// A step of two layers of one group: what chunks are compared on when the whole step is large.
struct SmallStep {
  StepShape shape;
  Workload workload;

  SmallStep(const StepShape& whole, const Workload& work, int layer) : shape(whole), workload(work) {
    constexpr size_t kLayers = 2;
    const BucketIndex buckets = whole.buckets();
    shape.layers.assign(kLayers, whole.layers[At(layer)]);
    shape.parts = 1;
    workload.experts = {work.experts[At(work.experts_of_layer[At(layer)])]};
    workload.experts_of_layer.assign(kLayers, 0);
    const auto shrink = [&](std::vector<int64_t>* values) {
      std::vector<int64_t> kept = {(*values)[0], (*values)[1]};
      kept.insert(kept.end(), kLayers, (*values)[At(buckets.OfLayer(layer))]);
      if (!whole.tied_head) kept.push_back(values->back());
      *values = std::move(kept);
    };
    shrink(&workload.bucket_elements);
    shrink(&workload.bucket_bytes);
  }
};

class Search {
 public:
  Search(const StepShape& shape, const CostTable& costs, const Workload& workload, const Topology& topology,
         const SchedulerOptions& options)
      : shape_(FewParts(shape)),
        costs_(costs),
        workload_(workload),
        topology_(topology),
        options_(options),
        whole_(shape_, costs, workload, topology),
        all_parts_(shape, costs, workload, topology),
        groups_(GroupLayers(shape, workload)),
        forward_(options.chunks_forward > 0 ? std::vector<int>{options.chunks_forward} : options.chunks),
        backward_(options.chunks_backward > 0 ? std::vector<int>{options.chunks_backward} : options.chunks) {}

  ScheduleChoice Run() {
    ScheduleChoice choice;
    choice.schedule = PlainSchedule(shape_, workload_.bucket_elements);
    choice.schedule.prefetch = options_.prefetch.front();
    choice.schedule.waves = options_.waves.front();
    choice.plain_ns = all_parts_.Time(choice.schedule);
    best_ = choice.schedule;
    for (LayerGroup& group : groups_) {
      group = {std::move(group.layers), forward_.front(), backward_.front()};
      Apply(group, &best_);
    }
    best_ns_ = whole_.Time(best_);
    if (shape_.dispatch) {
      ChooseChunks();
      TryUniform();
    }
    if (options_.slice_gradients && shape_.dense == DensePolicy::kReplicated && shape_.ranks > 1 && training()) {
      SliceGradients();
      if (shape_.dispatch) RefineBackward();
    }
    if (shape_.dispatch) TryWaves();
    for (int prefetch : options_.prefetch) {
      Schedule schedule = best_;
      schedule.prefetch = prefetch;
      Try(schedule);
    }
    if (shape_.dispatch && options_.part_waves && WavesMayPart(shape_)) TryTurns();
    choice.predicted_ns = all_parts_.Time(best_);
    // Fewer parts can be wrong about all of them.
    if (Better(choice.plain_ns, choice.predicted_ns) && !Given()) {
      Take(choice.schedule);
      choice.predicted_ns = choice.plain_ns;
    }
    choice.schedule = best_;
    Explain(&choice);
    return choice;
  }

 private:
  // Groups up to which every choice is checked on the whole step.
  static constexpr size_t kFewGroups = 4;
  // Layers up to which the whole step is small.
  static constexpr size_t kFewLayers = 4;

  // Parts of the batch are alike but for the first, which gathers, and the last, which sends gradients.
  static constexpr int kFewParts = 2;
  static StepShape FewParts(StepShape shape) {
    shape.parts = std::min(shape.parts, kFewParts);
    return shape;
  }

  bool Given() const { return options_.chunks_forward > 0 || options_.chunks_backward > 0; }
  bool training() const { return shape_.mode == StepShape::Mode::kTrain; }
  void Try(const Schedule& schedule) {
    const double time = whole_.Time(schedule);
    if (!Better(time, best_ns_)) return;
    best_ns_ = time;
    Take(schedule);
  }
  void Take(const Schedule& schedule) {
    best_ = schedule;
    for (LayerGroup& group : groups_) {
      const LayerSchedule& layer = best_.layers[At(group.layers.front())];
      group.forward = layer.forward_chunks;
      group.backward = layer.backward_chunks;
    }
  }

  void ChooseChunks() {
    if (groups_.size() == 1 && shape_.layers.size() <= kFewLayers) {
      for (int forward : forward_) {
        for (int backward : backward_) TryChunks(groups_[0], forward, backward);
      }
      return;
    }
    Schedule chosen = best_;
    for (const LayerGroup& group : groups_) {
      LayerGroup choice = group;
      std::tie(choice.forward, choice.backward) = BestOnSmallStep(group);
      Apply(choice, &chosen);
    }
    Try(chosen);
    if (groups_.size() > kFewGroups) return;
    for (const LayerGroup& group : groups_) {
      for (int forward : Neighbours(forward_, group.forward)) TryChunks(group, forward, group.backward);
      for (int backward : Neighbours(backward_, group.backward)) TryChunks(group, group.forward, backward);
    }
  }

  void TryChunks(LayerGroup group, int forward, int backward) {
    Schedule schedule = best_;
    group.forward = forward;
    group.backward = backward;
    Apply(group, &schedule);
    Try(schedule);
  }

  static std::vector<int> Neighbours(const std::vector<int>& values, int value) {
    std::vector<int> near;
    const auto at = std::find(values.begin(), values.end(), value);
    if (at == values.end()) return near;
    if (at != values.begin()) near.push_back(*(at - 1));
    if (at + 1 != values.end()) near.push_back(*(at + 1));
    return near;
  }

  // Forward and backward chunks of a group: all pairs, or the one after the other where there are many groups.
  std::pair<int, int> BestOnSmallStep(const LayerGroup& group) const {
    const SmallStep small(shape_, workload_, group.layers.front());
    const StepScorer scorer(small.shape, costs_, small.workload, topology_);
    Schedule schedule = PlainSchedule(small.shape, small.workload.bucket_elements);
    schedule.prefetch = options_.prefetch.front();
    schedule.waves = options_.waves.front();
    std::pair<int, int> best = {forward_.front(), backward_.front()};
    double best_ns = -1;
    const auto consider = [&](int forward, int backward) {
      for (LayerSchedule& layer : schedule.layers) layer = {forward, backward};
      const double time = scorer.Time(schedule);
      if (best_ns >= 0 && !Better(time, best_ns)) return;
      best_ns = time;
      best = {forward, backward};
    };
    if (groups_.size() <= kFewGroups) {
      for (int forward : forward_) {
        for (int backward : backward_) consider(forward, backward);
      }
      return best;
    }
    for (int forward : forward_) consider(forward, best.second);
    for (int backward : backward_) consider(best.first, backward);
    return best;
  }

  void TryUniform() {
    if (Given()) return;
    for (int chunks : options_.chunks) {
      Schedule schedule = best_;
      for (LayerGroup group : groups_) {
        group.forward = group.backward = chunks;
        Apply(group, &schedule);
      }
      Try(schedule);
    }
  }

  // Where waves hide communication, few chunks are enough.
  void TryWaves() {
    const int before = best_.waves;
    for (int waves : options_.waves) {
      if (waves == before) continue;
      for (size_t i = 0; i < std::min<size_t>(3, std::max(forward_.size(), backward_.size())); ++i) {
        Schedule schedule = best_;
        schedule.waves = waves;
        schedule.turns.clear();
        for (LayerGroup group : groups_) {
          group.forward = forward_[std::min(i, forward_.size() - 1)];
          group.backward = backward_[std::min(i, backward_.size() - 1)];
          Apply(group, &schedule);
        }
        Try(schedule);
      }
    }
    if (best_.waves == before || groups_.size() > kFewGroups) return;
    for (const LayerGroup& group : groups_) {
      for (int forward : forward_) TryChunks(group, forward, group.backward);
      for (int backward : backward_) TryChunks(group, group.forward, backward);
    }
  }

  // Waves that part. Early ones run ahead by so much that few chunks are enough again.
  void TryTurns() {
    const Schedule together = best_;
    const double row_ns = NsOfRows(together);
    for (int waves : options_.waves) {
      if (waves == 1) continue;
      for (int forward_waves : {2, 3}) {
        // Of what a wave sends in a turn.
        for (double turns : {0.0, 1.5, 3.0}) {
          Schedule schedule = together;
          schedule.waves = waves;
          for (LayerGroup group : groups_) {
            group.forward = forward_.front();
            group.backward = backward_.front();
            Apply(group, &schedule);
          }
          Try(whole_.WithTurns(schedule, {.forward_waves = forward_waves, .hungry_ns = turns * row_ns / waves}));
        }
      }
    }
  }

  // What the rows of one layer take to their experts, mean over layers.
  double NsOfRows(const Schedule& schedule) const {
    Graph graph;
    const StepRecord record = whole_.Predict(schedule, Record::kYes, &graph).record;
    double sum = 0;
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
      const Task& task = graph.tasks[i];
      const bool slowest = task.lane == (shape_.inter ? Lane::kInter : Lane::kIntra);
      if (task.op == Op::kDispatch && slowest && task.phase == Phase::kForward && task.part == 0) {
        sum += static_cast<double>(record.tasks[i].end_ns - record.tasks[i].begin_ns);
      }
    }
    return sum / std::max<double>(1, static_cast<double>(shape_.layers.size()));
  }

  void SliceGradients() {
    GradientSlicer slicer(shape_, workload_, costs_, options_.slice_elements_min);
    Schedule schedule = best_;
    schedule.gradients = slicer.AtTheEnd();
    Graph graph;
    const Prediction at_the_end = whole_.Predict(schedule, Record::kYes, &graph);
    slicer.Measure(graph, at_the_end.record);
    Try(schedule);
    for (double scale : {0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0}) {
      std::vector<double> scales(shape_.layers.size(), scale);
      const double before = best_ns_;
      TrySlices(slicer, scales);
      if (Better(best_ns_, before)) slice_scales_ = scales;
    }
    // Layer by layer, from the last: less or more than its pause.
    if (slice_scales_.empty()) return;
    int trials = options_.slice_trials;
    for (int layer = static_cast<int>(shape_.layers.size()) - 1; layer >= 0 && trials > 0; --layer) {
      for (double factor : {0.0, 0.5, 1.5}) {
        if (--trials < 0) break;
        std::vector<double> scales = slice_scales_;
        scales[At(layer)] *= factor;
        const double before = best_ns_;
        TrySlices(slicer, scales);
        if (Better(best_ns_, before)) slice_scales_ = scales;
      }
    }
  }

  void TrySlices(const GradientSlicer& slicer, const std::vector<double>& scales) {
    Schedule schedule = best_;
    schedule.gradients = slicer.InPauses(scales);
    Try(schedule);
  }

  // Gradients in a layer's pauses can change the number of chunks that suits it.
  void RefineBackward() {
    if (groups_.size() > kFewGroups) return;
    for (const LayerGroup& group : groups_) {
      for (int backward : backward_) {
        if (backward != group.backward) TryChunks(group, group.forward, backward);
      }
    }
  }

  // "layers 0 to 7", "layers 1, 4, 5", at most a handful.
  static std::string LayersText(std::vector<int> layers) {
    constexpr size_t kShownMax = 8;
    std::sort(layers.begin(), layers.end());
    if (layers.size() == 1) return absl::StrCat("layer ", layers[0]);
    if (layers.back() - layers.front() + 1 == static_cast<int>(layers.size())) {
      return absl::StrCat("layers ", layers.front(), " to ", layers.back());
    }
    if (layers.size() > kShownMax) return absl::StrCat(layers.size(), " layers");
    return absl::StrCat("layers ", absl::StrJoin(layers, ", "));
  }

  // What the step would take if the layers with so many chunks had one.
  std::string ExplainChunks(bool forward, int chunks, const std::vector<int>& layers, double step_ns) const {
    Schedule without = best_;
    for (int layer : layers) (forward ? without.layers[At(layer)].forward_chunks : without.layers[At(layer)].backward_chunks) = 1;
    return absl::StrCat(LayersText(layers), ": ", chunks, " chunks ", forward ? "forward" : "backward", ": a step of ",
                        TimeText(step_ns), " instead of ", TimeText(all_parts_.Time(without)), " with 1");
  }

  void Explain(ScheduleChoice* choice) const {
    for (const bool forward : {true, false}) {
      std::map<int, std::vector<int>> layers;  // By chunks.
      for (const LayerGroup& group : groups_) {
        std::vector<int>& alike = layers[forward ? group.forward : group.backward];
        alike.insert(alike.end(), group.layers.begin(), group.layers.end());
      }
      for (const auto& [chunks, alike] : layers) {
        if (chunks > 1) choice->reasons.push_back(ExplainChunks(forward, chunks, alike, choice->predicted_ns));
      }
    }
    Schedule plain = best_;
    plain.gradients = PlainSchedule(shape_, workload_.bucket_elements).gradients;
    const double plain_ns = all_parts_.Time(plain);
    if (Better(choice->predicted_ns, plain_ns)) {
      choice->reasons.push_back(absl::StrCat("dense gradients in ", best_.gradients.size(),
                                             " slices: ", TimeText(choice->predicted_ns), " instead of ", TimeText(plain_ns),
                                             " with those of a layer at once"));
    }
    if (best_.waves != options_.waves.front()) {
      Schedule without = best_;
      without.waves = options_.waves.front();
      without.turns.clear();
      choice->reasons.push_back(absl::StrCat(best_.waves, " waves: ", TimeText(choice->predicted_ns), " instead of ",
                                             TimeText(all_parts_.Time(without)), " with ", without.waves));
    }
    if (!best_.turns.empty()) {
      Schedule without = best_;
      without.turns.clear();
      choice->reasons.push_back(absl::StrCat("backward passes of early waves beside forward passes of late ones: ",
                                             TimeText(choice->predicted_ns), " instead of ", TimeText(all_parts_.Time(without))));
    }
    if (best_.prefetch != options_.prefetch.front()) {
      choice->reasons.push_back(absl::StrCat("weights are gathered ", best_.prefetch, " layers ahead"));
    }
    if (choice->reasons.empty())
      choice->reasons.push_back(absl::StrCat("nothing to gain by pieces: ", TimeText(choice->predicted_ns)));
  }

  const StepShape shape_;  // Of few parts.
  const CostTable& costs_;
  const Workload& workload_;
  const Topology& topology_;
  const SchedulerOptions& options_;
  const StepScorer whole_, all_parts_;
  std::vector<LayerGroup> groups_;
  const std::vector<int> forward_, backward_;
  Schedule best_;
  double best_ns_ = 0;
  std::vector<double> slice_scales_;
};

}  // namespace

ScheduleChoice ChooseSchedule(const StepShape& shape, const CostTable& costs, const Workload& workload, const Topology& topology,
                              const SchedulerOptions& options) {
  SHOAL_CHECK(!options.chunks.empty() && !options.prefetch.empty() && !options.waves.empty());
  return Search(shape, costs, workload, topology, options).Run();
}

double PredictStep(const StepShape& shape, const CostTable& costs, const Workload& workload, const Topology& topology,
                   const Schedule& schedule) {
  return StepScorer(shape, costs, workload, topology).Time(schedule);
}

bool WorthReplanning(double current_ns, double proposed_ns, double noise) {
  // Less than a hundredth is never worth a change of the graph.
  return current_ns - proposed_ns > std::max(0.01, noise) * current_ns;
}

}  // namespace shoal
