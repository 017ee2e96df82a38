#include "collectives/backend/mpi_group.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <deque>
#include <numeric>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/backend/mpi_library.h"
#include "collectives/engine/arguments.h"
#include "collectives/engine/op.h"
#include "collectives/engine/reduce.h"
#include "collectives/engine/work_state.h"
#include "collectives/transport/clock.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kCountMax = INT_MAX;
constexpr uint32_t kSparseTag = 32767;  // The highest that every MPI has; callers use those below.

void ReduceForMpi(int dtype, int op, const void* in, void* in_out, int64_t count) {
  auto* const target = static_cast<std::byte*>(in_out);
  Reduce(static_cast<DType>(dtype), static_cast<ReduceOp>(op), {static_cast<const std::byte*>(in), target}, {target},
         count);
}

// One operation: some requests, then work on this rank.
struct Pending {
  std::string name;
  std::vector<shoal_mpi_request*> requests;
  std::vector<Tensor> held;      // Alive until the end.
  std::function<void()> finish;  // May be empty.
  int64_t deadline_ns = 0;
  std::shared_ptr<QueuedWork> work;
};

class MpiGroup final : public Communicator {
 public:
  MpiGroup(std::shared_ptr<MpiLibrary> library, shoal_mpi_group* group, const WorldOptions& options)
      : library_(std::move(library)),
        group_(group),
        options_(options),
        index_(library_->plugin->rank(group)),
        size_(library_->plugin->size(group)),
        thread_([this] { Run(); }) {}
  ~MpiGroup() override;

  int index() const override { return index_; }
  int size() const override { return size_; }
  Epoch epoch() const override { return options_.epoch; }
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override { return Zeros(std::move(shape), dtype); }

  Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) override;
  Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                     const OpOptions& options) override;
  Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                 const OpOptions& options) override;
  Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                absl::Span<const int64_t> recv_counts, const OpOptions& options) override;
  Work Broadcast(const Tensor& in_out, int root, const OpOptions& options) override;
  Work Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) override;
  Work Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
              const OpOptions& options) override;
  Work Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
               const OpOptions& options) override;
  Work Barrier(const OpOptions& options) override;
  Work Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) override;
  Work Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) override;
  Work SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves,
                       const OpOptions& options) override;
  Work SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                           const OpOptions& options) override;
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override;
  void Abort(const absl::Status& cause) override { End(absl::StrCat("rank ", index_, " aborted: ", cause.message()), true); }
  absl::Status status() const override {
    MutexLock lock(&mutex_);
    return status_;
  }
  void OnAbort(std::function<void(const absl::Status&)> callback) override;

 private:
  struct Request {
    shoal_mpi_op op = {};
    std::vector<int64_t> counts, recv_counts;
  };

  Request NewRequest(int kind, DType dtype) const;
  // Issues the requests as one operation.
  Work Issue(OpKind kind, std::vector<Request> requests, std::vector<Tensor> held, const absl::Status& valid,
             const OpOptions& options, std::function<void()> finish = {});
  // What every transport asks of the arguments, and what MPI can count to.
  absl::Status Check(Operation op, const OpOptions& options) const;
  // Averages divide what MPI summed.
  std::function<void()> Divide(const Tensor& out, ReduceOp op) const;

  absl::Status Meet(absl::Span<const int> members);
  void Run();
  bool Progress();
  void End(const std::string& cause, bool tell);

  const std::shared_ptr<MpiLibrary> library_;
  shoal_mpi_group* const group_;
  const WorldOptions options_;
  const int index_;
  const int size_;

  mutable Mutex mutex_;
  CondVar changed_;
  std::deque<Pending> pending_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::function<void(const absl::Status&)>> callbacks_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t issued_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

MpiGroup::~MpiGroup() {
  bool open = false;
  {
    MutexLock lock(&mutex_);
    open = !pending_.empty();
  }
  if (open) End("closed with operations pending", true);
  bool lives = false;
  {
    MutexLock lock(&mutex_);
    closing_ = true;
    callbacks_.clear();
    lives = status_.ok();
  }
  changed_.NotifyAll();
  thread_.join();
  MutexLock lock(&library_->mutex);
  if (lives) library_->plugin->free_group(group_);
}

// ---- Progress. A thread of its own tests what is pending: MPI moves data only inside of its calls.

void MpiGroup::Run() {
  for (int idle = 0;; ++idle) {
    {
      MutexLock lock(&mutex_);
      if (closing_) return;
      // Nothing pending: only texts may come, and they may come late.
      if (pending_.empty()) changed_.WaitUntil(&mutex_, SteadyTime(NowNs() + 10'000'000));
      if (closing_) return;
    }
    if (Progress()) idle = 0;
    if (idle > 1000) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    } else {
      std::this_thread::yield();
    }
  }
}

