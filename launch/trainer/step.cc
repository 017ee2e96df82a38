#include "launch/trainer/step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

#include "absl/strings/str_join.h"
#include "collectives/backend/device_group.h"
#include "launch/status/measured_communicator.h"
#include "launch/trainer/rank_values.h"
#include "runtime/base/log.h"
#include "runtime/base/thread.h"
#include "runtime/device/cpu.h"
#include "runtime/device/device.h"

namespace shoal {
namespace {

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// ---- Setting up.

absl::StatusOr<std::unique_ptr<RankModel>> RankModel::Create(const Config& config, const ModelConfig& model,
                                                             Communicator& world, const Options& options) {
  std::unique_ptr<RankModel> rank_model(new RankModel(config, model, world));
  rank_model->order_ = NumericsFor(config) == Numerics::kPinned ? Order::kFixed : Order::kFast;
  rank_model->pace_ = options.pace;
  rank_model->request_ = options.request;
  if (options.pace != nullptr) AskForExactTimers();
  rank_model->record_steps_ = config.schedule().device_graphs() == "auto";
  SHOAL_ASSIGN_OR_RETURN(std::vector<ExpertPlacement> placement, InitialPlacement(config, model, world.size()));
  SHOAL_ASSIGN_OR_RETURN(rank_model->stream_, rank_model->NewStream(options.device));
  SHOAL_ASSIGN_OR_RETURN(rank_model->copy_stream_, rank_model->NewStream(options.device));
  SHOAL_RETURN_IF_ERROR(rank_model->Connect(options), "communicators");
  const bool sparse = HasSparseExperts(config, model, world.size());
  StepShape shape = StepShapeFor(config, model, rank_model->topology_, placement);
  shape.streams = options.device != nullptr;
  shape.calibrate = sparse && (config.parallel().calibrate() || options.calibrate != nullptr);
  const DType compute = config.train().precision() == "bf16" ? DType::kBF16 : DType::kF32;
  SHOAL_ASSIGN_OR_RETURN(rank_model->store_,
                         ParameterStore::Create(ParameterSpecs(model), std::move(placement), *rank_model->bulk_,
                                                {.compute = compute,
                                                 .training = options.training,
                                                 .dense = shape.dense,
                                                 .experts = shape.experts,
                                                 .prefetch = PrefetchToChooseFrom(config, shape).back(),
                                                 .waves_max = WavesToChooseFrom(config, model, shape).back(),
                                                 .copies = sparse ? ExpertMoves::FirstRoom(config) : -1,
                                                 .topology = rank_model->topology_,
                                                 .numerics = NumericsFor(config),
                                                 .stream = rank_model->stream_.get(),
                                                 .products = ProductsFor(config)}));
  const bool several = rank_model->topology_.hosts() > 1;
  TokenExchange::Streams lanes;
  for (std::unique_ptr<Stream>& lane : lanes) {
    SHOAL_ASSIGN_OR_RETURN(lane, rank_model->NewStream(options.device));
  }
  rank_model->exchange_ = std::make_unique<TokenExchange>(several ? rank_model->bulk_.get() : nullptr,
                                                          several ? rank_model->intra_.get() : rank_model->bulk_.get(),
                                                          rank_model->topology_, world.index(), std::move(lanes));
  rank_model->experts_ = {.control = shape.exchange && world.size() > 1 ? rank_model->control_.get() : nullptr,
                          .exchange = rank_model->exchange_.get(),
                          .topology = rank_model->topology_,
                          .rank = world.index(),
                          .rule = DispatchRuleFor(config),
                          .numerics = NumericsFor(config)};
  rank_model->decoder_ = std::make_unique<Decoder>(model,
                                                   Decoder::Options{.seq = config.train().seq_length(),
                                                                    .recompute = config.train().recompute(),
                                                                    .loss_chunk = config.train().loss_chunk(),
                                                                    .end_of_document = EndOfDocument(config)},
                                                   *rank_model->store_, rank_model->experts_, *rank_model->stream_);
  SHOAL_RETURN_IF_ERROR(rank_model->SetUpSchedules(shape, options.training));
  if (sparse && options.training) rank_model->SetUpMoves(options);
  return rank_model;
}

absl::StatusOr<std::unique_ptr<Stream>> RankModel::NewStream(Device* device) const {
  if (device == nullptr) return std::make_unique<Stream>();
  return device->NewStream();
}

absl::Status RankModel::Connect(const Options& options) {
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> hosts, GatherValues(*world_, options.host, "hosts"));
  topology_ = TopologyOf(hosts);
  std::vector<int> all(static_cast<size_t>(world_->size()));
  std::iota(all.begin(), all.end(), 0);
  SHOAL_ASSIGN_OR_RETURN(control_, SplitAs(*world_, all, "control"));
  SHOAL_ASSIGN_OR_RETURN(bulk_, SplitAs(*world_, all, "bulk"));
  const std::vector<int> here = topology_.RanksOf(topology_.HostOf(world_->index()));
  if (topology_.hosts() > 1 && here.size() > 1) {
    SHOAL_ASSIGN_OR_RETURN(intra_, SplitAs(*world_, here, "intra"));
  }
  if (options.device == nullptr || world_->size() == 1) return absl::OkStatus();
  for (std::unique_ptr<Communicator>* group : {&bulk_, &intra_}) {
    if (*group == nullptr) continue;
    absl::StatusOr<const NcclApi*> nccl = absl::FailedPreconditionError("train.numerics: pinned adds in the order of ranks");
    if (order_ == Order::kFast) nccl = LoadNccl(*options.device);
    SHOAL_ASSIGN_OR_RETURN(*group, DeviceGroup(std::move(*group), *options.device, nccl,
                                               {.connect_timeout = absl::Seconds(config_.comm().connect_timeout_seconds()),
                                                .timeout = absl::Seconds(config_.comm().timeout_seconds())}));
  }
  return absl::OkStatus();
}

absl::Status RankModel::SetUpSchedules(const StepShape& shape, bool training) {
  const StepSchedule& wanted = config_.schedule();
  StepTuner::Options options;
  options.scheduler.waves = WavesToChooseFrom(config_, model_, shape);
  options.choose = training && (wanted.chunks_forward() == 0 || wanted.chunks_backward() == 0 ||
                                wanted.gradient_slices() == "auto" || options.scheduler.waves.size() > 1);
  options.replan = wanted.replan();
  options.scheduler.chunks_forward = wanted.chunks_forward();
  options.scheduler.chunks_backward = wanted.chunks_backward();
  options.scheduler.slice_gradients = wanted.gradient_slices() == "auto";
  options.scheduler.prefetch = PrefetchToChooseFrom(config_, shape);
  options.scheduler.part_waves = wanted.wave_order() != "together";
  options.start_apart = wanted.wave_order() == "apart";
  forward_.shape = shape;
  forward_.shape.mode = StepShape::Mode::kForward;
  forward_.shape.parts = 1;
  auto tuner = std::make_unique<StepTuner>(shape, topology_, WorkloadOf(shape), world_->size() > 1 ? control_.get() : nullptr,
                                           options);
  forward_.schedule = tuner->schedule();
  forward_.schedule.waves = 1;
  forward_.schedule.turns.clear();
  forward_.graph = EmitStep(forward_.shape, forward_.schedule);
  if (!training) return absl::OkStatus();
  tuner_ = std::move(tuner);
  train_.shape = shape;
  return SetSchedule(tuner_->schedule());
}

void RankModel::SetUpMoves(const Options& options) {
  moves_ = std::make_unique<ExpertMoves>(config_, topology_, *control_, store_->experts());
  if (options.calibrate != nullptr) {
    experts_.calibrate = options.calibrate;
  } else if (config_.parallel().calibrate()) {
    experts_.calibrate = [this](const ExpertPlacement& planned, absl::Span<const int64_t> rows) {
      return moves_->Calibrate(planned, rows, train_.schedule.waves * train_.shape.parts);
    };
  }
}

absl::Status RankModel::SetSchedule(const Schedule& schedule) {
  ForgetRecorded();
  train_.schedule = schedule;
  train_.graph = EmitStep(train_.shape, schedule);
  lanes_ = LanesOf(train_, Timing::kYes);
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> fingerprints,
                         GatherValues(*control_, static_cast<int64_t>(Fingerprint(train_.graph)), "schedule"));
  std::vector<int> others;
  for (size_t rank = 1; rank < fingerprints.size(); ++rank) {
    if (fingerprints[rank] != fingerprints[0]) others.push_back(static_cast<int>(rank));
  }
  if (others.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("ranks ", absl::StrJoin(others, ", "),
                                                    " have another step graph than rank 0: do all run the same program?"));
}

