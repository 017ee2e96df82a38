#include "collectives/engine/routed_channel.h"

#include <algorithm>
#include <utility>

#include "collectives/transport/clock.h"

namespace shoal {
namespace {

// While both are awaited each is waited for in turn, as there is no call that sleeps on both: for an eighth of the time in which
// nothing has come. Short turns cost a core, long ones delay what comes by the other channel.
constexpr int64_t kTurnMinNs = 50'000, kTurnMaxNs = 2'000'000;

}  // namespace

RoutedChannel::RoutedChannel(std::vector<bool> on_host, std::unique_ptr<Channel> host, std::unique_ptr<Channel> network)
    : on_host_(std::move(on_host)) {
  host_.channel = std::move(host);
  network_.channel = std::move(network);
}

RoutedChannel::Part& RoutedChannel::OpenTo(int member) {
  Part& part = PartOf(member);
  ++part.open;
  moved_ = true;
  return part;
}

void RoutedChannel::Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) {
  OpenTo(member).channel->Send(member, id, data, bytes, token);
}

void RoutedChannel::Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) {
  OpenTo(member).channel->Receive(member, id, into, bytes, token);
}

void RoutedChannel::ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) {
  OpenTo(member).channel->ReceiveView(member, id, bytes, token);
}

void RoutedChannel::Release(int member, MessageId id, const std::byte* view) {
  PartOf(member).channel->Release(member, id, view);
}

void RoutedChannel::Finish(MessageId id) {
  host_.channel->Finish(id);
  network_.channel->Finish(id);
}

void RoutedChannel::Probe(int member, MessageId id) { PartOf(member).channel->Probe(member, id); }

absl::Status RoutedChannel::PollPart(Part* part, std::vector<Event>* events) {
  const size_t before = events->size();
  const absl::Status status = part->channel->Poll(events);
  part->open -= static_cast<int64_t>(events->size() - before);
  moved_ |= events->size() > before;
  if (!status.ok() && failed_ == nullptr) failed_ = part->channel.get();
  return status;
}

absl::Status RoutedChannel::Poll(std::vector<Event>* events) {
  // Both, whatever the first says: a channel lets go of borrowed memory when it is polled.
  const absl::Status host = PollPart(&host_, events);
  const absl::Status network = PollPart(&network_, events);
  return host.ok() ? network : host;
}

absl::Status RoutedChannel::Wait(int64_t until_ns) {
  if (network_.open == 0) return host_.channel->Wait(until_ns);
  if (host_.open == 0) return network_.channel->Wait(until_ns);
  const int64_t now_ns = NowNs();
  if (std::exchange(moved_, false)) moved_ns_ = now_ns;
  const int64_t turn_ns = std::clamp((now_ns - moved_ns_) / 8, kTurnMinNs, kTurnMaxNs);
  const absl::Status status = host_.channel->Wait(std::min(until_ns, now_ns + turn_ns));
  return status.ok() ? network_.channel->Wait(std::min(until_ns, NowNs() + turn_ns)) : status;
}

void RoutedChannel::Wake() {
  host_.channel->Wake();
  network_.channel->Wake();
}

std::vector<int> RoutedChannel::Awaited() const {
  std::vector<int> all = host_.channel->Awaited();
  const std::vector<int> others = network_.channel->Awaited();
  all.insert(all.end(), others.begin(), others.end());
  std::sort(all.begin(), all.end());
  return all;
}

bool RoutedChannel::MayBeUnderWay(int member) { return PartOf(member).channel->MayBeUnderWay(member); }

uint64_t RoutedChannel::Reached(int member) const {
  return (on_host_[member] ? host_ : network_).channel->Reached(member);
}

Mismatch RoutedChannel::mismatch() const { return failed_ == nullptr ? Mismatch{} : failed_->mismatch(); }

}  // namespace shoal
