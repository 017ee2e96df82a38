#include "parallel/schedule/step_graph.h"

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int kNone = -1;

// Buffers that users take and free in turn: who takes one waits for the task that freed it.
class Buffers {
 public:
  int Take(int buffers) {
    const size_t user = users_++, count = static_cast<size_t>(buffers);
    if (user < count) return kNone;
    SHOAL_CHECK_LT(user - count, freed_.size()) << "more users at a time than buffers";
    return freed_[user - count];
  }
  void Free(int task) { freed_.push_back(task); }

 private:
  size_t users_ = 0;
  std::vector<int> freed_;  // Tasks, in order.
};

// Some sequences of the part, on their way through the layers.
struct Wave {
  int x = kNone;                            // What made its input of the next layer.
  int combining = kNone;                    // The layer of experts whose results have to be combined yet.
  std::vector<std::vector<int>> arrived;    // By chunk: what brings its rows to the experts,
  std::vector<std::vector<int>> returned;   // and home.
};

// Emits the tasks of one step in order. Members are the tasks that produced what later ones wait for.
class Emitter {
 public:
  Emitter(const StepShape& shape, const Schedule& schedule)
      : shape_(shape),
        schedule_(schedule),
        buckets_(shape.buckets()),
        world_lane_(shape.inter ? Lane::kInter : Lane::kIntra),
        gathered_(static_cast<size_t>(buckets_.count()), kNone),
        here_(static_cast<size_t>(buckets_.count())),
        released_(static_cast<size_t>(buckets_.count()), kNone),
        complete_(static_cast<size_t>(buckets_.count()), kNone),
        reduced_(static_cast<size_t>(buckets_.count()), kNone),
        materialised_(shape.layers.size(), kNone),
        experts_here_(shape.layers.size()),
        experts_released_(shape.layers.size(), kNone),
        experts_reduced_(shape.layers.size(), kNone) {
    waves_.resize(static_cast<size_t>(schedule.waves));
    SHOAL_CHECK_EQ(schedule.layers.size(), shape.layers.size());
  }

  Graph Emit() {
    for (part_ = 0; part_ < shape_.parts; ++part_) EmitPart();
    part_ = kNone;
    if (training()) EmitUpdate();
    return std::move(graph_);
  }

 private:
  bool training() const { return shape_.mode == StepShape::Mode::kTrain; }
  bool sharded() const { return shape_.dense == DensePolicy::kSharded && shape_.ranks > 1; }
  bool sharded(int bucket) const { return sharded() && bucket >= 2 && bucket < 2 + layers(); }
  bool rematerialise() const { return shape_.experts == ExpertPolicy::kRematerialise; }
  int layers() const { return static_cast<int>(shape_.layers.size()); }
  const LayerShape& layer_shape(int layer) const { return shape_.layers[static_cast<size_t>(layer)]; }
  bool first_part() const { return part_ == 0; }
  bool last_part() const { return part_ + 1 == shape_.parts; }

  int Add(Op op, Phase phase, Lane lane, int layer, int chunk, std::initializer_list<int> after) {
    Task task;
    task.op = op;
    task.phase = phase;
    task.lane = lane;
    task.part = part_;
    task.wave = wave_;
    task.layer = layer;
    task.chunk = chunk;
    for (int before : after) {
      if (before != kNone && std::find(task.after.begin(), task.after.end(), before) == task.after.end()) {
        task.after.push_back(before);
      }
    }
    graph_.tasks.push_back(std::move(task));
    return static_cast<int>(graph_.tasks.size()) - 1;
  }
  int Compute(Op op, Phase phase, int layer, int chunk, std::initializer_list<int> after) {
    return Add(op, phase, Lane::kCompute, layer, chunk, after);
  }
  void Wait(int task, int before) {
    if (before != kNone) graph_.tasks[static_cast<size_t>(task)].after.push_back(before);
  }
  void Wait(int task, const std::vector<int>& before) {
    for (int one : before) Wait(task, one);
  }
  template <typename Emit> void ForEachWave(const Emit& emit) {
    for (wave_ = 0; wave_ < schedule_.waves; ++wave_) emit();
    wave_ = kNone;
  }
  Wave& wave() { return waves_[static_cast<size_t>(wave_)]; }

  // ---- Weights on their way here and away.