Workload RankModel::WorkloadOf(const StepShape& shape) const {
  const int64_t act = config_.train().precision() == "bf16" ? 2 : 4, seq = config_.train().seq_length();
  Workload workload;
  workload.tokens = TokensOfRanks(config_.train().global_batch_size() / shape.parts, seq);
  workload.sequence_tokens = seq;
  workload.choices = model_.num_experts_per_tok;
  workload.row_bytes = model_.hidden_size * act;
  workload.dispatch = DispatchRuleFor(config_);
  workload.expert_elements = store_->experts().expert_elements();
  workload.expert_weight_bytes = workload.expert_elements * act;
  workload.expert_gradient_bytes = workload.expert_elements * 4;
  for (int bucket = 0; bucket < store_->dense().buckets(); ++bucket) {
    workload.bucket_elements.push_back(store_->dense().elements(bucket));
    workload.bucket_bytes.push_back(store_->dense().bytes(bucket));
  }
  workload.summary_bytes = model_.num_local_experts * 8;
  workload.totals_bytes = StepRouting::Bytes(model_);
  workload.norm_bytes = static_cast<int64_t>(store_->blocks().size() + 1) * 8;
  int next = 0;
  for (const LayerShape& layer : shape.layers) workload.experts_of_layer.push_back(layer.moe ? next++ : -1);
  workload.experts = ExpertWorkOfStep();
  return workload;
}

