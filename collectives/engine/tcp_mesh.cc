#include "collectives/engine/tcp_mesh.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint32_t kMagic = 0x4d4f4853;  // "SHOM"
constexpr int64_t kEagerBytes = 32 << 10;
constexpr int64_t kSliceBytes = 1 << 20;
constexpr size_t kBufferBytes = 64 << 10;
constexpr int64_t kDirectBytes = 16 << 10;  // From here on, payload is read straight to where it belongs.
constexpr int64_t kReadBudget = 4 << 20;    // Per turn, so that no peer starves another.
// A peer that sends so much before it is wanted waits (only a broadcast's root can run ahead at all).
constexpr int64_t kUnexpectedBytes = 64 << 20;
constexpr int64_t kSpinNs = 50'000;  // A sleeping thread's wake-up costs 25 us.
constexpr int kSleepMs = 50;         // Ends are also announced by a wake-up; this bounds a lost one.
constexpr int64_t kFollowerSleepNs = 2'000'000;

}  // namespace

TcpMesh::TcpMesh(World* world, Epoch epoch, Fd wake, std::vector<Fd> sockets)
    : world_(world), epoch_(static_cast<uint64_t>(epoch)), wake_(std::move(wake)) {
  for (Fd& socket : sockets) {
    auto peer = std::make_unique<Peer>();
    peer->open = socket.valid();
    peer->socket = std::move(socket);
    peer->buffer.resize(peer->open ? kBufferBytes : 0);
    peers_.push_back(std::move(peer));
  }
  world_->AddSleeper(this);
}

TcpMesh::~TcpMesh() { world_->RemoveSleeper(this); }

void TcpMesh::Wake() {
  const uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
  changed_.NotifyAll();
}

TcpMesh::Header TcpMesh::NewHeader(const Batch& batch, Type type, uint32_t step, int64_t total) const {
  Header header = {};
  header.magic = kMagic;
  header.type = type;
  header.kind = static_cast<uint8_t>(batch.op.kind);
  header.signature = Signature(batch.op);
  header.step = step;
  header.epoch = epoch_;
  header.group = batch.group;
  header.seq = batch.op.seq;
  header.total = total;
  return header;
}

void TcpMesh::Finish(Batch* batch, int rank) {
  --batch->pending;
  --batch->pending_by_rank[rank];
}

void TcpMesh::Send(Batch* batch, int rank, uint32_t step, const void* data, int64_t bytes) {
  const bool eager = bytes <= kEagerBytes;
  Outgoing out;
  out.header = NewHeader(*batch, eager ? Type::kEager : Type::kBulk, step, bytes);
  out.data = static_cast<const std::byte*>(data);
  out.batch = batch;
  MutexLock lock(&mutex_);
  Peer& peer = *peers_[rank];
  ++batch->pending;
  ++batch->pending_by_rank[rank];
  if (!eager) {
    const auto early = peer.early_ready.find(KeyOf(out.header));
    if (early == peer.early_ready.end()) {
      peer.held[KeyOf(out.header)] = out;
      return;
    }
    const absl::Status same = Check(early->second, batch->op, bytes);
    peer.early_ready.erase(early);
    if (!same.ok()) return EndBecauseOf(rank, same);
  }
  peer.queue.push_back(out);
  PumpOut(rank);
  if (polling_ && peer.writing) Wake();
}

void TcpMesh::Receive(Batch* batch, int rank, uint32_t step, void* data, int64_t bytes) {
  const Incoming in = {static_cast<std::byte*>(data), bytes, 0, batch};
  const Header header = NewHeader(*batch, Type::kReady, step, bytes);
  MutexLock lock(&mutex_);
  Peer& peer = *peers_[rank];
  ++batch->pending;
  ++batch->pending_by_rank[rank];
  if (peer.unexpected.contains(KeyOf(header))) return TakeUnexpected(rank, header, in);
  peer.expected[KeyOf(header)] = in;
  if (bytes > kEagerBytes) {
    peer.ready.push_back({header, nullptr, 0, nullptr});
    PumpOut(rank);
    if (polling_ && peer.writing) Wake();
  }
}

void TcpMesh::TakeUnexpected(int rank, const Header& wanted, const Incoming& in) {
  Peer& peer = *peers_[rank];
  const auto early = peer.unexpected.find(KeyOf(wanted));
  const absl::Status same = Check(early->second.header, in.batch->op, in.bytes);
  if (!same.ok()) return EndBecauseOf(rank, same);
  const bool arriving = peer.in_payload && KeyOf(peer.in) == KeyOf(wanted);
  const int64_t there = arriving ? in.bytes - peer.payload_left : in.bytes;
  if (there > 0) std::memcpy(in.data, early->second.bytes.data(), there);
  peer.unexpected_bytes -= in.bytes;
  peer.unexpected.erase(early);
  if (arriving) {
    peer.target = in.data + there;
    peer.expected[KeyOf(wanted)] = in;
  } else {
    Finish(in.batch, rank);
  }
}

// ---- Sending.