  // A layer's bucket that is not kept takes a buffer: there are enough for `prefetch` layers ahead of the one in use.
  void Gather(int bucket, Phase phase) {
    if (shape_.ranks == 1) return;
    const size_t at = static_cast<size_t>(bucket);
    if (!sharded(bucket)) {
      if (gathered_[at] == kNone) gathered_[at] = Add(Op::kGather, phase, world_lane_, kNone, bucket, {});
      return;
    }
    if (here_[at]) return;
    here_[at] = true;
    gathered_[at] = Add(Op::kGather, phase, world_lane_, kNone, bucket,
                        {dense_buffers_.Take(DenseBuffers(schedule_.prefetch, schedule_.waves)), released_[at]});
  }
  void Release(int bucket, Phase phase) {
    if (!sharded(bucket)) return;
    const size_t at = static_cast<size_t>(bucket);
    here_[at] = false;
    released_[at] = Compute(Op::kRelease, phase, kNone, bucket, {});
    dense_buffers_.Free(released_[at]);
  }

  void Materialise(int layer, Phase phase) {
    if (!shape_.materialise || !layer_shape(layer).moe) return;
    const size_t at = static_cast<size_t>(layer);
    if (!rematerialise()) {
      if (phase != Phase::kForward || !first_part()) return;
      materialised_[at] = Add(Op::kMaterialise, phase, world_lane_, layer, kNone, {});
      return;
    }
    if (experts_here_[at]) return;
    experts_here_[at] = true;
    materialised_[at] = Add(Op::kMaterialise, phase, world_lane_, layer, kNone,
                            {expert_buffers_.Take(schedule_.prefetch + 1), experts_released_[at]});
  }
  // The first wave of the first part decides for the step, so that copies have one set of gradients; before its rows, because
  // no expert is computed before all weights are there.
  void Calibrate(int layer, int arrange) {
    if (!training() || !shape_.calibrate || !first_part() || wave_ != 0) return;
    materialised_[static_cast<size_t>(layer)] = Add(Op::kCalibrate, Phase::kForward, world_lane_, layer, kNone, {arrange});
  }
  void ReleaseExperts(int layer) {
    if (!shape_.materialise || !rematerialise() || !layer_shape(layer).moe) return;
    FreeExperts(layer, Compute(Op::kRelease, Phase::kForward, layer, kNone, {}));
  }
  void FreeExperts(int layer, int task) {
    const size_t at = static_cast<size_t>(layer);
    experts_here_[at] = false;
    experts_released_[at] = task;
    expert_buffers_.Free(task);
  }
  void GatherLayer(int layer, Phase phase) {
    if (layer < 0 || layer >= layers()) return;
    Gather(buckets_.OfLayer(layer), phase);
    Materialise(layer, phase);
  }

  // ---- One part of the batch.

  void EmitPart() {
    Gather(BucketIndex::kVectors, Phase::kForward);
    Gather(BucketIndex::kEmbedding, Phase::kForward);
    for (int layer = 0; layer < schedule_.prefetch; ++layer) GatherLayer(layer, Phase::kForward);
    ForEachWave([&] {
      wave() = {};
      wave().x = Compute(Op::kEmbed, Phase::kForward, kNone, kNone,
                         {gathered_[BucketIndex::kEmbedding], gathered_[BucketIndex::kVectors]});
    });
    routed_ = waves_.front().x;  // The part has begun: all that its totals wait for where no layer has experts.
    for (int layer = 0; layer < layers(); ++layer) {
      EmitLayer(layer, Phase::kForward, [&] {
        GatherLayer(layer + schedule_.prefetch, Phase::kForward);
        if (layer + 1 == layers()) Gather(buckets_.OfHead(), Phase::kForward);
      });
      // The last layer is where the backward pass begins.
      if (!training() || layer + 1 < layers()) {
        Release(buckets_.OfLayer(layer), Phase::kForward);
        ReleaseExperts(layer);
      }
    }
    EmitHead();
    if (training()) EmitBackward();
  }

  void EmitHead() {
    int totals = kNone;
    if (training() && shape_.ranks > 1) {
      totals = Add(Op::kTotals, Phase::kForward, Lane::kControl, kNone, kNone, {routed_});
    }
    int head = kNone;
    ForEachWave([&] {
      Combine();
      head = Compute(Op::kHead, Phase::kForward, kNone, kNone, {wave().x, gathered_[static_cast<size_t>(buckets_.OfHead())]});
    });
    if (!training()) return;
    if (!shape_.tied_head) Complete(buckets_.OfHead(), head);
    balanced_ = Compute(Op::kBalance, Phase::kForward, kNone, kNone, {totals});
  }

