// What the ranks of a group that read each other's memory tell each other of an operation, and what each then copies and sums. Decided
// by the arguments and these notes alone, so that all ranks decide alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "collectives/backend/peer_memory.h"
#include "collectives/engine/op.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

// What one rank tells of its operation. As bytes: the head, then the tensors, then the counts.
struct PeerNote {
  struct Head {
    int64_t signature;
    int64_t direct;  // 1: peers can read what they need of it.
  };
  Head head = {};
  std::vector<SharedTensor> tensors;  // Those that peers may read.
  std::vector<int64_t> counts;        // Of an all_to_all: sent to each rank.
};

// Of a checked operation of this rank: which tensors its note has. Many kinds have empty ones where this rank has nothing to show.
std::vector<Tensor> TensorsToShare(const Operation& op, int index);
// How long the note of rank `rank` is, as any rank of `size` knows it.
int64_t NoteBytes(const Operation& op, int rank, int size);
Tensor EncodeNote(const PeerNote& note);
PeerNote DecodeNote(const Operation& op, int rank, int size, absl::Span<const std::byte> bytes);

// Whether kernels and copies do such an operation: everything but reductions other than sums of f32 or bf16, wire formats and named
// algorithms.
bool DoneByPeers(const Operation& op);

// Phases; each begins when all ranks have done the one before. It keeps this rank's tensors.
struct PeerPlan {
  struct Copied {
    Tensor from, to;
  };
  struct Summed {
    std::vector<Tensor> from;  // In their order.
    Tensor to;
  };
  struct Phase {
    std::vector<Copied> copies;
    std::vector<Summed> sums;
  };
  std::vector<Phase> phases;  // As many on all ranks.
};

// Of a collective (not a barrier) that all ranks do by themselves: all notes are direct. `open` gives the address of a tensor of another
// rank. INTERNAL: ranks have issued different operations, or with arguments that do not fit; otherwise the error of `open`.
using OpenShared = std::function<absl::StatusOr<std::byte*>(const SharedTensor& shared)>;
absl::StatusOr<PeerPlan> PlanPeerReads(const Operation& op, int index, absl::Span<const PeerNote> notes, const OpenShared& open);

}  // namespace shoal
