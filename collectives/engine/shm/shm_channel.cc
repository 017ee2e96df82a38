#include "collectives/engine/shm/shm_channel.h"

#include <algorithm>
#include <utility>

#include "collectives/engine/shm/shm_channel_state.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {

using namespace shm;

ShmChannel::State::State(std::shared_ptr<HostGroup> host_group)
    : group(std::move(host_group)), spinner(group.get()) {
  const GroupLayout layout(group->seats());
  const int own = group->own_seat();
  for (int seat = 0; seat < group->seats(); ++seat) {
    if (seat == own) {
      peers.push_back(nullptr);
      continue;
    }
    GroupPage* mine = &group->page(own);
    GroupPage* theirs = &group->page(seat);
    peers.push_back(std::make_unique<Peer>(layout, mine, own, theirs, seat));
  }
}

// ---- Errors.

void ShmChannel::State::FailMismatch(const Peer& peer, MessageId ours, int64_t our_bytes, MessageId theirs,
                                     int64_t their_bytes) {
  if (!final.ok()) return;
  mismatch = {group->member(peer.seat), ours, theirs, our_bytes, their_bytes};
  Fail(absl::FailedPreconditionError(absl::StrCat("rank ", group->life().ranks()[mismatch.member],
                                                  " sends another message than this rank expects")));
}

void ShmChannel::State::FailNonsense(const Peer& peer, std::string_view what) {
  Fail(absl::DataLossError(absl::StrCat("rank ", group->life().ranks()[group->member(peer.seat)],
                                        " sent nonsense through shared memory: ", AbslSv(what))));
}

// The first message of an operation: what has arrived for it must be of the same operation.
void ShmChannel::State::NoteOperation(MessageId id) {
  if (id.op == last_op || (id.op & kUnordered) != 0) return;
  last_op = id.op;
  if (!signatures.emplace(id.op, id.signature).second) return;
  for (const auto& peer : peers) {
    if (peer == nullptr) continue;
    if (peer->probe.op == id.op && peer->probe.signature != id.signature) FailMismatch(*peer, id, 0, peer->probe, 0);
    for (const auto& [key, arrival] : peer->arrived) {
      if (key.op == id.op && arrival.signature != id.signature) {
        FailMismatch(*peer, id, 0, {key.op, key.tag, arrival.signature}, arrival.bytes);
      }
    }
  }
}

bool ShmChannel::State::HasNews() {
  if (woken.load(std::memory_order_acquire) || !ended.empty() || !copies.empty() || group->life().Ended())
    return true;
  const auto has_room = [this](const auto& next) { return peers[next.first]->MayAsk(); };
  if (!free_slots.empty() && std::any_of(granted.begin(), granted.end(), has_room)) return true;
  for (const auto& peer : peers) {
    if (peer == nullptr) continue;
    if (peer->in.Front() != nullptr && peer->arrived.size() < kArrivedMax) return true;
    if (peer->questions.AnyAnswer()) return true;
    if (!peer->waiting.empty() && peer->MayStart(peer->waiting.front())) return true;
  }
  return false;
}

// ---- The interface.

void ShmChannel::Probe(int member, MessageId id) {
  Peer& peer = state_->PeerOf(member);
  if (!peer.waiting.empty() || !peer.out.Fits(0)) return;  // What is on its way says as much.
  const Outgoing nothing = {.id = {id.op, kProbeTag, id.signature}};
  peer.out.Write(State::Describe(nothing, RecordKind::kInline), nullptr, 0);
  peer.written = true;
}

ShmChannel::ShmChannel(std::shared_ptr<HostGroup> group)
    : state_(std::make_unique<State>(std::move(group))) {}

ShmChannel::~ShmChannel() = default;

void ShmChannel::Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) {
  state_->NoteOperation(id);
  state_->SendNow(state_->PeerOf(member), {.token = token, .data = data, .bytes = bytes, .id = id});
}

void ShmChannel::Lend(int member, MessageId id, std::byte* data, int64_t bytes, uint64_t token) {
  State& s = *state_;
  s.NoteOperation(id);
  Peer& peer = s.PeerOf(member);
  Outgoing message = {.token = token, .data = data, .bytes = bytes, .id = id, .mode = Outgoing::Mode::kLentCopy};
  const uint64_t cuts = SharedMemory::Cuts();
  Record unused;
  if (s.IsShared(message, &unused) && s.group->Lend({peer.seat, data, bytes, cuts})) {
    message.mode = Outgoing::Mode::kLent;
  } else {
    s.Post(member, {id.op, id.tag | kReturnBit, id.signature}, {data, bytes, id.signature, token});
  }
  s.SendNow(peer, message);
}

void ShmChannel::State::Post(int member, MessageId id, const Posted& posted) {
  NoteOperation(id);
  Peer& peer = PeerOf(member);
  const Key key = {id.op, id.tag};
  const auto found = peer.arrived.find(key);
  if (found == peer.arrived.end()) {
    SHOAL_CHECK(peer.posted.emplace(key, posted).second) << "message " << id.op << "/" << id.tag << " twice";
    return;
  }
  Arrival arrival = std::move(found->second);
  peer.arrived.erase(found);
  Match(peer, key, posted, std::move(arrival));
}

void ShmChannel::Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) {
  state_->Post(member, id, {bytes > 0 ? into : g_nothing, bytes, id.signature, token});
}

void ShmChannel::ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) {
  state_->Post(member, id, {nullptr, bytes, id.signature, token});
}

