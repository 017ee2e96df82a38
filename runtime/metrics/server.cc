#include "runtime/metrics/server.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <exception>
#include <limits>
#include <map>
#include <thread>
#include <utility>

#include "prometheus/counter.h"
#include "prometheus/exposer.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/metrics/process.h"

namespace shoal {
namespace {

using Labels = std::map<std::string, std::string>;

constexpr double kNotMeasured = std::numeric_limits<double>::quiet_NaN();
constexpr std::array<const char*, kJobStates> kStateNames = {
    "init", "rendezvous", "restore", "train", "eval", "save", "recover", "drain", "failed", "done"};

// Adds series to a registry by family name. Family::Add is slow, so series are made once and kept as handles.
class Catalogue {
 public:
  explicit Catalogue(prometheus::Registry& registry) : registry_(registry) {}

  Counter AddCounter(const char* name, const char* help, const Labels& labels = {}) {
    return Counter(&prometheus::BuildCounter().Name(name).Help(help).Register(registry_).Add(labels));
  }
  Gauge AddGauge(const char* name, const char* help, const Labels& labels = {},
                 double initial = kNotMeasured) {
    prometheus::Family<prometheus::Gauge>& family =
        prometheus::BuildGauge().Name(name).Help(help).Register(registry_);
    const bool fresh = !family.Has(labels);
    prometheus::Gauge& gauge = family.Add(labels);
    if (fresh) gauge.Set(initial);
    return Gauge(&gauge);
  }
  Histogram AddHistogram(const char* name, const char* help, const std::vector<double>& bounds,
                         const Labels& labels = {}) {
    return Histogram(
        &prometheus::BuildHistogram().Name(name).Help(help).Register(registry_).Add(labels, bounds));
  }

