#include "collectives/engine/tcp/data_port.h"

#include <algorithm>
#include <cstring>

#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Of small messages that one group may have under way to one rank before they are asked for.
constexpr int64_t kWindowBytes = 4 << 20;
constexpr int64_t kGiveBackBytes = kWindowBytes / 8;
constexpr int64_t kSliceBytes = 128 << 10;
// Operations of a pair stand outside of the order of collectives (see Channel): only their own messages are
// compared.
constexpr uint64_t kPairBit = uint64_t{1} << 63;

// Of a small message on the sender's window.
int64_t Cost(int64_t bytes) { return bytes + static_cast<int64_t>(sizeof(DataHeader)); }

DataMesh::Port::Key KeyOf(const DataHeader& header) { return {header.op, header.tag}; }
MessageId IdOf(const DataHeader& header) { return {header.op, header.tag, header.signature}; }

}  // namespace

DataMesh::Port::~Port() {
  Fail(absl::CancelledError("the group is closed"));
  for (const auto& side : sides) {
    if (side == nullptr) continue;
    for (const auto& [unused, early] : side->early) {
      if (early.buffer != nullptr) shared->pool.Give(early.buffer);
    }
    for (const auto& [unused, incoming] : side->expected) {
      if (incoming.view && incoming.into != nullptr) shared->pool.Give(incoming.into);
    }
  }
  for (const std::byte* view : views) shared->pool.Give(view);
}

DataMesh::Port::Side& DataMesh::Port::At(int rank) {
  if (sides[rank] == nullptr) sides[rank] = std::make_unique<Side>();
  return *sides[rank];
}

bool DataMesh::Port::Pending(int rank) const {
  const Side* side = sides[rank].get();
  return side != nullptr && (!side->sends.empty() || !side->expected.empty() || side->wanted_early > 0);
}

bool DataMesh::Port::Idle() const {
  for (size_t rank = 0; rank < sides.size(); ++rank) {
    if (Pending(static_cast<int>(rank))) return false;
  }
  return true;
}

DataHeader DataMesh::Port::NewHeader(DataType type, MessageId id, int64_t total) const {
  DataHeader header = {};
  header.magic = kDataMagic;
  header.type = type;
  header.signature = id.signature;
  header.tag = id.tag;
  header.epoch = shared->epoch;
  header.group = key;
  header.op = id.op;
  header.total = total;
  return header;
}

void DataMesh::Port::List(int rank) {
  Outbox& box = shared->outboxes[rank];
  if (!box.listed) shared->dirty.push_back(rank);
  box.listed = true;
}

void DataMesh::Port::Post(int rank, const DataHeader& header, Outgoing* out) {
  shared->outboxes[rank].small.push_back({header, out == nullptr ? nullptr : out->data, out});
  List(rank);
}

void DataMesh::Port::PostLarge(int rank, Outgoing* out) {
  Side& side = At(rank);
  if (side.large.empty()) shared->outboxes[rank].large.push_back(this);
  side.large.push_back(out);
  List(rank);
}

DataFlow::Frame DataMesh::Port::TakeSlice(int rank) {
  Side& side = At(rank);
  Outbox& box = shared->outboxes[rank];
  box.large.pop_front();
  Outgoing* out = side.large.front();
  side.large.pop_front();
  DataHeader header = out->header;
  header.offset = out->cut;
  header.bytes = std::min<int64_t>(header.total - out->cut, kSliceBytes);
  DataFlow::Frame slice = {header, out->data + out->cut, out};
  out->cut += header.bytes;
  if (out->cut < static_cast<int64_t>(header.total)) side.large.push_back(out);
  if (!side.large.empty()) box.large.push_back(this);
  return slice;
}

// ---- Do both sides mean the same?