// Ends what has ended. True: something did.
bool MpiGroup::Progress() {
  std::vector<std::pair<Pending, absl::Status>> ended;
  std::string late, told;
  {
    MutexLock lock(&mutex_);
    if (!status_.ok()) return false;
    MutexLock library(&library_->mutex);
    int from = 0;
    char text[512] = "";
    if (library_->plugin->heard(group_, &from, text, sizeof text) != 0) told = text;
    for (auto it = pending_.begin(); it != pending_.end();) {
      absl::Status status;
      while (!it->requests.empty() && status.ok()) {
        int done = 0;
        status = library_->Error(library_->plugin->test(it->requests.back(), &done));
        if (done == 0) break;
        it->requests.pop_back();
      }
      if (it->requests.empty() || !status.ok()) {
        ended.emplace_back(std::move(*it), status);
        it = pending_.erase(it);
        continue;
      }
      if (NowNs() > it->deadline_ns) late = it->name;
      ++it;
    }
  }
  for (auto& [operation, status] : ended) {
    if (status.ok() && operation.finish) operation.finish();
    operation.held.clear();
    if (!status.ok()) {
      End(absl::StrCat(operation.name, ": ", status.message()), true);
      status = this->status();
    }
    operation.work->Finish(Annotate(status, operation.name));
  }
  if (!told.empty()) End(told, false);
  if (!late.empty()) End(absl::StrCat(late, ": deadline passed"), true);
  return !ended.empty();
}

void MpiGroup::End(const std::string& cause, bool tell) {
  // MPI may go on using these buffers: they are never given back.
  static auto* const kept = new std::deque<Pending>;
  std::deque<Pending> open;
  std::vector<std::function<void(const absl::Status&)>> callbacks;
  absl::Status status;
  {
    MutexLock lock(&mutex_);
    if (!status_.ok()) return;
    status = status_ = absl::AbortedError(cause);
    open.swap(pending_);
    callbacks.swap(callbacks_);
    MutexLock library(&library_->mutex);
    for (int rank = 0; rank < size_ && tell; ++rank) {
      if (rank != index_) (void)library_->plugin->tell(group_, rank, cause.c_str());
    }
    for (const Pending& operation : open) {
      kept->push_back({operation.name, {}, operation.held, {}, 0, nullptr});
    }
  }
  for (const Pending& operation : open) operation.work->Finish(Annotate(status, operation.name));
  for (const auto& callback : callbacks) callback(status);
}

void MpiGroup::OnAbort(std::function<void(const absl::Status&)> callback) {
  absl::Status over;
  {
    MutexLock lock(&mutex_);
    over = status_;
    if (over.ok()) callbacks_.push_back(std::move(callback));
  }
  if (!over.ok()) callback(over);
}

// ---- Issuing.

MpiGroup::Request MpiGroup::NewRequest(int kind, DType dtype) const {
  Request request;
  request.op.kind = kind;
  request.op.dtype = static_cast<int>(dtype);
  return request;
}

Work MpiGroup::Issue(OpKind kind, std::vector<Request> requests, std::vector<Tensor> held, const absl::Status& valid,
                     const OpOptions& options, std::function<void()> finish) {
  Pending operation;
  operation.held = std::move(held);
  operation.finish = std::move(finish);
  const absl::Time deadline = options.deadline == absl::InfiniteFuture() ? absl::Now() + options_.timeout : options.deadline;
  operation.deadline_ns = SteadyDeadlineNs(deadline);
  operation.work = std::make_shared<QueuedWork>(std::weak_ptr<WorkRunner>());
  const Work work(operation.work);
  absl::Status refused = valid;
  std::string broken;
  {
    MutexLock lock(&mutex_);
    if (refused.ok()) refused = status_;
    operation.name = OpName(kind, options.label, ++issued_);
    if (!refused.ok()) return EndedWork(Annotate(refused, operation.name));
    MutexLock library(&library_->mutex);
    for (Request& request : requests) {
      if (!request.counts.empty()) request.op.counts = request.counts.data();
      if (!request.recv_counts.empty()) request.op.recv_counts = request.recv_counts.data();
      shoal_mpi_request* begun = nullptr;
      const absl::Status status = library_->Error(library_->plugin->begin(group_, &request.op, &begun));
      if (!status.ok()) {
        broken = absl::StrCat(operation.name, ": ", status.message());
        break;
      }
      operation.requests.push_back(begun);
    }
    pending_.push_back(std::move(operation));
  }
  if (!broken.empty()) End(broken, true);
  changed_.NotifyAll();
  return work;
}