std::vector<ExpertWork> RankModel::ExpertWorkOfStep() const {
  return ExpertWorkOf(store_->experts(), decoder_->rows_by_rank(), config_.train().gradient_accumulation_steps());
}

// ---- Between steps.

absl::Status RankModel::AfterStep(StepResult* result) {
  result->experts = Summarise(*result);
  const int64_t request = request_ == nullptr ? 0 : request_();
  SHOAL_ASSIGN_OR_RETURN(reschedule_, tuner_->AfterStep(train_.graph, record_, ExpertWorkOfStep(), request), "tuning the schedule");
  result->request = tuner_->request();
  if (moves_ == nullptr) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(
      result->experts->owner_moves,
      moves_->AfterStep(decoder_->rows_by_rank(), tuner_->profiler().table(), train_.shape, WorkloadOf(train_.shape)));
  return absl::OkStatus();
}

std::optional<ExpertSummary> RankModel::Summarise(const StepResult& result) const {
  if (world_->size() == 1 || result.expert_counts.empty()) return std::nullopt;
  ExpertSummary summary = SummariseExperts(WorkloadOf(train_.shape), topology_, train_.graph);
  int64_t choices = 0, dropped = 0;
  for (const std::vector<int64_t>& layer : result.expert_counts) choices = std::accumulate(layer.begin(), layer.end(), choices);
  for (const std::vector<int64_t>& layer : result.dropped) dropped = std::accumulate(layer.begin(), layer.end(), dropped);
  if (choices > 0) summary.dropped = static_cast<double>(dropped) / static_cast<double>(choices);
  return summary;
}

// ---- Running.

std::unique_ptr<StreamLanes> RankModel::LanesOf(const Program& program, Timing timing) {
  if (stream_->device() == nullptr) return nullptr;
  return std::make_unique<StreamLanes>(program.graph, *stream_, *copy_stream_, timing);
}

