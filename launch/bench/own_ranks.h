// Shoal's own ranks in `shoal bench collectives`: the same measurement as the peers' programs make
// (sampling.h).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "launch/bench/peers.h"
#include "runtime/tensor/dtype.h"

namespace shoal {

struct OwnOptions {
  DType dtype = DType::kF32;
  ReduceOp redop = ReduceOp::kSum;
  WireFormat wire = WireFormat::kAsIs;
  Order order = Order::kFast;
  std::string algorithm;  // Empty: chosen.
  bool bind = false;      // Each rank to a core.
  bool explain = false;   // Say what was chosen, why, and how long it was expected to take.
};

// "wire=bf16,order=fixed,algorithm=ring", each part optional, into `options`. INVALID_ARGUMENT names the
// part.
absl::Status ParseOpOptions(std::string_view text, OwnOptions* options);
absl::StatusOr<DType> ParseDType(std::string_view name);
absl::StatusOr<ReduceOp> ParseRedop(std::string_view name);

// What element `i` of the result of `op` must be on rank `rank`, and in `*checked` how many elements of that
// rank's result count. Inputs are BenchInput(); each rank's part has `part` elements.
double ExpectedElement(std::string_view op, ReduceOp redop, int rank, int ranks, int64_t part, int64_t i);
int64_t CheckedElements(std::string_view op, int rank, int ranks, int64_t part);

// Forks the ranks, which connect, verify and measure; rank 0 prints to stdout. Returns when all have ended:
// 0, or 1 after lines on stderr. The calling process must have no other threads.
int RunOwnRanks(const BenchCase& bench, const OwnOptions& options, absl::Span<const int64_t> sizes);

}  // namespace shoal