void ShmChannel::Release(int member, MessageId id, const std::byte*) {
  State& s = *state_;
  Peer& peer = s.PeerOf(member);
  const auto found = peer.views.find(Key{id.op, id.tag});
  SHOAL_CHECK(found != peer.views.end()) << "no view of message " << id.op << "/" << id.tag;
  if (found->second.segment != nullptr) {
    if (const absl::Status status = s.group->CheckPeer(peer.seat); !status.ok()) s.Fail(status);
    s.Reply(peer, Answer::kTaken, found->second.request);
  }
  peer.views.erase(found);
}

void ShmChannel::Borrow(int member, MessageId id, int64_t bytes, uint64_t token) {
  state_->Post(member, id, {nullptr, bytes, id.signature, token, /*borrows=*/true});
}

void ShmChannel::GiveBack(int member, MessageId id, const std::byte* view) {
  State& s = *state_;
  Peer& peer = s.PeerOf(member);
  const auto found = peer.views.find(Key{id.op, id.tag});
  SHOAL_CHECK(found != peer.views.end()) << "no view of message " << id.op << "/" << id.tag;
  View given = std::move(found->second);
  peer.views.erase(found);
  if (!s.final.ok()) return;  // What was written there does not count.
  if (given.segment != nullptr) {
    s.Reply(peer, Answer::kTaken, given.request);
    s.ended.push_back({given.token, nullptr});
    return;
  }
  const MessageId back = {id.op, id.tag | kReturnBit, given.signature};
  const Outgoing message = {
      .token = given.token, .data = view, .bytes = given.bytes, .id = back, .mode = Outgoing::Mode::kReturn};
  peer.returning[Key{back.op, back.tag}] = std::move(given);
  s.SendNow(peer, message);
}

bool ShmChannel::BeginWrite(int64_t begin, int64_t bytes) {
  if (!state_->final.ok()) return false;
  if (__builtin_expect(state_->group->BeginWrite(begin, bytes), 1)) return true;
  state_->Fail(state_->group->CheckAlive());
  return false;
}

bool ShmChannel::EndWrite() {
  if (__builtin_expect(state_->group->EndWrite(), 1)) return true;
  state_->Fail(state_->group->CheckAlive());
  return false;
}

void ShmChannel::Finish(MessageId id) {
  State& s = *state_;
  if ((id.op & kUnordered) != 0 || id.op <= s.finished.op) return;
  s.finished = id;
  absl::erase_if(s.signatures, [&](const auto& entry) { return entry.first <= id.op; });
  for (const auto& peer : s.peers) {
    if (peer == nullptr) continue;
    for (const auto& [key, arrival] : peer->arrived) {
      if (key.op <= id.op) s.FailMismatch(*peer, id, 0, {key.op, key.tag, arrival.signature}, arrival.bytes);
    }
  }
}

absl::Status ShmChannel::Poll(std::vector<Event>* events) {
  State& s = *state_;
  s.woken.store(false, std::memory_order_relaxed);
  if (s.final.ok() && s.group->life().Ended()) s.Fail(s.group->life().status());
  if (!s.final.ok()) return s.final;
  for (const auto& peer : s.peers) {
    if (peer == nullptr) continue;
    s.CollectAnswers(*peer);
    s.Drain(*peer);
  }
  if (!s.unresolved.empty()) s.RetryUnresolved();
  s.RunCopies();
  s.StageGranted();
  for (const auto& peer : s.peers) {
    if (peer == nullptr) continue;
    while (!peer->waiting.empty() && s.Start(*peer, peer->waiting.front())) peer->waiting.pop_front();
  }
  s.RingBells();
  if (!s.final.ok()) return s.final;
  events->insert(events->end(), s.ended.begin(), s.ended.end());
  s.ended.clear();
  return absl::OkStatus();
}

absl::Status ShmChannel::Wait(int64_t until_ns) {
  State& s = *state_;
  if (!s.final.ok()) return s.final;
  const auto news = [&s] { return s.HasNews(); };
  if (!s.unknown_memory && news()) return absl::OkStatus();
  s.RingBells();
  if (!s.unresolved.empty() || s.unknown_memory) {
    s.group->memory().AwaitAnnouncement();
    return s.group->CheckAlive();
  }
  while (!s.spinner.Spin(news, until_ns)) {
    if (const absl::Status status = s.group->CheckAlive(); !status.ok()) {
      s.Fail(status);
      return status;
    }
    if (NowNs() >= until_ns) return absl::OkStatus();
    const uint32_t seen = s.group->PrepareSleep();
    if (news()) {
      s.group->CancelSleep();
      return absl::OkStatus();
    }
    s.group->Sleep(seen, until_ns);
    if (news()) return absl::OkStatus();
  }
  return absl::OkStatus();
}

void ShmChannel::Wake() {
  state_->woken.store(true, std::memory_order_seq_cst);
  state_->group->RingOwn();
}

std::vector<int> ShmChannel::Awaited() const {
  std::vector<int> members;
  for (const auto& peer : state_->peers) {
    if (peer == nullptr) continue;
    const bool awaits = !peer->posted.empty() || !peer->assembling.empty() || !peer->waiting.empty() ||
                        peer->questions.open() > 0;
    if (awaits) members.push_back(state_->group->member(peer->seat));
  }
  return members;
}

uint64_t ShmChannel::Reached(int member) const { return state_->PeerOf(member).reached; }

Mismatch ShmChannel::mismatch() const { return state_->mismatch; }

}  // namespace shoal