absl::StatusOr<double> RankModel::RunOnLane(const Task& task, StreamLanes* lanes, const Executor::Body& body) {
  if (task.lane != Lane::kCompute) SetThreads(1);  // The team is the compute lane's.
  if (lanes != nullptr) {
    SHOAL_RETURN_IF_ERROR(lanes->Begin(task));
    SHOAL_ASSIGN_OR_RETURN(const double units, body(task));
    SHOAL_RETURN_IF_ERROR(lanes->End(task));
    return units;
  }
  if (pace_ == nullptr || task.lane != Lane::kCompute) return body(task);
  const auto begin = std::chrono::steady_clock::now();
  SHOAL_ASSIGN_OR_RETURN(const double units, body(task));
  std::this_thread::sleep_until(begin + std::chrono::nanoseconds(pace_(task, units)));
  return units;
}

absl::Status RankModel::Execute(const Program& program, StreamLanes* lanes, StepRecord* record, const Executor::Body& body) {
  const auto abort = [this](const absl::Status& status) { world_->Abort(status); };
  const auto on_lane = [&](const Task& task) { return RunOnLane(task, lanes, body); };
  if (lanes != nullptr) lanes->Start();
  SHOAL_RETURN_IF_ERROR(executor_.Run(program.graph, on_lane, abort, record));
  return AwaitStreams(lanes, record);
}

// The host's one wait, unless it has to know more.
absl::Status RankModel::AwaitStreams(const StreamLanes* lanes, StepRecord* record) {
  stream_->WaitFor(*copy_stream_);
  const absl::Status status = stream_->Wait();
  if (!status.ok()) {
    world_->Abort(status);
    return Annotate(status, "at the end of the step");
  }
  if (lanes == nullptr || record == nullptr) return absl::OkStatus();
  record->end_ns = NowNs();
  return lanes->SetTimes(record);
}

absl::Status RankModel::RunStep(StepState* step) {
  const StepWay way = WayOf({.wanted = record_steps_,
                             .on_device = stream_->device() != nullptr,
                             .ranks = world_->size(),
                             .routes_on_stream = RoutesOnStream(model_, experts_, *stream_),
                             .observed = *step->on_gradients != nullptr,
                             .ran = ran_,
                             .recorded = recorded_.has_value()});
  if (way == StepWay::kReplay) return ReplayStep(step);
  if (way == StepWay::kRecord) {
    StepState recorded = *step;
    const absl::Status status = RecordStep(&recorded);
    if (status.ok()) return ReplayStep(step);
    SHOAL_LOG(kWarning) << "steps are not recorded as graphs: " << std::string(status.message());
    record_steps_ = false;
  }
  SHOAL_RETURN_IF_ERROR(Execute(train_, lanes_.get(), &record_, [&](const Task& task) { return RunTrainTask(task, step); }));
  ran_ = true;
  return absl::OkStatus();
}

// The graph has memory of its own, as much as a step needs: what steps before it have left in the pool makes room.
absl::Status RankModel::RecordStep(StepState* step) {
  stream_->device()->memory().Trim();
  recorded_.emplace(train_.graph, *stream_, *copy_stream_);
  const auto on_lane = [&](const Task& task) {
    return RunOnLane(task, &recorded_->lanes, [&](const Task& own) { return RunTrainTask(own, step); });
  };
  absl::Status status = stream_->BeginCapture();
  if (status.ok()) {
    status = executor_.Run(train_.graph, on_lane, /*on_failure=*/nullptr, &recorded_->record);
    if (copy_stream_->capturing()) stream_->WaitFor(*copy_stream_);
    absl::StatusOr<CapturedGraph> graph = stream_->EndCapture();
    if (status.ok()) status = graph.status();
    if (status.ok()) recorded_->graph = *std::move(graph);
  }
  recorded_->routing = std::move(step->routing);
  if (!status.ok()) recorded_.reset();
  return status;
}

absl::Status RankModel::ReplayStep(StepState* step) {
  step->routing = *recorded_->routing;
  record_ = recorded_->record;
  record_.begin_ns = NowNs();
  recorded_->lanes.Start();
  stream_->Launch(recorded_->graph);
  return AwaitStreams(&recorded_->lanes, &record_);
}

