// The libraries that `shoal bench collectives` compares with: how each is started, and what must be installed
// for it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace shoal {

// One measurement of one operation on one transport, by whatever library.
struct BenchCase {
  std::string op;
  std::string transport;  // "shm" or "tcp"
  int ranks = 2;
  double seconds = 0.1;  // About, for each size, without verification.
  bool in_place = true;  // Concerns all_reduce.
};

struct Contender {
  std::string library;    // As in BenchRow. "limit": bench_limits, what the machine allows (LimitsProgram).
  std::string algorithm;  // Gloo's; otherwise empty.
};

// What `peers` ("openmpi", "mpich", "gloo") take part with: each MPI as shipped and warm, Gloo with each of
// its algorithms.
std::vector<Contender> PeerContenders(absl::Span<const std::string> peers, std::string_view op);

// NOT_FOUND: what is missing of `peers`, and the Debian packages or the command that provide it. `folder`: of
// the peers' programs. INVALID_ARGUMENT: a peer that is not known.
absl::Status CheckPeers(absl::Span<const std::string> peers, const std::string& folder);

// Beside the peers' folder. Takes TRANSPORT OP RANKS SECONDS BYTES... and prints what sampling.h says; sizes
// for which it knows no limit it may leave out at the end.
std::string LimitsProgram(const std::string& folder);

struct PeerCommand {
  std::vector<std::string> argv;
  std::vector<std::pair<std::string, std::string>> environment;  // Added to this process's.
};
PeerCommand CommandOf(const Contender& peer, const BenchCase& bench, absl::Span<const int64_t> sizes,
                      const std::string& folder);

// Replaces this process. Returns the exit code, after a line on stderr, when the program cannot be run.
int Execute(const PeerCommand& command);

}  // namespace shoal
