#include "tests/sim/sim_channel.h"

#include <cstring>

#include "runtime/base/status.h"

namespace shoal::sim {

void SimChannel::Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) {
  Packet packet = {kPacketKind, id.op, id.tag, id.signature, {}};
  packet.body.resize(bytes);
  if (bytes > 0) std::memcpy(packet.body.data(), data, bytes);
  post_(member, std::move(packet));
  events_.push_back({token, nullptr});
}

void SimChannel::Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) {
  static std::byte nowhere;
  Await({member, id.op, id.tag}, {into != nullptr ? into : &nowhere, bytes, token});
}

void SimChannel::ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) {
  Await({member, id.op, id.tag}, {nullptr, bytes, token});
}

void SimChannel::Release(int member, MessageId id, const std::byte*) {
  arrived_.erase({member, id.op, id.tag});
}

void SimChannel::Await(const Key& key, Wanted wanted) {
  if (arrived_.contains(key)) {
    Match(key, wanted);
  } else {
    wanted_[key] = wanted;
  }
}

void SimChannel::OnPacket(int member, Packet packet) {
  const Key key = {member, packet.a, packet.b};
  if (arrived_.contains(key)) {
    status_ = absl::DataLossError(
        absl::StrCat("member ", member, " sent message ", packet.a, "/", packet.b, " twice"));
    return;
  }
  if (packet.body.capacity() == 0) packet.body.reserve(16);  // A view needs an address.
  arrived_[key] = std::move(packet.body);
  const auto wanted = wanted_.find(key);
  if (wanted == wanted_.end()) return;
  const Wanted found = wanted->second;
  wanted_.erase(wanted);
  Match(key, found);
}

void SimChannel::Match(const Key& key, const Wanted& wanted) {
  const std::vector<char>& body = arrived_.at(key);
  if (static_cast<int64_t>(body.size()) != wanted.bytes) {
    status_ =
        absl::DataLossError(absl::StrCat("a message of ", body.size(), " bytes instead of ", wanted.bytes));
    return;
  }
  if (wanted.into == nullptr) {
    events_.push_back({wanted.token, reinterpret_cast<const std::byte*>(body.data())});
    return;
  }
  if (wanted.bytes > 0) std::memcpy(wanted.into, body.data(), wanted.bytes);
  events_.push_back({wanted.token, nullptr});
  arrived_.erase(key);
}

absl::Status SimChannel::Poll(std::vector<Event>* events) {
  if (!status_.ok()) return status_;
  events->insert(events->end(), events_.begin(), events_.end());
  events_.clear();
  return absl::OkStatus();
}

std::vector<int> SimChannel::Awaited() const {
  std::vector<int> members;
  for (const auto& [key, wanted] : wanted_) {
    if (members.empty() || members.back() != std::get<0>(key)) members.push_back(std::get<0>(key));
  }
  return members;
}

}  // namespace shoal::sim