void RankModel::ForgetRecorded() {
  recorded_.reset();
  ran_ = false;
}

absl::Status RankModel::PrepareStep(const std::vector<Tensor>& parts, const kernels::AdamWStep& update) {
  if (std::exchange(reschedule_, false)) SHOAL_RETURN_IF_ERROR(SetSchedule(tuner_->schedule()), "changing the schedule");
  SHOAL_CHECK_EQ(parts.size(), static_cast<size_t>(train_.shape.parts));
  if (!buffers_.has_value() || !buffers_->Fits(parts, train_.schedule.waves)) {
    ForgetRecorded();
    buffers_.reset();
    buffers_.emplace(static_cast<int64_t>(store_->blocks().size()), train_.shape.parts, train_.schedule.waves, parts[0].dim(0),
                     parts[0].dim(1) - 1, *stream_);
  }
  buffers_->Put(parts, update);
  return stream_->status();
}

std::vector<int64_t> RankModel::TokensOfRanks(int64_t all_rows, int64_t seq) const {
  std::vector<int64_t> tokens;
  for (int rank = 0; rank < topology_.ranks(); ++rank) {
    tokens.push_back(EvenPart(all_rows, topology_.ranks(), rank).count * seq);
  }
  return tokens;
}

absl::StatusOr<StepResult> RankModel::Train(const std::vector<Tensor>& parts, double learning_rate, int64_t update,
                                            const OnGradients& on_gradients) {
  const Optimizer& optimizer = config_.optimizer();
  StepState step{
      .update = {.learning_rate = learning_rate,
                 .beta1 = optimizer.beta1(),
                 .beta2 = optimizer.beta2(),
                 .epsilon = optimizer.eps(),
                 .weight_decay = optimizer.weight_decay(),
                 .update = update},
      .on_gradients = &on_gradients,
      .routing = StepRouting(model_, train_.shape.parts, config_.train().global_batch_size() / train_.shape.parts,
                             config_.train().seq_length())};
  SHOAL_RETURN_IF_ERROR(PrepareStep(parts, step.update), "preparing a step");
  SHOAL_RETURN_IF_ERROR(RunStep(&step));
  if (!host_clips()) FinishNorm(buffers_->HostSums(), &step);
  const std::vector<Router*> routers = decoder_->routers();
  for (size_t layer = 0; layer < routers.size(); ++layer) {
    if (step.result.finite) routers[layer]->EndStep(step.result.expert_counts[layer]);
    step.result.router_state.push_back(routers[layer]->state());
  }
  SetTimes(train_.graph, &step.result);
  SHOAL_RETURN_IF_ERROR(AfterStep(&step.result));
  return std::move(step.result);
}

absl::StatusOr<double> RankModel::RunTrainTask(const Task& task, StepState* step) {
  switch (task.op) {
    case Op::kEmbed:
      if (task.phase == Phase::kForward && task.wave == 0) BeginPart(task.part, step);
      return decoder_->Run(task, StreamOf(task));
    case Op::kTotals:
      return SumRouting(step);
    case Op::kBalance:
      SHOAL_RETURN_IF_ERROR(Balance(step));
      return 0;
    case Op::kNorm:
      Norm(step);
      return static_cast<double>(store_->owned_elements());
    case Op::kNormSum:
      return SumNorm(step);
    case Op::kUpdate:
      return Update(task, step);
    case Op::kHead:
      return decoder_->Run(task, StreamOf(task));
    default:
      return RunStoreTask(task);
  }
}