  // Each wave up to the departure of its rows, then each wave's experts: while the rows of one wave travel, another computes. What
  // comes home is combined when the wave goes on. `gather` emits what the links bring behind departing rows and before those that
  // come home.
  template <typename Gather> void EmitLayer(int layer, Phase phase, const Gather& gather) {
    const int bucket = gathered_[static_cast<size_t>(buckets_.OfLayer(layer))];
    const int chunks = schedule_.layers[static_cast<size_t>(layer)].forward_chunks;
    ForEachWave([&] {
      Combine();
      wave().arrived.clear();
      const int attention = Compute(Op::kAttention, phase, layer, kNone, {wave().x, bucket});
      if (!layer_shape(layer).moe) {
        wave().x = Compute(Op::kDense, phase, layer, kNone, {});
        return;
      }
      const int route = Compute(Op::kRoute, phase, layer, kNone, {attention});
      const bool exchange = shape_.ranks > 1 && shape_.exchange && phase == Phase::kForward;
      const int exchanged = exchange ? Add(Op::kExchange, phase, Lane::kControl, layer, kNone, {route}) : kNone;
      // Where waves take turns, another one computes meanwhile.
      const Lane lane = schedule_.waves > 1 && shape_.dispatch ? Lane::kCopy : Lane::kCompute;
      const int arrange = Add(Op::kArrange, phase, lane, layer, kNone, {exchanged, route});
      if (phase == Phase::kForward) {
        routed_ = arrange;
        Calibrate(layer, arrange);
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int pack = Add(Op::kPack, phase, lane, layer, chunk, {arrange});
        wave().arrived.push_back(Travel(Op::kDispatch, phase, layer, chunk, pack));
      }
    });
    gather();
    if (!layer_shape(layer).moe) return;
    ForEachWave([&] {
      if (layer_shape(layer).shared_expert) Compute(Op::kShared, phase, layer, kNone, {});
      wave().returned.clear();
      for (int chunk = 0; chunk < chunks; ++chunk) wave().returned.push_back(Experts(phase, layer, chunk));
      // The backward pass needs the rows, not their sum.
      wave().combining = phase == Phase::kRecompute ? kNone : layer;
    });
  }

  // Returns what to wait for until their results are home.
  std::vector<int> Experts(Phase phase, int layer, int chunk) {
    const int experts = Compute(Op::kExperts, phase, layer, chunk, {materialised_[static_cast<size_t>(layer)]});
    Wait(experts, wave().arrived[static_cast<size_t>(chunk)]);
    return Travel(Op::kReturn, phase, layer, chunk, experts);
  }

  // What is left of the wave's last layer of experts.
  void Combine() {
    const int layer = std::exchange(wave().combining, kNone);
    if (layer == kNone) return;
    for (size_t chunk = 0; chunk < wave().returned.size(); ++chunk) {
      wave().x = Compute(Op::kCombine, Phase::kForward, layer, static_cast<int>(chunk), {});
      Wait(wave().x, wave().returned[chunk]);
    }
  }

  // Rows of a chunk to the ranks of their experts (kDispatch) or home (kReturn); returns what to wait for.
  std::vector<int> Travel(Op op, Phase phase, int layer, int chunk, int ready) {
    std::vector<int> tasks;
    if (!shape_.dispatch) return tasks;
    if (shape_.inter) tasks.push_back(Add(op, phase, Lane::kInter, layer, chunk, {ready}));
    if (shape_.intra) tasks.push_back(Add(op, phase, Lane::kIntra, layer, chunk, {ready}));
    tasks.push_back(Add(Op::kStay, phase, Lane::kCopy, layer, chunk, {ready}));
    graph_.tasks.back().back = op == Op::kReturn;
    return tasks;
  }

  // ---- Backward.

  void EmitBackward() {
    const int top = layers() - 1;
    for (int layer = top; layer > top - schedule_.prefetch; --layer) GatherLayer(layer, Phase::kBackward);
    ForEachWave([&] {
      const int head = Compute(Op::kHead, Phase::kBackward, kNone, kNone, {});
      if (sharded()) Wait(head, reduced_);  // The buffers of the part before.
    });
    for (int layer = top; layer >= 0; --layer) {
      WaitForGradientBuffer(layer);
      if (shape_.recompute) EmitLayer(layer, Phase::kRecompute, [] {});
      EmitLayerBackward(layer);
    }
    FinishLayerBackward([] {});
    int embed = kNone;
    ForEachWave([&] { embed = Compute(Op::kEmbed, Phase::kBackward, kNone, kNone, {}); });
    Complete(BucketIndex::kEmbedding, embed);
    Complete(BucketIndex::kVectors, embed);
    SendGradients(kNone);
  }

