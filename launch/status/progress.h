// What a person reads while a run goes on and when it ended: pure functions from numbers to text.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/types/span.h"

namespace shoal {

inline constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
// No line that Shoal prints is wider.
inline constexpr int kColumnsMax = 110;

enum class Colour : uint8_t { kNone, kTerminal };

// kUnknown leaves a field out.
struct Progress {
  int64_t step = 0;  // Steps done.
  int64_t total_steps = 0;
  double eta_seconds = kUnknown;
  double loss = kUnknown;
  double learning_rate = kUnknown;
  double grad_norm = kUnknown;
  double tokens_per_second = kUnknown;
  double flops_per_second = kUnknown;
  double peak_share = kUnknown;      // Of the measured GEMM peak of all ranks.
  double expert_balance = kUnknown;  // Max over mean of tokens per expert.
};

// One line without its end, of at most min(columns, kColumnsMax) characters (colours aside). Columns line up
// from line to line. What does not fit is shortened, then left out, the least important first.
std::string FormatProgress(const Progress& progress, int columns, Colour colour);

// Seconds until `remaining_steps` are done, from the newest step times (any order, seconds) and the time that
// each step costs beside itself (validations, checkpoints). A single step that took long hardly counts.
// kUnknown without times.
double EtaSeconds(absl::Span<const double> recent_step_seconds, int64_t remaining_steps,
                  double other_seconds_per_step);

// Max over mean of the least balanced layer. kUnknown without counts, or when all are zero.
double ExpertBalance(absl::Span<const std::vector<int64_t>> counts_by_layer);

std::string FormatSeconds(double seconds);   // "8.4s", "42s", "2m13s", "1h04m", "3d04h"; "--" when unknown.
std::string FormatCount(double count);       // "812", "22.3k", "5.24M", "1.30B"
std::string FormatInteger(int64_t integer);  // "1,234,567"
std::string FormatBytes(double bytes);       // "512 B", "1.5 MiB"
std::string FormatFlops(double per_second);  // "312 GFLOP/s", "12.3 TFLOP/s"

// Lines "  label   value" with the values in one column, below `title`. Values that are too long go on below
// themselves.
std::string FormatTable(std::string_view title, absl::Span<const std::pair<std::string, std::string>> rows,
                        Colour colour);

// Text as it came out of a model, made safe for a terminal: control characters and broken UTF-8 become "?";
// wrapped at spaces to `width` characters, each line after `indent`.
std::string FormatSample(std::string_view text, int width, std::string_view indent);

}  // namespace shoal