bool TcpMesh::NextFrame(Peer* peer) {
  std::deque<Outgoing>& from = peer->ready.empty() ? peer->queue : peer->ready;
  if (from.empty()) return false;
  peer->out = from.front();
  from.pop_front();
  Header& header = peer->out.header;
  if (header.type != Type::kReady) {
    header.offset = peer->out.sent;
    header.bytes = std::min<int64_t>(header.total - header.offset, kSliceBytes);
  }
  peer->frame_sent = 0;
  peer->writing = true;
  return true;
}

void TcpMesh::EndFrame(int rank) {
  Peer& peer = *peers_[rank];
  peer.writing = false;
  if (peer.out.header.type == Type::kReady) return;
  peer.out.sent += peer.out.header.bytes;
  if (peer.out.sent < static_cast<int64_t>(peer.out.header.total)) {
    peer.queue.push_back(peer.out);
  } else {
    Finish(peer.out.batch, rank);
  }
}

void TcpMesh::PumpOut(int rank) {
  Peer& peer = *peers_[rank];
  while (peer.open && !world_->Ended() && (peer.writing || NextFrame(&peer))) {
    const Header& header = peer.out.header;
    iovec parts[2];
    int count = 0;
    if (peer.frame_sent < sizeof header) {
      parts[count++] = {reinterpret_cast<char*>(&peer.out.header) + peer.frame_sent,
                        sizeof header - peer.frame_sent};
    }
    const size_t payload_sent = peer.frame_sent - std::min(peer.frame_sent, sizeof header);
    if (header.bytes > payload_sent) {
      parts[count++] = {const_cast<std::byte*>(peer.out.data) + header.offset + payload_sent,
                        static_cast<size_t>(header.bytes - payload_sent)};
    }
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(peer.socket.get(), &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (sent < 0) {
      peer.open = false;  // The control link has the verdict.
      return;
    }
    peer.frame_sent += sent;
    if (peer.frame_sent == sizeof header + header.bytes) EndFrame(rank);
  }
}

// ---- Receiving.

absl::Status TcpMesh::Check(const Header& header, const Op& op, int64_t bytes) {
  if (header.signature != Signature(op)) {
    return absl::InternalError(
        absl::StrCat("is in ", OpName(static_cast<OpKind>(header.kind), "", header.seq), ", this rank in ",
                     OpName(op), ": not the same operation, or with other arguments"));
  }
  if (static_cast<int64_t>(header.total) != bytes) {
    return absl::InternalError(
        absl::StrCat("has ", header.total, " bytes for ", OpName(op), ", this rank ", bytes));
  }
  return absl::OkStatus();
}

void TcpMesh::EndBecauseOf(int rank, const absl::Status& status) {
  peers_[rank]->open = false;
  (void)world_->End(absl::StrCat(world_->RankName(rank), " ", status.message()));
}

absl::Status TcpMesh::BeginPayload(int rank) {
  Peer& peer = *peers_[rank];
  const Header& header = peer.in;
  const Key key = KeyOf(header);
  if (header.magic != kMagic) return absl::DataLossError("sends bytes that are no frame");
  if (header.epoch != epoch_) return absl::DataLossError(absl::StrCat("is in epoch ", header.epoch));
  if (header.type == Type::kReady) {
    const auto held = peer.held.find(key);
    if (held == peer.held.end()) {
      peer.early_ready[key] = header;
      return absl::OkStatus();
    }
    SHOAL_RETURN_IF_ERROR(Check(header, held->second.batch->op, held->second.header.total));
    peer.queue.push_back(held->second);
    peer.held.erase(held);
    PumpOut(rank);
    return absl::OkStatus();
  }
  if (header.bytes > static_cast<uint64_t>(kSliceBytes) || header.offset > header.total ||
      header.bytes > header.total - header.offset) {
    return absl::DataLossError("sends a slice that does not fit its message");
  }
  peer.in_payload = true;
  peer.payload_left = header.bytes;
  const auto expected = peer.expected.find(key);
  if (expected != peer.expected.end()) {
    SHOAL_RETURN_IF_ERROR(Check(header, expected->second.batch->op, expected->second.bytes));
    peer.target = expected->second.data + header.offset;
    return absl::OkStatus();
  }
  if (header.type != Type::kEager || header.bytes != header.total) {
    return absl::DataLossError("sends data that nobody asked for");
  }
  Unexpected& kept = peer.unexpected[key];
  kept.header = header;
  kept.bytes.resize(header.bytes);
  peer.unexpected_bytes += header.bytes;
  peer.target = kept.bytes.data();
  return absl::OkStatus();
}

void TcpMesh::EndPayload(int rank) {
  Peer& peer = *peers_[rank];
  peer.in_payload = false;
  const auto expected = peer.expected.find(KeyOf(peer.in));
  if (expected == peer.expected.end()) return;  // Kept in `unexpected`.
  Incoming& incoming = expected->second;
  incoming.received += peer.in.bytes;
  if (incoming.received < incoming.bytes) return;
  Finish(incoming.batch, rank);
  peer.expected.erase(expected);
}

bool TcpMesh::ConsumeBuffer(int rank) {
  Peer& peer = *peers_[rank];
  const size_t there = peer.buffer_end - peer.buffer_begin;
  if (peer.in_payload) {
    const size_t take = std::min<size_t>(there, peer.payload_left);
    if (take > 0) std::memcpy(peer.target, peer.buffer.data() + peer.buffer_begin, take);
    peer.target += take;
    peer.payload_left -= take;
    peer.buffer_begin += take;
    if (peer.payload_left > 0) return false;
    EndPayload(rank);
    return true;
  }
  if (there < sizeof(Header)) {
    std::memmove(peer.buffer.data(), peer.buffer.data() + peer.buffer_begin, there);
    peer.buffer_begin = 0;
    peer.buffer_end = there;
    return false;
  }
  std::memcpy(&peer.in, peer.buffer.data() + peer.buffer_begin, sizeof(Header));
  peer.buffer_begin += sizeof(Header);
  const absl::Status status = BeginPayload(rank);
  if (!status.ok()) EndBecauseOf(rank, status);
  return status.ok();
}

void TcpMesh::PumpIn(int rank) {
  Peer& peer = *peers_[rank];
  int64_t budget = kReadBudget;
  while (peer.open && budget > 0 && !world_->Ended()) {
    if (ConsumeBuffer(rank)) continue;
    if (!peer.open) return;
    const bool direct = peer.in_payload && peer.payload_left >= kDirectBytes;
    if (peer.buffer_begin == peer.buffer_end) peer.buffer_begin = peer.buffer_end = 0;
    std::byte* to = direct ? peer.target : peer.buffer.data() + peer.buffer_end;
    const size_t room = direct ? peer.payload_left : peer.buffer.size() - peer.buffer_end;
    const ssize_t got = recv(peer.socket.get(), to, room, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got <= 0) {
      peer.open = false;  // The control link has the verdict.
      return;
    }
    budget -= got;
    if (!direct) {
      peer.buffer_end += got;
    } else {
      peer.target += got;
      peer.payload_left -= got;
      if (peer.payload_left == 0) EndPayload(rank);
    }
  }
}

// ---- Waiting.

bool TcpMesh::PollOnce(int timeout_ms) {
  std::vector<pollfd> entries = {{wake_.get(), POLLIN, 0}};
  std::vector<int> ranks = {-1};
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    const Peer& peer = *peers_[rank];
    if (!peer.open) continue;
    const short in = peer.unexpected_bytes < kUnexpectedBytes ? POLLIN : 0;
    const short out = peer.writing ? POLLOUT : 0;
    entries.push_back({peer.socket.get(), static_cast<short>(in | out), 0});
    ranks.push_back(static_cast<int>(rank));
  }
  polling_ = true;
  mutex_.Unlock();
  const int ready = poll(entries.data(), entries.size(), timeout_ms);
  mutex_.Lock();
  polling_ = false;
  if (ready > 0) {
    uint64_t count = 0;
    if (entries[0].revents != 0) (void)!read(wake_.get(), &count, sizeof count);
    for (size_t i = 1; i < entries.size(); ++i) {
      if ((entries[i].revents & POLLOUT) != 0) PumpOut(ranks[i]);
      if ((entries[i].revents & ~POLLOUT) != 0) PumpIn(ranks[i]);
    }
  }
  changed_.NotifyAll();
  return ready > 0;
}

