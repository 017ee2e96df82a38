// One operation of one group, as it waits in the group's queue and as engines run it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "collectives/communicator.h"
#include "collectives/engine/work_state.h"
#include "collectives/program/program.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

struct Op {
  OpKind kind = OpKind::kBarrier;
  ReduceOp reduce = ReduceOp::kSum;
  int root = 0;
  DType dtype = DType::kF32;    // Of all elements; `in` or `out` may be empty where the operation does not use it.
  Tensor in;                    // What peers get to read.
  Tensor out;                   // What this rank gets. Broadcast: the one tensor, in both.
  std::vector<int64_t> counts;  // Elements per rank; of an all_to_all: sent to each; sparse: of each chunk.
  std::vector<int64_t> recv_counts;  // Only of an all_to_all.
  bool even = false;                 // Of an all_to_all: every rank has these counts.
  bool in_place = false;
  uint32_t tag = 0;                  // Of a send or receive; `root` is the other rank.
  std::vector<Tensor> chunks;        // Of the sparse ones, as the next one.
  std::vector<SparseMove> moves;
  WireFormat wire = WireFormat::kAsIs;
  Order order = Order::kFast;
  std::string algorithm;
  std::string label;
  uint64_t seq = 0;  // 1, 2, ... in the group.
  int64_t deadline_ns = 0;
  std::shared_ptr<QueuedWork> state;
};

const char* KindName(OpKind kind);
std::string OpName(OpKind kind, std::string_view label, uint64_t seq);  // all_reduce "grads" #17
inline std::string OpName(const Op& op) { return OpName(op.kind, op.label, op.seq); }

// Equal on all ranks that issued the same operation with the same arguments. A send's and its receive's are equal.
uint32_t Signature(const Op& op);
// The kind of an operation with that signature, which a peer sent; kSend stands for both ends.
const char* KindNameOf(uint32_t signature);

// displacements[i]: where rank i's part begins; one more entry for the end.
std::vector<int64_t> Displacements(const std::vector<int64_t>& counts);

}  // namespace shoal