 private:
  prometheus::Registry& registry_;
};

// Where the time of this rank's steps goes, lane by lane.
void AddStepSeries(Catalogue& catalogue, Metrics& metrics) {
  for (size_t i = 0; i < kStepLanes.size(); ++i) {
    metrics.lane_busy[i] =
        catalogue.AddCounter("shoal_step_lane_busy_seconds_total", "Time in which a lane of the step graph had a task running.",
                             {{"lane", std::string(kStepLanes[i])}});
  }
  metrics.exposed_communication =
      catalogue.AddCounter("shoal_step_exposed_seconds_total",
                           "Time in which the compute lane waited for other lanes that worked: what overlap did not hide.");
  metrics.scheduling_overhead =
      catalogue.AddCounter("shoal_step_overhead_seconds_total",
                           "Time in which the compute lane idled although nothing that it waited for was running.");
  metrics.predicted_step_duration = catalogue.AddGauge(
      "shoal_step_predicted_seconds", "Duration of the last step as predicted from the steps before it.");
  metrics.task_prediction_error =
      catalogue.AddGauge("shoal_step_task_prediction_error_ratio",
                         "Sum over the tasks of the last step of |predicted - measured|, over the sum measured.");
  metrics.cost_changes = catalogue.AddCounter(
      "shoal_step_cost_changes_total", "How often the time that a kind of task takes changed for good: a link, a clock, a neighbour.");
}

void AddExpertSeries(Catalogue& catalogue, ExpertMetrics& metrics) {
  metrics.hottest_expert = catalogue.AddGauge("shoal_moe_hottest_expert_ratio",
                                              "Tokens of the busiest expert of any layer over its fair share, in the last step.");
  const auto balance = [&](const char* of) {
    return catalogue.AddGauge("shoal_moe_max_over_mean_ratio",
                              "Rows of the busiest over the mean, of experts or of the ranks that compute them; mean over layers.",
                              {{"of", of}});
  };
  metrics.expert_max_over_mean = balance("experts");
  metrics.rank_max_over_mean = balance("ranks");
  const auto stay = [&](const char* on) {
    return catalogue.AddGauge("shoal_moe_local_rows_ratio",
                              "Share of rows whose expert is computed on the rank, or on the host, where they come from.",
                              {{"on", on}});
  };
  metrics.stay_rank = stay("rank");
  metrics.stay_host = stay("host");
  metrics.dropped = catalogue.AddGauge("shoal_moe_dropped_ratio", "Share of choices that experts refused for capacity.");
  metrics.copies_per_layer =
      catalogue.AddGauge("shoal_moe_copies_per_layer", "Copies of experts beside their owners, on all ranks together.");
  const auto bytes = [&](const char* what) {
    return catalogue.AddCounter("shoal_moe_copied_bytes_total",
                                "What travelled for copies of experts, of all ranks; counted on rank 0.", {{"what", what}});
  };
  metrics.weight_bytes = bytes("weights");
  metrics.gradient_bytes = bytes("gradients");
  metrics.owner_moves = catalogue.AddCounter("shoal_moe_owner_moves_total",
                                             "Experts that got another owner; counted on rank 0.");
}

void AddTrainSeries(Catalogue& catalogue, Metrics& metrics) {
  metrics.train_step = catalogue.AddGauge("shoal_train_step", "Committed optimizer steps.", {}, 0);
  const auto steps = [&](const char* outcome) {
    return catalogue.AddCounter("shoal_train_steps_total", "Steps attempted, by outcome.",
                                {{"outcome", outcome}});
  };
  metrics.steps_committed = steps("committed");
  metrics.steps_skipped_nonfinite = steps("skipped_nonfinite");
  metrics.steps_skipped_spike = steps("skipped_spike");
  metrics.steps_aborted = steps("aborted");
  metrics.last_step_timestamp = catalogue.AddGauge("shoal_train_last_step_timestamp_seconds",
                                                   "Unix time at which the last step was committed.");
  metrics.step_duration =
      catalogue.AddHistogram("shoal_train_step_duration_seconds", "Wall time of an optimizer step.",
                             {0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300});
  for (size_t i = 0; i < kPhases.size(); ++i) {
    metrics.phase_seconds[i] = catalogue.AddCounter(
        "shoal_train_phase_seconds_total", "Time of steps, by phase.", {{"phase", std::string(kPhases[i])}});
  }
  AddStepSeries(catalogue, metrics);
  AddExpertSeries(catalogue, metrics.experts);
  metrics.tokens =
      catalogue.AddCounter("shoal_train_tokens_total", "Tokens in committed steps, of all ranks; counted on rank 0.");
  metrics.model_flops =
      catalogue.AddCounter("shoal_train_model_flops_total",
                           "Floating-point operations of the model in committed steps, of all ranks; counted on rank 0.");
  metrics.mfu = catalogue.AddGauge("shoal_train_mfu_ratio",
                                   "Model FLOP/s of the last step over the measured GEMM peak of all ranks.");
  const auto loss = [&](const char* objective) {
    return catalogue.AddGauge("shoal_train_loss", "Loss of the last step, by objective.",
                              {{"objective", objective}});
  };
  metrics.loss_lm = loss("lm");
  metrics.loss_load_balance = loss("load_balance");
  metrics.loss_z = loss("z");
  metrics.grad_norm = catalogue.AddGauge("shoal_train_grad_norm", "Global gradient norm before clipping.");
  metrics.learning_rate =
      catalogue.AddGauge("shoal_train_learning_rate", "Learning rate of the last step.", {{"group", "all"}});
  const auto anomaly = [&](const char* kind) {
    return catalogue.AddCounter("shoal_train_anomalies_total", "Steps that looked wrong, by kind.",
                                {{"kind", kind}});
  };
  metrics.nan_losses = anomaly("nan_loss");
  metrics.nan_grads = anomaly("nan_grad");
  metrics.eval_loss =
      catalogue.AddGauge("shoal_eval_loss", "Loss in nats per token.", {{"dataset", "validation"}});
  metrics.data_wait =
      catalogue.AddCounter("shoal_data_wait_seconds_total", "Time in which training waited for data.");
}

void AddSystemSeries(Catalogue& catalogue, Metrics& metrics) {
  catalogue.AddGauge("shoal_build_info", "What this program was built from.",
                     {{"version", SHOAL_VERSION},
                      {"revision", SHOAL_REVISION},
                      {"cuda", "none"},
                      {"nccl", "none"},
                      {"mpi", "none"}},
                     1);
  for (size_t i = 0; i < metrics.job_state.size(); ++i) {
    metrics.job_state[i] =
        catalogue.AddGauge("shoal_job_state", "1 for the state that the job is in, 0 for others.",
                           {{"state", kStateNames[i]}}, 0);
  }
  const auto comm_error = [&](const char* kind) {
    return catalogue.AddCounter("shoal_comm_errors_total", "Failed communication, by kind.",
                                {{"kind", kind}});
  };
  metrics.comm_timeouts = comm_error("timeout");
  metrics.comm_peers_lost = comm_error("peer_lost");
  metrics.comm_checksum_errors = comm_error("checksum");
  metrics.comm_aborted = comm_error("aborted");
  metrics.checkpoint_timestamp =
      catalogue.AddGauge("shoal_checkpoint_last_success_timestamp_seconds",
                         "Unix time of the newest checkpoint.", {{"tier", "local"}});
  metrics.checkpoint_step = catalogue.AddGauge("shoal_checkpoint_last_success_step",
                                               "Steps in the newest checkpoint.", {{"tier", "local"}});
  const auto stage = [&](const char* name) {
    return catalogue.AddHistogram("shoal_checkpoint_duration_seconds",
                                  "Time of a checkpoint by stage; training waits during snapshot only.",
                                  {0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300},
                                  {{"tier", "local"}, {"stage", name}});
  };
  metrics.checkpoint_snapshot = stage("snapshot");
  metrics.checkpoint_write = stage("write");
  metrics.checkpoint_commit = stage("commit");
  const auto failure = [&](const char* reason) {
    return catalogue.AddCounter("shoal_checkpoint_failures_total",
                                "Checkpoints that were not written, by reason.",
                                {{"tier", "local"}, {"reason", reason}});
  };
  metrics.checkpoint_disk_full = failure("disk_full");
  metrics.checkpoint_other_failures = failure("other");
}

// Threads made while this lives take no signals: those are the main thread's.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// civetweb does not say why it could not listen; trying the same tells.
absl::Status WhyNotListening(const std::string& host, int port, const std::string& what) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("telemetry.metrics_address: '", host, "' is not an IP address"));
  }
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  int error = 0;
  if (bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, 1) != 0) error = errno;
  close(fd);
  freeaddrinfo(found);
  switch (error) {
    case EADDRINUSE:
      return absl::AlreadyExistsError(
          absl::StrCat(what, ": the port is in use; set telemetry.metrics_port to a free ",
                       "port, to 0 to let the system choose, or to -1 for no /metrics"));
    case EADDRNOTAVAIL:
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": no interface of this host has the address ", "telemetry.metrics_address"));
    case 0:
      return absl::UnavailableError(
          absl::StrCat(what, ": the HTTP server could not start (telemetry.metrics_port)"));
    default:
      return ErrnoStatus(error, what + " (telemetry.metrics_port)");
  }
}