void DataMesh::Port::FailMismatch(int rank, MessageId ours, int64_t our_bytes, const DataHeader& theirs) {
  if (!failure.ok()) return;
  mismatch = {rank, ours, IdOf(theirs), our_bytes, static_cast<int64_t>(theirs.total)};
  Fail(absl::FailedPreconditionError(absl::StrCat(
      shared->names[rank], " sends or awaits a message of operation ", theirs.op, ", tag ", theirs.tag, ", ",
      theirs.total, " bytes, signature ", theirs.signature, "; this rank has operation ", ours.op, ", tag ",
      ours.tag, ", ", our_bytes, " bytes, signature ", ours.signature)));
}

bool DataMesh::Port::Agree(int rank, uint32_t ours, int64_t our_bytes, const DataHeader& theirs) {
  if (theirs.signature == ours && static_cast<int64_t>(theirs.total) == our_bytes) return true;
  FailMismatch(rank, {theirs.op, theirs.tag, ours}, our_bytes, theirs);
  return false;
}

bool DataMesh::Port::AgreePosted(int rank, MessageId id, int64_t bytes) {
  if (!failure.ok()) return false;
  if ((id.op & kPairBit) != 0) return true;
  OpState& state = ops[id.op];
  if (state.posted) return true;
  state.posted = true;
  state.ours = id.signature;
  for (const auto& [peer, theirs] : state.seen) {
    if (theirs.signature == id.signature) continue;
    FailMismatch(peer, id, peer == rank && theirs.tag == id.tag ? bytes : 0, theirs);
    return false;
  }
  state.seen.clear();
  return true;
}

bool DataMesh::Port::AgreeSeen(int rank, const DataHeader& header) {
  if ((header.op & kPairBit) != 0 || header.type == DataType::kCredit) return true;
  if (header.op <= finished_op) {
    // A slice is an error of its own; who probes may be behind.
    if (header.type == DataType::kSlice || header.type == DataType::kProbe) return true;
    FailMismatch(rank, {finished_op, 0, 0}, 0, header);
    return false;
  }
  OpState& state = ops[header.op];
  if (!state.posted) {
    for (const auto& [peer, seen] : state.seen) {
      if (seen.signature == header.signature) return true;
    }
    if (state.seen.size() < 2) state.seen.emplace_back(rank, header);
    return true;
  }
  if (state.ours == header.signature) return true;
  FailMismatch(rank, {header.op, header.tag, state.ours}, 0, header);
  return false;
}

void DataMesh::Port::Finish(MessageId id) {
  ops.erase(id.op);
  if ((id.op & kPairBit) != 0 || id.op <= finished_op || !failure.ok()) return;
  finished_op = id.op;
  const auto over = [&](uint64_t op) { return (op & kPairBit) == 0 && op <= finished_op; };
  if (!ops.empty()) {
    absl::erase_if(ops, [&](const auto& entry) { return over(entry.first); });
  }
  for (size_t rank = 0; rank < sides.size(); ++rank) {
    if (sides[rank] == nullptr) continue;
    for (const auto& [unused, early] : sides[rank]->early) {
      if (over(early.header.op) && !early.wanted) return FailMismatch(rank, id, 0, early.header);
    }
    for (const auto& [unused, ready] : sides[rank]->early_ready) {
      if (over(ready.op)) return FailMismatch(rank, id, 0, ready);
    }
  }
}

void DataMesh::Port::Probe(int rank, MessageId id) {
  if (failure.ok()) Post(rank, NewHeader(DataType::kProbe, id, 0), nullptr);
}

// ---- The caller's side.

void DataMesh::Port::Send(int rank, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) {
  if (!AgreePosted(rank, id, bytes)) return;
  Side& side = At(rank);
  side.sends.push_front({this, rank, NewHeader(DataType::kEager, id, bytes), data, token});
  Outgoing* out = &side.sends.front();
  out->self = side.sends.begin();
  if (bytes <= kEagerBytesMax && side.window_used + Cost(bytes) <= kWindowBytes) {
    side.window_used += Cost(bytes);
    out->header.bytes = bytes;
    return Post(rank, out->header, out);
  }
  out->header.type = DataType::kSlice;
  const auto early = side.early_ready.find({id.op, id.tag});
  if (early == side.early_ready.end()) {
    if (bytes <= kEagerBytesMax) Post(rank, NewHeader(DataType::kAnnounce, id, bytes), nullptr);
    side.held[{id.op, id.tag}] = out;
    return;
  }
  const DataHeader theirs = early->second;
  side.early_ready.erase(early);
  if (!Agree(rank, id.signature, bytes, theirs)) return;
  PostLarge(rank, out);
}

