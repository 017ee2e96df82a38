// The messages of one epoch on the simulated network: a link per peer.
#pragma once

#include <functional>
#include <map>
#include <tuple>
#include <vector>

#include "collectives/transport/channel.h"
#include "tests/sim/network.h"

namespace shoal::sim {

class SimChannel : public Channel {
 public:
  using Post = std::function<void(int member, Packet packet)>;
  static constexpr int kPacketKind = 100;

  explicit SimChannel(Post post) : post_(std::move(post)) {}

  void Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) override;
  void Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) override;
  void ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) override;
  void Release(int member, MessageId id, const std::byte* view) override;
  absl::Status Poll(std::vector<Event>* events) override;
  absl::Status Wait(int64_t) override { return absl::OkStatus(); }
  void Wake() override {}
  std::vector<int> Awaited() const override;

  void OnPacket(int member, Packet packet);

 private:
  using Key = std::tuple<int, uint64_t, uint64_t>;  // Member, operation, tag.
  struct Wanted {
    std::byte* into = nullptr;  // Null: a view.
    int64_t bytes = 0;
    uint64_t token = 0;
  };

  void Await(const Key& key, Wanted wanted);
  void Match(const Key& key, const Wanted& wanted);

  const Post post_;
  std::map<Key, std::vector<char>> arrived_;
  std::map<Key, Wanted> wanted_;
  std::vector<Event> events_;
  absl::Status status_;
};

}  // namespace shoal::sim