// Connects to a server of this host and hangs up.
void Poke(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return;
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (connect(fd, found->ai_addr, found->ai_addrlen) != 0) {
    // In progress, or the server is gone already: both are what we want.
  }
  close(fd);
  freeaddrinfo(found);
}

std::string Unbracketed(std::string_view address) {
  if (address.size() >= 2 && address.front() == '[' && address.back() == ']') {
    address = address.substr(1, address.size() - 2);
  }
  return std::string(address);
}

}  // namespace

void Counter::Add(double amount) const {
  if (counter_ != nullptr && amount > 0) counter_->Increment(amount);
}
double Counter::value() const { return counter_ == nullptr ? 0 : counter_->Value(); }

void Gauge::Set(double value) const {
  if (gauge_ != nullptr) gauge_->Set(value);
}
void Gauge::SetToNow() const {
  Set(std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count());
}
double Gauge::value() const { return gauge_ == nullptr ? 0 : gauge_->Value(); }

void Histogram::Observe(double value) const {
  if (histogram_ != nullptr) histogram_->Observe(value);
}

void Metrics::SetState(JobState state) const {
  for (size_t i = 0; i < job_state.size(); ++i) job_state[i].Set(static_cast<size_t>(state) == i ? 1 : 0);
}

void Metrics::AddPhase(std::string_view name, double seconds) const {
  size_t phase = 0;
  while (phase + 1 < kPhases.size() && kPhases[phase] != name) ++phase;
  phase_seconds[phase].Add(seconds);
}