absl::StatusOr<double> RankModel::RunStoreTask(const Task& task) {
  DenseStore& dense = store_->dense();
  switch (task.op) {
    case Op::kGather:
      SHOAL_RETURN_IF_ERROR(dense.Gather(task.chunk));
      return static_cast<double>(dense.bytes(task.chunk));
    case Op::kRelease:
      if (task.layer >= 0) {
        store_->experts().Release(task.layer);
      } else {
        dense.Release(task.chunk);
      }
      return 0;
    case Op::kReduce: {
      const GradientSlice& slice = train_.schedule.gradients[static_cast<size_t>(task.slice)];
      SHOAL_RETURN_IF_ERROR(dense.Reduce(slice.bucket, slice.begin, slice.count, task.part));
      return static_cast<double>(slice.count * SizeOf(DType::kF32));
    }
    case Op::kMaterialise: {
      SHOAL_ASSIGN_OR_RETURN(const int64_t bytes, store_->experts().Materialise(task.layer));
      return static_cast<double>(bytes);
    }
    case Op::kCalibrate: {
      SHOAL_ASSIGN_OR_RETURN(const int64_t bytes, store_->experts().MaterialiseAdded(task.layer));
      return static_cast<double>(bytes);
    }
    case Op::kReduceExperts: {
      SHOAL_ASSIGN_OR_RETURN(const int64_t bytes, store_->experts().ReduceGradients(task.layer));
      return static_cast<double>(bytes);
    }
    default:
      return decoder_->Run(task, StreamOf(task));
  }
}

void RankModel::BeginPart(int part, StepState* step) {
  const int64_t parts = train_.shape.parts, seq = config_.train().seq_length();
  const int64_t batch_rows = config_.train().global_batch_size();
  decoder_->Begin({.mode = Decoder::Pass::Mode::kTrain,
                   .tokens = buffers_->tokens(part),
                   .tokens_of_rank = TokensOfRanks(batch_rows / parts, seq),
                   .loss_scale = static_cast<float>(1.0 / static_cast<double>(batch_rows * seq)),
                   .losses = buffers_->losses(part),
                   .part = part,
                   .schedule = &train_.schedule},
                  *stream_);
  if (train_.shape.balance) return;
  // Early waves go back before late ones have chosen.
  decoder_->SetRoutingGradients(step->routing.GradientsWithoutSums());
}

// ---- Auxiliary losses.

absl::StatusOr<double> RankModel::SumRouting(StepState* step) {
  return step->routing.Sum(decoder_->routing(), world_->size() > 1 ? control_.get() : nullptr, order_);
}

absl::Status RankModel::Balance(StepState* step) {
  if (RoutesOnStream(model_, experts_, *stream_)) {
    step->routing.SumOnStream(decoder_->routing(), *stream_);
  } else if (world_->size() == 1) {
    SHOAL_RETURN_IF_ERROR(SumRouting(step).status());
  }
  if (train_.shape.balance) decoder_->SetRoutingGradients(step->routing.Gradients(*stream_));
  return absl::OkStatus();
}

// ---- Norm, loss and update.

void RankModel::Norm(StepState* step) {
  if (*step->on_gradients) (*step->on_gradients)(*store_);
  store_->SquaresByBlock(buffers_->squares(), *stream_);
  if (!host_clips()) buffers_->Clip(config_.optimizer().clip_grad());
  buffers_->FetchSums();
  if (host_clips() && world_->size() == 1) FinishNorm(buffers_->HostSums(), step);
}

absl::StatusOr<double> RankModel::SumNorm(StepState* step) {
  const Tensor sums = buffers_->HostSums();
  SHOAL_RETURN_IF_ERROR(control_->AllReduce(sums, sums, ReduceOp::kSum, {.label = "gradient norm", .order = order_}).Await(),
                        "gradient norm");
  FinishNorm(sums, step);
  return static_cast<double>(sums.bytes());
}

void RankModel::FinishNorm(const Tensor& sums, StepState* step) {
  StepResult& result = step->result;
  step->routing.Finish(&result);
  result.grad_norm = buffers_->ClipOnHost(sums, config_.optimizer().clip_grad());
  result.cross_entropy = sums.data<double>()[sums.elements() - 1] /
                         static_cast<double>(config_.train().global_batch_size() * config_.train().seq_length());
  result.loss = result.cross_entropy + model_.router_aux_loss_coef * result.aux + model_.router_z_loss_coef * result.z +
                model_.seq_aux_loss_coef * result.seq_aux;
  // As the stream decides. What auxiliary losses add to gradients is in the norm.
  result.finite = std::isfinite(result.cross_entropy) && std::isfinite(result.grad_norm);
  if (!result.finite) buffers_->Skip();
}

