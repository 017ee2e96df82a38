#include "launch/trainer/train.h"

#include <algorithm>
#include <chrono>
#include <csignal>

#include "absl/strings/str_format.h"
#include "launch/checkpoint/checkpoint.h"
#include "launch/status/measured_communicator.h"
#include "launch/status/reporter.h"
#include "launch/trainer/device.h"
#include "launch/trainer/folder_lock.h"
#include "launch/trainer/rank_values.h"
#include "launch/trainer/schedule.h"
#include "launch/trainer/session.h"
#include "launch/trainer/signal_note.h"
#include "launch/trainer/step_watch.h"
#include "models/data/prefetch.h"
#include "nlohmann/json.hpp"
#include "runtime/base/log.h"
#include "runtime/device/cpu.h"
#include "runtime/files/file.h"
#include "runtime/kernels/matmul.h"
#include "runtime/metrics/process.h"
#include "runtime/metrics/server.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

// What somebody asks of the job while it trains; what is asked of one rank is asked of all.
enum class Request : int64_t { kNone, kSave, kEnd };

constexpr char kNoCheckpoints[] = "checkpoint.interval is 0 and checkpoint.save_last is false";

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

class TrainingRun {
 public:
  TrainingRun(const LoadedConfig& loaded, const RankEnvironment& environment)
      : config_(loaded.config),
        environment_(environment),
        model_config_(ModelConfigOf(loaded.config)),
        run_dir_(absl::StrCat(config_.run().output_dir(), "/", config_.run().name())) {}