  // Sharded gradients have buffers for as many layers as weights have.
  void WaitForGradientBuffer(int layer) {
    const int other = layer + schedule_.prefetch + 1;
    gradient_buffer_ = kNone;
    if (!sharded() || other >= layers()) return;
    gradient_buffer_ = reduced_[static_cast<size_t>(buckets_.OfLayer(other))];
    SHOAL_CHECK_GT(gradient_buffer_, complete_[static_cast<size_t>(buckets_.OfLayer(other))])
        << "gradients of layer " << other << " must be sent before the backward pass of layer " << layer;
  }

  // As EmitLayer: each wave up to the departure of its gradients, behind what is left of the layer above.
  void EmitLayerBackward(int layer) {
    const Phase phase = Phase::kBackward;
    const int bucket = gathered_[static_cast<size_t>(buckets_.OfLayer(layer))];
    const int chunks = schedule_.layers[static_cast<size_t>(layer)].backward_chunks;
    const bool moe = layer_shape(layer).moe;
    FinishLayerBackward([&] {
      if (!moe) {
        Compute(Op::kDense, phase, layer, kNone, {bucket, gradient_buffer_});
        return;
      }
      const std::vector<std::vector<int>> recomputed =
          shape_.recompute ? std::move(wave().returned) : std::vector<std::vector<int>>();
      wave().arrived.clear();
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int pack = Compute(Op::kPack, phase, layer, chunk, {bucket, gradient_buffer_});
        if (chunk == 0) {
          for (const std::vector<int>& before : recomputed) Wait(pack, before);
        }
        wave().arrived.push_back(Travel(Op::kDispatch, phase, layer, chunk, pack));
      }
    });
    GatherLayer(layer - schedule_.prefetch, Phase::kBackward);
    SendGradients(layer);
    if (moe) EmitExpertsBackward(layer, chunks);
    finishing_ = layer;
    if (schedule_.waves == 1) FinishLayerBackward([] {});
  }

  void EmitExpertsBackward(int layer, int chunks) {
    const Phase phase = Phase::kBackward;
    int weights = kNone;
    ForEachWave([&] {
      if (layer_shape(layer).shared_expert) Compute(Op::kShared, phase, layer, kNone, {});
      wave().returned.clear();
      for (int chunk = 0; chunk < chunks; ++chunk) wave().returned.push_back(Experts(phase, layer, chunk));
      for (int chunk = 0; chunk < chunks; ++chunk) weights = Compute(Op::kExpertsWeight, phase, layer, chunk, {});
    });
    if (!shape_.materialise || !(last_part() || rematerialise())) return;
    const int reduced = Add(Op::kReduceExperts, phase, world_lane_, layer, kNone, {weights});
    experts_reduced_[static_cast<size_t>(layer)] = reduced;
    if (rematerialise()) FreeExperts(layer, reduced);
  }

  // What is left of the layer above, wave by wave, each followed by what `then` emits.
  template <typename Then> void FinishLayerBackward(const Then& then) {
    const int layer = std::exchange(finishing_, kNone);
    int attention = kNone;
    ForEachWave([&] {
      if (layer != kNone) {
        if (layer_shape(layer).moe) {
          const int route = Compute(Op::kRoute, Phase::kBackward, layer, kNone, {balanced_});
          for (const std::vector<int>& before : wave().returned) Wait(route, before);
        }
        attention = Compute(Op::kAttention, Phase::kBackward, layer, kNone, {});
      }
      then();
    });
    if (layer == kNone) return;
    Complete(buckets_.OfLayer(layer), attention);
    Release(buckets_.OfLayer(layer), Phase::kBackward);
  }

  // ---- Gradients.

  void Complete(int bucket, int task) { complete_[static_cast<size_t>(bucket)] = task; }

  // The slices that the schedule puts behind the last dispatch of `layer`; kNone: those at the end.
  void SendGradients(int layer) {
    if (shape_.ranks == 1) return;
    for (size_t i = 0; i < schedule_.gradients.size(); ++i) {
      const GradientSlice& slice = schedule_.gradients[i];
      if (slice.before_layer != layer || !(last_part() || sharded(slice.bucket))) continue;
      const size_t at = static_cast<size_t>(slice.bucket);
      SHOAL_CHECK(complete_[at] != kNone) << "gradients of bucket " << slice.bucket << " are sent before they exist";
      reduced_[at] = Add(Op::kReduce, Phase::kBackward, world_lane_, kNone, slice.bucket, {complete_[at]});
      graph_.tasks.back().slice = static_cast<int>(i);
    }
  }

  void EmitUpdate() {
    const Phase phase = Phase::kUpdate;
    const int norm = Compute(Op::kNorm, phase, kNone, kNone, {});
    Wait(norm, reduced_);
    Wait(norm, experts_reduced_);
    const int sum = shape_.ranks > 1 ? Add(Op::kNormSum, phase, Lane::kControl, kNone, kNone, {norm}) : kNone;
    for (int bucket = 0; bucket < buckets_.count(); ++bucket) Compute(Op::kUpdate, phase, kNone, bucket, {sum});
    for (int layer = 0; layer < layers(); ++layer) {
      if (layer_shape(layer).moe) Compute(Op::kUpdate, phase, layer, kNone, {sum});
    }
  }

  const StepShape& shape_;
  const Schedule& schedule_;
  const BucketIndex buckets_;
  const Lane world_lane_;
  Graph graph_;
  int part_ = 0;
  int wave_ = kNone;
  std::vector<Wave> waves_;
  int routed_ = kNone, balanced_ = kNone, gradient_buffer_ = kNone;
  int finishing_ = kNone;  // The layer whose backward pass lacks what waits for its rows.
  // By bucket. Of those that are sharded, too: is it here, and the task that released it. It has one place at a time.
  std::vector<int> gathered_;
  std::vector<bool> here_;
  std::vector<int> released_, complete_, reduced_;
  std::vector<int> materialised_;  // By layer; the next two as here_ and released_.
  std::vector<bool> experts_here_;
  std::vector<int> experts_released_, experts_reduced_;
  Buffers dense_buffers_, expert_buffers_;
};

}  // namespace

