// One optimizer step of one rank: forward, backward, reduction, clipping, AdamW, run as a step graph (parallel/schedule). Where
// things live is the placement's, what is computed the decoder's; here the two meet.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "collectives/communicator.h"
#include "launch/config/config.pb.h"
#include "launch/trainer/expert_moves.h"
#include "launch/trainer/layout.h"
#include "launch/trainer/routing_sums.h"
#include "launch/trainer/recorded_step.h"
#include "launch/trainer/step_buffers.h"
#include "launch/trainer/step_tuner.h"
#include "models/zoo/decoder.h"
#include "parallel/schedule/executor.h"

namespace shoal {

struct StepResult : RoutingReport {
  double loss = 0;  // cross_entropy + coefficients * (aux, z, seq_aux), over the global batch; the same on every rank.
  double cross_entropy = 0;
  double grad_norm = 0;                  // Before clipping.
  std::vector<Tensor> router_state;      // Per MoE layer, after the step: Router::state.
  std::optional<ExpertSummary> experts;  // None: no layer has experts, or there is one rank.
  bool finite = true;                               // False: the update was skipped.
  int64_t request = 0;                              // The highest of all ranks' Options::request.
  double forward_seconds = 0, backward_seconds = 0, reduce_seconds = 0, update_seconds = 0;
};

// Gradients of a step before clipping and update; for tests. Called between the reduction and the update.
using OnGradients = std::function<void(const ParameterStore&)>;

// The model of one rank, ready to train or to evaluate. Not thread-safe; its collective calls are made by all ranks alike.
class RankModel {
 public:
  // Nanoseconds that a task of the compute lane takes at least, by its units: an emulated device. The thread sleeps the rest.
  using Pace = std::function<int64_t(const Task& task, double units)>;
  using Calibrate = std::function<ExpertPlacement(const ExpertPlacement& planned, absl::Span<const int64_t> rows)>;
  struct Options {
    bool training = true;
    int64_t host = 0;  // Equal on ranks of one host.
    Device* device = nullptr;  // That computes, with the parameters in its memory; null: the CPU.
    std::function<int64_t()> request;  // Asked at the end of each training step, on every rank; null: 0.
    Pace pace;         // For experiments with clusters on one machine; null: none.
    Calibrate calibrate;  // For tests of sparse experts: as ExpertContext::calibrate, instead of copies that pay; null: none.
  };
  // Collective. Borrows `world` for life. `precision` fp32 or bf16 is the configuration's. Parameters are uninitialised.
  // INVALID_ARGUMENT: the parallel layout does not fit, or a device cannot do it; RESOURCE_EXHAUSTED: too little memory.
  static absl::StatusOr<std::unique_ptr<RankModel>> Create(const Config& config, const ModelConfig& model,
                                                           Communicator& world, const Options& options);

  // Collective. One step on this rank's rows of each part of the global batch: batch_of(part) is [rows, seq + 1] (i32).
  absl::StatusOr<StepResult> Train(const std::vector<Tensor>& parts, double learning_rate, int64_t update,
                                   const OnGradients& on_gradients = nullptr);
  // Collective. Sum of cross-entropies over all ranks' rows; this rank has RowsOf(all_rows) of them.
  absl::StatusOr<double> Evaluate(const Tensor& rows, int64_t all_rows);
  // Collective. Logits [V] (f32) of the token after `ids` [n] (i32), n >= 1, the same on every rank.
  absl::StatusOr<Tensor> NextLogits(const Tensor& ids);

  // This rank's share of a part of the batch with `rows` sequences.
  Range RowsOf(int64_t rows) const { return EvenPart(rows, topology_.ranks(), world_->index()); }

  ParameterStore& store() { return *store_; }
  const ParameterStore& store() const { return *store_; }
  Decoder& decoder() { return *decoder_; }
  Stream& stream() { return *stream_; }
  const Topology& topology() const { return topology_; }
  const ModelConfig& model() const { return model_; }
  // The graph of the last training step, and when its tasks ran.
  const Graph& graph() const { return train_.graph; }
  const StepRecord& record() const { return record_; }
  const Schedule& schedule() const { return train_.schedule; }
  int rank() const { return world_->index(); }
  // What the tasks of the last step had to do.
  Workload workload() const { return WorkloadOf(train_.shape); }
  // Null where experts stay where they are.
  ExpertMoves* moves() { return moves_.get(); }
  // Null without training.
  StepTuner* tuner() { return tuner_.get(); }