  absl::Status Run() {
    SetThreads(ThreadsPerRank(config_, environment_));
    SHOAL_RETURN_IF_ERROR(StartMetrics());
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> world, ConnectWorld(WorldOptionsFor(environment_, config_)),
                           "connecting the ranks");
    std::string transport = config_.comm().transport();
    if (transport == "auto") transport = environment_.nodes == 1 ? "shm" : "tcp";
    world_ = Measure(std::move(world), *metrics_, "world", transport);
    absl::Status status = SetUpAndTrain();
    const bool failed = !status.ok() && !absl::IsCancelled(status);
    // Whatever this rank met ends the job on every rank, with its words.
    if (failed && world_->status().ok()) world_->Abort(status);
    if (failed && reporter_ != nullptr) Report(reporter_->Finish(FinishOf(status)));
    metrics_->metrics().SetState(failed ? JobState::kFailed : JobState::kDone);
    return status;
  }

 private:
  bool is_rank0() const { return environment_.rank == 0; }
  static void Report(const absl::Status& status) {
    if (!status.ok()) SHOAL_LOG(kError) << status;
  }

  absl::Status StartMetrics() {
    const int wanted = config_.telemetry().metrics_port();
    const int port = wanted < 0 ? MetricsServer::kNoPort : wanted == 0 ? 0 : wanted + environment_.local_rank;
    SHOAL_ASSIGN_OR_RETURN(metrics_, MetricsServer::Create(config_.telemetry().metrics_address(), port));
    metrics_->metrics().SetState(JobState::kInit);
    metrics_->SetJob({.run_id = config_.run().name(),
                      .model = ModelText(),
                      .precision = config_.train().precision(),
                      .config_hash = absl::StrFormat("%016x", ConfigHash(config_)),
                      .layout = LayoutText(config_, model_config_, environment_.world_size)});
    const int expert = LayoutFor(config_, model_config_, environment_.world_size).expert;
    metrics_->SetRank({.rank = environment_.rank,
                       .local_rank = environment_.local_rank,
                       .node = environment_.node_rank,
                       .dp = environment_.rank / expert,
                       .ep = environment_.rank % expert});
    return absl::OkStatus();
  }

  absl::Status SetUpAndTrain() {
    if (is_rank0()) {
      SHOAL_ASSIGN_OR_RETURN(lock_, FolderLock::Take(run_dir_));
    }
    metrics_->metrics().SetState(JobState::kRestore);
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> checkpoint, ChooseCheckpoint());
    if (checkpoint != nullptr && checkpoint->step() >= config_.train().steps()) {
      if (is_rank0()) {
        absl::PrintF("shoal: %s is of step %d, and train.steps is %d: nothing is left to do; a larger train.steps goes on\n",
                     checkpoint->path(), checkpoint->step(), config_.train().steps());
      }
      return absl::OkStatus();
    }
    SHOAL_RETURN_IF_ERROR(OpenData());
    SHOAL_ASSIGN_OR_RETURN(Device* const device, DeviceFor(config_, environment_));
    const RankModel::Options options = {
        .host = environment_.node_rank, .device = device, .request = [this] { return static_cast<int64_t>(TakeRequest()); }};
    SHOAL_ASSIGN_OR_RETURN(model_, RankModel::Create(config_, model_config_, *world_, options), "setting up");
    SHOAL_RETURN_IF_ERROR(StartOrResume(checkpoint.get()));
    SHOAL_RETURN_IF_ERROR(StartReporter());
    const Telemetry& telemetry = config_.telemetry();
    SHOAL_ASSIGN_OR_RETURN(
        watch_, StepWatch::Create({.run_dir = run_dir_,
                                   .about = absl::StrCat(ModelText(), "; ", LayoutText(config_, model_config_, world_->size()),
                                                         "; ", config_.train().precision(), ", ", Threads(),
                                                         Threads() == 1 ? " thread" : " threads"),
                                   .trace_steps = {telemetry.trace_steps().begin(), telemetry.trace_steps().end()},
                                   .metrics = metrics_->metrics()},
                                  *world_, model_->tuner()->profiler()));
    if (config_.checkpoint().resume() == "auto" && checkpoint == nullptr) {
      reporter_->Note(absl::StrCat(run_dir_, " has no checkpoint to go on from: the run starts anew"));
    }
    if (is_rank0()) SHOAL_RETURN_IF_ERROR(first_step_ == 0 ? PutOldCheckpointsAside() : PutLaterCheckpointsAside());
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> group, world_->Split(AllRanks()));
    SHOAL_ASSIGN_OR_RETURN(checkpointer_,
                           Checkpointer::Create({.run_dir = run_dir_,
                                                 .keep = config_.checkpoint().keep(),
                                                 .config_yaml = ConfigYaml(config_)},
                                                std::move(group)));
    return Train();
  }

  absl::Status Train() {
    // Our launcher tells its ranks what somebody may have told them already, and ends them if it is told twice.
    end_.emplace(SIGTERM, environment_.source == "SHOAL" ? SignalNote::Again::kNoted : SignalNote::Again::kAsBefore);
    for (int64_t step = first_step_; step < config_.train().steps(); ++step) {
      SHOAL_RETURN_IF_ERROR(Step(step), "step ", step);
      const bool last = step + 1 == config_.train().steps();
      const bool end = request_ == Request::kEnd && !last;
      if (last || (!end && Due(step, config_.train().eval_interval()))) SHOAL_RETURN_IF_ERROR(Validate(step), "validation");
      const bool due = last ? config_.checkpoint().save_last() : Due(step, config_.checkpoint().interval());
      if (due || SavesOnRequest(step + 1)) SHOAL_RETURN_IF_ERROR(Save(step + 1), "saving a checkpoint");
      if (end) return EndAsAsked(step + 1);
    }
    return Finish();
  }

  Request TakeRequest() {
    const bool save = save_.Take();
    if (end_.has_value() && end_->Take()) return Request::kEnd;
    return save ? Request::kSave : Request::kNone;
  }

  // `step`: steps done.
  bool SavesOnRequest(int64_t step) {
    if (request_ == Request::kNone) return false;
    const bool saves = config_.checkpoint().save_last() || config_.checkpoint().interval() > 0;
    if (request_ == Request::kSave) {
      reporter_->Note(saves ? absl::StrCat("step ", step, " is saved, as SIGUSR1 asks")
                            : absl::StrCat("SIGUSR1 saves nothing, as ", kNoCheckpoints));
    }
    return saves;
  }

  static bool Due(int64_t step, int64_t interval) { return interval > 0 && (step + 1) % interval == 0; }

  absl::Status OpenData() {
    SHOAL_ASSIGN_OR_RETURN(const DataKind kind, ParseDataKind(config_.data().kind()));
    SHOAL_ASSIGN_OR_RETURN(const DataOrder order, ParseDataOrder(config_.data().order()));
    SHOAL_ASSIGN_OR_RETURN(data_, OpenDataset({.kind = kind,
                                               .path = config_.data().path(),
                                               .order = order,
                                               .validation_fraction = config_.data().validation_fraction(),
                                               .seed = config_.run().seed(),
                                               .end_of_document = EndOfDocument(config_),
                                               .vocab_size = model_config_.vocab_size,
                                               .seq = config_.train().seq_length(),
                                               .global_batch = config_.train().global_batch_size()}),
                           "data");
    return absl::OkStatus();
  }

  // Weights, optimizer state and the position in the run; then reading ahead can begin.
  absl::Status StartOrResume(const CheckpointReader* checkpoint) {
    std::string changes;
    if (checkpoint != nullptr) {
      const nlohmann::json meta = nlohmann::json::parse(checkpoint->meta(), nullptr, /*allow_exceptions=*/false);
      if (!meta.is_object() || !meta.value("update", nlohmann::json()).is_number_integer()) {
        return absl::DataLossError(absl::StrCat(checkpoint->path(), ": the manifest's meta has no number `update`"));
      }
      updates_ = meta["update"];
      first_step_ = checkpoint->step();
      SHOAL_ASSIGN_OR_RETURN(const Config before, CheckpointConfig(*checkpoint), checkpoint->path());
      resumed_ = absl::StrCat("going on from ", checkpoint->path());
      changes = ConfigChanges(before, config_);
      if (!changes.empty()) changes = "; changed since: " + changes;
      resumed_ += changes;
    }
    SHOAL_RETURN_IF_ERROR(LoadWeights({checkpoint, config_.run().init_from(), config_.run().seed()}, *model_),
                          checkpoint == nullptr ? "initial weights" : "resuming", changes);
    const int64_t parts = config_.train().gradient_accumulation_steps();
    const int64_t part_rows = config_.train().global_batch_size() / parts;
    const Range mine = model_->RowsOf(part_rows);
    for (int64_t part = 0; part < parts; ++part) {
      batches_.push_back(std::make_unique<Prefetcher>(
          data_.train, PrefetchOptions{part * part_rows + mine.begin, mine.count, first_step_}));
    }
    return absl::OkStatus();
  }

  // A run that starts anew must not be mistaken for the one before it, nor destroy it.
  absl::Status PutOldCheckpointsAside() {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<CheckpointFolder> old, ListCheckpoints(run_dir_));
    if (old.empty()) return absl::OkStatus();
    const std::string aside = run_dir_ + "/checkpoints.previous";
    SHOAL_RETURN_IF_ERROR(RemoveTree(aside));
    SHOAL_RETURN_IF_ERROR(RenameDurably(run_dir_ + "/checkpoints", aside));
    reporter_->Note(absl::StrCat("checkpoints of an earlier run are now in ", aside, "; --resume would have gone on"));
    return absl::OkStatus();
  }

  // A run that goes on from an earlier step leaves the steps after it behind: the next --resume must not go on from those.
  absl::Status PutLaterCheckpointsAside() {
    SHOAL_ASSIGN_OR_RETURN(std::vector<CheckpointFolder> later, ListCheckpoints(run_dir_));
    std::erase_if(later, [&](const CheckpointFolder& folder) { return folder.step <= first_step_; });
    if (later.empty()) return absl::OkStatus();
    const std::string aside = absl::StrCat(run_dir_, "/checkpoints.after-step-", first_step_);
    SHOAL_RETURN_IF_ERROR(MakeFolders(aside));
    for (auto folder = later.rbegin(); folder != later.rend(); ++folder) {
      const std::string to = absl::StrCat(aside, folder->path.substr(folder->path.rfind('/')));
      SHOAL_RETURN_IF_ERROR(RemoveTree(to));
      SHOAL_RETURN_IF_ERROR(RenameDurably(folder->path, to));
    }
    reporter_->Note(absl::StrCat("checkpoints of later steps, which this run leaves behind, are now in ", aside));
    return absl::OkStatus();
  }

  // Every rank reads the same folders: one that sees others than rank 0 would start another run than rank 0 does.
  absl::Status AgreeOnNewest(const std::vector<CheckpointFolder>& folders) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> newest,
                           GatherValues(*world_, folders.empty() ? -1 : folders.back().step));
    const auto other = std::find_if(newest.begin(), newest.end(), [&](int64_t step) { return step != newest[0]; });
    if (other == newest.end()) return absl::OkStatus();
    const auto seen = [](int64_t step) { return step < 0 ? std::string("none") : absl::StrCat("that of step ", step); };
    return absl::FailedPreconditionError(absl::StrCat(
        "checkpoint.resume: the newest checkpoint in ", run_dir_, " is for rank 0 ", seen(newest[0]), " and for rank ",
        other - newest.begin(), " ", seen(*other), ": the run's folder must lie on a file system that all ranks share"));
  }

  // The checkpoint to go on from, checked whole by every rank; null: none.
  absl::StatusOr<std::unique_ptr<CheckpointReader>> ChooseCheckpoint() {
    using Reader = std::unique_ptr<CheckpointReader>;
    const std::string& resume = config_.checkpoint().resume();
    if (resume == "none") return Reader();
    std::vector<CheckpointFolder> folders = {{0, resume}};
    if (resume == "auto") {
      SHOAL_ASSIGN_OR_RETURN(folders, ListCheckpoints(run_dir_));
      SHOAL_RETURN_IF_ERROR(AgreeOnNewest(folders));
    }
    while (!folders.empty()) {
      const std::string path = folders.back().path;
      absl::StatusOr<Reader> reader = resume == "auto" ? OpenCheckpoint(path) : FindCheckpoint(path);
      // Each rank checks every hash; the file system's cache makes that one read.
      const absl::Status status = reader.ok() ? (*reader)->VerifyAll(Threads()) : reader.status();
      // The ranks agree: damage that one sees is damage for all.
      SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> whole, GatherValues(*world_, status.ok() ? 1 : 0));
      const auto damaged = std::find(whole.begin(), whole.end(), 0);
      if (damaged == whole.end()) return reader;
      const std::string words = status.ok() ? absl::StrCat("rank ", damaged - whole.begin(), " cannot read ", path)
                                            : std::string(status.message());
      folders.pop_back();
      if (!config_.checkpoint().allow_fallback() || folders.empty()) {
        return absl::DataLossError(absl::StrCat(
            "checkpoint.resume: ", words,
            folders.empty() ? "" : "; checkpoint.allow_fallback=true goes on from the one before it, " + folders.back().path));
      }
      SHOAL_LOG(kWarning) << words << "; going on from " << folders.back().path;
    }
    return Reader();
  }

  std::string ModelText() const {
    const ModelConfig& m = model_config_;
    return absl::StrFormat("%d layers, width %d, %d experts, top-%d", m.num_hidden_layers, m.hidden_size,
                           m.num_local_experts, m.num_experts_per_tok);
  }

  std::string DataText() const {
    if (data_.train_tokens == 0) return config_.data().kind();
    return absl::StrFormat("%s, %.2f M tokens to train on, %.2f M held out",
                           config_.data().path().empty() ? config_.data().kind() : config_.data().path(),
                           static_cast<double>(data_.train_tokens) / 1e6, static_cast<double>(data_.validation_tokens) / 1e6);
  }

  absl::Status StartReporter() {
    // All ranks at once, as when they train.
    SHOAL_RETURN_IF_ERROR(world_->Barrier({.label = "start"}).Await());
    const DType compute = config_.train().precision() == "bf16" ? DType::kBF16 : DType::kF32;
    const double peak = kernels::MeasureMatMulPeak(compute, 0.2, model_->stream());
    SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> peaks, GatherValues(*world_, static_cast<int64_t>(peak * 1e9)));
    SHOAL_ASSIGN_OR_RETURN(const std::vector<int64_t> ports, GatherValues(*world_, metrics_->port()));
    ReporterOptions options;
    options.run_dir = run_dir_;
    options.run_name = config_.run().name();
    options.is_rank0 = is_rank0();
    options.total_steps = config_.train().steps();
    options.start_step = first_step_;
    options.tokens_per_step = config_.train().global_batch_size() * config_.train().seq_length();
    for (int64_t flops : peaks) options.gemm_peak_flops += static_cast<double>(flops);
    options.bytes_per_token = config_.data().kind() == "text" ? 1 : 0;
    options.log_interval = config_.telemetry().log_interval();
    options.expert_counts_interval = config_.telemetry().expert_counts_interval();
    options.parameters = TotalParameters(model_config_);
    options.active_parameters = ActiveMatmulParameters(model_config_);
    options.world_size = environment_.world_size;
    options.threads_per_rank = Threads();
    options.model = ModelText();
    options.layout = LayoutText(config_, model_config_, environment_.world_size);
    options.precision = config_.train().precision();
    options.data = DataText();
    for (int layer = 0; layer < model_config_.num_hidden_layers; ++layer) {
      if (!model_config_.is_dense(layer)) moe_layers_.push_back(layer);
    }
    options.moe_layers = moe_layers_;
    options.metrics = metrics_.get();
    SHOAL_ASSIGN_OR_RETURN(reporter_, Reporter::Create(std::move(options)));
    if (is_rank0() && !resumed_.empty()) reporter_->Note(resumed_);
    if (is_rank0() && world_->size() > 1 && metrics_->port() >= 0) reporter_->Note(OtherPorts(ports));
    if (!is_rank0()) SHOAL_LOG(kInfo) << "metrics at " << metrics_->url();
    if (is_rank0()) {
      config_path_ = run_dir_ + "/config.yaml";
      SHOAL_RETURN_IF_ERROR(WriteFileAtomic(config_path_, ConfigYaml(config_)), "writing the configuration");
    }
    metrics_->metrics().SetState(JobState::kTrain);
    return absl::OkStatus();
  }

  static std::string OtherPorts(const std::vector<int64_t>& ports) {
    std::string text = "metrics of the other ranks: port";
    for (size_t rank = 1; rank < ports.size(); ++rank) {
      absl::StrAppend(&text, rank == 1 ? " " : ", ", ports[rank], " (rank ", rank, ")");
    }
    return text;
  }

  absl::Status Step(int64_t step) {
    const Clock::time_point begin = Clock::now();
    std::vector<Tensor> parts;
    for (const std::unique_ptr<Prefetcher>& batches : batches_) {
      SHOAL_ASSIGN_OR_RETURN(parts.emplace_back(), batches->Next(step), "data");
    }
    const double data_seconds = SecondsSince(begin);
    const double learning_rate = LearningRate(config_, step);
    SHOAL_ASSIGN_OR_RETURN(const StepResult result, model_->Train(parts, learning_rate, updates_ + 1));
    request_ = static_cast<Request>(result.request);
    SHOAL_RETURN_IF_ERROR(watch_->AfterStep(step, model_->graph(), model_->record()), "telemetry");
    TrainRecord record;
    record.step = step;
    record.loss = result.loss;
    record.ce_loss = result.cross_entropy;
    record.aux_loss = result.aux;
    record.z_loss = result.z;
    record.learning_rate = learning_rate;
    record.grad_norm = result.grad_norm;
    record.tokens = config_.train().global_batch_size() * config_.train().seq_length();
    record.seconds = SecondsSince(begin);
    record.flops = static_cast<double>(record.tokens) *
                   static_cast<double>(TrainFlopsPerToken(model_config_, config_.train().seq_length()));
    record.data_wait_seconds = data_seconds;
    record.expert_counts = result.expert_counts;
    record.experts = result.experts;
    record.moe_layers = moe_layers_;
    record.phase_seconds = {{"data", data_seconds},
                            {"forward", result.forward_seconds},
                            {"backward", result.backward_seconds},
                            {"grad_sync", result.reduce_seconds},
                            {"optimizer", result.update_seconds}};
    if (!result.finite) return NotFinite(record);
    ++updates_;
    return reporter_->Step(record);
  }

  absl::Status NotFinite(const TrainRecord& record) {
    SHOAL_RETURN_IF_ERROR(reporter_->SkippedStep(record));
    const std::string words =
        absl::StrFormat("loss %g, gradient norm %g: not finite, so the step was not applied", record.loss, record.grad_norm);
    if (!config_.train().stop_on_nonfinite()) {
      SHOAL_LOG(kWarning) << "step " << record.step << ": " << words;
      return absl::OkStatus();
    }
    return absl::FailedPreconditionError(absl::StrCat(
        words, "; a lower optimizer.lr or a longer scheduler.warmup_steps may help, --resume goes on from the last checkpoint, "
               "train.stop_on_nonfinite=false skips such steps"));
  }

  absl::Status Validate(int64_t step) {
    if (data_.validation == nullptr) return absl::OkStatus();
    metrics_->metrics().SetState(JobState::kEval);
    const Clock::time_point begin = Clock::now();
    const int64_t batch = config_.train().global_batch_size(), seq = config_.train().seq_length();
    const int64_t wanted = config_.train().eval_batches() * batch;
    const bool last = step + 1 == config_.train().steps();  // The figure that counts is of the whole split.
    const int64_t rows = wanted == 0 || last ? data_.ValidationRows() : std::min(wanted, data_.ValidationRows());
    // As many rows at a time as a part of a training step has: more might not fit into memory.
    const int64_t part_rows = batch / config_.train().gradient_accumulation_steps();
    double sum = 0;
    for (int64_t first = 0; first < rows; first += part_rows) {
      const int64_t count = std::min(part_rows, rows - first);
      const Range mine = model_->RowsOf(count);
      const Tensor tokens = Empty({mine.count, seq + 1}, DType::kI32);
      for (int64_t i = 0; i < mine.count; ++i) {
        // A part of the split is spread over all of it: neighbouring windows are alike.
        const int64_t row = (first + mine.begin + i) * data_.ValidationRows() / rows;
        SHOAL_RETURN_IF_ERROR(data_.validation->ReadRows(0, row, tokens.Rows(i, 1)));
      }
      SHOAL_ASSIGN_OR_RETURN(const double part, model_->Evaluate(tokens, count));
      sum += part;
    }
    const int64_t tokens = rows * seq;
    SHOAL_RETURN_IF_ERROR(reporter_->Eval(
        {.step = step, .loss = sum / static_cast<double>(tokens), .tokens = tokens, .seconds = SecondsSince(begin)}));
    metrics_->metrics().SetState(JobState::kTrain);
    return absl::OkStatus();
  }

  // `step`: steps done.
  absl::Status Save(int64_t step) {
    const Clock::time_point begin = Clock::now();
    metrics_->metrics().SetState(JobState::kSave);
    SHOAL_RETURN_IF_ERROR(checkpointer_->Save(step, nlohmann::json({{"update", updates_}}).dump(), CheckpointShards(*model_)));
    const Metrics& metrics = metrics_->metrics();
    if (saved_step_ > 0) CommittedSave();
    saved_step_ = step;
    metrics.checkpoint_snapshot.Observe(SecondsSince(begin));
    metrics.SetState(JobState::kTrain);
    return absl::OkStatus();
  }

  void CommittedSave() {
    metrics_->metrics().checkpoint_step.Set(static_cast<double>(saved_step_));
    metrics_->metrics().checkpoint_timestamp.SetToNow();
  }

  FinishRecord FinishOf(const absl::Status& status) const {
    FinishRecord record;
    record.status = status;
    record.config_path = config_path_;
    if (environment_.source == "SHOAL") record.log_dir = run_dir_ + "/logs";
    return record;
  }

  // The end of the save in progress, and of what is learnt of steps.
  absl::Status AwaitFiles(FinishRecord* record) {
    SHOAL_RETURN_IF_ERROR(checkpointer_->Wait(), "saving a checkpoint");
    if (saved_step_ > 0) {
      CommittedSave();
      SHOAL_ASSIGN_OR_RETURN(const std::optional<std::string> newest, NewestCheckpoint(run_dir_));
      record->checkpoint_dir = newest.value_or("");
    }
    return Annotate(watch_->Finish(), "telemetry");
  }

  // CANCELLED, when all is done. `step`: steps done.
  absl::Status EndAsAsked(int64_t step) {
    metrics_->metrics().SetState(JobState::kDrain);
    FinishRecord record = FinishOf(absl::OkStatus());
    SHOAL_RETURN_IF_ERROR(AwaitFiles(&record));
    const std::string saved = saved_step_ == step ? "which is saved: --resume goes on from there"
                                                  : absl::StrCat("and nothing was saved, as ", kNoCheckpoints);
    record.status = absl::CancelledError(absl::StrCat("SIGTERM: ended after step ", step, ", ", saved));
    SHOAL_RETURN_IF_ERROR(reporter_->Finish(record));
    // Some launchers end all ranks when one ends: it must find nothing undone.
    SHOAL_RETURN_IF_ERROR(world_->Barrier({.label = "end"}).Await(), "ending");
    return record.status;
  }

  absl::Status Finish() {
    FinishRecord record = FinishOf(absl::OkStatus());
    SHOAL_RETURN_IF_ERROR(AwaitFiles(&record));
    const Telemetry& telemetry = config_.telemetry();
    if (!telemetry.sample_prompt().empty() && telemetry.sample_length() > 0 && config_.data().kind() == "text") {
      record.sample_prompt = telemetry.sample_prompt();
      SHOAL_ASSIGN_OR_RETURN(record.sample_text, SampleText({.prompt = telemetry.sample_prompt(),
                                                             .length = telemetry.sample_length(),
                                                             .context = config_.train().seq_length(),
                                                             .seed = config_.run().seed()},
                                                            *model_, *world_));
    }
    SHOAL_ASSIGN_OR_RETURN(record.peak_memory_bytes, GatherValues(*world_, ReadProcessUsage().peak_resident_bytes));
    if (!record.checkpoint_dir.empty() && config_.data().kind() == "text") {
      record.hints.push_back(absl::StrCat("./shoal generate --checkpoint ", run_dir_, " --prompt \"Once upon a time\""));
    }
    if (!record.checkpoint_dir.empty()) {
      record.hints.push_back(absl::StrCat("./shoal export --checkpoint ", run_dir_, " --out ", run_dir_, "/hf"));
    }
    return reporter_->Finish(record);
  }

  std::vector<int> AllRanks() const {
    std::vector<int> ranks;
    for (int rank = 0; rank < world_->size(); ++rank) ranks.push_back(rank);
    return ranks;
  }

  const Config config_;
  const RankEnvironment environment_;
  const ModelConfig model_config_;
  const std::string run_dir_;
  std::string config_path_;
  std::string resumed_;  // What to say about the checkpoint; empty: the run starts anew.
  std::vector<int> moe_layers_;
  int64_t first_step_ = 0, updates_ = 0, saved_step_ = 0;
  SignalNote save_{SIGUSR1, SignalNote::Again::kNoted};
  std::optional<SignalNote> end_;           // SIGTERM, while steps are done: before, nothing would be lost.
  Request request_ = Request::kNone;        // Of the last step.

  // In the order in which they are set up; the last goes first.
  std::unique_ptr<FolderLock> lock_;  // Of rank 0.
  std::unique_ptr<MetricsServer> metrics_;
  std::unique_ptr<Communicator> world_;
  Dataset data_;
  std::unique_ptr<RankModel> model_;
  std::vector<std::unique_ptr<Prefetcher>> batches_;
  std::unique_ptr<Reporter> reporter_;
  std::unique_ptr<StepWatch> watch_;
  std::unique_ptr<Checkpointer> checkpointer_;
};

}  // namespace

absl::Status TrainRank(const LoadedConfig& loaded, const RankEnvironment& environment) {
  return TrainingRun(loaded, environment).Run();
}

}  // namespace shoal