absl::Status MpiGroup::Check(Operation op, const OpOptions& options) const {
  op.wire = options.wire;  // Over MPI it travels as it is, which loses nothing.
  SHOAL_RETURN_IF_ERROR(CheckArguments(op, index_, size_));
  if (op.tag >= kSparseTag) {
    return absl::InvalidArgumentError(absl::StrCat("tag ", op.tag, ", below ", kSparseTag, " over MPI"));
  }
  op.chunks.insert(op.chunks.end(), {op.in, op.out});
  for (const Tensor& tensor : op.chunks) {
    if (tensor.elements() > kCountMax) {
      return absl::InvalidArgumentError(absl::StrCat(tensor.elements(), " elements: MPI counts to ", kCountMax));
    }
  }
  return absl::OkStatus();
}

// The operation as the other transports know it.
Operation NewOp(OpKind kind, const Tensor& in, const Tensor& out, DType dtype) {
  Operation op;
  op.kind = kind;
  op.dtype = dtype;
  op.in = in;
  op.out = out;
  return op;
}

std::function<void()> MpiGroup::Divide(const Tensor& out, ReduceOp op) const {
  if (op != ReduceOp::kAverage) return {};
  return [out, size = size_] {
    auto* const data = static_cast<std::byte*>(out.raw());
    shoal::Reduce(out.dtype(), ReduceOp::kAverage, {data}, {data}, out.elements(), size);
  };
}

int MpiOp(ReduceOp op) { return static_cast<int>(op == ReduceOp::kAverage ? ReduceOp::kSum : op); }

Work MpiGroup::AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_ALL_REDUCE, in.dtype());
  request.op.op = MpiOp(op);
  request.op.in = in.raw();
  request.op.out = out.raw();
  request.op.count = in.elements();
  Operation wanted = NewOp(OpKind::kAllReduce, in, out, in.dtype());
  wanted.reduce = op;
  return Issue(OpKind::kAllReduce, {request}, {in, out}, Check(std::move(wanted), options), options, Divide(out, op));
}

Work MpiGroup::ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                             const OpOptions& options) {
  Operation wanted = NewOp(OpKind::kReduceScatter, in, out, in.dtype());
  wanted.reduce = op;
  wanted.counts.assign(counts.begin(), counts.end());
  const absl::Status valid = Check(std::move(wanted), options);
  // MPI wants the result apart from the input.
  const Tensor result = valid.ok() ? Empty({counts[index_]}, in.dtype()) : Tensor();
  Request request = NewRequest(SHOAL_MPI_REDUCE_SCATTER, in.dtype());
  request.op.op = MpiOp(op);
  request.op.in = in.raw();
  request.op.out = result.raw();
  request.counts.assign(counts.begin(), counts.end());
  return Issue(OpKind::kReduceScatter, {request}, {in, out, result}, valid, options,
               [result, out, divide = Divide(result, op)] {
                 if (divide) divide();
                 if (!out.empty()) std::memcpy(out.raw(), result.raw(), out.bytes());
               });
}

Work MpiGroup::AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                         const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_ALL_GATHER, out.dtype());
  request.op.in = in.raw();
  request.op.out = out.raw();
  request.counts.assign(counts.begin(), counts.end());
  Operation wanted = NewOp(OpKind::kAllGather, in, out, out.dtype());
  wanted.counts = request.counts;
  return Issue(OpKind::kAllGather, {request}, {in, out}, Check(std::move(wanted), options), options);
}

Work MpiGroup::AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                        absl::Span<const int64_t> recv_counts, const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_ALL_TO_ALL, in.dtype());
  request.op.in = in.raw();
  request.op.out = out.raw();
  const bool even = send_counts.empty() && recv_counts.empty();
  request.counts.assign(send_counts.begin(), send_counts.end());
  request.recv_counts.assign(recv_counts.begin(), recv_counts.end());
  if (even) request.counts = request.recv_counts = std::vector<int64_t>(size_, in.elements() / size_);
  Operation wanted = NewOp(OpKind::kAllToAll, in, out, in.dtype());
  wanted.even = even;
  wanted.counts = request.counts;
  wanted.recv_counts = request.recv_counts;
  return Issue(OpKind::kAllToAll, {request}, {in, out}, Check(std::move(wanted), options), options);
}

