// Runs Shoal and its peers in alternation, so that what the machine does meanwhile meets all of them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "launch/bench/own_ranks.h"
#include "launch/bench/report.h"

namespace shoal {

struct ComparisonOptions {
  std::vector<std::string> ops, transports, peers;
  std::vector<int64_t> sizes;
  std::vector<int> ranks;
  double seconds = 0.1;  // For each size, library and round, about.
  int rounds = 3;
  bool in_place = true;
  bool limits = false;  // Measure what the machine allows, where that is known.
  bool probe = false;   // Measure the cores' distance in each round.
  std::string folder;   // Of the peers' programs.
  OwnOptions own;
  absl::Duration patience =
      absl::Seconds(30);  // Beyond ten times `seconds`: who says nothing for so long hangs.

  std::function<void(const std::string& line)> say;  // Progress.
  std::function<absl::Status(absl::Span<const BenchRow> rows)>
      on_rows;  // Of an operation on a transport, when complete.
};

// All combinations (pingpong with two ranks only). A library that fails or hangs at a size has a row that
// says so. Errors: those of on_rows, and UNAVAILABLE when no process can be started.
absl::StatusOr<std::vector<BenchRow>> Compare(const ComparisonOptions& options);

}  // namespace shoal
