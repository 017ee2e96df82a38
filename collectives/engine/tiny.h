// Operations of a few KiB among ranks of one host, without a queue, a thread, an allocation or a system call.
// At issue a rank publishes its contribution in a slot of its shared memory; the result is made from the
// peers' slots when somebody looks: in Await or Done of the handle, when later tiny operations are issued, or
// in Poll. Tiny operations end in the order of issue; they stand beside the group's other operations, whose
// order is their own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "collectives/communicator.h"
#include "collectives/engine/host_group.h"
#include "collectives/program/program.h"
#include "collectives/transport/channel.h"

namespace shoal {

constexpr int64_t kTinyBytesMax = 4096;  // Of one rank's contribution.

// A view of the caller's arguments; nothing is kept but pointers to the tensors' memory.
struct TinyOp {
  OpKind kind = OpKind::kBarrier;  // Not: kSend, kReceive, the sparse ones.
  ReduceOp reduce = ReduceOp::kSum;
  DType dtype = DType::kU8;
  int root = 0;
  const Tensor* in = nullptr;  // Kept alive until the operation ended. Null: none.
  const Tensor* out = nullptr;
  // Elements per rank: of all_gather, reduce_scatter, gather and scatter. Empty: even parts. Must outlive
  // Issue only.
  absl::Span<const int64_t> counts;
  uint64_t seq = 0;         // The operation's number in the group, for mismatches and errors.
  uint32_t signature = 0;   // What all ranks must agree on.
  int64_t deadline_ns = 0;  // 0: the group's timeout, counted from when somebody first waits long.
  std::string_view label;
};

class TinyGroup : public std::enable_shared_from_this<TinyGroup> {
 public:
  // What the group's executor does for tiny operations. All thread-safe; each may be called with a lock held,
  // and must not call back.
  struct Hooks {
    // Ends the group because of a mismatch or a missed deadline (`missing`: members); returns its status.
    std::function<absl::Status(const std::string& op, const Mismatch&)> mismatch;
    std::function<absl::Status(const std::string& op, const std::vector<int>& missing)> late;
    // Operations are open that nobody waits for (OnDone): call Poll from another thread until it returns
    // false.
    std::function<void()> attend;
  };

  static std::shared_ptr<TinyGroup> Create(std::shared_ptr<HostGroup> group, int64_t timeout_ns, Hooks hooks);
  ~TinyGroup();

  // The most bytes that a rank contributes or gets; an operation is tiny on all ranks or on none, so ask with
  // what all of them know. All members of the group must be on this host.
  static bool Fits(OpKind kind, int64_t contributed_bytes, int64_t result_bytes);
  // Issues; `op` must fit and be valid.
  Work Issue(const TinyOp& op);
  // Ends what can end. True while operations are open. Thread-safe.
  bool Poll();
  // Ends what is open: completed, or with the group's status once it is over. Blocks until then.
  void Close();
  bool Idle();

  struct State;

 private:
  explicit TinyGroup(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace shoal