absl::Status TcpMesh::CheckEpoch(const Batch& batch, int64_t deadline_ns) {
  if (world_->Ended()) return world_->status();
  std::vector<int> missing;
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    if (batch.pending_by_rank[rank] == 0) continue;
    missing.push_back(static_cast<int>(rank));
    // All that it had sent has been read by now.
    if (!peers_[rank]->open && world_->Left(static_cast<int>(rank))) {
      return world_->End(absl::StrCat(world_->RankName(static_cast<int>(rank)), " left"));
    }
  }
  if (NowNs() < deadline_ns) return absl::OkStatus();
  return world_->End(
      absl::StrCat(OpName(batch.op), ": deadline passed: ", world_->RankNames(missing), " had not arrived"));
}

absl::Status TcpMesh::Wait(Batch* batch, const std::atomic<int64_t>& deadline_ns) {
  MutexLock lock(&mutex_);
  int64_t active_ns = NowNs();
  while (batch->pending > 0) {
    // After the end nobody touches a buffer without first looking, under the lock, whether the epoch lives.
    SHOAL_RETURN_IF_ERROR(CheckEpoch(*batch, deadline_ns.load(std::memory_order_relaxed)));
    if (polling_) {
      changed_.WaitUntil(&mutex_, SteadyTime(NowNs() + kFollowerSleepNs));
      continue;
    }
    const bool spin = NowNs() - active_ns < kSpinNs;
    if (PollOnce(spin ? 0 : kSleepMs)) {
      active_ns = NowNs();
    } else if (spin) {
      mutex_.Unlock();
      std::this_thread::yield();
      mutex_.Lock();
    }
  }
  return absl::OkStatus();
}

}  // namespace shoal
