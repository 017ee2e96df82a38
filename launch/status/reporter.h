// How a run tells what it does: the progress line or log lines on stdout, metrics.jsonl, /metrics, and at the
// end a table, a sample of text and the loss curve. Rank 0 writes and prints; other ranks feed their own
// /metrics only.
//
// Not thread-safe: the training loop's thread calls it. An error is one of writing files: it names the file
// and ends the run; printing cannot fail.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "launch/status/metrics_file.h"
#include "runtime/metrics/server.h"

namespace shoal {

enum class OutputMode : uint8_t {
  kAuto,      // kTerminal if out_fd is a terminal (and TERM is not dumb), otherwise kLog.
  kTerminal,  // One line that updates itself, kept lines at validations.
  kLog,       // A line every log_interval steps.
};

struct ReporterOptions {
  std::string run_dir;  // Made if missing.
  std::string run_name;
  bool is_rank0 = true;
  int64_t total_steps = 0;
  int64_t start_step = 0;  // The first step of this process: above 0 when the run was resumed.
  int64_t tokens_per_step = 0;
  double gemm_peak_flops = 0;           // FLOP/s of all ranks together, measured. 0: unknown.
  double bytes_per_token = 0;           // Of the validation text, for bits per byte. 0: unknown; 1: bytes.
  int64_t log_interval = 10;            // telemetry.log_interval
  int64_t expert_counts_interval = 10;  // telemetry.expert_counts_interval; 0: never.
  // For the block at the start; what is empty or 0 is left out.
  int64_t parameters = 0, active_parameters = 0;
  int world_size = 1, threads_per_rank = 1;
  std::string model;                 // "4 layers, width 192, 8 experts, top-2"
  std::string layout;                // "data parallel", "expert parallel over 2 ranks"
  std::string precision;             // "fp32"
  std::string data;                  // "corpus.txt.zst, 4.2M tokens, 5.0% held out"
  std::vector<int> moe_layers;       // Layers with experts.
  MetricsServer* metrics = nullptr;  // Borrowed; outlives the reporter. nullptr: none.
  // Where and how to print, and the time in seconds from any start. Set by tests alone.
  int out_fd = STDOUT_FILENO;
  OutputMode mode = OutputMode::kAuto;
  int columns = 0;  // 0: the terminal's.
  std::function<double()> now_seconds;
};

struct FinishRecord {
  absl::Status status;                     // Not OK: the run ended early, and why.
  std::string sample_prompt, sample_text;  // Empty text: no sample.
  std::vector<int64_t> peak_memory_bytes;  // One a rank, in rank order; empty: of this process alone.
  std::string checkpoint_dir, config_path, log_dir;  // Where those were written; empty: not.
  std::vector<std::string> hints;                    // Commands worth trying next, one a line.
};

class Reporter {
 public:
  // Opens (or continues, see MetricsFile) <run_dir>/metrics.jsonl and prints the block at the start.
  static absl::StatusOr<std::unique_ptr<Reporter>> Create(ReporterOptions options);
  ~Reporter();
  Reporter(const Reporter&) = delete;
  Reporter& operator=(const Reporter&) = delete;

  // After each committed step, in order. Counts of experts are written only every expert_counts_interval
  // steps.
  absl::Status Step(const TrainRecord& record);
  // A step whose result was not applied because it is not finite: counted in /metrics and written to
  // metrics.jsonl.
  absl::Status SkippedStep(const TrainRecord& record);
  absl::Status Eval(const EvalRecord& record);
  // A line that stays, above the updating one: "saved runs/a/checkpoints/step-200 in 0.1s".
  void Note(const std::string& line);
  // Once, at the end, also of a failed run. Writes <run_dir>/loss.svg.
  absl::Status Finish(const FinishRecord& record);

 private:
  struct Impl;
  explicit Reporter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace shoal