struct MetricsServer::Impl {
  std::string host;
  int port = kNoPort;
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  std::shared_ptr<prometheus::Collectable> process = NewProcessCollector();
  Catalogue catalogue{*registry};
  Metrics metrics;
  Mutex mutex;
  // The one series of each info family, which SetJob and SetRank replace.
  std::map<std::string, prometheus::Gauge*> info ABSL_GUARDED_BY(mutex);
  bool stopped ABSL_GUARDED_BY(mutex) = false;
  CondVar on_stopped;
  std::unique_ptr<prometheus::Exposer> exposer;  // Last: its threads read the members above.

  ~Impl() {
    if (exposer != nullptr) Stop();
  }

  // civetweb looks for its stop flag only every 2 s, unless somebody connects.
  void Stop() {
    std::thread stopper([this] {
      exposer.reset();
      MutexLock lock(&mutex);
      stopped = true;
      on_stopped.NotifyAll();
    });
    {
      MutexLock lock(&mutex);
      while (!stopped) {
        if (!on_stopped.WaitUntil(&mutex, std::chrono::steady_clock::now() + std::chrono::milliseconds(5))) {
          Poke(Unbracketed(host), port);
        }
      }
    }
    stopper.join();
  }

  void SetInfo(const char* name, const char* help, const Labels& labels) {
    MutexLock lock(&mutex);
    prometheus::Family<prometheus::Gauge>& family =
        prometheus::BuildGauge().Name(name).Help(help).Register(*registry);
    if (family.Has(labels)) return;
    prometheus::Gauge*& gauge = info[name];
    if (gauge != nullptr) family.Remove(gauge);
    gauge = &family.Add(labels);
    gauge->Set(1);
  }
};

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Create(std::string_view address, int port) {
  auto impl = std::make_unique<Impl>();
  AddSystemSeries(impl->catalogue, impl->metrics);
  AddTrainSeries(impl->catalogue, impl->metrics);
  impl->metrics.SetState(JobState::kInit);
  for (const char* group : {"world", "dp", "ep"}) {
    // Made here so that they exist before the first event.
    impl->catalogue.AddCounter("shoal_comm_wait_seconds_total",
                               "Time with an operation in flight on this rank; a straggler has the least.", {{"group", group}});
    impl->catalogue.AddGauge("shoal_comm_oldest_pending_timestamp_seconds",
                             "Unix time at which the oldest pending operation was issued; 0 when idle.",
                             {{"group", group}}, 0);
  }
  if (port == kNoPort) return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(impl)));

  const std::string host = Unbracketed(address);
  impl->host = host.find(':') == std::string::npos ? host : "[" + host + "]";
  const std::string listening = absl::StrCat(impl->host, ":", port);
  try {
    const SignalsBlocked blocked;
    impl->exposer = std::make_unique<prometheus::Exposer>(listening, /*num_threads=*/2);
    impl->port = impl->exposer->GetListeningPorts().at(0);
  } catch (const std::exception&) {
    return WhyNotListening(host, port, absl::StrCat("/metrics cannot listen on ", listening));
  }
  impl->exposer->RegisterCollectable(impl->registry);
  impl->exposer->RegisterCollectable(impl->process);
  return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(impl)));
}

