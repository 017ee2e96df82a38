// The collectives of one group in one epoch. Knows nothing of models.
//
// Every operation is asynchronous and ends in exactly one of two ways: it completed on this rank, or the group is over.
// Membership is immutable: no shrink, no repair. A group ends on all of its members when one of them dies, stops
// answering, leaves with work undone, misses a deadline, issues another operation than the rest, or calls Abort: all
// pending and later Works of the group end ABORTED with the cause. A death ends exactly the groups that have the dead
// rank; anything else ends the group and those split from it. Bad arguments end the Work with INVALID_ARGUMENT, and
// nothing else.
//
// Thread-safe. Collectives of one communicator must be issued in the same order on all of its ranks (Send and Receive
// are matched by peer and tag, and stand outside of that order); they may end in another one. Operations of different
// communicators are independent. A result is bit-identical on every rank that receives it.
//
// Inputs are only read. After ABORTED outputs are undefined; an operation in place has no input left to repeat it from.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "runtime/tensor/dtype.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

enum class Epoch : uint64_t {};

// kAverage: the sum divided by the group's size, in the precision of the sum. Integers: sum, product, min and max modulo
// their range; their average is truncated towards zero.
enum class ReduceOp : uint8_t { kSum, kProduct, kMin, kMax, kAverage };

// How the elements of a sum or average of f32 travel (all_reduce, reduce_scatter): quantised twice, whatever the number
// of ranks: each contribution, and the result. Blocks of 256 elements share a scale.
enum class WireFormat : uint8_t { kAsIs, kBf16, kInt8, kFp8 };

enum class Order : uint8_t {
  kFast,   // The algorithm that is expected to be fastest now.
  kFixed,  // An algorithm that depends on the group and the arguments alone: the same bits from run to run.
};

struct OpOptions {
  absl::Time deadline = absl::InfiniteFuture();  // Infinite: the communicator's own timeout.
  std::string_view label;                        // Names the operation in errors and traces. Copied.
  WireFormat wire = WireFormat::kAsIs;
  Order order = Order::kFast;
  std::string_view algorithm;  // For tests and benchmarks: its name (program/algorithms.h). Empty: chosen.
};

// One operation in flight. Copyable, thread-safe; dropping it does not stop the operation.
class Work {
 public:
  struct State;
  Work() = default;  // Done, OK.
  explicit Work(std::shared_ptr<State> state) : state_(std::move(state)) {}

  bool Done() const;
  // Blocks until the operation ended or `deadline` passed (DEADLINE_EXCEEDED; the operation goes on). Otherwise OK, ABORTED
  // (the group is over; the message has the cause) or INVALID_ARGUMENT.
  absl::Status Await(absl::Time deadline = absl::InfiniteFuture()) const;
  // Runs `callback` once when the operation has ended, on the communicator's thread or at once on the caller's.
  void OnDone(std::function<void(const absl::Status&)> callback) const;

 private:
  std::shared_ptr<State> state_;
};

// One chunk of a sparse operation (Hecate, arXiv 2502.02581, section 3): whole chunks travel between their owner and the
// ranks that hold a copy in this step.
struct SparseMove {
  int chunk = 0;             // Index into the call's chunks.
  int owner = 0;             // Index in the group.
  std::vector<int> holders;  // Indices in the group, ascending, without the owner.
};

class Communicator {
 public:
  // As Abort(CANCELLED) when operations are pending; waits until no buffer is in use. Not in a callback of its own
  // (CHECK): others need the communicator, or the thread, after it.
  //
  // The last communicator of an epoch leaves it politely: what operations that ended OK here have sent still arrives. So
  // that may block: until the peers' systems have got it all, or a peer has taken nothing for heartbeat_timeout.
  virtual ~Communicator() = default;

  virtual int index() const = 0;  // This process in the group, in [0, size()).
  virtual int size() const = 0;
  virtual Epoch epoch() const = 0;

  // Memory for tensors that are communicated: peers on the same host map it, and operations on it read it in place. Any
  // other memory works too, through copies. Local (no peer takes part). Zeroed. Stays shared in later epochs of this
  // process. RESOURCE_EXHAUSTED: the system has too little shared memory; the message says how much was wanted.
  virtual absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) = 0;

  // Buffers are borrowed until the Work ends. Element counts are of the tensors' element type. "In place" means that two
  // tensors of a call begin at the same byte as stated; otherwise they do not overlap.

  // `in` and `out` have equal shapes; in place when they are the same.
  virtual Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) = 0;
  // `in` has sum(counts) elements; rank i gets the reduction of its counts[i] elements in `out`. In place: `out` is the
  // rank's own part of `in`; the other parts of `in` are left as they were.
  virtual Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                             const OpOptions& options) = 0;
  // `out` has sum(counts) elements; rank i gives counts[i] elements. In place: `in` is the rank's own part of `out`.
  virtual Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                         const OpOptions& options) = 0;
  // `in` has sum(send_counts) elements in rank order, `out` sum(recv_counts). send_counts[j] on rank i must equal
  // recv_counts[i] on rank j. Both empty on all ranks: equal parts, size() divides the elements.
  virtual Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                        absl::Span<const int64_t> recv_counts, const OpOptions& options) = 0;
  virtual Work Broadcast(const Tensor& in_out, int root, const OpOptions& options) = 0;
  // `out` is used on the root alone (elsewhere it may be empty); in place there when it is `in`.
  virtual Work Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) = 0;
  // As AllGather, for the root alone; `out` may be empty elsewhere.
  virtual Work Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                      const OpOptions& options) = 0;
  // Rank i gets its counts[i] elements of the root's `in`, which may be empty elsewhere.
  virtual Work Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                       const OpOptions& options) = 0;
  virtual Work Barrier(const OpOptions& options) = 0;
  // Messages from one rank to another are received in the order of sending, per tag. Equal sizes on both sides.
  virtual Work Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) = 0;
  virtual Work Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) = 0;

  // chunks[c]: this rank's memory for chunk c; an empty tensor where it is neither owner nor holder. Sizes may differ from
  // chunk to chunk. `moves` are equal on all ranks, at most one per chunk.
  // After a gather every holder has the owner's chunk.
  virtual Work SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves,
                               const OpOptions& options) = 0;
  // The owner's chunk becomes the reduction of its own and all holders' ones, in a fixed order for given moves; theirs stay.
  virtual Work SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                                   const OpOptions& options) = 0;

  // A group of `members` (indices of this group, ascending, this process among them) on the same connections. Collective
  // over the members.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) = 0;

  // Ends the group, and those split from it, on every rank. The one way to cancel. Never blocks.
  virtual void Abort(const absl::Status& cause) = 0;
  // OK while the group lives, otherwise the cause of its end, for example "rank 2 (pid 71, host b): connection closed".
  virtual absl::Status status() const = 0;
  // Runs once, on the communicator's thread, when the group ends for another reason than this process's own close.
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
  std::string secret;     // Every connection proves it by challenge and response; "": nothing to prove.
  std::string interface;  // Network interface or address whose addresses peers are told; "": the one towards the master.
  int flows = 0;          // TCP data connections per pair; 0: chosen (1 on loopback, 4 across hosts).
};

// Connects this process with all others of the job. Blocks, at most connect_timeout. DEADLINE_EXCEEDED names the
// ranks that did not come; UNAVAILABLE: the master address cannot be reached or bound; INVALID_ARGUMENT: two processes
// claim one rank, or sizes differ. size == 1 needs no network at all.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(const WorldOptions& options);

}  // namespace shoal
