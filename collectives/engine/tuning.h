// What a group has chosen for its operations, and why: for `shoal bench collectives --explain` and for diagnosis.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/communicator.h"
#include "collectives/program/program.h"

namespace shoal {

struct TuningRow {
  OpKind kind = OpKind::kBarrier;
  int64_t size_class = 0;     // Operations of [size_class, 2 size_class) bytes; 0: of any size.
  std::string algorithm;
  int64_t piece_bytes = 0;    // 0: not cut into pieces.
  int64_t predicted_ns = 0;   // For 1.5 size_class bytes. 0: not predicted.
  int64_t observed_ns = 0;    // The median of the latest operations here, waiting for late ranks included. 0: none yet.
  int64_t operations = 0;
  bool chosen = false;        // Otherwise it was tried.
  std::string why;
};

// Empty for communicators that choose nothing: other backends, groups of one. Tiny operations are not among them.
// Thread-safe.
std::vector<TuningRow> Tuning(const Communicator& group);

}  // namespace shoal