void DataMesh::Port::Receive(int rank, MessageId id, std::byte* into, int64_t bytes, uint64_t token,
                             Into whose) {
  if (!AgreePosted(rank, id, bytes)) return;
  Side& side = At(rank);
  Incoming incoming;
  incoming.into = into;
  incoming.bytes = bytes;
  incoming.token = token;
  incoming.signature = id.signature;
  incoming.view = whose == Into::kMesh;
  const DataHeader wanted = NewHeader(DataType::kReady, id, bytes);
  const auto early = side.early.find(KeyOf(wanted));
  if (early != side.early.end()) return TakeEarly(rank, &early->second, incoming, wanted);
  side.expected[KeyOf(wanted)] = incoming;
  if (bytes > kEagerBytesMax) Post(rank, wanted, nullptr);
}

void DataMesh::Port::TakeEarly(int rank, Early* early, const Incoming& incoming, const DataHeader& wanted) {
  Side& side = At(rank);
  if (!Agree(rank, wanted.signature, wanted.total, early->header)) return;
  early->receiver = incoming;
  if (early->header.type == DataType::kAnnounce) {
    side.expected[KeyOf(wanted)] = incoming;
    side.early.erase(KeyOf(wanted));
    return Post(rank, wanted, nullptr);
  }
  if (!early->complete) {
    early->wanted = true;
    ++side.wanted_early;
    return;
  }
  Incoming& receiver = early->receiver;
  if (receiver.view) {
    receiver.into = early->buffer;
  } else {
    if (receiver.bytes > 0) std::memcpy(receiver.into, early->buffer, receiver.bytes);
    shared->pool.Give(early->buffer);
  }
  EndReceive(receiver);
  Consumed(rank, Cost(receiver.bytes));
  side.early.erase(KeyOf(wanted));
}

void DataMesh::Port::EndReceive(const Incoming& incoming) {
  if (incoming.view) views.insert(incoming.into);
  events.push_back({incoming.token, incoming.view ? incoming.into : nullptr});
}

void DataMesh::Port::Consumed(int rank, int64_t cost) {
  Side& side = At(rank);
  side.consumed += cost;
  if (side.consumed < kGiveBackBytes) return;
  Post(rank, NewHeader(DataType::kCredit, {}, side.consumed), nullptr);
  side.consumed = 0;
}

void DataMesh::Port::Release(const std::byte* view) {
  // After the end the views are gone already.
  if (views.erase(view) > 0) shared->pool.Give(view);
}

// ---- The network's side.

absl::StatusOr<std::byte*> DataMesh::Port::OnHeader(int rank, const DataHeader& header) {
  if (!failure.ok()) return nullptr;
  Side& side = At(rank);
  if ((header.op & kPairBit) == 0) side.reached = std::max<uint64_t>(side.reached, header.op);
  if (!AgreeSeen(rank, header) || header.type == DataType::kProbe) return nullptr;
  if (header.type == DataType::kReady) return OnReady(rank, header);
  if (header.type == DataType::kCredit) {
    if (static_cast<int64_t>(header.total) < 0 || static_cast<int64_t>(header.total) > side.window_used) {
      return absl::DataLossError("gives back more than it was sent");
    }
    side.window_used -= header.total;
    return nullptr;
  }
  const auto expected = side.expected.find(KeyOf(header));
  if (expected == side.expected.end()) return OnUnasked(rank, header);
  if (!Agree(rank, expected->second.signature, expected->second.bytes, header)) return nullptr;
  if (header.type == DataType::kAnnounce) {
    Post(rank, NewHeader(DataType::kReady, IdOf(header), header.total), nullptr);
    return nullptr;
  }
  return IntoExpected(rank, header, &expected->second);
}