std::string Describe(const Schedule& schedule) {
  // "2" where all layers have as many, else each: "2 2 4 2".
  const auto chunks = [&](int LayerSchedule::*count) {
    std::vector<int> counts;
    for (const LayerSchedule& layer : schedule.layers) counts.push_back(layer.*count);
    const bool alike = std::adjacent_find(counts.begin(), counts.end(), std::not_equal_to<>()) == counts.end();
    if (alike && counts.size() > 1) counts.resize(1);
    return absl::StrJoin(counts, " ");
  };
  return absl::StrCat(schedule.waves, schedule.waves == 1 ? " wave" : " waves", "; chunks ",
                      chunks(&LayerSchedule::forward_chunks), " forward, ", chunks(&LayerSchedule::backward_chunks), " backward; ",
                      schedule.gradients.size(), " slices of gradients");
}

int DenseBuffers(int prefetch, int waves) {
  // Those gathered ahead, the one in use; with several waves also the one above, of which the last wave is not done yet.
  return prefetch + 1 + (waves > 1 ? 1 : 0);
}

int CompletedBy(const StepShape& shape, int bucket) {
  const int layer = bucket - 2;
  if (layer >= static_cast<int>(shape.layers.size())) return static_cast<int>(shape.layers.size());
  return layer < 0 ? -1 : layer;
}

Schedule PlainSchedule(const StepShape& shape, const std::vector<int64_t>& bucket_elements) {
  Schedule schedule;
  schedule.layers.resize(shape.layers.size());
  const BucketIndex buckets = shape.buckets();
  SHOAL_CHECK_EQ(bucket_elements.size(), static_cast<size_t>(buckets.count()));
  for (int bucket = buckets.count() - 1; bucket >= 0; --bucket) {
    const int completed = CompletedBy(shape, bucket);
    schedule.gradients.push_back({bucket, 0, bucket_elements[static_cast<size_t>(bucket)], completed < 0 ? -1 : completed - 1});
  }
  return schedule;
}

Graph EmitStep(const StepShape& shape, const Schedule& schedule) { return Emitter(shape, schedule).Emit(); }

}  // namespace shoal
