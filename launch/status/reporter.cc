#include "launch/status/reporter.h"

#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "launch/status/loss_curve.h"
#include "launch/status/progress.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"
#include "runtime/metrics/process.h"

namespace shoal {
namespace {

using Rows = std::vector<std::pair<std::string, std::string>>;

// Steps whose rate the progress line shows.
constexpr size_t kWindow = 20;
// Redrawing more often costs and cannot be read.
constexpr double kRedrawSeconds = 0.1;

double SteadySeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A value of the sorted copy of `values`, which is not empty: 0 the least, 1 the greatest.
double Quantile(std::vector<double> values, double q) {
  const auto at = static_cast<int64_t>(std::lround(q * static_cast<double>(values.size() - 1)));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<size_t>(at)];
}

// Where people read: a terminal or a log. Failures are ignored: a run does not end because nobody listens.
class Screen {
 public:
  Screen(int fd, OutputMode mode, int columns) : fd_(fd), columns_(columns) {
    const char* term = std::getenv("TERM");
    const bool dumb = term == nullptr || std::strcmp(term, "dumb") == 0;
    terminal_ = mode == OutputMode::kTerminal || (mode == OutputMode::kAuto && isatty(fd) == 1 && !dumb);
    const char* no_colour = std::getenv("NO_COLOR");
    if (terminal_ && (no_colour == nullptr || *no_colour == '\0')) colour_ = Colour::kTerminal;
  }

  bool terminal() const { return terminal_; }
  Colour colour() const { return colour_; }
  // One less than there are: a cursor in the last column wraps on some terminals. Asked anew: windows change.
  int columns() const {
    if (columns_ > 0) return columns_;
    winsize size{};
    if (!terminal_ || ioctl(fd_, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return kColumnsMax;
    return size.ws_col - 1;
  }

  // Whole lines that stay; takes the updating line away.
  void Print(const std::string& lines) {
    Write(drawn_ ? absl::StrCat("\r\x1b[K", lines) : lines);
    drawn_ = false;
  }
  // Replaces the updating line.
  void Draw(const std::string& line) {
    Write(absl::StrCat("\r", line, "\x1b[K"));
    drawn_ = true;
  }
  // The updating line stays as it is, and a new one begins.
  void Keep() {
    if (drawn_) Write("\n");
    drawn_ = false;
  }

 private:
  void Write(absl::string_view text) {
    while (!text.empty()) {
      const ssize_t written = write(fd_, text.data(), text.size());
      if (written < 0 && errno != EINTR) return;
      if (written > 0) text.remove_prefix(static_cast<size_t>(written));
    }
  }

  const int fd_;
  const int columns_;
  bool terminal_ = false;
  Colour colour_ = Colour::kNone;
  bool drawn_ = false;
};

std::string PeakMemory(std::vector<int64_t> bytes) {
  if (bytes.empty())
    return FormatBytes(static_cast<double>(ReadProcessUsage().peak_resident_bytes)) + " on rank 0";
  constexpr size_t kShown = 8;
  if (bytes.size() > kShown) {
    const auto [low, high] = std::minmax_element(bytes.begin(), bytes.end());
    return absl::StrCat(FormatBytes(static_cast<double>(*low)), " to ",
                        FormatBytes(static_cast<double>(*high)), " per rank");
  }
  const auto one = [](std::string* out, int64_t rank_bytes) {
    out->append(FormatBytes(static_cast<double>(rank_bytes)));
  };
  return absl::StrCat(absl::StrJoin(bytes, ", ", one), bytes.size() == 1 ? "" : " (by rank)");
}

}  // namespace

struct Reporter::Impl {
  explicit Impl(ReporterOptions given)
      : options(std::move(given)), screen(options.out_fd, options.mode, options.columns) {
    if (!options.now_seconds) options.now_seconds = SteadySeconds;
    if (options.metrics == nullptr) return;
    metrics = options.metrics->metrics();
    layers = options.metrics->Layers(options.moe_layers);
  }

  ReporterOptions options;
  Screen screen;
  Metrics metrics;  // Handles that do nothing when there is no server.
  std::vector<LayerMetrics> layers;
  std::unique_ptr<MetricsFile> file;  // Rank 0's.
  CurvePoints train, validation;

