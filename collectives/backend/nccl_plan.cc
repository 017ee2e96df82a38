#include "collectives/backend/nccl_plan.h"

#include <algorithm>

#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Kind = NcclCall::Kind;

NcclOp OpOf(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum: return NcclOp::kSum;
    case ReduceOp::kProduct: return NcclOp::kProduct;
    case ReduceOp::kMin: return NcclOp::kMin;
    case ReduceOp::kMax: return NcclOp::kMax;
    case ReduceOp::kAverage: return NcclOp::kAverage;
  }
  return NcclOp::kSum;
}

bool Even(const std::vector<int64_t>& counts) {
  return std::all_of(counts.begin(), counts.end(), [&](int64_t count) { return count == counts.front(); });
}

// Plans one operation. Parts without elements have no call, on any rank.
class CallPlanner {
 public:
  CallPlanner(const Operation& op, int index, int size, Stream& stream)
      : op_(op), index_(index), size_(size), stream_(stream), begins_(Displacements(op.counts)) {}

  NcclPlan Make() {
    switch (op_.kind) {
      case OpKind::kAllReduce: Add({.kind = Kind::kAllReduce, .from = op_.in.raw(), .to = op_.out.raw(), .count = op_.in.elements()}); break;
      case OpKind::kReduceScatter: ReduceScatter(); break;
      case OpKind::kAllGather: AllGather(); break;
      case OpKind::kAllToAll: AllToAll(); break;
      case OpKind::kBroadcast:
        Add({.kind = Kind::kBroadcast, .from = op_.in.raw(), .to = op_.in.raw(), .count = op_.in.elements(), .peer = op_.root});
        break;
      case OpKind::kReduce:
        Add({.kind = Kind::kReduce, .from = op_.in.raw(), .to = op_.out.raw(), .count = op_.in.elements(), .peer = op_.root});
        break;
      case OpKind::kGather: Gather(); break;
      case OpKind::kScatter: Scatter(); break;
      case OpKind::kSparseAllGather: SparseAllGather(); break;
      case OpKind::kSparseReduceScatter: SparseReduceScatter(); break;
      case OpKind::kBarrier:
      case OpKind::kSend:
      case OpKind::kReceive: SHOAL_CHECK(false) << "not an operation for NCCL";
    }
    return std::move(plan_);
  }

 private:
  void Add(NcclCall call) {
    if (call.count == 0) return;
    call.dtype = op_.dtype;
    call.op = OpOf(op_.reduce);
    plan_.calls.push_back(call);
  }
  void Send(const Tensor& from, int peer) {
    Add({.kind = Kind::kSend, .from = from.raw(), .count = from.elements(), .peer = peer});
  }
  void Receive(const Tensor& to, int peer) {
    Add({.kind = Kind::kReceive, .to = to.raw(), .count = to.elements(), .peer = peer});
  }
  void Keep(const Tensor& from, const Tensor& to) {
    if (!from.empty() && from.raw() != to.raw()) plan_.copies.push_back({from, to});
  }
  // Rank `rank`'s part of a tensor with `counts`.
  Tensor Part(const Tensor& whole, int rank) const { return PartAt(whole, begins_, rank); }
  static Tensor PartAt(const Tensor& whole, const std::vector<int64_t>& begins, int rank) {
    const size_t i = static_cast<size_t>(rank);
    return whole.Elements(begins[i], {begins[i + 1] - begins[i]});
  }

  void ReduceScatter() {
    if (Even(op_.counts)) {
      return Add({.kind = Kind::kReduceScatter, .from = op_.in.raw(), .to = op_.out.raw(), .count = op_.counts.front()});
    }
    for (int root = 0; root < size_; ++root) {
      const Tensor part = Part(op_.in, root);
      Add({.kind = Kind::kReduce, .from = part.raw(), .to = root == index_ ? op_.out.raw() : nullptr, .count = part.elements(), .peer = root});
    }
  }

  void AllGather() {
    if (Even(op_.counts)) {
      return Add({.kind = Kind::kAllGather, .from = op_.in.raw(), .to = op_.out.raw(), .count = op_.counts.front()});
    }
    for (int root = 0; root < size_; ++root) {
      const Tensor part = Part(op_.out, root);
      Add({.kind = Kind::kBroadcast,
           .from = root == index_ ? op_.in.raw() : part.raw(),
           .to = part.raw(),
           .count = part.elements(),
           .peer = root});
    }
  }