MetricsServer::MetricsServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MetricsServer::~MetricsServer() = default;

int MetricsServer::port() const { return impl_->port; }

std::string MetricsServer::url() const {
  if (impl_->port == kNoPort) return "";
  std::string host = impl_->host;
  if (host == "0.0.0.0" || host == "[::]") {
    std::array<char, 256> name{};
    if (gethostname(name.data(), name.size() - 1) == 0) host = name.data();
  }
  return absl::StrCat("http://", host, ":", impl_->port, "/metrics");
}

const Metrics& MetricsServer::metrics() const { return impl_->metrics; }

void MetricsServer::SetJob(const JobInfo& job) {
  impl_->SetInfo("shoal_job_info", "What this job trains, and how.",
                 {{"run_id", job.run_id},
                  {"model", job.model},
                  {"precision", job.precision},
                  {"config_hash", job.config_hash},
                  {"layout", job.layout}});
}

void MetricsServer::SetRank(const RankInfo& rank) {
  impl_->SetInfo("shoal_rank_info", "Who this process is. tp, pp and cp are 0: one rank each.",
                 {{"rank", std::to_string(rank.rank)},
                  {"local_rank", std::to_string(rank.local_rank)},
                  {"node", std::to_string(rank.node)},
                  {"dp", std::to_string(rank.dp)},
                  {"tp", "0"},
                  {"pp", "0"},
                  {"cp", "0"},
                  {"ep", std::to_string(rank.ep)}});
}

std::vector<LayerMetrics> MetricsServer::Layers(absl::Span<const int> layers) {
  Catalogue& catalogue = impl_->catalogue;
  std::vector<LayerMetrics> all;
  for (const int layer : layers) {
    const std::string name = std::to_string(layer);
    const auto load = [&](const char* stat) {
      return catalogue.AddGauge("shoal_moe_expert_load_ratio",
                                "Tokens of an expert over its fair share, by statistic.",
                                {{"layer", name}, {"stat", stat}});
    };
    LayerMetrics metrics;
    metrics.max_violation =
        catalogue.AddGauge("shoal_moe_max_violation_ratio", "(max - mean) / mean of tokens per expert.",
                           {{"layer", name}, {"scope", "batch"}});
    metrics.load_min = load("min");
    metrics.load_p50 = load("p50");
    metrics.load_p95 = load("p95");
    metrics.load_max = load("max");
    metrics.idle_experts = catalogue.AddGauge("shoal_moe_idle_experts",
                                              "Experts without a token in the last step.", {{"layer", name}});
    all.push_back(metrics);
  }
  return all;
}

CommMetrics MetricsServer::Comm(std::string_view group, std::string_view op, std::string_view transport) {
  const Labels labels = {
      {"group", std::string(group)}, {"op", std::string(op)}, {"transport", std::string(transport)}};
  return {impl_->catalogue.AddHistogram(
              "shoal_comm_duration_seconds", "Time of an operation, from issue to end.",
              {1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10}, labels),
          impl_->catalogue.AddCounter("shoal_comm_bytes_total", "Payload given to operations by this rank.",
                                      labels)};
}

Counter MetricsServer::CommWait(std::string_view group) {
  return impl_->catalogue.AddCounter("shoal_comm_wait_seconds_total",
                                     "Time with an operation in flight on this rank; a straggler has the least.",
                                     {{"group", std::string(group)}});
}

Gauge MetricsServer::CommOldestPending(std::string_view group) {
  return impl_->catalogue.AddGauge("shoal_comm_oldest_pending_timestamp_seconds",
                                   "Unix time at which the oldest pending operation was issued; 0 when idle.",
                                   {{"group", std::string(group)}}, 0);
}

std::string MetricsServer::Text() const {
  std::vector<prometheus::MetricFamily> families = impl_->registry->Collect();
  for (prometheus::MetricFamily& family : impl_->process->Collect()) families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace shoal
