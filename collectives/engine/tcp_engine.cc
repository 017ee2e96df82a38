#include "collectives/engine/tcp_engine.h"

#include <algorithm>
#include <cstring>

#include "collectives/engine/reduce.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kSmallBytes =
    16 << 10;  // Up to here everybody sends everything to everybody: one step, not two.
constexpr int64_t kChunkBytes = 1 << 20;  // Of a part: what is received while the chunk before is reduced.

std::byte* Bytes(const Tensor& tensor) { return static_cast<std::byte*>(tensor.raw()); }

void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, bytes);
}

}  // namespace

TcpEngine::Batch TcpEngine::NewBatch(const Context& context) const {
  return Batch(key_, context.op, world_->options().size);
}

absl::Status TcpEngine::Wait(Batch* batch, const Context& context) const {
  return world_->mesh()->Wait(batch, context.deadline_ns);
}

absl::Status TcpEngine::Run(const Op& op, const std::atomic<int64_t>& deadline_ns) {
  if (world_->Ended()) return world_->status();
  const Context context = {op, deadline_ns};
  switch (op.kind) {
    case OpKind::kBarrier:
      return Barrier(context);
    case OpKind::kBroadcast:
      return Broadcast(context);
    case OpKind::kAllGather:
      return AllGather(context);
    case OpKind::kAllToAll:
      return AllToAll(context);
    case OpKind::kReduceScatter:
      return ReduceParts(context, op.counts, Bytes(op.out), /*gather=*/false);
    default:
      break;
  }
  if (op.in.bytes() <= kSmallBytes) return AllReduceSmall(context);
  std::vector<int64_t> counts;
  for (int member = 0; member < size_; ++member) {
    counts.push_back(op.in.elements() * (member + 1) / size_ - op.in.elements() * member / size_);
  }
  const int64_t own_begin = Displacements(counts)[index_];
  return ReduceParts(context, counts, Bytes(op.in) + own_begin * SizeOf(op.in.dtype()), /*gather=*/true);
}

absl::Status TcpEngine::Barrier(const Context& context) const {
  Batch batch = NewBatch(context);
  for (int member = 0; member < size_; ++member) {
    if (member == index_) continue;
    world_->mesh()->Receive(&batch, ranks_[member], /*step=*/0, nullptr, 0);
    world_->mesh()->Send(&batch, ranks_[member], /*step=*/0, nullptr, 0);
  }
  return Wait(&batch, context);
}

absl::Status TcpEngine::Broadcast(const Context& context) const {
  const Op& op = context.op;
  Batch batch = NewBatch(context);
  if (index_ != op.root) {
    world_->mesh()->Receive(&batch, ranks_[op.root], /*step=*/0, op.out.raw(), op.out.bytes());
  }
  for (int member = 0; member < size_; ++member) {
    if (index_ != op.root || member == index_) continue;
    world_->mesh()->Send(&batch, ranks_[member], /*step=*/0, op.in.raw(), op.in.bytes());
  }
  return Wait(&batch, context);
}

absl::Status TcpEngine::AllReduceSmall(const Context& context) const {
  const Op& op = context.op;
  Batch batch = NewBatch(context);
  std::vector<std::byte> received(op.in.bytes() * size_);
  std::vector<const std::byte*> inputs(size_, Bytes(op.in));
  for (int member = 0; member < size_; ++member) {
    if (member == index_) continue;
    std::byte* to = received.data() + member * op.in.bytes();
    inputs[member] = to;
    world_->mesh()->Receive(&batch, ranks_[member], /*step=*/0, to, op.in.bytes());
    world_->mesh()->Send(&batch, ranks_[member], /*step=*/0, op.in.raw(), op.in.bytes());
  }
  SHOAL_RETURN_IF_ERROR(Wait(&batch, context));
  Reduce(op.in.dtype(), op.reduce, inputs, {Bytes(op.out)}, op.in.elements());
  return absl::OkStatus();
}

absl::Status TcpEngine::AllGather(const Context& context) const {
  const Op& op = context.op;
  const int64_t element_bytes = SizeOf(op.in.dtype());
  const std::vector<int64_t> begins = Displacements(op.counts);
  Batch batch = NewBatch(context);
  for (int step = 1; step < size_; ++step) {
    const int to = (index_ + step) % size_, from = (index_ + size_ - step) % size_;
    world_->mesh()->Receive(&batch, ranks_[from], /*step=*/0, Bytes(op.out) + begins[from] * element_bytes,
                            op.counts[from] * element_bytes);
    world_->mesh()->Send(&batch, ranks_[to], /*step=*/0, op.in.raw(), op.in.bytes());
  }
  Copy(Bytes(op.out) + begins[index_] * element_bytes, Bytes(op.in), op.in.bytes());
  return Wait(&batch, context);
}

