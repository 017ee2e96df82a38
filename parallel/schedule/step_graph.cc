#include "parallel/schedule/step_graph.h"

#include <algorithm>
#include <array>
#include <functional>
#include <initializer_list>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "parallel/schedule/turn_chooser.h"
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
  int finishing = kNone;                    // The layer whose backward pass lacks what waits for its rows.
  std::vector<std::vector<int>> arrived;    // By chunk: what brings its rows to the experts,
  std::vector<std::vector<int>> returned;   // and home,
  std::vector<std::vector<int>> again;      // and home where a layer is computed again.
};

// What a wave does before the next one does: up to where it waits for the links.
struct Turn {
  enum class Kind : uint8_t { kDepart, kExperts, kHead, kDepartAgain, kExpertsAgain, kDepartBackward, kExpertsBackward, kEnd };
  Kind kind = Kind::kDepart;
  int layer = kNone;
};

// Those of a part. "Again": computed anew for the backward pass.
std::vector<Turn> TurnsOf(const StepShape& shape) {
  std::vector<Turn> turns;
  const int layers = static_cast<int>(shape.layers.size());
  for (int layer = 0; layer < layers; ++layer) {
    turns.push_back({Turn::Kind::kDepart, layer});
    turns.push_back({Turn::Kind::kExperts, layer});
  }
  turns.push_back({Turn::Kind::kHead, kNone});
  if (shape.mode == StepShape::Mode::kForward) return turns;
  for (int layer = layers - 1; layer >= 0; --layer) {
    if (shape.recompute) {
      turns.push_back({Turn::Kind::kDepartAgain, layer});
      turns.push_back({Turn::Kind::kExpertsAgain, layer});
    }
    turns.push_back({Turn::Kind::kDepartBackward, layer});
    turns.push_back({Turn::Kind::kExpertsBackward, layer});
  }
  turns.push_back({Turn::Kind::kEnd, kNone});
  return turns;
}

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
    graph_.waves_apart = !schedule.turns.empty() && !shape.tied_head && !shape.streams;
    last_of_wave_.resize(waves_.size() + 1);
    for (std::array<int, kLanes>& lasts : last_of_wave_) lasts.fill(kNone);
    SHOAL_CHECK_EQ(schedule.layers.size(), shape.layers.size());
    SHOAL_CHECK(schedule.turns.empty() || WavesMayPart(shape)) << "the waves of this step must go together";
  }

  std::vector<int> ChooseTurns(const TurnRule& rule, const std::function<double(const Task&)>& cost_ns) {
    TurnChooser chooser(rule, cost_ns);
    chooser_ = &chooser;
    part_ = 0;
    EmitPart();
    return chooser.turns();
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
  bool sharded(int bucket) const { return sharded() && buckets_.Shardable(bucket); }
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
    for (int before : after) AddWait(&task, before);
    if (graph_.waves_apart && IsLocal(lane)) WaitForWaves(&task);
    graph_.tasks.push_back(std::move(task));
    return static_cast<int>(graph_.tasks.size()) - 1;
  }

  // Where lanes have no order among waves: what the list says without. The same task of the wave before comes first, so that sums
  // over waves have one order. What is for all waves comes after all that they have done, and so does the first task of a part.
  void WaitForWaves(Task* task) {
    const int index = static_cast<int>(graph_.tasks.size());
    const auto key = std::make_tuple(task->op, task->phase, task->layer, task->chunk, task->back);
    if (task->wave == kNone || same_of_wave_.empty()) {
      for (const std::array<int, kLanes>& lasts : last_of_wave_) {
        for (int last : lasts) AddWait(task, last);
      }
    } else if (task->wave > 0) {
      const auto same = same_of_wave_.find(key);
      SHOAL_CHECK(same != same_of_wave_.end()) << "wave " << task->wave << " is before an earlier one";
      AddWait(task, same->second);
    }
    if (task->wave != kNone) same_of_wave_[key] = index;
    last_of_wave_[static_cast<size_t>(task->wave + 1)][static_cast<size_t>(task->lane)] = index;
  }
  static void AddWait(Task* task, int before) {
    if (before != kNone && std::find(task->after.begin(), task->after.end(), before) == task->after.end()) task->after.push_back(before);
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
  Wave& wave() { return waves_[static_cast<size_t>(wave_)]; }

  // ---- Weights on their way here and away.

  int BucketOf(int layer) const { return gathered_[static_cast<size_t>(buckets_.OfLayer(layer))]; }

  // A bucket that is not kept takes a buffer: there are enough for `prefetch` layers ahead of the one in use.
  void Gather(int bucket, Phase phase) {
    if (shape_.ranks == 1) return;
    const size_t at = static_cast<size_t>(bucket);
    if (!sharded(bucket)) {
      if (gathered_[at] == kNone) gathered_[at] = Add(Op::kGather, phase, world_lane_, kNone, bucket, {});
      return;
    }
    if (here_[at]) return;
    here_[at] = true;
    const int buffer =
        buckets_.IsLayer(bucket) ? layer_buffers_.Take(DenseBuffers(schedule_.prefetch, schedule_.waves)) : end_buffers_.Take(1);
    gathered_[at] = Add(Op::kGather, phase, world_lane_, kNone, bucket, {buffer, released_[at]});
  }
  void Release(int bucket, Phase phase) {
    if (!sharded(bucket)) return;
    const size_t at = static_cast<size_t>(bucket);
    here_[at] = false;
    released_[at] = Compute(Op::kRelease, phase, kNone, bucket, {});
    (buckets_.IsLayer(bucket) ? layer_buffers_ : end_buffers_).Free(released_[at]);
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
    same_of_wave_.clear();
    Gather(BucketIndex::kVectors, Phase::kForward);
    Gather(BucketIndex::kEmbedding, Phase::kForward);
    for (int layer = 0; layer < schedule_.prefetch; ++layer) GatherLayer(layer, Phase::kForward);
    for (wave_ = 0; wave_ < schedule_.waves; ++wave_) {
      wave() = {};
      wave().x = Compute(Op::kEmbed, Phase::kForward, kNone, kNone,
                         {gathered_[BucketIndex::kEmbedding], gathered_[BucketIndex::kVectors]});
    }
    wave_ = kNone;
    Release(BucketIndex::kEmbedding, Phase::kForward);
    routed_ = waves_.front().x;  // The part has begun: all that its totals wait for where no layer has experts.
    const std::vector<Turn> turns = TurnsOf(shape_);
    std::vector<size_t> done(waves_.size());
    for (size_t turn = 0; turn < turns.size() * waves_.size(); ++turn) {
      wave_ = chooser_ != nullptr ? Choose(turns, done) : WaveOf(turn);
      const size_t at = static_cast<size_t>(wave_);
      SHOAL_CHECK(done[at] < turns.size() && (at == 0 || done[at - 1] > done[at])) << "wave " << wave_ << " is before an earlier one";
      EmitTurn(turns[done[at]++]);
    }
    wave_ = kNone;
  }

  int WaveOf(size_t turn) const {
    if (schedule_.turns.empty()) return static_cast<int>(turn % waves_.size());
    SHOAL_CHECK_LT(turn, schedule_.turns.size()) << "turns of another step";
    return schedule_.turns[turn];
  }

  int Choose(const std::vector<Turn>& turns, const std::vector<size_t>& done) {
    const size_t forward = 2 * shape_.layers.size() + 1, ahead = static_cast<size_t>(chooser_->rule().forward_waves);
    std::vector<TurnChooser::Candidate> candidates;
    for (size_t wave = 0; wave < waves_.size(); ++wave) {
      if (done[wave] == turns.size() || (wave > 0 && done[wave - 1] <= done[wave])) continue;
      if (wave >= ahead && done[wave - ahead] < forward) continue;
      candidates.push_back({static_cast<int>(wave), ArrivalsFor(turns[done[wave]], waves_[wave])});
    }
    return chooser_->Choose(graph_, candidates, world_lane_);
  }

  const std::vector<int>* ArrivalsFor(const Turn& turn, const Wave& wave) const {
    const bool experts = turn.kind == Turn::Kind::kExperts || turn.kind == Turn::Kind::kExpertsAgain ||
                         turn.kind == Turn::Kind::kExpertsBackward;
    if (experts && !layer_shape(turn.layer).moe) return nullptr;
    const std::vector<std::vector<int>>& chunks = experts ? wave.arrived : wave.returned;
    return chunks.empty() ? nullptr : &chunks.front();
  }

  // Tasks of all waves.
  template <typename Emit> void ForAll(const Emit& emit) {
    const int wave = std::exchange(wave_, kNone);
    emit();
    wave_ = wave;
  }

  void EmitTurn(const Turn& turn) {
    const bool first = wave_ == 0, last = wave_ + 1 == schedule_.waves;
    switch (turn.kind) {
      case Turn::Kind::kDepart:
        Depart(turn.layer, Phase::kForward);
        if (last && turn.layer + 1 == layers()) ForAll([&] { SumRouting(); });
        return;
      case Turn::Kind::kExperts:
        // Links bring weights behind departing rows and before those that come home.
        if (first) ForAll([&] { GatherAhead(turn.layer); });
        ComputeExperts(turn.layer, Phase::kForward);
        if (last) ForAll([&] { EndLayer(turn.layer); });
        return;
      case Turn::Kind::kHead:
        Head();
        if (last && training()) ForAll([&] { EndForward(); });
        return;
      case Turn::Kind::kDepartAgain:
        return Depart(turn.layer, Phase::kRecompute);
      case Turn::Kind::kExpertsAgain:
        return ComputeExperts(turn.layer, Phase::kRecompute);
      case Turn::Kind::kDepartBackward:
        DepartBackward(turn.layer);
        if (last) ForAll([&] { FillLinks(turn.layer); });
        return;
      case Turn::Kind::kExpertsBackward:
        if (layer_shape(turn.layer).moe) ComputeExpertsBackward(turn.layer);
        wave().finishing = turn.layer;
        if (schedule_.waves == 1) FinishLayerBackward();
        return;
      case Turn::Kind::kEnd:
        return EndBackward();
    }
  }

  // ---- Forward. A wave goes up to the departure of its rows, then lets others go on; what comes home is combined when it goes on.

  void Depart(int layer, Phase phase) {
    Combine();
    wave().arrived.clear();
    const int attention = Compute(Op::kAttention, phase, layer, kNone, {wave().x, BucketOf(layer)});
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
    for (int chunk = 0; chunk < schedule_.layers[static_cast<size_t>(layer)].forward_chunks; ++chunk) {
      const int pack = Add(Op::kPack, phase, lane, layer, chunk, {arrange});
      wave().arrived.push_back(Travel(Op::kDispatch, phase, layer, chunk, pack));
    }
  }

  void ComputeExperts(int layer, Phase phase) {
    if (!layer_shape(layer).moe) return;
    if (layer_shape(layer).shared_expert) Compute(Op::kShared, phase, layer, kNone, {});
    const int chunks = schedule_.layers[static_cast<size_t>(layer)].forward_chunks;
    std::vector<std::vector<int>>& returned = phase == Phase::kForward ? wave().returned : wave().again;
    returned.clear();
    for (int chunk = 0; chunk < chunks; ++chunk) returned.push_back(Experts(phase, layer, chunk));
    // The backward pass needs the rows, not their sum.
    if (phase == Phase::kForward) wave().combining = layer;
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

  void GatherAhead(int layer) {
    GatherLayer(layer + schedule_.prefetch, Phase::kForward);
    if (layer + 1 == layers()) Gather(buckets_.OfHead(), Phase::kForward);
  }

  // The last layer is where the backward pass begins.
  void EndLayer(int layer) {
    if (training() && layer + 1 == layers()) return;
    Release(buckets_.OfLayer(layer), Phase::kForward);
    ReleaseExperts(layer);
  }

  void SumRouting() {
    totals_ = training() && shape_.ranks > 1 ? Add(Op::kTotals, Phase::kForward, Lane::kControl, kNone, kNone, {routed_}) : kNone;
  }

  void Head() {
    Combine();
    head_ = Compute(Op::kHead, Phase::kForward, kNone, kNone, {wave().x, gathered_[static_cast<size_t>(buckets_.OfHead())]});
    if (sharded()) Wait(head_, reduced_);  // The gradients' buffers of the part before.
    if (wave_ + 1 == schedule_.waves) ForAll([&] { Release(buckets_.OfHead(), Phase::kForward); });
    if (training()) Compute(Op::kHead, Phase::kBackward, kNone, kNone, {});
  }

  void EndForward() {
    if (!shape_.tied_head) Complete(buckets_.OfHead(), head_);
    balanced_ = Compute(Op::kBalance, Phase::kForward, kNone, kNone, {totals_});
    for (int layer = layers() - 1; layer >= layers() - schedule_.prefetch; --layer) GatherLayer(layer, Phase::kBackward);
  }

  // ---- Backward: as forward, each wave up to the departure of its gradients, behind what is left of the layer above.

  void DepartBackward(int layer) {
    const Phase phase = Phase::kBackward;
    const int buffer = GradientBuffer(layer);
    FinishLayerBackward();
    if (!layer_shape(layer).moe) {
      Compute(Op::kDense, phase, layer, kNone, {BucketOf(layer), buffer});
      return;
    }
    wave().arrived.clear();
    for (int chunk = 0; chunk < schedule_.layers[static_cast<size_t>(layer)].backward_chunks; ++chunk) {
      const int pack = Compute(Op::kPack, phase, layer, chunk, {BucketOf(layer), buffer});
      if (chunk == 0 && shape_.recompute) {
        for (const std::vector<int>& before : wave().again) Wait(pack, before);
      }
      wave().arrived.push_back(Travel(Op::kDispatch, phase, layer, chunk, pack));
    }
  }

  // Sharded gradients have buffers for as many layers as weights have: what a layer's waits for.
  int GradientBuffer(int layer) const {
    const int other = layer + schedule_.prefetch + 1;
    if (!sharded() || other >= layers()) return kNone;
    const int reduced = reduced_[static_cast<size_t>(buckets_.OfLayer(other))];
    SHOAL_CHECK_GT(reduced, complete_[static_cast<size_t>(buckets_.OfLayer(other))])
        << "gradients of layer " << other << " must be sent before the backward pass of layer " << layer;
    return reduced;
  }

  // That of the head, which the embedding's take.
  int EndGradientBuffer() const {
    if (!sharded(BucketIndex::kEmbedding)) return kNone;
    const size_t head = static_cast<size_t>(buckets_.OfHead());
    SHOAL_CHECK_GT(reduced_[head], complete_[head]) << "gradients of the head must be sent before those of the embedding are computed";
    return reduced_[head];
  }

  // Between departing gradients and those that come home.
  void FillLinks(int layer) {
    GatherLayer(layer - schedule_.prefetch, Phase::kBackward);
    SendGradients(layer);
  }

  void ComputeExpertsBackward(int layer) {
    const Phase phase = Phase::kBackward;
    const int chunks = schedule_.layers[static_cast<size_t>(layer)].backward_chunks;
    int weights = kNone;
    if (layer_shape(layer).shared_expert) Compute(Op::kShared, phase, layer, kNone, {});
    wave().returned.clear();
    for (int chunk = 0; chunk < chunks; ++chunk) wave().returned.push_back(Experts(phase, layer, chunk));
    for (int chunk = 0; chunk < chunks; ++chunk) weights = Compute(Op::kExpertsWeight, phase, layer, chunk, {});
    if (wave_ + 1 < schedule_.waves || !shape_.materialise || !(last_part() || rematerialise())) return;
    ForAll([&] {
      const int reduced = Add(Op::kReduceExperts, phase, world_lane_, layer, kNone, {weights});
      experts_reduced_[static_cast<size_t>(layer)] = reduced;
      if (rematerialise()) FreeExperts(layer, reduced);
    });
  }

  // What is left of the wave's layer above.
  void FinishLayerBackward() {
    const int layer = std::exchange(wave().finishing, kNone);
    if (layer == kNone) return;
    if (layer_shape(layer).moe) {
      const int route = Compute(Op::kRoute, Phase::kBackward, layer, kNone, {shape_.balance ? balanced_ : kNone});
      for (const std::vector<int>& before : wave().returned) Wait(route, before);
    }
    const int attention = Compute(Op::kAttention, Phase::kBackward, layer, kNone, {});
    if (wave_ + 1 < schedule_.waves) return;
    ForAll([&] {
      Complete(buckets_.OfLayer(layer), attention);
      Release(buckets_.OfLayer(layer), Phase::kBackward);
    });
  }

  void EndBackward() {
    FinishLayerBackward();
    const int embed = Compute(Op::kEmbed, Phase::kBackward, kNone, kNone, {EndGradientBuffer()});
    if (wave_ + 1 < schedule_.waves) return;
    ForAll([&] {
      Complete(BucketIndex::kEmbedding, embed);
      Complete(BucketIndex::kVectors, embed);
      SendGradients(kNone);
    });
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
  TurnChooser* chooser_ = nullptr;
  int part_ = 0;
  int wave_ = kNone;
  std::vector<Wave> waves_;
  // Of waves_apart: the last wave's task of a kind in this part, and the last tasks of the local lanes, by wave, first those of none.
  absl::flat_hash_map<std::tuple<Op, Phase, int, int, bool>, int> same_of_wave_;
  std::vector<std::array<int, kLanes>> last_of_wave_;
  int routed_ = kNone, totals_ = kNone, head_ = kNone, balanced_ = kNone;
  // By bucket. Of those that are sharded, too: is it here, and the task that released it. It has one place at a time.
  std::vector<int> gathered_;
  std::vector<bool> here_;
  std::vector<int> released_, complete_, reduced_;
  std::vector<int> materialised_;  // By layer; the next two as here_ and released_.
  std::vector<bool> experts_here_;
  std::vector<int> experts_released_, experts_reduced_;
  Buffers layer_buffers_, end_buffers_, expert_buffers_;
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
  const char* const order = schedule.turns.empty() ? "" : ", not in step";
  return absl::StrCat(schedule.waves, schedule.waves == 1 ? " wave" : " waves", order, "; chunks ",
                      chunks(&LayerSchedule::forward_chunks), " forward, ", chunks(&LayerSchedule::backward_chunks), " backward; ",
                      schedule.gradients.size(), " slices of gradients");
}

bool WavesMayPart(const StepShape& shape) {
  return shape.mode == StepShape::Mode::kTrain && !shape.balance && shape.dense == DensePolicy::kReplicated &&
         !(shape.materialise && shape.experts == ExpertPolicy::kRematerialise);
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

std::vector<int> WavesUpTo(int64_t sequences) {
  constexpr int kMost = 8;
  std::vector<int> waves = {1};
  while (waves.back() < kMost && 2 * waves.back() <= sequences) waves.push_back(2 * waves.back());
  return waves;
}

std::vector<int> PrefetchUpTo(const StepShape& shape) {
  const bool rooms = shape.dense == DensePolicy::kSharded || (shape.materialise && shape.experts == ExpertPolicy::kRematerialise);
  std::vector<int> prefetch = {1};
  for (const int layers : {2, 4}) {
    if (!rooms && shape.ranks > 1 && layers <= static_cast<int>(shape.layers.size())) prefetch.push_back(layers);
  }
  return prefetch;
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

std::vector<int> ChooseTurns(const StepShape& shape, const Schedule& schedule, const TurnRule& rule,
                             const std::function<double(const Task&)>& cost_ns) {
  return Emitter(shape, schedule).ChooseTurns(rule, cost_ns);
}

Graph EmitStep(const StepShape& shape, const Schedule& schedule) { return Emitter(shape, schedule).Emit(); }

}  // namespace shoal
