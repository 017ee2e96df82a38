// One operation of one group, as it waits in the group's queue and as engines run it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "collectives/engine/work_state.h"
#include "collectives/program/program.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

struct Operation {
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

std::string OpName(OpKind kind, std::string_view label, uint64_t seq);  // all_reduce "grads" #17
inline std::string OpName(const Operation& op) { return OpName(op.kind, op.label, op.seq); }

// Of what all ranks must agree on in an operation.
class SignatureHash {
 public:
  SignatureHash(OpKind kind, DType dtype, ReduceOp reduce, Order order, int root,
                WireFormat wire = WireFormat::kAsIs, bool even = false)
      : kind_(kind) {
    Mix(static_cast<uint64_t>(dtype) | static_cast<uint64_t>(reduce) << 8 | static_cast<uint64_t>(wire) << 16 |
        static_cast<uint64_t>(order) << 24 | static_cast<uint64_t>(even) << 32);
    Mix(root);
  }
  void Mix(uint64_t value) {
    hash_ = (hash_ ^ value) * 0x9e3779b97f4a7c15u;
    hash_ ^= hash_ >> 32;
  }
  void MixAll(absl::Span<const int64_t> values) {
    for (int64_t value : values) Mix(value);
  }
  uint32_t Signature() const {
    return static_cast<uint32_t>(kind_) << kHashBits | static_cast<uint32_t>(hash_ & ((1u << kHashBits) - 1));
  }
  static OpKind KindOf(uint32_t signature) { return static_cast<OpKind>(signature >> kHashBits); }

 private:
  static constexpr int kHashBits = 28;

  const OpKind kind_;
  uint64_t hash_ = 0xcbf29ce484222325u;
};

// Equal on all ranks that issued the same operation with the same arguments. A send's and its receive's are equal.
uint32_t Signature(const Operation& op);
// The kind of an operation with that signature, which a peer sent; kSend stands for both ends.
std::string KindNameOf(uint32_t signature);

// displacements[i]: where rank i's part begins; one more entry for the end.
std::vector<int64_t> Displacements(const std::vector<int64_t>& counts);

}  // namespace shoal
