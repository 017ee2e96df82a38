// What a communicator does, in the series shoal_comm_* of /metrics. Hides the bookkeeping of operations in
// flight.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "runtime/metrics/server.h"

namespace shoal {

// `inner`, with its operations counted under `group` ("world", "dp", "ep") and `transport` ("shm", "tcp"): of
// those that complete, the time from issue to end and the bytes that this rank gives; of all, the time in
// which at least one is in flight, and when the oldest was issued. Adds no waiting and no thread. `metrics`
// outlives the result. A group of one communicates nothing: `inner` itself.
std::unique_ptr<Communicator> Measure(std::unique_ptr<Communicator> inner, MetricsServer& metrics,
                                      std::string group, std::string transport);

// parent.Split(members), counted under `group` if Measure() made `parent`, otherwise plain. Split() alone
// counts under the parent's group.
absl::StatusOr<std::unique_ptr<Communicator>> SplitAs(Communicator& parent, absl::Span<const int> members,
                                                      std::string_view group);

}  // namespace shoal
