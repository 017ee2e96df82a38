// Messages between the members of a group on one host. The sender posts a descriptor into a ring that the
// receiver reads; the bytes stay where they are: small ones beside the descriptor, others in the sender's
// registered memory (SharedMemory), which the receiver reads in place, or, from any other memory, through
// cache-sized staging slots of the sender. Whoever read a buffer in place asks afterwards whether its owner
// had ended the group meanwhile: what was read then never counts as received.
#pragma once

#include <memory>
#include <vector>

#include "collectives/engine/shm/host_group.h"
#include "collectives/transport/channel.h"

namespace shoal {

// Members are indices in the group, of those that `group` has.
class ShmChannel final : public Channel {
 public:
  explicit ShmChannel(std::shared_ptr<HostGroup> group);
  ~ShmChannel() override;

  void Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) override;
  void Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) override;
  void ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) override;
  // What was computed from the view counts only if the next Poll returns OK.
  void Release(int member, MessageId id, const std::byte* view) override;
  bool Lends() const override { return true; }
  // Memory that is not shared is copied to the peer and back.
  void Lend(int member, MessageId id, std::byte* data, int64_t bytes, uint64_t token) override;
  void Borrow(int member, MessageId id, int64_t bytes, uint64_t token) override;
  void GiveBack(int member, MessageId id, const std::byte* view) override;
  bool BeginWrite(int64_t begin, int64_t bytes) override;
  bool EndWrite() override;
  void Finish(MessageId id) override;
  void Probe(int member, MessageId id) override;
  // ABORTED: the group ended, here or in a peer; the message has the cause.
  absl::Status Poll(std::vector<Event>* events) override;
  absl::Status Wait(int64_t until_ns) override;
  void Wake() override;
  std::vector<int> Awaited() const override;
  uint64_t Reached(int member) const override;
  Mismatch mismatch() const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace shoal