  void AllToAll() {
    const std::vector<int64_t> out_begins = Displacements(op_.recv_counts);
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == index_) {
        Keep(Part(op_.in, peer), PartAt(op_.out, out_begins, peer));
      } else {
        Send(Part(op_.in, peer), peer);
        Receive(PartAt(op_.out, out_begins, peer), peer);
      }
    }
  }

  void Gather() {
    if (index_ != op_.root) return Send(op_.in, op_.root);
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == index_) {
        Keep(op_.in, Part(op_.out, peer));
      } else {
        Receive(Part(op_.out, peer), peer);
      }
    }
  }

  void Scatter() {
    if (index_ != op_.root) return Receive(op_.out, op_.root);
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == index_) {
        Keep(Part(op_.in, peer), op_.out);
      } else {
        Send(Part(op_.in, peer), peer);
      }
    }
  }

  bool Holds(const SparseMove& move) const { return std::binary_search(move.holders.begin(), move.holders.end(), index_); }
  const Tensor& Chunk(const SparseMove& move) const { return op_.chunks[static_cast<size_t>(move.chunk)]; }

  void SparseAllGather() {
    for (const SparseMove& move : op_.moves) {
      if (Holds(move)) Receive(Chunk(move), move.owner);
      if (move.owner != index_) continue;
      for (int holder : move.holders) Send(Chunk(move), holder);
    }
  }

  void SparseReduceScatter() {
    for (const SparseMove& move : op_.moves) {
      if (Holds(move)) Send(Chunk(move), move.owner);
      if (move.owner != index_ || move.holders.empty() || Chunk(move).empty()) continue;
      NcclPlan::Summed sum = {.owner = Chunk(move)};
      for (int holder : move.holders) {
        sum.contributions.push_back(Empty({sum.owner.elements()}, op_.dtype, stream_));
        Receive(sum.contributions.back(), holder);
      }
      plan_.sums.push_back(std::move(sum));
    }
  }

  const Operation& op_;
  const int index_, size_;
  Stream& stream_;
  const std::vector<int64_t> begins_;
  NcclPlan plan_;
};

}  // namespace

absl::Status CheckForNccl(const Operation& op) {
  if (op.wire != WireFormat::kAsIs) {
    return absl::InvalidArgumentError("NCCL sends elements as they are: groups of NCCL have no other wire format");
  }
  if (!op.algorithm.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("NCCL chooses algorithms itself: none is called ", op.algorithm));
  }
  if (op.order == Order::kFixed) return absl::InvalidArgumentError("NCCL adds in an order of its own: its groups have no fixed one");
  if (op.kind != OpKind::kSparseReduceScatter || op.moves.empty()) return absl::OkStatus();
  const bool any = std::any_of(op.chunks.begin(), op.chunks.end(), [](const Tensor& chunk) { return !chunk.empty(); });
  if (op.reduce != ReduceOp::kSum || (any && op.dtype != DType::kF32 && op.dtype != DType::kBF16)) {
    return absl::InvalidArgumentError("a sparse reduce_scatter of a group of NCCL sums f32 or bf16, nothing else");
  }
  return absl::OkStatus();
}

NcclPlan PlanNcclCalls(const Operation& op, int index, int size, Stream& stream) { return CallPlanner(op, index, size, stream).Make(); }

DeviceResult Issue(const NcclCall& call, const NcclApi& api, NcclComm* comm, DeviceStream* stream) {
  const auto& [kind, from, to, count, dtype, op, peer] = call;
  switch (kind) {
    case Kind::kAllReduce: return api.all_reduce(from, to, count, dtype, op, comm, stream);
    case Kind::kReduceScatter: return api.reduce_scatter(from, to, count, dtype, op, comm, stream);
    case Kind::kAllGather: return api.all_gather(from, to, count, dtype, comm, stream);
    case Kind::kBroadcast: return api.broadcast(from, to, count, dtype, peer, comm, stream);
    case Kind::kReduce: return api.reduce(from, to, count, dtype, op, peer, comm, stream);
    case Kind::kSend: return api.send(from, count, dtype, peer, comm, stream);
    case Kind::kReceive: return api.receive(to, count, dtype, peer, comm, stream);
  }
  return {};
}

}  // namespace shoal
