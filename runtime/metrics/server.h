// /metrics of one process: what a Prometheus server scrapes. Hides prometheus-cpp, its HTTP server and
// threads, and holds the one list of Shoal's series (docs: the help texts). All series exist from the start;
// a quantity that was not yet measured is NaN, a counter 0. Labels are bounded and never hold a step, a rank
// or a host: join with shoal_rank_info instead.
//
// Handles are small values, thread-safe, valid as long as their server. A default-constructed handle does
// nothing, so a `Metrics{}` stands for "no metrics" and callers need no branch.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace prometheus {
class Counter;
class Gauge;
class Histogram;
}  // namespace prometheus

namespace shoal {

class Counter {
 public:
  Counter() = default;
  explicit Counter(prometheus::Counter* counter) : counter_(counter) {}
  void Add(double amount = 1) const;  // Negative or NaN: no effect.
  double value() const;               // 0 without a counter.

 private:
  prometheus::Counter* counter_ = nullptr;
};

class Gauge {
 public:
  Gauge() = default;
  explicit Gauge(prometheus::Gauge* gauge) : gauge_(gauge) {}
  void Set(double value) const;
  void SetToNow() const;  // Unix seconds.
  double value() const;   // 0 without a gauge.

 private:
  prometheus::Gauge* gauge_ = nullptr;
};

class Histogram {
 public:
  Histogram() = default;
  explicit Histogram(prometheus::Histogram* histogram) : histogram_(histogram) {}
  void Observe(double value) const;

 private:
  prometheus::Histogram* histogram_ = nullptr;
};

enum class JobState : uint8_t {
  kInit,
  kRendezvous,
  kRestore,
  kTrain,
  kEval,
  kSave,
  kRecover,
  kDrain,
  kFailed,
  kDone
};
inline constexpr int kJobStates = 10;

// Where a step's time goes. The names are the label values of shoal_train_phase_seconds_total.
inline constexpr std::array<std::string_view, 10> kPhases = {
    "data",      "forward",      "backward",      "dispatch",  "combine",
    "grad_sync", "param_gather", "pipeline_wait", "optimizer", "other"};

// The lanes of a step (parallel/schedule/graph.h), by name: label values of shoal_step_lane_busy_seconds_total.
inline constexpr std::array<std::string_view, 5> kStepLanes = {"compute", "copy", "intra", "inter", "control"};

// Series of one MoE layer.
struct LayerMetrics {
  Gauge max_violation;                           // (max - mean) / mean of tokens per expert, over the batch.
  Gauge load_min, load_p50, load_p95, load_max;  // Load of an expert over its fair share.
  Gauge idle_experts;
};

// Series of all layers with experts together.
struct ExpertMetrics {
  Gauge hottest_expert;                           // Load of the busiest expert of any layer over its fair share.
  Gauge expert_max_over_mean, rank_max_over_mean;  // Means over layers.
  Gauge stay_rank, stay_host, dropped;            // Shares of rows.
  Gauge copies_per_layer;
  Counter weight_bytes, gradient_bytes, owner_moves;  // Of all ranks.
};

// Series of one kind of collective.
struct CommMetrics {
  Histogram duration_seconds;
  Counter bytes;  // Payload given by this rank.
};

struct Metrics {
  std::array<Gauge, kJobStates> job_state;
  Gauge train_step;
  Counter steps_committed, steps_skipped_nonfinite, steps_skipped_spike, steps_aborted;
  Gauge last_step_timestamp;
  Histogram step_duration;
  std::array<Counter, kPhases.size()> phase_seconds;
  std::array<Counter, kStepLanes.size()> lane_busy;
  Counter exposed_communication, scheduling_overhead;
  Gauge predicted_step_duration, task_prediction_error;
  Counter cost_changes;
  ExpertMetrics experts;
  Counter tokens, model_flops;
  Gauge mfu;
  Gauge loss_lm, loss_load_balance, loss_z;
  Gauge grad_norm, learning_rate;
  Counter nan_losses, nan_grads;
  Gauge eval_loss;
  Counter comm_timeouts, comm_peers_lost, comm_checksum_errors, comm_aborted;
  Gauge checkpoint_timestamp, checkpoint_step;
  Histogram checkpoint_snapshot, checkpoint_write, checkpoint_commit;
  Counter checkpoint_disk_full, checkpoint_other_failures;
  Counter data_wait;

  // Makes `state` the only one that is 1.
  void SetState(JobState state) const;
  // Adds to the phase of that name; unknown names count as "other".
  void AddPhase(std::string_view name, double seconds) const;
};

struct JobInfo {
  std::string run_id, model, precision, config_hash, layout;
};

struct RankInfo {
  int rank = 0, local_rank = 0, node = 0;
  int dp = 0, ep = 0;  // Index in the data-parallel and in the expert-parallel group. Without others: 0.
};

class MetricsServer {
 public:
  static constexpr int kNoPort = -1;
  // Listens on `address` (an IP address; 0.0.0.0 and [::]: all) and `port` (0: chosen by the system; kNoPort:
  // nowhere, the series are still counted). Two threads answer; they take no signals; SIGPIPE is ignored
  // process-wide from here on. ALREADY_EXISTS: the port is taken; INVALID_ARGUMENT, PERMISSION_DENIED: the
  // address or port cannot be used. Messages name address, port and the configuration key.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Create(std::string_view address, int port);
  ~MetricsServer();  // Ends scrapes in progress, then stops listening.
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;

  int port() const;         // kNoPort when it listens nowhere.
  std::string url() const;  // "http://127.0.0.1:9400/metrics"; empty when it listens nowhere.
  const Metrics& metrics() const;

  // The join targets shoal_job_info and shoal_rank_info. A later call replaces the labels.
  void SetJob(const JobInfo& job);
  void SetRank(const RankInfo& rank);
  // The series of these layers, in this order. Again with the same layers: the same series.
  std::vector<LayerMetrics> Layers(absl::Span<const int> layers);
  // The series of one operation in one group, for example ("ep", "all_to_all", "shm"). Slow the first time:
  // keep it.
  CommMetrics Comm(std::string_view group, std::string_view op, std::string_view transport);
  // Time in which this rank waited for its peers in `group`: with an operation in flight there.
  Counter CommWait(std::string_view group);
  // When the oldest pending operation of `group` was issued, in Unix seconds; 0 when idle.
  Gauge CommOldestPending(std::string_view group);
  // The text that a scrape gets.
  std::string Text() const;

 private:
  struct Impl;
  explicit MetricsServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace shoal
