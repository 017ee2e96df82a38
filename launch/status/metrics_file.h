// metrics.jsonl of a run: one JSON object a line, one line per step and per validation, appended whole (one
// write(2) a line) so that it can be followed while the run goes on. Numbers read back exactly; what is not
// finite is null.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "parallel/expert/expert_summary.h"

namespace shoal {

struct TrainRecord {
  int64_t step = 0;  // From 0.
  double loss = 0, ce_loss = 0, aux_loss = 0, z_loss = 0;
  double learning_rate = 0, grad_norm = 0;
  int64_t tokens = 0;  // Of all ranks in this step.
  double seconds = 0;  // Wall time of the step.
  double flops = 0;    // Floating-point operations of the model in this step, of all ranks.
  double data_wait_seconds = 0;
  std::vector<std::vector<int64_t>> expert_counts = {};  // [MoE layer][expert], global. Empty: not counted.
  std::vector<int> moe_layers = {};  // The layers of expert_counts, as the model numbers them.
  std::optional<ExpertSummary> experts = {};  // None: no layer has experts, or there is one rank.
  std::vector<std::pair<std::string, double>> phase_seconds = {};
};

struct EvalRecord {
  int64_t step = 0;  // The last step before it: of the weights after step s, s.
  double loss = 0;   // Nats per token.
  int64_t tokens = 0;
  double seconds = 0;
};

enum class ExpertCounts : uint8_t { kOmit, kInclude };

// {"step":12,"loss":...,"ce_loss":...,"aux_loss":...,"z_loss":...,"lr":...,"grad_norm":...,"tokens":...,
// "tokens_per_second":...,"seconds":...,"experts":{...},"expert_counts":[[...],...]}, without a line end;
// "experts" has the fields of ExpertSummary.
std::string StepJson(const TrainRecord& record, ExpertCounts expert_counts);
// {"step":12,"validation_loss":...,"validation_tokens":...,"validation_seconds":...}
std::string EvalJson(const EvalRecord& record);

class MetricsFile {
 public:
  // (step, cross-entropy) of the records that a resumed file kept. What was null is NaN.
  struct History {
    std::vector<std::pair<int64_t, double>> train, validation;
  };

  // A run that starts at `first_step` > 0 keeps the records of earlier steps and drops all others, also a
  // torn last line: the old file or the whole new one is there at any instant. One that starts at 0 moves an
  // old file out of the way, to metrics.previous.jsonl beside it. Errors name the file.
  static absl::StatusOr<std::unique_ptr<MetricsFile>> Open(const std::string& path, int64_t first_step);
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;

  // `json` and a line end. RESOURCE_EXHAUSTED: the disk is full. After an error the file still ends with a
  // whole line.
  absl::Status Append(const std::string& json);
  const History& history() const { return history_; }
  const std::string& path() const { return path_; }

 private:
  MetricsFile(std::string path, int fd, History history);
  const std::string path_;
  const int fd_;
  const History history_;
};

}  // namespace shoal
