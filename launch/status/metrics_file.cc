#include "launch/status/metrics_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {
namespace {

// The shortest text that reads back as the same double.
std::string Number(double value) {
  if (!std::isfinite(value)) return "null";
  std::array<char, 32> text;
  const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), value);
  return std::string(text.data(), end);
}

double LossOf(const nlohmann::json& record, const char* key) {
  const nlohmann::json& value = record[key];
  return value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
}

// Takes one line into `history`; false when it is no record of a step before `first_step`.
bool Keep(std::string_view line, int64_t first_step, MetricsFile::History& history) {
  const nlohmann::json record =
      nlohmann::json::parse(line.begin(), line.end(), /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!record.is_object() || !record.contains("step") || !record["step"].is_number_integer()) return false;
  const auto step = record["step"].get<int64_t>();
  if (step >= first_step) return false;
  if (record.contains("validation_loss")) {
    history.validation.emplace_back(step, LossOf(record, "validation_loss"));
  } else if (record.contains("ce_loss")) {
    history.train.emplace_back(step, LossOf(record, "ce_loss"));
  }
  return true;
}

// Rewrites the file at `path` with the records before `first_step` alone.
absl::StatusOr<MetricsFile::History> Truncate(const std::string& path, int64_t first_step) {
  SHOAL_ASSIGN_OR_RETURN(const std::string old, ReadFile(path));
  MetricsFile::History history;
  std::string kept;
  int64_t dropped = 0;
  for (std::string_view rest = old; !rest.empty();) {
    const size_t end = rest.find('\n');
    const std::string_view line = rest.substr(0, end);
    if (end != std::string_view::npos && Keep(line, first_step, history)) {
      kept.append(line).append("\n");
    } else {
      ++dropped;
    }
    rest = end == std::string_view::npos ? "" : rest.substr(end + 1);
  }
  if (dropped > 0) {
    SHOAL_LOG(kInfo) << path << ": dropped " << dropped << " records from step " << first_step << " on";
    SHOAL_RETURN_IF_ERROR(WriteFileAtomic(path, kept));
  }
  return history;
}

std::string ExpertsJson(const ExpertSummary& experts) {
  std::string json = absl::StrCat("{\"hottest_expert\":", Number(experts.hottest_expert),
                                  ",\"expert_max_over_mean\":", Number(experts.expert_max_over_mean),
                                  ",\"rank_max_over_mean\":", Number(experts.rank_max_over_mean),
                                  ",\"stay_rank\":", Number(experts.stay_rank));
  absl::StrAppend(
      &json, ",\"stay_host\":", Number(experts.stay_host), ",\"dropped\":", Number(experts.dropped),
      ",\"copies_per_layer\":", Number(experts.copies_per_layer), ",\"weight_bytes\":", experts.weight_bytes);
  absl::StrAppend(&json, ",\"gradient_bytes\":", experts.gradient_bytes,
                  ",\"owner_moves\":", experts.owner_moves, "}");
  return json;
}

}  // namespace

std::string StepJson(const TrainRecord& record, ExpertCounts expert_counts) {
  const double rate = record.seconds > 0 ? static_cast<double>(record.tokens) / record.seconds : 0;
  std::string json =
      absl::StrCat("{\"step\":", record.step, ",\"loss\":", Number(record.loss),
                   ",\"ce_loss\":", Number(record.ce_loss), ",\"aux_loss\":", Number(record.aux_loss));
  absl::StrAppend(&json, ",\"z_loss\":", Number(record.z_loss), ",\"lr\":", Number(record.learning_rate),
                  ",\"grad_norm\":", Number(record.grad_norm), ",\"tokens\":", record.tokens);
  absl::StrAppend(&json, ",\"tokens_per_second\":", Number(rate), ",\"seconds\":", Number(record.seconds));
  if (record.experts.has_value()) absl::StrAppend(&json, ",\"experts\":", ExpertsJson(*record.experts));
  if (expert_counts == ExpertCounts::kInclude && !record.expert_counts.empty()) {
    const auto layer = [](std::string* out, const std::vector<int64_t>& counts) {
      absl::StrAppend(out, "[", absl::StrJoin(counts, ","), "]");
    };
    absl::StrAppend(&json, ",\"expert_counts\":[", absl::StrJoin(record.expert_counts, ",", layer), "]");
  }
  return json + "}";
}

std::string EvalJson(const EvalRecord& record) {
  return absl::StrCat("{\"step\":", record.step, ",\"validation_loss\":", Number(record.loss),
                      ",\"validation_tokens\":", record.tokens,
                      ",\"validation_seconds\":", Number(record.seconds), "}");
}

absl::StatusOr<std::unique_ptr<MetricsFile>> MetricsFile::Open(const std::string& path, int64_t first_step) {
  History history;
  struct stat info {};
  const bool has_old = stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0;
  if (has_old && first_step > 0) {
    SHOAL_ASSIGN_OR_RETURN(history, Truncate(path, first_step));
  } else if (has_old) {
    const std::string previous = absl::StrCat(absl::StripSuffix(path, ".jsonl"), ".previous.jsonl");
    SHOAL_RETURN_IF_ERROR(RenameDurably(path, previous));
  }
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd < 0) return ErrnoStatus(errno, "opening " + path);
  return std::unique_ptr<MetricsFile>(new MetricsFile(path, fd, std::move(history)));
}

MetricsFile::MetricsFile(std::string path, int fd, History history)
    : path_(std::move(path)), fd_(fd), history_(std::move(history)) {}

MetricsFile::~MetricsFile() { close(fd_); }

absl::Status MetricsFile::Append(const std::string& json) {
  const std::string line = json + "\n";
  ssize_t written = 0;
  do {
    written = write(fd_, line.data(), line.size());
  } while (written < 0 && errno == EINTR);
  if (written == static_cast<ssize_t>(line.size())) return absl::OkStatus();
  const int error = written < 0 ? errno : ENOSPC;  // A short write: the rest found no room.
  if (written > 0) {
    const off_t end = lseek(fd_, 0, SEEK_END);
    if (end < 0 || ftruncate(fd_, end - written) != 0) {
      SHOAL_LOG(kWarning) << path_ << " ends with a torn line";
    }
  }
  return ErrnoStatus(error, absl::StrCat("writing ", path_, " (", line.size(), " bytes)"));
}

}  // namespace shoal