  double started = 0, first_step_ended = 0, last_drawn = 0;
  int64_t steps_done = 0;  // Of this process.
  int64_t next_step = 0;   // Of the run.
  int64_t tokens = 0;      // Of this process.
  double eval_seconds = 0;
  std::vector<double> step_seconds;  // Without the first step, which warms caches and allocates.
  double sum_step_seconds = 0, sum_flops = 0, sum_tokens = 0;  // Likewise.
  std::deque<TrainRecord> window;                               // Likewise; without their counts.
  double balance = kUnknown;
  EvalRecord last_eval;
  double best_eval = kUnknown;

  double Now() const { return options.now_seconds(); }
  bool IsLogStep(int64_t step) const {
    return (step + 1) % options.log_interval == 0 || step + 1 == options.total_steps || steps_done == 1;
  }
  std::string BitsPerByte(double loss) const {
    if (options.bytes_per_token <= 0) return "";
    return absl::StrFormat("%.4f bits per byte", loss / std::log(2.0) / options.bytes_per_token);
  }
  std::string PathOf(const char* name) const { return JoinPath(options.run_dir, name); }

  void CountStep(const TrainRecord& record);
  void FeedMetrics(const TrainRecord& record) const;
  void FeedExperts(const ExpertSummary& experts) const;
  Progress ProgressAt(const TrainRecord& record) const;
  void ShowStep(const TrainRecord& record);
  void PrintHeader();
  Rows ResultRows(const FinishRecord& record) const;
  Rows FileRows(const FinishRecord& record) const;
  absl::Status WriteCurve() const;
};

void Reporter::Impl::CountStep(const TrainRecord& record) {
  next_step = record.step + 1;
  ++steps_done;
  tokens += record.tokens;
  if (!record.expert_counts.empty()) balance = ExpertBalance(record.expert_counts);
  if (steps_done == 1) {
    first_step_ended = Now();
    return;
  }
  step_seconds.push_back(record.seconds);
  sum_step_seconds += record.seconds;
  sum_flops += record.flops;
  sum_tokens += static_cast<double>(record.tokens);
  TrainRecord slim;
  slim.seconds = record.seconds;
  slim.tokens = record.tokens;
  slim.flops = record.flops;
  window.push_back(std::move(slim));
  if (window.size() > kWindow) window.pop_front();
}

void Reporter::Impl::FeedMetrics(const TrainRecord& record) const {
  metrics.SetState(JobState::kTrain);
  metrics.train_step.Set(static_cast<double>(record.step + 1));
  metrics.steps_committed.Add();
  metrics.last_step_timestamp.SetToNow();
  metrics.step_duration.Observe(record.seconds);
  for (const auto& [phase, seconds] : record.phase_seconds) metrics.AddPhase(phase, seconds);
  if (options.is_rank0) {
    metrics.tokens.Add(static_cast<double>(record.tokens));
    metrics.model_flops.Add(record.flops);
  }
  if (options.gemm_peak_flops > 0 && record.seconds > 0) {
    metrics.mfu.Set(record.flops / record.seconds / options.gemm_peak_flops);
  }
  metrics.loss_lm.Set(record.ce_loss);
  metrics.loss_load_balance.Set(record.aux_loss);
  metrics.loss_z.Set(record.z_loss);
  metrics.grad_norm.Set(record.grad_norm);
  metrics.learning_rate.Set(record.learning_rate);
  metrics.data_wait.Add(record.data_wait_seconds);
  if (record.experts.has_value()) FeedExperts(*record.experts);
  for (size_t i = 0; i < std::min(layers.size(), record.expert_counts.size()); ++i) {
    const std::vector<int64_t>& counts = record.expert_counts[i];
    const auto sum = static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    if (sum <= 0) continue;
    std::vector<double> loads;
    for (const int64_t count : counts) {
      loads.push_back(static_cast<double>(count) * static_cast<double>(counts.size()) / sum);
    }
    layers[i].load_min.Set(Quantile(loads, 0));
    layers[i].load_p50.Set(Quantile(loads, 0.5));
    layers[i].load_p95.Set(Quantile(loads, 0.95));
    layers[i].load_max.Set(Quantile(loads, 1));
    layers[i].max_violation.Set(Quantile(loads, 1) - 1);
    layers[i].idle_experts.Set(static_cast<double>(std::count(counts.begin(), counts.end(), 0)));
  }
}

void Reporter::Impl::FeedExperts(const ExpertSummary& experts) const {
  const ExpertMetrics& to = metrics.experts;
  to.hottest_expert.Set(experts.hottest_expert);
  to.expert_max_over_mean.Set(experts.expert_max_over_mean);
  to.rank_max_over_mean.Set(experts.rank_max_over_mean);
  to.stay_rank.Set(experts.stay_rank);
  to.stay_host.Set(experts.stay_host);
  to.dropped.Set(experts.dropped);
  to.copies_per_layer.Set(experts.copies_per_layer);
  if (!options.is_rank0) return;
  to.weight_bytes.Add(static_cast<double>(experts.weight_bytes));
  to.gradient_bytes.Add(static_cast<double>(experts.gradient_bytes));
  to.owner_moves.Add(static_cast<double>(experts.owner_moves));
}

Progress Reporter::Impl::ProgressAt(const TrainRecord& record) const {
  Progress progress;
  progress.step = record.step + 1;
  progress.total_steps = options.total_steps;
  progress.loss = record.ce_loss;
  progress.learning_rate = record.learning_rate;
  progress.grad_norm = record.grad_norm;
  progress.expert_balance = balance;
  double seconds = 0, window_tokens = 0, flops = 0;
  std::vector<double> recent;
  for (const TrainRecord& step : window) {
    seconds += step.seconds;
    window_tokens += static_cast<double>(step.tokens);
    flops += step.flops;
    recent.push_back(step.seconds);
  }
  if (seconds <= 0) return progress;
  // What the run spent beside its steps so far, it will spend on.
  const double other = std::max(0.0, Now() - first_step_ended - sum_step_seconds);
  progress.eta_seconds = EtaSeconds(recent, options.total_steps - progress.step,
                                    other / static_cast<double>(step_seconds.size()));
  progress.tokens_per_second = window_tokens / seconds;
  if (flops > 0) {
    progress.flops_per_second = flops / seconds;
    if (options.gemm_peak_flops > 0) progress.peak_share = flops / seconds / options.gemm_peak_flops;
  }
  return progress;
}

void Reporter::Impl::ShowStep(const TrainRecord& record) {
  const bool last = record.step + 1 == options.total_steps;
  if (screen.terminal()) {
    const double now = Now();
    if (!last && steps_done > 1 && now - last_drawn < kRedrawSeconds) return;
    last_drawn = now;
    screen.Draw(FormatProgress(ProgressAt(record), screen.columns(), screen.colour()));
    if (last) screen.Keep();
  } else if (IsLogStep(record.step)) {
    screen.Print(FormatProgress(ProgressAt(record), screen.columns(), Colour::kNone) + "\n");
  }
}

void Reporter::Impl::PrintHeader() {
  Rows rows;
  std::string model = options.model;
  if (options.parameters > 0) {
    model = absl::StrCat(FormatCount(static_cast<double>(options.parameters)), " parameters",
                         options.active_parameters > 0
                             ? absl::StrCat(", ", FormatCount(static_cast<double>(options.active_parameters)),
                                            " active per token")
                             : "",
                         model.empty() ? "" : ": ", model);
  }
  if (!model.empty()) rows.emplace_back("model", model);
  const auto counted = [](int64_t n, const char* what) {
    return absl::StrCat(n, " ", what, n == 1 ? "" : "s");
  };
  rows.emplace_back("ranks", absl::StrCat(counted(options.world_size, "rank"), " x ",
                                          counted(options.threads_per_rank, "thread"),
                                          options.layout.empty() ? "" : ", ", options.layout));
  if (!options.precision.empty()) rows.emplace_back("precision", options.precision);
  if (!options.data.empty()) rows.emplace_back("data", options.data);
  rows.emplace_back("training", absl::StrCat(FormatInteger(options.total_steps), " steps x ",
                                             FormatInteger(options.tokens_per_step), " tokens = ",
                                             FormatCount(static_cast<double>(options.total_steps) *
                                                         static_cast<double>(options.tokens_per_step)),
                                             " tokens"));
  if (options.start_step > 0) {
    rows.emplace_back("resumed", absl::StrCat("after step ", FormatInteger(options.start_step)));
  }
  if (options.gemm_peak_flops > 0) {
    rows.emplace_back("GEMM peak", FormatFlops(options.gemm_peak_flops) + " of all ranks, measured");
  }
  rows.emplace_back("files", options.run_dir);
  if (options.metrics != nullptr && !options.metrics->url().empty()) {
    rows.emplace_back("metrics", options.metrics->url());
  }
  screen.Print(FormatTable("shoal: " + options.run_name, rows, screen.colour()) + "\n");
}

Rows Reporter::Impl::ResultRows(const FinishRecord& record) const {
  Rows rows;
  rows.emplace_back(
      "steps", absl::StrCat(FormatInteger(next_step), " of ", FormatInteger(options.total_steps),
                            options.start_step > 0
                                ? absl::StrCat(", ", FormatInteger(steps_done), " of them since the resume")
                                : ""));
  rows.emplace_back("tokens", FormatInteger(tokens));
  rows.emplace_back(
      "wall time",
      absl::StrCat(
          FormatSeconds(Now() - started),
          eval_seconds > 0 ? absl::StrCat(", ", FormatSeconds(eval_seconds), " in validations") : ""));
  if (!step_seconds.empty() && sum_step_seconds > 0) {
    const double median = Quantile(step_seconds, 0.5);
    const double steps = static_cast<double>(step_seconds.size());
    rows.emplace_back("step time",
                      absl::StrFormat("%#.3g s median, %#.3g to %#.3g s for nine in ten", median,
                                      Quantile(step_seconds, 0.05), Quantile(step_seconds, 0.95)));
    if (median > 0) {
      rows.emplace_back("tokens/s", FormatCount(sum_tokens / steps / median) + " median");
      const double flops = sum_flops / steps / median;
      if (flops > 0) rows.emplace_back("compute", FormatFlops(flops) + " median");
      if (flops > 0 && options.gemm_peak_flops > 0) {
        absl::StrAppendFormat(&rows.back().second, ", %.0f%% of the measured GEMM peak (%s)",
                              100 * flops / options.gemm_peak_flops, FormatFlops(options.gemm_peak_flops));
      }
    }
  }
  const size_t last = std::min<size_t>(train.size(), 50);
  if (last > 0) {
    double sum = 0;
    for (size_t i = train.size() - last; i < train.size(); ++i) sum += train[i].second;
    rows.emplace_back("train loss", absl::StrFormat("%.4f nats per token, mean of the last %d steps",
                                                    sum / static_cast<double>(last), last));
  }
  if (!validation.empty()) {
    const double loss = validation.back().second;
    const std::string bits = BitsPerByte(loss);
    rows.emplace_back("validation loss",
                      absl::StrFormat("%.4f nats per token%s%s", loss, bits.empty() ? "" : ", ", bits));
    if (best_eval < loss) absl::StrAppendFormat(&rows.back().second, " (best %.4f)", best_eval);
  }
  if (!std::isnan(balance)) {
    rows.emplace_back("expert balance", absl::StrFormat("%.2f max over mean, least balanced layer", balance));
  }
  rows.emplace_back("peak memory", PeakMemory(record.peak_memory_bytes));
  return rows;
}

Rows Reporter::Impl::FileRows(const FinishRecord& record) const {
  Rows rows = {{"metrics", PathOf("metrics.jsonl")}, {"loss curve", PathOf("loss.svg")}};
  if (!record.checkpoint_dir.empty()) rows.emplace_back("checkpoint", record.checkpoint_dir);
  if (!record.config_path.empty()) rows.emplace_back("configuration", record.config_path);
  if (!record.log_dir.empty()) rows.emplace_back("logs", record.log_dir);
  return rows;
}

absl::Status Reporter::Impl::WriteCurve() const {
  LossCurve curve;
  curve.title = options.run_name + ": loss";
  std::vector<std::string> facts;
  if (options.parameters > 0)
    facts.push_back(FormatCount(static_cast<double>(options.parameters)) + " parameters");
  if (!options.precision.empty()) facts.push_back(options.precision);
  facts.push_back(absl::StrCat(options.world_size, options.world_size == 1 ? " rank" : " ranks"));
  facts.push_back(FormatInteger(options.tokens_per_step) + " tokens per step");
  curve.subtitle = absl::StrJoin(facts, ", ");
  // Records count steps from 0; people read how many were done.
  for (const auto& [step, loss] : train) curve.train.emplace_back(step + 1, loss);
  for (const auto& [step, loss] : validation) curve.validation.emplace_back(step + 1, loss);
  return WriteFileAtomic(PathOf("loss.svg"), LossCurveSvg(curve));
}

absl::StatusOr<std::unique_ptr<Reporter>> Reporter::Create(ReporterOptions options) {
  auto impl = std::make_unique<Impl>(std::move(options));
  impl->started = impl->Now();
  impl->next_step = impl->options.start_step;
  if (impl->options.is_rank0) {
    SHOAL_RETURN_IF_ERROR(MakeFolders(impl->options.run_dir));
    SHOAL_ASSIGN_OR_RETURN(impl->file,
                           MetricsFile::Open(impl->PathOf("metrics.jsonl"), impl->options.start_step));
    impl->train = impl->file->history().train;
    impl->validation = impl->file->history().validation;
    for (const auto& [step, loss] : impl->validation) impl->best_eval = std::fmin(impl->best_eval, loss);
    impl->PrintHeader();
  }
  return std::unique_ptr<Reporter>(new Reporter(std::move(impl)));
}

Reporter::Reporter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Reporter::~Reporter() { impl_->screen.Keep(); }

absl::Status Reporter::Step(const TrainRecord& record) {
  impl_->CountStep(record);
  impl_->FeedMetrics(record);
  if (impl_->file == nullptr) return absl::OkStatus();
  const int64_t interval = impl_->options.expert_counts_interval;
  const bool counts = interval > 0 && record.step % interval == 0;
  impl_->train.emplace_back(record.step, record.ce_loss);
  impl_->ShowStep(record);
  return impl_->file->Append(StepJson(record, counts ? ExpertCounts::kInclude : ExpertCounts::kOmit));
}

absl::Status Reporter::SkippedStep(const TrainRecord& record) {
  impl_->next_step = record.step + 1;
  impl_->metrics.steps_skipped_nonfinite.Add();
  if (!std::isfinite(record.loss)) impl_->metrics.nan_losses.Add();
  if (!std::isfinite(record.grad_norm)) impl_->metrics.nan_grads.Add();
  if (impl_->file == nullptr) return absl::OkStatus();
  Note(absl::StrFormat("step %d skipped: loss %g, gradient norm %g", record.step + 1, record.loss,
                       record.grad_norm));
  return impl_->file->Append(StepJson(record, ExpertCounts::kInclude));
}

absl::Status Reporter::Eval(const EvalRecord& record) {
  impl_->eval_seconds += record.seconds;
  impl_->metrics.eval_loss.Set(record.loss);
  if (impl_->file == nullptr) return absl::OkStatus();
  const bool best = !(record.loss >= impl_->best_eval) && std::isfinite(record.loss);
  if (best) impl_->best_eval = record.loss;
  impl_->validation.emplace_back(record.step, record.loss);
  const std::string total = std::to_string(impl_->options.total_steps);
  const std::string bits = impl_->BitsPerByte(record.loss);
  Note(absl::StrFormat("step %*d/%s  validation loss %.4f%s%s  in %s%s", static_cast<int>(total.size()),
                       record.step + 1, total, record.loss, bits.empty() ? "" : "  ", bits,
                       FormatSeconds(record.seconds),
                       best && impl_->validation.size() > 1 ? "  best so far" : ""));
  return impl_->file->Append(EvalJson(record));
}

void Reporter::Note(const std::string& line) {
  if (impl_->file != nullptr) impl_->screen.Print(line + "\n");
}

absl::Status Reporter::Finish(const FinishRecord& record) {
  impl_->metrics.SetState(record.status.ok() ? JobState::kDone : JobState::kFailed);
  if (impl_->file == nullptr) return absl::OkStatus();
  Screen& screen = impl_->screen;
  screen.Keep();
  const absl::Status written = impl_->WriteCurve();
  Rows rows = impl_->ResultRows(record);
  if (!record.status.ok()) rows.emplace(rows.begin(), "reason", std::string(record.status.message()));
  const std::string title = record.status.ok() ? "finished" : "stopped before the end";
  std::string text = "\n" + FormatTable(title, rows, screen.colour());
  if (!record.sample_text.empty()) {
    const std::string prompt =
        record.sample_prompt.empty() ? "" : absl::StrCat(", after \"", record.sample_prompt, "\"");
    absl::StrAppend(&text, "\n", FormatTable("sample of generated text" + prompt, {}, screen.colour()),
                    FormatSample(record.sample_text, kColumnsMax - 4, "    "));
  }
  absl::StrAppend(&text, "\n", FormatTable("written", impl_->FileRows(record), screen.colour()));
  if (!record.hints.empty()) {
    absl::StrAppend(&text, "\n", FormatTable("next", {}, screen.colour()));
    // As they are, however long: they are there to be copied.
    for (const std::string& hint : record.hints) absl::StrAppend(&text, "  ", hint, "\n");
  }
  screen.Print(text);
  return written;
}

}  // namespace shoal
