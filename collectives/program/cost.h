// Predicts how long a program takes, from link parameters that were measured. Pure.
#pragma once

#include <string>
#include <vector>

#include "collectives/program/algorithms.h"

namespace shoal {

// Sending `bytes`: latency + bytes / bandwidth. Integers, so that all ranks compute with the same numbers.
struct Link {
  int64_t latency_ns = 0;
  int64_t bytes_per_ms = 1;
};

struct CostModel {
  Topology topology;
  std::vector<Link> links;             // [from * size + to].
  int64_t reduce_bytes_per_ms = 1;     // Per source, on one rank.
  int64_t instruction_ns = 0;
  int64_t cores_per_host = 1;          // Ranks of one host share them.
  bool shared_memory = true;           // Ranks of one host read each other's memory: a view costs no transfer, and what is
                                       // received is copied by the receiver, at the link's bandwidth.
};

// When the last rank is through, where messages of one link queue behind each other, a rank's messages to all others
// share the bandwidth of its fastest link, and arithmetic shares the cores. programs[r]: rank r's; they are right
// (program/verifier.h).
int64_t PredictNs(const CostModel& model, const std::vector<Program>& programs, int64_t element_bytes);

// No less than that passes, however the programs are cut into pieces: what the busiest rank, host or port has to do.
int64_t BusiestNs(const CostModel& model, const std::vector<Program>& programs, int64_t element_bytes);

struct Choice {
  const Algorithm* algorithm = nullptr;
  int64_t piece = 0;         // Elements; Problem::piece.
  int64_t predicted_ns = 0;
};
// All algorithms that apply with their predictions, the best first; in pieces those that could win by it. Of long operations the first pieces are simulated, and of more
// than 64 ranks none: formulas tell. `problem` is one rank's; of a v-operation whose counts only each
// rank knows itself, its counts stand for all. Equal on all ranks for equal models and (kind, counts, size, even).
std::vector<Choice> RankAlgorithms(const CostModel& model, const Problem& problem, int64_t element_bytes);

// A short tour through all ranks that avoids slow links (the bottleneck of a ring is its slowest link): greedy start,
// then 2-opt and or-opt moves. links as CostModel. Deterministic.
std::vector<int> RingOrder(const std::vector<Link>& links, int size);

}  // namespace shoal
