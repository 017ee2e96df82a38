// Operations of a group whose ranks share a host. Every rank posts where its data lies, meets the others at a
// counter, and then reads (an all_reduce also writes) the peers' memory in place. Data outside of shared
// memory passes through a staging segment, chunk by chunk. Sums are made in index order.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/engine/control_page.h"
#include "collectives/engine/op.h"
#include "collectives/engine/world.h"

namespace shoal {

class ShmEngine final : public Engine, public Sleeper {
 public:
  // `ranks` of the job form the group `key`; this process is ranks[index]. Waits for all of them, until
  // deadline_ns; ABORTED: the epoch is over (also because one did not come).
  static absl::StatusOr<std::unique_ptr<Engine>> Create(World* world, std::vector<int> ranks, int index,
                                                        uint64_t key, int64_t deadline_ns);
  ~ShmEngine() override;

  absl::Status Run(const Op& op, const std::atomic<int64_t>& deadline_ns) override;
  void Wake() override;

 private:
  // A member's data of the running operation, as this process sees it.
  struct Source {
    std::byte* base = nullptr;
    int64_t bytes = 0;
    Where where = Where::kInline;
    const Post* post = nullptr;
  };
  // What this rank copies from one member: bytes [begin, begin + bytes) of its data.
  struct Pull {
    int64_t begin = 0;
    int64_t bytes = 0;
    std::byte* target = nullptr;
  };

  ShmEngine(World* world, std::vector<int> ranks, int index);
  absl::Status FindPeers(uint64_t key, int64_t deadline_ns);

  // The meeting points: returns when every member has reached it as often as this one.
  absl::Status Meet();
  bool Reached(int member) const;
  absl::Status WaitFor(int member);
  absl::Status CheckEpoch(int member) const;
  std::string DeadlineCause() const;

  absl::Status PostOp();
  absl::Status ReadPosts();
  absl::Status ResolveSource(int member);
  bool AllInline() const;
  bool AnyStaged() const;

  absl::Status AllReduce();
  absl::Status AllReduceStaged();
  void ReduceShare(absl::Span<std::byte* const> windows, int64_t elements) const;
  absl::Status ReduceScatter();
  absl::Status ReduceScatterStaged(const std::vector<int64_t>& begins);
  absl::Status PullAll(const std::vector<Pull>& pulls);
  absl::Status PullStaged(const std::vector<Pull>& pulls);
  std::vector<Pull> Pulls() const;

  World* const world_;
  const std::vector<int> ranks_;
  const int index_;
  const int size_;
  const int spins_;
  std::vector<ControlBlock*> blocks_;  // By member.
  uint32_t phase_ = 0;
  std::shared_ptr<Segment> staging_;  // Made when first needed.

  // The running operation.
  const Op* op_ = nullptr;
  const std::atomic<int64_t>* deadline_ns_ = nullptr;
  std::vector<Source> sources_;
};

}  // namespace shoal
