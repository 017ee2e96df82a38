// The messages of one group between this rank and its other members, as engines use them. Implemented over shared
// memory (engine/shm/shm_channel.h), TCP (engine/tcp/tcp_channel.h) and a simulated network (tests/sim). Calls of one
// channel come from one thread at a time; no call but Wait blocks.
//
// A message is known by (sender, receiver, op, tag). Both sides know its size. Any number may be in flight; they are
// matched whatever the order in which the two sides post them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace shoal {

struct MessageId {
  uint64_t op = 0;   // The operation's number in the group; Send/Receive pairs have numbers of their own (top bit set).
  uint32_t tag = 0;  // Within the operation.
  // What both sides must agree on about the operation. Not part of the key: it travels beside the message. A message of the
  // same operation but with another signature, whatever its tag, or with the same key but another size, is an error of
  // the channel (see Mismatch).
  uint32_t signature = 0;
};

// Both ends of a message, as a channel finds that they do not fit: another signature, or another size.
struct Mismatch {
  int member = 0;  // The peer.
  MessageId ours;  // What this rank posted.
  MessageId theirs;
  int64_t our_bytes = 0;
  int64_t their_bytes = 0;
};

class Channel {
 public:
  virtual ~Channel() = default;

  // What has ended. `token` is the caller's.
  struct Event {
    uint64_t token = 0;
    const std::byte* view = nullptr;  // Of ReceiveView: where the bytes lie until Release.
  };

  // The bytes are borrowed until the token comes back.
  virtual void Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) = 0;
  // `into` is borrowed until the token comes back.
  virtual void Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) = 0;
  // The message stays where it arrived (on shared memory: in the sender's buffer), aligned to 16 bytes or as the sender's
  // bytes are.
  virtual void ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) = 0;
  virtual void Release(int member, MessageId id, const std::byte* view) = 0;

  // Lending: whether all members can do what follows with each other.
  virtual bool Lends() const { return false; }
  // As Send, but the peer, which takes it by Borrow, may write to the bytes as well: until the token comes back.
  virtual void Lend(int /*member*/, MessageId, std::byte* /*data*/, int64_t /*bytes*/, uint64_t /*token*/) {}
  // As ReceiveView and Release, but the view may be written to. When that has reached the owner the token comes once more,
  // without a view.
  virtual void Borrow(int /*member*/, MessageId, int64_t /*bytes*/, uint64_t /*token*/) {}
  virtual void GiveBack(int /*member*/, MessageId, const std::byte* /*view*/) {}
  // Around each write to the bytes [begin, begin + bytes) of borrowed views, of 512 KiB or so: owners wait for its end before
  // they use their memory for something else. False: the group is over, the next Poll says why; of Begin: nothing may be
  // written; of End: what was read and written does not count.
  virtual bool BeginWrite(int64_t /*begin*/, int64_t /*bytes*/) { return false; }
  virtual bool EndWrite() { return false; }

  // This rank posts no message of this operation any more, nor of earlier ones (those without the top bit): one that arrives
  // unasked, or has already, is an error (see Mismatch), for example because the other rank was in another operation.
  virtual void Finish(MessageId) {}

  // Tells the member in which operation this rank is, so that it notices when it is in another one and both wait for each
  // other. It only compares signatures (see MessageId); nobody takes or awaits it.
  virtual void Probe(int /*member*/, MessageId) {}

  // Moves what can be moved now and appends what ended. An error (the group is over, a peer sent nonsense) is final: no
  // event comes after it, and no borrowed memory is touched any more. FAILED_PRECONDITION: `mismatch()` says what does
  // not fit; the caller ends the group.
  virtual absl::Status Poll(std::vector<Event>* events) = 0;
  // Blocks until Poll may have something new, the group ended, Wake was called, or until `until_ns` (NowNs()). May spin a
  // bounded while first.
  virtual absl::Status Wait(int64_t until_ns) = 0;
  // Ends a Wait on another thread, also the next one. Thread-safe.
  virtual void Wake() = 0;
  // The members from which something is awaited, for the verdict when a deadline passes.
  virtual std::vector<int> Awaited() const = 0;
  // Of a member that said goodbye: whether something that it sent before may still be under way. False: the next Poll
  // returns the last that it caused.
  virtual bool MayBeUnderWay(int /*member*/) { return false; }
  // The latest collective that the member is known to have begun, because something of it has come, if only a Probe. 0: none.
  virtual uint64_t Reached(int /*member*/) const { return 0; }
  // Of the failed Poll.
  virtual Mismatch mismatch() const { return {}; }
};

}  // namespace shoal