 private:
  // A graph with the schedule it was emitted from.
  struct Program {
    StepShape shape;
    Schedule schedule;
    Graph graph;
  };
  // What the tasks of one step share.
  struct StepState {
    kernels::AdamWStep update;
    const OnGradients* on_gradients = nullptr;
    StepRouting routing;
    bool numbers_sent = false;  // Of ClipOnHost.
    StepResult result;
  };

  RankModel(const Config& config, const ModelConfig& model, Communicator& world)
      : config_(config), model_(model), world_(&world) {}
  absl::Status Connect(const Options& options);
  absl::StatusOr<std::unique_ptr<Stream>> NewStream(Device* device) const;
  absl::Status SetUpSchedules(const StepShape& shape, bool training);
  void SetUpMoves(const Options& options);
  Workload WorkloadOf(const StepShape& shape) const;
  std::vector<ExpertWork> ExpertWorkOfStep() const;
  // Collective. FAILED_PRECONDITION names the ranks that have another graph than rank 0.
  absl::Status SetSchedule(const Schedule& schedule);
  absl::Status AfterStep(StepResult* result);
  std::optional<ExpertSummary> Summarise(const StepResult& result) const;
  absl::Status PrepareStep(const std::vector<Tensor>& parts, const kernels::AdamWStep& update);
  // Null on the CPU.
  std::unique_ptr<StreamLanes> LanesOf(const Program& program, Timing timing);
  // Returns when all that the program does has been done.
  absl::Status Execute(const Program& program, StreamLanes* lanes, StepRecord* record, const Executor::Body& body);
  absl::StatusOr<double> RunOnLane(const Task& task, StreamLanes* lanes, const Executor::Body& body);
  absl::Status AwaitStreams(const StreamLanes* lanes, StepRecord* record);
  absl::Status RunStep(StepState* step);
  // An error: nothing was recorded, and nothing of the step done.
  absl::Status RecordStep(StepState* step);
  absl::Status ReplayStep(StepState* step);
  void ForgetRecorded();
  std::vector<int64_t> TokensOfRanks(int64_t all_rows, int64_t seq) const;
  absl::Status RunForward(Decoder::Pass pass);
  Stream& StreamOf(const Task& task) { return task.lane == Lane::kCompute ? *stream_ : *copy_stream_; }

  absl::StatusOr<double> RunTrainTask(const Task& task, StepState* step);
  absl::StatusOr<double> RunStoreTask(const Task& task);
  void BeginPart(int part, StepState* step);
  absl::StatusOr<double> SumRouting(StepState* step);  // kTotals
  absl::Status Balance(StepState* step);             // kBalance
  // Of the gradients, when the host knows it before the update; otherwise the stream clips by itself, and the host reads at the end.
  bool host_clips() const { return stream_->device() == nullptr || world_->size() > 1; }
  void Norm(StepState* step);
  absl::StatusOr<double> SumNorm(StepState* step);
  void FinishNorm(const Tensor& sums, StepState* step);
  double Update(const Task& task, StepState* step);
  void SetTimes(const Graph& graph, StepResult* result) const;

  const Config config_;
  const ModelConfig model_;
  Pace pace_;
  std::function<int64_t()> request_;
  Communicator* world_;
  Order order_ = Order::kFast;  // Of sums over ranks.
  Topology topology_;
  std::unique_ptr<Stream> stream_, copy_stream_;  // Of the compute lane and of the copy lane.
  std::unique_ptr<Communicator> control_, bulk_, intra_;  // Of all ranks, twice; of this host where there are several. The last two are for
                                                          // tensors where the parameters are.
  std::unique_ptr<ParameterStore> store_;
  std::unique_ptr<TokenExchange> exchange_;
  ExpertContext experts_;
  std::unique_ptr<Decoder> decoder_;
  Executor executor_;
  std::unique_ptr<StepTuner> tuner_;
  bool reschedule_ = false;             // The next step has another schedule.
  std::unique_ptr<ExpertMoves> moves_;  // Of sparse experts.
  Program train_, forward_;
  std::unique_ptr<StreamLanes> lanes_;  // Of train_.
  std::optional<StepBuffers> buffers_;
  StepRecord record_;
  bool record_steps_ = false;  // schedule.device_graphs, until recording fails.
  bool ran_ = false;           // A step of train_ with these buffers was run.
  std::optional<RecordedStep> recorded_;
};

}  // namespace shoal
