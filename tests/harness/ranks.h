// Ranks of one job as threads of this process, for tests of what ranks do together.
#pragma once

#include <functional>
#include <string>

#include "collectives/communicator.h"

namespace shoal {

// A rendezvous name ("unix:...") that nobody else on this host uses.
std::string UniqueRendezvous();

// Options of rank `rank` of a job that meets at `rendezvous`; time-outs fit for a loaded machine.
WorldOptions RankOptions(int rank, int size, const std::string& transport, const std::string& rendezvous);

// Connects `size` ranks and runs `body` once per rank, each on a thread of its own; returns when all have returned and
// closed. CHECKs that they connect.
void RunRanks(int size, const std::string& transport, const std::function<void(Communicator&)>& body);

}  // namespace shoal
