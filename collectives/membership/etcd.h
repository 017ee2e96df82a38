// Which of several coordinators leads a job: etcd decides, through its JSON gateway. The leader's address is the value of
// one key that lives as long as the leader's lease; who finds the key absent puts its own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace shoal {

// The leader's address. Blocks until `deadline_ns` (NowNs()). NOT_FOUND: nobody leads now. UNAVAILABLE: no etcd answers.
absl::StatusOr<std::string> FindLeader(const std::vector<std::string>& etcd, const std::string& job_id,
                                       int64_t deadline_ns);

struct ElectionOptions {
  std::vector<std::string> etcd;  // HOST:PORT each.
  std::string job_id;
  std::string address;                            // Of the candidate.
  absl::Duration lease = absl::Seconds(2);  // Whole seconds. A dead leader is replaced after about so long.
};

// A candidate, for as long as it exists. One thread of its own.
class Election {
 public:
  // `changed` runs on that thread: true: this candidate leads now; false: it no longer does, at the latest when its lease
  // ends. It begins as a follower.
  Election(const ElectionOptions& options, std::function<void(bool leads)> changed);
  ~Election();  // Gives the lease back, so that another takes over at once.

 private:
  class Candidate;
  std::unique_ptr<Candidate> candidate_;
};

}  // namespace shoal
