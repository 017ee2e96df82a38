// The receiving half of ShmChannel.
#include <algorithm>
#include <cstring>

#include "collectives/engine/reduce.h"
#include "collectives/engine/shm/shm_channel_state.h"
#include "runtime/base/status.h"

namespace shoal {

using namespace shm;

void ShmChannel::State::Drain(Peer& peer) {
  for (const Record* record = peer.in.Front(); record != nullptr && final.ok(); record = peer.in.Front()) {
    if (peer.arrived.size() >= kArrivedMax) return;
    switch (record->kind) {
      case RecordKind::kStaged:
        if ((record->flags & Record::kEager) == 0) {
          if (!TakeFragment(peer, *record)) return;
          break;
        }
        [[fallthrough]];
      default:
        TakeMessage(peer, *record);
    }
    if (peer.in.Pop()) peer.written = true;
  }
}

void ShmChannel::State::TakeProbe(Peer& peer, MessageId theirs) {
  const auto ours = signatures.find(theirs.op);
  if (ours == signatures.end() && theirs.op > finished.op) {
    peer.probe = theirs;
    return;
  }
  const uint32_t signature = ours != signatures.end() ? ours->second : finished.signature;
  const bool known = ours != signatures.end() || theirs.op == finished.op;
  if (known && signature != theirs.signature) {
    FailMismatch(peer, {theirs.op, theirs.tag, signature}, 0, theirs, 0);
  }
}

void ShmChannel::State::TakeMessage(Peer& peer, const Record& record) {
  const Key key = {record.op, record.tag};
  const MessageId theirs = {record.op, record.tag, record.signature};
  if ((key.op & kUnordered) == 0) peer.reached = std::max(peer.reached, key.op);
  if (key.tag == kProbeTag && (key.op & kUnordered) == 0) return TakeProbe(peer, theirs);
  const auto found = peer.posted.find(key);
  if ((key.op & kUnordered) == 0) {
    const auto ours = signatures.find(key.op);
    if (ours != signatures.end() && ours->second != record.signature) {
      return FailMismatch(peer, {key.op, key.tag, ours->second}, 0, theirs, record.bytes);
    }
    if (found == peer.posted.end() && key.op <= finished.op) {
      return FailMismatch(peer, finished, 0, theirs, record.bytes);
    }
  }
  if (record.kind == RecordKind::kInline && record.bytes != peer.in.PayloadBytes()) {
    return FailNonsense(peer, "a message with another length than it says");
  }
  Arrival arrival = {
      .kind = record.kind, .bytes = record.bytes, .signature = record.signature, .request = record.request};
  arrival.lent = (record.flags & Record::kLent) != 0;
  if (record.kind == RecordKind::kDirect || record.kind == RecordKind::kStaged) {
    arrival.segment = record.segment();
    arrival.offset = record.offset();
  }
  if (found != peer.posted.end()) {
    const Posted posted = found->second;
    peer.posted.erase(found);
    const bool plain = record.kind == RecordKind::kInline && posted.into != nullptr;
    if (plain && posted.bytes == record.bytes && !arrival.lent) {
      peer.in.CopyPayload(posted.into);
      ended.push_back({posted.token, nullptr});
      return;
    }
    if (record.kind == RecordKind::kInline && record.bytes > 0) {
      arrival.payload.reset(new std::byte[record.bytes]);
      peer.in.CopyPayload(arrival.payload.get());
    }
    return Match(peer, key, posted, std::move(arrival));
  }
  if (record.kind == RecordKind::kInline && record.bytes > 0) {
    arrival.payload.reset(new std::byte[record.bytes]);
    peer.in.CopyPayload(arrival.payload.get());
  }
  if (!peer.arrived.emplace(key, std::move(arrival)).second) FailNonsense(peer, "one message twice");
}

// False: the sender's staging memory is not known yet.
bool ShmChannel::State::TakeFragment(Peer& peer, const Record& record) {
  const auto found = peer.assembling.find(Key{record.op, record.tag});
  if (found == peer.assembling.end()) {
    FailNonsense(peer, "a fragment that nobody asked for");
    return false;
  }
  Assembly& assembly = found->second;
  const int64_t bytes = std::min(kFragmentBytes, assembly.bytes - assembly.done);
  const std::byte* from = Find(peer, record.segment(), record.offset(), bytes);
  unknown_memory = from == nullptr;
  if (from == nullptr) return false;
  std::memcpy(assembly.into + assembly.done, from, bytes);
  assembly.done += bytes;
  Reply(peer, Answer::kTaken, record.request);
  if (assembly.done < assembly.bytes) return true;
  if (assembly.buffer != nullptr) {
    ended.push_back({assembly.token, assembly.into});
    peer.views[found->first] = {
        nullptr, 0, std::move(assembly.buffer), assembly.token, assembly.signature, assembly.bytes};
  } else {
    ended.push_back({assembly.token, nullptr});
  }
  peer.assembling.erase(found);
  return true;
}

void ShmChannel::State::Match(Peer& peer, const Key& key, const Posted& posted, Arrival arrival) {
  if (posted.bytes != arrival.bytes || posted.signature != arrival.signature || posted.borrows != arrival.lent) {
    return FailMismatch(peer, {key.op, key.tag, posted.signature}, posted.bytes,
                        {key.op, key.tag, arrival.signature}, arrival.bytes);
  }
  const bool view = posted.into == nullptr;
  switch (arrival.kind) {
    case RecordKind::kInline:
      if (!view) {
        if (arrival.bytes > 0) std::memcpy(posted.into, arrival.payload.get(), arrival.bytes);
        ended.push_back({posted.token, nullptr});
        return;
      }
      ended.push_back({posted.token, arrival.bytes > 0 ? arrival.payload.get() : g_nothing});
      peer.views[key] = {nullptr, 0, std::move(arrival.payload), posted.token, posted.signature, posted.bytes};
      return;
    case RecordKind::kOffer: {
      Assembly& assembly = peer.assembling[key];
      assembly = {posted.into, posted.bytes, 0, posted.token, nullptr, posted.signature};
      if (view) {
        assembly.buffer.reset(new std::byte[posted.bytes]);
        assembly.into = assembly.buffer.get();
      }
      Reply(peer, Answer::kGo, arrival.request);
      return;
    }
    case RecordKind::kDirect:
    case RecordKind::kStaged:
      if (!MatchInPlace(peer, key, posted, arrival) && final.ok()) {
        unresolved.push_back({peer.seat, key, posted, std::move(arrival)});
      }
      return;
  }
  FailNonsense(peer, "a message of an unknown kind");
}

// False: the sender's memory is not known yet.
bool ShmChannel::State::MatchInPlace(Peer& peer, const Key& key, const Posted& posted,
                                     const Arrival& arrival) {
  const std::byte* from = Find(peer, arrival.segment, arrival.offset, arrival.bytes);
  if (from == nullptr) return false;
  const std::shared_ptr<const Segment>& segment = peer.segments.front();
  if (posted.into == nullptr) {
    ended.push_back({posted.token, from});
    peer.views[key] = {segment, arrival.request, nullptr, posted.token, posted.signature, posted.bytes};
  } else {
    copies.push_back({peer.seat, segment, from, posted.into, arrival.bytes, 0, arrival.request, posted.token});
  }
  return true;
}

const std::byte* ShmChannel::State::Find(Peer& peer, uint64_t id, int64_t offset, int64_t bytes) {
  if (const uint64_t now = group->memory().Removed(); now != removed) {
    // A peer whose group has ended takes away also what is being read here: copies and views keep theirs.
    removed = now;
    for (const auto& other : peers) {
      if (other != nullptr) other->segments.clear();
    }
  }
  auto found = std::find_if(peer.segments.begin(), peer.segments.end(),
                            [id](const auto& segment) { return segment->id() == id; });
  if (found == peer.segments.end()) {
    std::shared_ptr<const Segment> segment =
        group->memory().FindPeerSegment(group->life().ranks()[group->member(peer.seat)], id);
    if (segment == nullptr) return nullptr;
    found = peer.segments.insert(peer.segments.begin(), std::move(segment));
  }
  if (found != peer.segments.begin()) std::iter_swap(found, peer.segments.begin());
  const Segment& segment = *peer.segments.front();
  if (offset < 0 || bytes < 0 || bytes > segment.bytes() || offset > segment.bytes() - bytes) {
    FailNonsense(peer, "a place past the end of its memory");
    return nullptr;
  }
  return segment.base() + offset;
}

void ShmChannel::State::RetryUnresolved() {
  for (size_t i = 0; i < unresolved.size() && final.ok();) {
    Unresolved& entry = unresolved[i];
    if (MatchInPlace(*peers[entry.seat], entry.key, entry.posted, entry.arrival)) {
      unresolved.erase(unresolved.begin() + static_cast<int64_t>(i));
    } else {
      ++i;
    }
  }
}

void ShmChannel::State::RunCopies() {
  for (int64_t budget = kCopyPerPoll; budget > 0 && !copies.empty() && final.ok();) {
    Copying& copy = copies.front();
    const int64_t bytes = std::min(budget, copy.bytes - copy.done);
    CopyPiece(copy.to + copy.done, copy.from + copy.done, bytes, copy.bytes);
    copy.done += bytes;
    budget -= bytes;
    if (copy.done < copy.bytes) return;
    if (const absl::Status status = group->CheckPeer(copy.seat); !status.ok()) return Fail(status);
    Reply(*peers[copy.seat], Answer::kTaken, copy.request);
    ended.push_back({copy.token, nullptr});
    copies.pop_front();
  }
}

void ShmChannel::State::Reply(Peer& peer, Answer answer, uint32_t request) {
  peer.replies.Say(answer, request);
  peer.written = true;
}

}  // namespace shoal