Work MpiGroup::Broadcast(const Tensor& in_out, int root, const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_BROADCAST, in_out.dtype());
  request.op.out = in_out.raw();
  request.op.count = in_out.elements();
  request.op.peer = root;
  Operation wanted = NewOp(OpKind::kBroadcast, in_out, in_out, in_out.dtype());
  wanted.root = root;
  return Issue(OpKind::kBroadcast, {request}, {in_out}, Check(std::move(wanted), options), options);
}

Work MpiGroup::Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_REDUCE, in.dtype());
  request.op.op = MpiOp(op);
  request.op.in = in.raw();
  request.op.out = out.raw();
  request.op.count = in.elements();
  request.op.peer = root;
  Operation wanted = NewOp(OpKind::kReduce, in, index_ == root ? out : Tensor(), in.dtype());
  wanted.root = root;
  wanted.reduce = op;
  return Issue(OpKind::kReduce, {request}, {in, out}, Check(std::move(wanted), options), options,
               index_ == root ? Divide(out, op) : std::function<void()>());
}

Work MpiGroup::Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                      const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_GATHER, in.dtype());
  request.op.in = in.raw();
  request.op.out = out.raw();
  request.op.peer = root;
  request.counts.assign(counts.begin(), counts.end());
  Operation wanted = NewOp(OpKind::kGather, in, index_ == root ? out : Tensor(), in.dtype());
  wanted.root = root;
  wanted.counts = request.counts;
  return Issue(OpKind::kGather, {request}, {in, out}, Check(std::move(wanted), options), options);
}

Work MpiGroup::Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                       const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_SCATTER, out.dtype());
  request.op.in = in.raw();
  request.op.out = out.raw();
  request.op.peer = root;
  request.counts.assign(counts.begin(), counts.end());
  Operation wanted = NewOp(OpKind::kScatter, index_ == root ? in : Tensor(), out, out.dtype());
  wanted.root = root;
  wanted.counts = request.counts;
  return Issue(OpKind::kScatter, {request}, {in, out}, Check(std::move(wanted), options), options);
}

Work MpiGroup::Barrier(const OpOptions& options) {
  return Issue(OpKind::kBarrier, {NewRequest(SHOAL_MPI_BARRIER, DType::kU8)}, {}, absl::OkStatus(), options);
}

Work MpiGroup::Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_SEND, in.dtype());
  request.op.in = in.raw();
  request.op.count = in.elements();
  request.op.peer = to;
  request.op.tag = static_cast<int>(tag);
  Operation wanted = NewOp(OpKind::kSend, in, Tensor(), in.dtype());
  wanted.root = to;
  wanted.tag = tag;
  return Issue(OpKind::kSend, {request}, {in}, Check(std::move(wanted), options), options);
}

Work MpiGroup::Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) {
  Request request = NewRequest(SHOAL_MPI_RECEIVE, out.dtype());
  request.op.out = out.raw();
  request.op.count = out.elements();
  request.op.peer = from;
  request.op.tag = static_cast<int>(tag);
  Operation wanted = NewOp(OpKind::kReceive, Tensor(), out, out.dtype());
  wanted.root = from;
  wanted.tag = tag;
  return Issue(OpKind::kReceive, {request}, {out}, Check(std::move(wanted), options), options);
}

Operation NewSparseOp(OpKind kind, absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp reduce) {
  Operation op = NewOp(kind, Tensor(), Tensor(), DType::kF32);
  op.reduce = reduce;
  op.chunks.assign(chunks.begin(), chunks.end());
  op.moves.assign(moves.begin(), moves.end());
  for (const Tensor& chunk : chunks) {
    if (!chunk.empty()) op.dtype = chunk.dtype();
  }
  return op;
}

// One tag serves all sparse operations: MPI matches the messages between two ranks in the order of issue, which is the same
// on both.
Work MpiGroup::SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves,
                               const OpOptions& options) {
  std::vector<Request> requests;
  const absl::Status valid = Check(NewSparseOp(OpKind::kSparseAllGather, chunks, moves, ReduceOp::kSum), options);
  if (!valid.ok()) return Issue(OpKind::kSparseAllGather, {}, {}, valid, options);
  for (const SparseMove& move : moves) {
    const Tensor& chunk = chunks[move.chunk];
    const auto add = [&](int kind, int peer) {
      Request request = NewRequest(kind, chunk.dtype());
      request.op.in = request.op.out = chunk.raw();
      request.op.count = chunk.elements();
      request.op.peer = peer;
      request.op.tag = kSparseTag;
      requests.push_back(std::move(request));
    };
    if (move.owner == index_) {
      for (int holder : move.holders) add(SHOAL_MPI_SEND, holder);
    } else if (std::count(move.holders.begin(), move.holders.end(), index_) > 0) {
      add(SHOAL_MPI_RECEIVE, move.owner);
    }
  }
  return Issue(OpKind::kSparseAllGather, std::move(requests), {chunks.begin(), chunks.end()}, valid, options);
}

