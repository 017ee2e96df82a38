// The sending half of ShmChannel.
#include <algorithm>
#include <cstring>

#include "collectives/engine/shm/shm_channel_state.h"
#include "runtime/base/status.h"

namespace shoal {

using namespace shm;

// Whether the message lies in memory that the peers have; fills in where.
bool ShmChannel::State::IsShared(const Outgoing& message, Record* record) {
  if (const uint64_t now = SharedMemory::Forgotten(); now != forgotten) {
    forgotten = now;
    last_extent = {};
  }
  const auto inside = [&] {
    return message.data >= last_extent.base &&
           message.data + message.bytes <= last_extent.base + last_extent.bytes;
  };
  if (!inside()) last_extent = SharedMemory::Surrounding(message.data, message.bytes);
  if (last_extent.base == nullptr) return false;
  record->SetPlace(last_extent.segment, message.data - last_extent.base);
  return true;
}

bool ShmChannel::State::HaveStaging() {
  if (staging != nullptr) return true;
  absl::StatusOr<std::shared_ptr<Segment>> memory =
      group->memory().NewSegment(kFragmentBytes * kStagingSlots);
  if (!memory.ok()) {
    Fail(Annotate(memory.status(), "memory to send from"));
    return false;
  }
  staging = *std::move(memory);
  for (int slot = 0; slot < kStagingSlots; ++slot) free_slots.push_back(slot);
  return true;
}

uint32_t ShmChannel::State::Ask(Peer& peer, Request request) {
  const uint32_t number = peer.questions.Ask();
  if (number >= peer.requests.size()) peer.requests.resize(number + 1);
  peer.requests[number] = std::move(request);
  return number;
}

Record ShmChannel::State::Describe(const Outgoing& message, RecordKind kind) {
  Record record{};
  record.kind = kind;
  record.op = message.id.op;
  record.tag = message.id.tag;
  record.signature = message.id.signature;
  record.bytes = message.bytes;
  const bool lent = message.mode == Outgoing::Mode::kLent || message.mode == Outgoing::Mode::kLentCopy;
  record.flags = lent ? Record::kLent : 0;
  return record;
}

void ShmChannel::State::SendNow(Peer& peer, const Outgoing& message) {
  if (!peer.waiting.empty() || !Start(peer, message)) peer.waiting.push_back(message);
}

// The peer has all of it, or has given it back.
void ShmChannel::State::EndSend(Peer& peer, const Outgoing& message) {
  switch (message.mode) {
    case Outgoing::Mode::kPlain:
      break;
    case Outgoing::Mode::kLent:
      if (group->EndLoan(peer.seat, message.data)) break;
      return Fail(absl::AbortedError("memory that was lent had to be cut off from a peer that stopped"));
    case Outgoing::Mode::kLentCopy:
      return;
    case Outgoing::Mode::kReturn:
      peer.returning.erase(Key{message.id.op, message.id.tag});
      break;
  }
  ended.push_back({message.token, nullptr});
}

// Writes what the peer needs to know of a new message. False: there is no room.
bool ShmChannel::State::Start(Peer& peer, Outgoing message) {
  if (!peer.MayStart(message)) return false;
  if (message.IsInline()) {
    peer.out.Write(Describe(message, RecordKind::kInline), message.data, message.bytes);
    peer.written = true;
    EndSend(peer, message);
    return true;
  }
  Record record = Describe(message, RecordKind::kDirect);
  const bool shared = message.mode != Outgoing::Mode::kLentCopy && IsShared(message, &record);
  if (message.mode == Outgoing::Mode::kLent && !shared) {
    Fail(absl::AbortedError("memory that is lent is no longer shared: it had to be cut off from a peer that stopped"));
    return true;
  }
  if (shared) {
    record.request = Ask(peer, {Request::Kind::kDirect, 0, message});
  } else {
    if (!HaveStaging()) return true;  // The channel has failed.
    const bool may_be_eager = message.mode != Outgoing::Mode::kLentCopy;  // The receiver writes to it.
    if (may_be_eager && message.bytes <= kFragmentBytes && free_slots.size() > kReservedSlots) {
      return WriteFragment(peer, &message, /*eager=*/true);
    }
    record.kind = RecordKind::kOffer;
    record.request = Ask(peer, {Request::Kind::kOffer, 0, message});
  }
  peer.out.Write(record, nullptr, 0);
  peer.written = true;
  return true;
}

// There is a free slot. False: there is no room in the ring.
bool ShmChannel::State::WriteFragment(Peer& peer, Outgoing* message, bool eager) {
  if (!peer.MayAsk()) return false;
  const int slot = free_slots.back();
  free_slots.pop_back();
  const int64_t bytes = std::min(kFragmentBytes, message->bytes - message->staged);
  std::memcpy(staging->base() + slot * kFragmentBytes, message->data + message->staged, bytes);
  message->staged += bytes;
  Record record = Describe(*message, RecordKind::kStaged);
  if (eager) record.flags |= Record::kEager;
  record.request = Ask(peer, {Request::Kind::kFragment, slot, *message});
  record.SetPlace(staging->id(), slot * kFragmentBytes);
  peer.out.Write(record, nullptr, 0);
  peer.written = true;
  return true;
}

void ShmChannel::State::StageGranted() {
  for (auto next = granted.begin(); next != granted.end() && !free_slots.empty();) {
    auto& [seat, message] = *next;
    if (!WriteFragment(*peers[seat], &message, /*eager=*/false)) {
      ++next;  // Others' rings may have room.
    } else if (message.staged == message.bytes) {
      next = granted.erase(next);
    }
  }
}

void ShmChannel::State::CollectAnswers(Peer& peer) {
  peer.questions.Collect([&](uint32_t number, Answer answer) {
    Request& request = peer.requests[number];
    switch (request.kind) {
      case Request::Kind::kDirect:
        EndSend(peer, request.message);
        break;
      case Request::Kind::kOffer:
        granted.emplace_back(peer.seat, request.message);
        break;
      case Request::Kind::kFragment:
        free_slots.push_back(request.slot);
        // Fragments are taken in order. Not before the last one: the staging memory is this rank's as well.
        if (request.message.staged == request.message.bytes) EndSend(peer, request.message);
        break;
      case Request::Kind::kNone:
        break;
    }
    const bool asked_for_go = request.kind == Request::Kind::kOffer;
    if (request.kind == Request::Kind::kNone || asked_for_go != (answer == Answer::kGo)) {
      FailNonsense(peer, "an answer to no question");
    }
    request.kind = Request::Kind::kNone;
  });
}

void ShmChannel::State::RingBells() {
  bool any = false;
  for (const auto& peer : peers) any = any || (peer != nullptr && peer->written);
  if (!any) return;
  group->OrderBeforeRing();
  for (const auto& peer : peers) {
    if (peer == nullptr || !peer->written) continue;
    peer->written = false;
    group->RingIfAsleep(peer->seat);
  }
}

}  // namespace shoal
