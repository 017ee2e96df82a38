// Proves a program symbolically: runs it on sets of contributions instead of numbers.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "collectives/program/program.h"

namespace shoal {

enum class ReduceOrder : uint8_t {
  kAny,
  kIndex,  // Every reduced element is made by one instruction, from all contributions in index order.
};

// problems[r], programs[r]: rank r's. OK: in every order of execution that the dependencies allow, with sends that end
// late (rendezvous) and with sends that end at once, all instructions end (no deadlock), every output element holds
// exactly the contributions that it must, each once and `final` once, no memory is read or written outside of its buffer
// or in a race, what is lent is used by nobody else meanwhile and returned once, no message is left, and all ranks that
// hold a reduced element made it by the same expression (equal bits). A barrier: no rank ends before all have begun.
// Otherwise INTERNAL, with the rank, the instruction and what is wrong.
absl::Status Verify(const std::vector<Problem>& problems, const std::vector<Program>& programs,
                    ReduceOrder order = ReduceOrder::kAny);

}  // namespace shoal