Work MpiGroup::SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                                   const OpOptions& options) {
  std::vector<Request> requests;
  std::vector<Tensor> held(chunks.begin(), chunks.end());
  std::vector<std::function<void()>> sums;
  const absl::Status valid = Check(NewSparseOp(OpKind::kSparseReduceScatter, chunks, moves, op), options);
  if (!valid.ok()) return Issue(OpKind::kSparseReduceScatter, {}, {}, valid, options);
  for (const SparseMove& move : moves) {
    const Tensor& chunk = chunks[move.chunk];
    const auto add = [&](int kind, int peer, const Tensor& memory) {
      Request request = NewRequest(kind, memory.dtype());
      request.op.in = request.op.out = memory.raw();
      request.op.count = memory.elements();
      request.op.peer = peer;
      request.op.tag = kSparseTag;
      requests.push_back(std::move(request));
    };
    if (move.owner != index_) {
      if (std::count(move.holders.begin(), move.holders.end(), index_) > 0) add(SHOAL_MPI_SEND, move.owner, chunk);
      continue;
    }
    std::vector<Tensor> received;
    for (int holder : move.holders) {
      received.push_back(Empty(chunk.shape(), chunk.dtype()));
      add(SHOAL_MPI_RECEIVE, holder, received.back());
    }
    held.insert(held.end(), received.begin(), received.end());
    sums.push_back([chunk, received, op] {
      auto* const data = static_cast<std::byte*>(chunk.raw());
      std::vector<const std::byte*> sources = {data};
      for (const Tensor& other : received) sources.push_back(static_cast<const std::byte*>(other.raw()));
      shoal::Reduce(chunk.dtype(), op, sources, {data}, chunk.elements(), static_cast<int>(sources.size()));
    });
  }
  return Issue(OpKind::kSparseReduceScatter, std::move(requests), std::move(held), valid, options,
               [sums = std::move(sums)] {
                 for (const auto& sum : sums) sum();
               });
}

// MPI makes groups in a call that blocks, and is called with the library's lock held: nobody enters it before all have come
// so far, so that nobody is kept from what a member must do before.
absl::Status MpiGroup::Meet(absl::Span<const int> members) {
  const std::vector<SparseMove> moves = {{0, members.front(), {members.begin() + 1, members.end()}}};
  const std::vector<Tensor> chunks = {Zeros({1}, DType::kI32)};
  SHOAL_RETURN_IF_ERROR(SparseReduceScatter(chunks, moves, ReduceOp::kMax, {}).Await());
  return SparseAllGather(chunks, moves, {}).Await();
}

absl::StatusOr<std::unique_ptr<Communicator>> MpiGroup::Split(absl::Span<const int> members) {
  if (!std::is_sorted(members.begin(), members.end()) || std::count(members.begin(), members.end(), index_) != 1 ||
      members.front() < 0 || members.back() >= size_) {
    return absl::InvalidArgumentError(absl::StrCat("members are not ascending ranks of a group of ", size_,
                                                   " with rank ", index_, " among them"));
  }
  SHOAL_RETURN_IF_ERROR(status());
  SHOAL_RETURN_IF_ERROR(Meet(members), "splitting");
  shoal_mpi_group* part = nullptr;
  {
    MutexLock lock(&library_->mutex);
    SHOAL_RETURN_IF_ERROR(library_->Error(
        library_->plugin->split(group_, members.data(), static_cast<int>(members.size()), &part)));
  }
  return std::unique_ptr<Communicator>(std::make_unique<MpiGroup>(library_, part, options_));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectMpi(const WorldOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(const std::shared_ptr<MpiLibrary> library, MpiLibrary::Load());
  shoal_mpi_group* world = nullptr;
  {
    MutexLock lock(&library->mutex);
    SHOAL_RETURN_IF_ERROR(library->Error(library->plugin->start(&ReduceForMpi, &world)), "starting MPI");
  }
  const int rank = library->plugin->rank(world), size = library->plugin->size(world);
  if (size != options.size || rank != options.rank) {
    return absl::FailedPreconditionError(absl::StrCat("MPI calls this rank ", rank, " of ", size, ", the job rank ",
                                                      options.rank, " of ", options.size,
                                                      ": start the ranks with mpirun or srun"));
  }
  return std::unique_ptr<Communicator>(std::make_unique<MpiGroup>(library, world, options));
}

}  // namespace shoal