absl::StatusOr<std::byte*> DataMesh::Port::OnReady(int rank, const DataHeader& header) {
  Side& side = At(rank);
  const auto held = side.held.find(KeyOf(header));
  if (held == side.held.end()) {
    if (!side.early_ready.emplace(KeyOf(header), header).second)
      return absl::DataLossError("asks twice for one message");
    return nullptr;
  }
  Outgoing* out = held->second;
  if (!Agree(rank, out->header.signature, out->header.total, header)) return nullptr;
  side.held.erase(held);
  PostLarge(rank, out);
  return nullptr;
}

absl::StatusOr<std::byte*> DataMesh::Port::OnUnasked(int rank, const DataHeader& header) {
  if (header.type == DataType::kSlice) return absl::DataLossError("sends data that nobody asked for");
  Early early;
  early.header = header;
  if (header.type == DataType::kEager) {
    early.buffer = shared->pool.Take(header.bytes);
    early.complete = header.bytes == 0;
  }
  std::byte* const into = early.buffer;
  const bool first = At(rank).early.emplace(KeyOf(header), std::move(early)).second;
  if (first) return into;
  if (into != nullptr) shared->pool.Give(into);
  return absl::DataLossError("sends one message twice");
}

absl::StatusOr<std::byte*> DataMesh::Port::IntoExpected(int rank, const DataHeader& header,
                                                        Incoming* incoming) {
  if (incoming->claimed + static_cast<int64_t>(header.bytes) > incoming->bytes ||
      (incoming->claimed > 0 && header.bytes == 0)) {
    return absl::DataLossError("sends more of a message than there is");
  }
  incoming->claimed += header.bytes;
  incoming->window = header.type == DataType::kEager;
  if (incoming->view && incoming->into == nullptr) incoming->into = shared->pool.Take(incoming->bytes);
  if (header.bytes > 0) return incoming->into + header.offset;
  EndReceive(*incoming);
  Consumed(rank, Cost(0));
  At(rank).expected.erase(KeyOf(header));
  return nullptr;
}

void DataMesh::Port::OnPayload(int rank, const DataHeader& header) {
  if (!failure.ok()) return;
  Side& side = At(rank);
  const auto expected = side.expected.find(KeyOf(header));
  if (expected != side.expected.end()) {
    Incoming& incoming = expected->second;
    incoming.received += header.bytes;
    if (incoming.received < incoming.bytes) return;
    EndReceive(incoming);
    if (incoming.window) Consumed(rank, Cost(incoming.bytes));
    side.expected.erase(expected);
    return;
  }
  const auto early = side.early.find(KeyOf(header));
  if (early == side.early.end()) return;
  early->second.complete = true;
  if (!early->second.wanted) return;
  --side.wanted_early;
  TakeEarly(rank, &early->second, early->second.receiver,
            NewHeader(DataType::kReady, IdOf(header), header.total));
}

void DataMesh::Port::OnSent(Outgoing* out, const DataHeader& header) {
  out->sent += header.bytes;
  if (!failure.ok() || out->sent < static_cast<int64_t>(out->header.total)) return;
  events.push_back({out->token, nullptr});
  At(out->rank).sends.erase(out->self);
}

// ---- The end.

void DataMesh::Port::Fail(const absl::Status& status) {
  if (failure.ok()) failure = status;
  events.clear();
  // What was not begun is not sent. Nothing that flows may point at is freed here.
  for (Outbox& box : shared->outboxes) {
    std::erase_if(box.small, [this](const auto& frame) { return frame.header.group == key; });
    std::erase(box.large, this);
  }
  for (const auto& side : sides) {
    if (side != nullptr) side->large.clear();
  }
}

}  // namespace shoal
