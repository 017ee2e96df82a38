#include "launch/status/measured_communicator.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <utility>

#include "absl/time/clock.h"
#include "collectives/program/program.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// The series of one group and its operations in flight. Thread-safe: they end on any thread.
class GroupSeries {
 public:
  GroupSeries(MetricsServer& metrics, std::string group, std::string transport)
      : metrics_(metrics),
        group_(std::move(group)),
        transport_(std::move(transport)),
        busy_(metrics.CommWait(group_)),
        oldest_pending_(metrics.CommOldestPending(group_)) {}

  struct Issued {
    uint64_t number;
    CommMetrics series;
    int64_t bytes;
    Clock::time_point at;
  };

  Issued Begin(OpKind kind, int64_t bytes) {
    const double unix_seconds = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
    MutexLock lock(&mutex_);
    auto series = by_kind_.find(kind);
    if (series == by_kind_.end()) {
      series = by_kind_.emplace(kind, metrics_.Comm(group_, OpKindName(kind), transport_)).first;
    }
    const Issued issued = {next_number_++, series->second, bytes, Clock::now()};
    if (pending_.empty()) {
      busy_since_ = issued.at;
      oldest_pending_.Set(unix_seconds);
    }
    pending_.emplace(issued.number, unix_seconds);
    return issued;
  }

  void End(const Issued& issued, const absl::Status& status) {
    const Clock::time_point now = Clock::now();
    if (status.ok()) {
      issued.series.duration_seconds.Observe(Seconds(now - issued.at));
      issued.series.bytes.Add(static_cast<double>(issued.bytes));
    }
    MutexLock lock(&mutex_);
    pending_.erase(issued.number);
    oldest_pending_.Set(pending_.empty() ? 0 : pending_.begin()->second);
    if (pending_.empty()) busy_.Add(Seconds(now - busy_since_));
  }

  // Of another group of the same job.
  std::shared_ptr<GroupSeries> Other(std::string_view group) const {
    return std::make_shared<GroupSeries>(metrics_, std::string(group), transport_);
  }

 private:
  MetricsServer& metrics_;
  const std::string group_, transport_;
  const Counter busy_;
  const Gauge oldest_pending_;
  Mutex mutex_;
  std::map<OpKind, CommMetrics> by_kind_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, double> pending_ ABSL_GUARDED_BY(mutex_);  // Unix time of issue, by number.
  uint64_t next_number_ ABSL_GUARDED_BY(mutex_) = 0;
  Clock::time_point busy_since_ ABSL_GUARDED_BY(mutex_);
};

class MeasuredCommunicator : public Communicator {
 public:
  MeasuredCommunicator(std::unique_ptr<Communicator> inner, std::shared_ptr<GroupSeries> series)
      : inner_(std::move(inner)), series_(std::move(series)) {}

  int index() const override { return inner_->index(); }
  int size() const override { return inner_->size(); }
  Epoch epoch() const override { return inner_->epoch(); }
  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override {
    return inner_->Allocate(shape, dtype);
  }

  Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kAllReduce, in.bytes());
    return Counted(issued, inner_->AllReduce(in, out, op, options));
  }
  Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                     const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kReduceScatter, in.bytes());
    return Counted(issued, inner_->ReduceScatter(in, counts, out, op, options));
  }
  Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                 const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kAllGather, in.bytes());
    return Counted(issued, inner_->AllGather(in, counts, out, options));
  }
  Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                absl::Span<const int64_t> recv_counts, const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kAllToAll, in.bytes());
    return Counted(issued, inner_->AllToAll(in, send_counts, out, recv_counts, options));
  }
  Work Broadcast(const Tensor& in_out, int root_index, const OpOptions& options) override {
    const int64_t bytes = index() == root_index ? in_out.bytes() : 0;
    const GroupSeries::Issued issued = series_->Begin(OpKind::kBroadcast, bytes);
    return Counted(issued, inner_->Broadcast(in_out, root_index, options));
  }
  Work Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kReduce, in.bytes());
    return Counted(issued, inner_->Reduce(in, out, root, op, options));
  }
  Work Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
              const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kGather, in.bytes());
    return Counted(issued, inner_->Gather(in, counts, out, root, options));
  }
  Work Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
               const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kScatter, index() == root ? in.bytes() : 0);
    return Counted(issued, inner_->Scatter(in, counts, out, root, options));
  }
  Work Barrier(const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kBarrier, 0);
    return Counted(issued, inner_->Barrier(options));
  }
  Work Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kSend, in.bytes());
    return Counted(issued, inner_->Send(in, to, tag, options));
  }
  Work Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kReceive, 0);
    return Counted(issued, inner_->Receive(out, from, tag, options));
  }
  Work SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves,
                       const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kSparseAllGather, SparseBytes(chunks, moves, true));
    return Counted(issued, inner_->SparseAllGather(chunks, moves, options));
  }
  Work SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                           const OpOptions& options) override {
    const GroupSeries::Issued issued = series_->Begin(OpKind::kSparseReduceScatter, SparseBytes(chunks, moves, false));
    return Counted(issued, inner_->SparseReduceScatter(chunks, moves, op, options));
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override {
    return SplitWith(members, series_);
  }
  absl::StatusOr<std::unique_ptr<Communicator>> SplitAs(absl::Span<const int> members,
                                                        std::string_view group) {
    return SplitWith(members, series_->Other(group));
  }

  void Abort(const absl::Status& cause) override { inner_->Abort(cause); }
  absl::Status status() const override { return inner_->status(); }
  void OnAbort(std::function<void(const absl::Status&)> callback) override {
    inner_->OnAbort(std::move(callback));
  }

 private:
  // What this rank contributes: as owner to a gather, as holder to a reduction.
  int64_t SparseBytes(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, bool gather) const {
    int64_t bytes = 0;
    for (const SparseMove& move : moves) {
      const bool holds = std::count(move.holders.begin(), move.holders.end(), index()) > 0;
      const bool known = move.chunk >= 0 && move.chunk < static_cast<int>(chunks.size());
      if (known && (gather ? move.owner == index() : holds)) bytes += chunks[move.chunk].bytes();
    }
    return bytes;
  }
  Work Counted(const GroupSeries::Issued& issued, Work work) const {
    // Shared: a callback may run after everything else here has gone.
    work.OnDone([series = series_, issued](const absl::Status& status) { series->End(issued, status); });
    return work;
  }

  absl::StatusOr<std::unique_ptr<Communicator>> SplitWith(absl::Span<const int> members,
                                                          std::shared_ptr<GroupSeries> series) {
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, inner_->Split(members));
    if (part->size() == 1) return part;
    return std::unique_ptr<Communicator>(new MeasuredCommunicator(std::move(part), std::move(series)));
  }

  const std::unique_ptr<Communicator> inner_;
  const std::shared_ptr<GroupSeries> series_;
};

}  // namespace

std::unique_ptr<Communicator> Measure(std::unique_ptr<Communicator> inner, MetricsServer& metrics,
                                      std::string group, std::string transport) {
  if (inner->size() == 1) return inner;
  auto series = std::make_shared<GroupSeries>(metrics, std::move(group), std::move(transport));
  return std::make_unique<MeasuredCommunicator>(std::move(inner), std::move(series));
}

absl::StatusOr<std::unique_ptr<Communicator>> SplitAs(Communicator& parent, absl::Span<const int> members,
                                                      std::string_view group) {
  auto* const measured = dynamic_cast<MeasuredCommunicator*>(&parent);
  return measured != nullptr ? measured->SplitAs(members, group) : parent.Split(members);
}

}  // namespace shoal