double RankModel::Update(const Task& task, StepState* step) {
  if (host_clips() && !std::exchange(step->numbers_sent, true)) buffers_->SendNumbers();
  const Tensor& numbers = buffers_->numbers();
  if (task.layer >= 0) return static_cast<double>(store_->experts().Update(task.layer, step->update, numbers, *stream_));
  return static_cast<double>(store_->dense().Update(task.chunk, step->update, numbers, *stream_));
}

// From the first task to the head's end, to the last backward task of the compute lane, to the norm's begin, to the end.
void RankModel::SetTimes(const Graph& graph, StepResult* result) const {
  int64_t backward = record_.begin_ns, reduced = record_.end_ns;
  result->forward_seconds = result->backward_seconds = 0;
  int64_t mark = record_.begin_ns;
  // Where waves part they end in any order.
  const auto until = [&](int64_t end, double* seconds) {
    *seconds += static_cast<double>(std::max<int64_t>(0, end - mark)) * 1e-9;
    mark = std::max(mark, end);
  };
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    const Task& task = graph.tasks[i];
    if (task.lane != Lane::kCompute) continue;
    if (task.op == Op::kBalance) {
      until(record_.tasks[i].end_ns, &result->forward_seconds);
    } else if (task.op == Op::kEmbed && task.phase == Phase::kBackward) {
      backward = record_.tasks[i].end_ns;
      until(backward, &result->backward_seconds);
    } else if (task.op == Op::kNorm) {
      reduced = record_.tasks[i].begin_ns;
    }
  }
  result->reduce_seconds = static_cast<double>(reduced - backward) * 1e-9;
  result->update_seconds = static_cast<double>(record_.end_ns - reduced) * 1e-9;
}

// ---- Without gradients.

absl::Status RankModel::RunForward(Decoder::Pass pass) {
  pass.schedule = &forward_.schedule;
  const std::unique_ptr<StreamLanes> lanes = LanesOf(forward_, Timing::kNo);
  return Execute(forward_, lanes.get(), /*record=*/nullptr, [&](const Task& task) -> absl::StatusOr<double> {
    if (task.op == Op::kEmbed && task.wave == 0) decoder_->Begin(pass, *stream_);
    return task.op == Op::kHead ? decoder_->Run(task, StreamOf(task)) : RunStoreTask(task);
  });
}

absl::StatusOr<double> RankModel::Evaluate(const Tensor& rows, int64_t all_rows) {
  const int64_t seq = rows.dim(1) - 1;
  const Tensor loss = Empty({1}, DType::kF64, *stream_), sum = EmptyHost({1}, DType::kF64, *stream_);
  SHOAL_RETURN_IF_ERROR(RunForward({.mode = Decoder::Pass::Mode::kEvaluate,
                                    .tokens = ToDevice(Decoder::IdsAndTargets(rows), *stream_),
                                    .tokens_of_rank = TokensOfRanks(all_rows, seq),
                                    .losses = loss}),
                        "evaluation");
  Copy(loss, sum, *stream_);
  SHOAL_RETURN_IF_ERROR(stream_->Wait(), "evaluation");
  if (world_->size() > 1) {
    SHOAL_RETURN_IF_ERROR(control_->AllReduce(sum, sum, ReduceOp::kSum, {.label = "validation loss", .order = order_}).Await(),
                          "summing the loss");
  }
  return sum.data<double>()[0];
}

absl::StatusOr<Tensor> RankModel::NextLogits(const Tensor& ids) {
  // Every rank computes the same sequence.
  const std::vector<int64_t> tokens(static_cast<size_t>(world_->size()), ids.elements());
  SHOAL_RETURN_IF_ERROR(RunForward({.mode = Decoder::Pass::Mode::kNextLogits,
                                    .tokens = ToDevice(ids, *stream_).Reshape({1, 1, ids.elements()}),
                                    .tokens_of_rank = tokens}));
  const Tensor logits = ToHost(decoder_->next_logits(), *stream_);
  SHOAL_RETURN_IF_ERROR(stream_->status());
  return logits;
}

}  // namespace shoal
