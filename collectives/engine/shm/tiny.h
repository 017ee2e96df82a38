// Operations of a few KiB among ranks of one host, without a queue, a thread, an allocation or a system call.
// At issue a rank publishes its contribution in a slot of its shared memory; the result is made from the
// peers' slots when somebody looks: in Await or Done of a handle, when later tiny operations are issued, or
// in Poll. Tiny operations end in the order of issue; they stand beside the group's other operations, whose
// order is their own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "collectives/engine/shm/host_group.h"
#include "collectives/program/program.h"

namespace shoal {

// The caller's arguments, valid. The memory is borrowed until the operation ended.
struct TinyOp {
  OpKind kind = OpKind::kBarrier;
  ReduceOp reduce = ReduceOp::kSum;
  DType dtype = DType::kU8;
  int root = 0;
  const void* in = nullptr;  // This rank's contribution; broadcast: the root's.
  void* out = nullptr;       // Null where this rank gets nothing.
  int64_t in_bytes = 0, out_bytes = 0;
  // Of reduce_scatter and scatter: where this rank's part lies in the contributions.
  int64_t part_begin_bytes = 0;
  uint64_t seq = 0;         // The operation's number in the group.
  uint32_t signature = 0;   // What all ranks must agree on.
  int64_t deadline_ns = 0;  // 0: the group's timeout, from when somebody first waits for long.
  std::string_view label;   // Copied; cut after some characters.
};

// Thread-safe.
class TinyGroup {
 public:
  // What it needs to know of the group. Called from any thread, also with locks held: must not call back.
  struct Hooks {
    std::function<std::string(int member)> name;                        // rank 2 (pid 71, host b)
    std::function<std::string(const std::vector<int>& members)> names;  // Also what they did last.
    std::function<bool(int member)> left;  // It said goodbye: what it has not done by now it never will.
    std::function<void()> attend;          // Have another thread call Poll until it returns false.
  };

  // All members of the group must be on this host. `timeout_ns`: of operations without a deadline.
  TinyGroup(std::shared_ptr<HostGroup> group, int64_t timeout_ns, Hooks hooks);
  // Operations are ended or the group is over. Handles may outlive it, also those that threads await: it returns when
  // none of these uses the hooks any more.
  ~TinyGroup();
  TinyGroup(const TinyGroup&) = delete;
  TinyGroup& operator=(const TinyGroup&) = delete;

  // Whether an operation with contributions of so many bytes can be tiny. It is so on all ranks or on none:
  // ask with what all of them know (the largest contribution).
  static bool Fits(OpKind kind, int64_t contribution_bytes);
  Work Issue(const TinyOp& op);
  // Ends what can end. True while operations are open.
  bool Poll();
  bool Idle();

  // A peer's operation that this rank has not issued here.
  struct Ahead {
    int member = 0;
    uint64_t seq = 0;  // Its number in the group.
    uint32_t signature = 0;
  };
  // One with number `seq` or less, which this rank has issued, but not as a tiny one: they are not the same.
  std::optional<Ahead> PeerAhead(uint64_t seq);

  struct State;

 private:
  State* const state_;  // Counted: by this object and by handles.
};

}  // namespace shoal