absl::Status TcpEngine::AllToAll(const Context& context) const {
  const Op& op = context.op;
  const int64_t element_bytes = SizeOf(op.in.dtype());
  const std::vector<int64_t> send_begins = Displacements(op.counts);
  const std::vector<int64_t> recv_begins = Displacements(op.recv_counts);
  Batch batch = NewBatch(context);
  for (int step = 1; step < size_; ++step) {
    const int to = (index_ + step) % size_, from = (index_ + size_ - step) % size_;
    world_->mesh()->Receive(&batch, ranks_[from], /*step=*/0,
                            Bytes(op.out) + recv_begins[from] * element_bytes,
                            op.recv_counts[from] * element_bytes);
    world_->mesh()->Send(&batch, ranks_[to], /*step=*/0, Bytes(op.in) + send_begins[to] * element_bytes,
                         op.counts[to] * element_bytes);
  }
  Copy(Bytes(op.out) + recv_begins[index_] * element_bytes,
       Bytes(op.in) + send_begins[index_] * element_bytes, op.counts[index_] * element_bytes);
  return Wait(&batch, context);
}

absl::Status TcpEngine::ReduceParts(const Context& context, const std::vector<int64_t>& counts,
                                    std::byte* out, bool gather) const {
  const Op& op = context.op;
  TcpMesh& mesh = *world_->mesh();
  const int64_t element_bytes = SizeOf(op.in.dtype());
  const int64_t chunk = kChunkBytes / element_bytes;
  const std::vector<int64_t> begins = Displacements(counts);
  const int64_t chunks = (*std::max_element(counts.begin(), counts.end()) + chunk - 1) / chunk;
  const auto length = [&](int member, int64_t k) {
    return std::clamp<int64_t>(counts[member] - k * chunk, 0, chunk) * element_bytes;
  };
  const auto piece = [&](int member, int64_t k) {
    return Bytes(op.in) + (begins[member] + k * chunk) * element_bytes;
  };
  // Two chunks in turn: one is received while the other is reduced.
  std::vector<std::byte> received(2 * size_ * length(index_, 0));
  std::vector<Batch> scatters(2, NewBatch(context));
  Batch gathers = NewBatch(context);
  const auto slot = [&](int member, int64_t k) {
    return received.data() + (k % 2 * size_ + member) * length(index_, 0);
  };
  const auto exchange = [&](int64_t k) {
    for (int step = 1; step < size_; ++step) {
      const int to = (index_ + step) % size_, from = (index_ + size_ - step) % size_;
      const uint32_t number = static_cast<uint32_t>(2 * k);
      if (length(index_, k) > 0) {
        mesh.Receive(&scatters[k % 2], ranks_[from], number, slot(from, k), length(index_, k));
      }
      if (length(to, k) > 0) mesh.Send(&scatters[k % 2], ranks_[to], number, piece(to, k), length(to, k));
    }
  };
  std::vector<const std::byte*> inputs(size_);
  if (chunks > 0) exchange(0);
  for (int64_t k = 0; k < chunks; ++k) {
    if (k + 1 < chunks) exchange(k + 1);
    absl::Status status = Wait(&scatters[k % 2], context);
    if (!status.ok()) return status;
    for (int member = 0; member < size_; ++member) {
      inputs[member] = member == index_ ? piece(index_, k) : slot(member, k);
    }
    if (length(index_, k) > 0) {
      Reduce(op.in.dtype(), op.reduce, inputs, {out + k * kChunkBytes}, length(index_, k) / element_bytes);
    }
    // A peer sends the result of a part only when it has all of this rank's part: it may be overwritten.
    for (int step = 1; step < size_ && gather; ++step) {
      const int to = (index_ + step) % size_, from = (index_ + size_ - step) % size_;
      const uint32_t number = static_cast<uint32_t>(2 * k + 1);
      if (length(from, k) > 0) mesh.Receive(&gathers, ranks_[from], number, piece(from, k), length(from, k));
      if (length(index_, k) > 0)
        mesh.Send(&gathers, ranks_[to], number, out + k * kChunkBytes, length(index_, k));
    }
  }
  return Wait(&gathers, context);
}

}  // namespace shoal
