// The collectives of one group in one epoch. Knows nothing of models.
//
// Every operation is asynchronous and ends in exactly one of two ways: it completed on this rank, or the epoch is over.
// Membership is immutable: no shrink, no repair. The first failure on any rank (a peer died, stopped answering, missed a
// deadline, called Abort) ends the epoch on every rank: all pending and later Works end ABORTED with the cause. Bad
// arguments end the Work with INVALID_ARGUMENT and do not end the epoch.
//
// Thread-safe. Operations of one communicator must be issued in the same order on all of its ranks; operations of
// different communicators are independent. A result is bit-identical on every rank that receives it: sums are made in
// index order.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "runtime/tensor/dtype.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

enum class Epoch : uint64_t {};
enum class ReduceOp : uint8_t { kSum, kMin, kMax };

struct OpOptions {
  absl::Time deadline = absl::InfiniteFuture();  // Infinite: the communicator's own timeout.
  std::string_view label;                        // Names the operation in errors and traces. Copied.
};

// One operation in flight. Copyable, thread-safe; dropping it does not stop the operation.
class Work {
 public:
  struct State;
  Work() = default;  // Done, OK.
  explicit Work(std::shared_ptr<State> state) : state_(std::move(state)) {}

  bool Done() const;
  // Blocks until the operation ended or `deadline` passed (DEADLINE_EXCEEDED; the operation goes on). Otherwise OK, ABORTED
  // (the epoch is over; the message has the cause) or INVALID_ARGUMENT.
  absl::Status Await(absl::Time deadline = absl::InfiniteFuture()) const;
  // Runs `callback` once when the operation has ended, on the communicator's thread or at once on the caller's.
  void OnDone(std::function<void(const absl::Status&)> callback) const;

 private:
  std::shared_ptr<State> state_;
};

class Communicator {
 public:
  virtual ~Communicator() = default;  // As Abort(CANCELLED) when operations are pending; waits until no buffer is in use.

  virtual int index() const = 0;  // This process in the group, in [0, size()).
  virtual int size() const = 0;
  virtual Epoch epoch() const = 0;

  // Memory for tensors that are communicated: peers on the same host map it, and operations on it read and reduce it
  // in place. Any other memory works too, through copies. Local (no peer takes part). Zeroed. RESOURCE_EXHAUSTED: the
  // system has too little shared memory; the message says how much was wanted.
  virtual absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) = 0;

  // Buffers are borrowed until the Work ends. Element counts are of the tensors' element type.
  virtual Work AllReduce(const Tensor& in_out, ReduceOp op, const OpOptions& options) = 0;
  // `in` has sum(counts) elements; rank i gets the reduction of its counts[i] elements in `out`. `out` may be the rank's own
  // part of `in`; the other parts of `in` are left as they were.
  virtual Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                             const OpOptions& options) = 0;
  // `out` has sum(counts) elements; rank i gives counts[i] elements. `in` may be the rank's own part of `out`.
  virtual Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                         const OpOptions& options) = 0;
  // `in` has sum(send_counts) elements in rank order, `out` sum(recv_counts). send_counts[j] on rank i must equal
  // recv_counts[i] on rank j. In and out do not overlap.
  virtual Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                        absl::Span<const int64_t> recv_counts, const OpOptions& options) = 0;
  virtual Work Broadcast(const Tensor& in_out, int root_index, const OpOptions& options) = 0;
  virtual Work Barrier(const OpOptions& options) = 0;

  // A group of `members` (indices of this group, ascending, this process among them) on the same connections. Collective
  // over the members. It shares this communicator's epoch and its end.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) = 0;

  // Ends the epoch on every rank. The one way to cancel. Never blocks.
  virtual void Abort(const absl::Status& cause) = 0;
  // OK while the epoch lives, otherwise the cause of its end, for example "rank 2 (pid 71, host b): connection closed".
  virtual absl::Status status() const = 0;
  // Runs once, on the communicator's thread, when the epoch ends for another reason than this process's own close.
  virtual void OnAbort(std::function<void(const absl::Status&)> callback) = 0;
};

struct WorldOptions {
  int rank = 0;
  int size = 1;
  // Rank 0 listens there; the others dial. "unix:NAME" is a socket in the abstract namespace of one host: no port.
  std::string master_host = "127.0.0.1";
  int master_port = 0;  // Must be set when size > 1 and the host is not unix:NAME.
  std::string job_id = "none";            // Peers of another job are refused.
  Epoch epoch = Epoch{1};
  absl::Duration connect_timeout = absl::Seconds(60);  // To find all peers.
  absl::Duration timeout = absl::Minutes(10);          // Of an operation whose caller gives no deadline.
  absl::Duration heartbeat_timeout = absl::Seconds(5);  // A peer silent for so long is dead.
  std::string transport = "auto";  // auto (shared memory on the same host, TCP across), or tcp (everywhere).
};

// Connects this process with all others of the job. Blocks, at most connect_timeout. DEADLINE_EXCEEDED names the
// ranks that did not come; UNAVAILABLE: the master address cannot be reached or bound; INVALID_ARGUMENT: two processes
// claim one rank, or sizes differ. size == 1 needs no network at all.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(const WorldOptions& options);

}  // namespace shoal
