// One channel made of two: members on this host over shared memory, the others over the network.
#pragma once

#include <memory>
#include <vector>

#include "collectives/transport/channel.h"

namespace shoal {

class RoutedChannel final : public Channel {
 public:
  // on_host[member]: which of the two reaches it.
  RoutedChannel(std::vector<bool> on_host, std::unique_ptr<Channel> host, std::unique_ptr<Channel> network);

  void Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) override;
  void Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) override;
  void ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) override;
  void Release(int member, MessageId id, const std::byte* view) override;
  void Finish(MessageId id) override;
  void Probe(int member, MessageId id) override;
  absl::Status Poll(std::vector<Event>* events) override;
  absl::Status Wait(int64_t until_ns) override;
  void Wake() override;
  std::vector<int> Awaited() const override;
  bool MayBeUnderWay(int member) override;
  uint64_t Reached(int member) const override;
  Mismatch mismatch() const override;

 private:
  struct Part {
    std::unique_ptr<Channel> channel;
    int64_t open = 0;  // Messages posted that have not ended.
  };
  Part& PartOf(int member) { return on_host_[member] ? host_ : network_; }
  Part& OpenTo(int member);  // For a message that is posted.
  absl::Status PollPart(Part* part, std::vector<Event>* events);

  const std::vector<bool> on_host_;
  Part host_, network_;
  bool moved_ = false;    // Messages were posted, or have come, since the last Wait.
  int64_t moved_ns_ = 0;  // When it was found so.
  const Channel* failed_ = nullptr;
};

}  // namespace shoal
