// Operations of a group whose ranks are on several hosts: pairwise messages over TCP. Each element is reduced
// on one rank, in index order, and sent to the others.
#pragma once

#include <memory>
#include <vector>

#include "collectives/engine/op.h"
#include "collectives/engine/tcp_mesh.h"
#include "collectives/engine/world.h"

namespace shoal {

class TcpEngine final : public Engine {
 public:
  // `ranks` of the job form the group `key`; this process is ranks[index].
  TcpEngine(World* world, std::vector<int> ranks, int index, uint64_t key)
      : world_(world),
        ranks_(std::move(ranks)),
        index_(index),
        size_(static_cast<int>(ranks_.size())),
        key_(key) {}

  absl::Status Run(const Op& op, const std::atomic<int64_t>& deadline_ns) override;

 private:
  // The running operation.
  struct Context {
    const Op& op;
    const std::atomic<int64_t>& deadline_ns;
  };
  using Batch = TcpMesh::Batch;

  Batch NewBatch(const Context& context) const;
  absl::Status Wait(Batch* batch, const Context& context) const;
  absl::Status Barrier(const Context& context) const;
  absl::Status Broadcast(const Context& context) const;
  absl::Status AllReduceSmall(const Context& context) const;
  absl::Status AllToAll(const Context& context) const;
  absl::Status AllGather(const Context& context) const;
  // Reduces part i of `in` (counts[i] elements) on rank i, into `out` there; then, if `gather`, sends it into
  // everybody's `in` as well.
  absl::Status ReduceParts(const Context& context, const std::vector<int64_t>& counts, std::byte* out,
                           bool gather) const;

  World* const world_;
  const std::vector<int> ranks_;
  const int index_;
  const int size_;
  const uint64_t key_;
};

}  // namespace shoal
