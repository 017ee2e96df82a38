// Ranks of one job as threads of this process, for tests of what ranks do together.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "collectives/communicator.h"

namespace shoal {

// A rendezvous name ("unix:...") that nobody else on this host uses.
std::string UniqueRendezvous();

// Options of rank `rank` of a job that meets at `rendezvous`; time-outs fit for a loaded machine.
WorldOptions RankOptions(int rank, int size, const std::string& transport, const std::string& rendezvous);

// Connects `size` ranks and runs `body` once per rank, each on a thread of its own; returns when all have
// returned and closed. CHECKs that they connect.
void RunRanks(int size, const std::string& transport, const std::function<void(Communicator&)>& body);

// Ranks of one job as processes, forked from this one (which must have no other threads), for tests of what
// happens when a process is killed or stopped. The destructor kills and reaps what is left.
class RankProcesses {
 public:
  // What the parent is told by a rank: one line at a time.
  using Say = std::function<void(const std::string& line)>;

  // Each rank connects and runs `body`, then exits. `options` are of every rank (its number is filled in).
  RankProcesses(const WorldOptions& options, const std::function<void(Communicator&, const Say&)>& body);
  ~RankProcesses();

  pid_t pid(int rank) const { return ranks_[rank].pid; }
  void Signal(int rank, int signal_number) const;
  // The next line that a rank says; "" when it has ended or says nothing for a minute.
  std::string Line(int rank);

 private:
  struct Rank {
    pid_t pid = 0;
    int fd = -1;
  };
  std::vector<Rank> ranks_;
};

}  // namespace shoal
