#include "collectives/engine/memory_channel.h"

#include <algorithm>
#include <cstring>

#include "collectives/transport/clock.h"
#include "runtime/base/check.h"

namespace shoal {

class MemoryChannel final : public Channel {
 public:
  MemoryChannel(MemoryNetwork* network, int member) : network_(*network), member_(member) {}

  void Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) override {
    MutexLock lock(&network_.mutex_);
    network_.Note(member_, member, id.op);
    network_.Post({member_, member, id.op, id.tag}, {.id = id, .data = data, .bytes = bytes, .token = token});
  }

  bool Lends() const override { return true; }

  void Lend(int member, MessageId id, std::byte* data, int64_t bytes, uint64_t token) override {
    MutexLock lock(&network_.mutex_);
    network_.Note(member_, member, id.op);
    network_.Post({member_, member, id.op, id.tag},
                  {.id = id, .data = data, .bytes = bytes, .token = token, .lent = true});
  }

  void Borrow(int member, MessageId id, int64_t bytes, uint64_t token) override {
    MutexLock lock(&network_.mutex_);
    Want(member, {id, nullptr, bytes, token, /*view=*/true, /*borrow=*/true});
  }

  // What the owner gets back of a copy is copied to it.
  void GiveBack(int member, MessageId, const std::byte* view) override {
    MutexLock lock(&network_.mutex_);
    const auto found = network_.members_[member_].views.find(view);
    SHOAL_CHECK(found != network_.members_[member_].views.end()) << "no such view";
    const MemoryNetwork::Sent& sent = found->second.first;
    if (sent.eager && sent.bytes > 0) std::memcpy(const_cast<std::byte*>(sent.data), view, sent.bytes);
    network_.members_[member].sent.push_back(sent.token);
    network_.members_[member_].sent.push_back(found->second.second);
    network_.members_[member_].views.erase(found);
    network_.changed_.NotifyAll();
  }

  bool BeginWrite(int64_t, int64_t) override { return true; }
  bool EndWrite() override { return true; }

  void Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) override {
    MutexLock lock(&network_.mutex_);
    Want(member, {id, into, bytes, token, /*view=*/false});
  }

  void ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) override {
    MutexLock lock(&network_.mutex_);
    Want(member, {id, nullptr, bytes, token, /*view=*/true});
  }

  void Release(int member, MessageId, const std::byte* view) override {
    MutexLock lock(&network_.mutex_);
    const auto found = network_.members_[member_].views.find(view);
    SHOAL_CHECK(found != network_.members_[member_].views.end()) << "no such view";
    const MemoryNetwork::Sent& sent = found->second.first;
    if (!sent.eager) network_.members_[member].sent.push_back(sent.token);
    network_.members_[member_].views.erase(found);
    network_.changed_.NotifyAll();
  }

  void Finish(MessageId id) override {
    MutexLock lock(&network_.mutex_);
    network_.members_[member_].finished.insert(id.op);
    for (const auto& [key, sent] : network_.sent_) {
      if (std::get<1>(key) == member_ && std::get<2>(key) == id.op) network_.CheckSignatures(key);
    }
  }

  void Probe(int member, MessageId id) override {
    MutexLock lock(&network_.mutex_);
    network_.Note(member_, member, id.op);
    for (const auto& [key, wanted] : network_.wanted_) {
      const bool fits = wanted.id.op != id.op || wanted.id.signature == id.signature;
      if (std::get<1>(key) == member && !fits) network_.Fail(member, {member_, wanted.id, id, wanted.bytes, 0});
    }
    network_.changed_.NotifyAll();
  }

  absl::Status Poll(std::vector<Event>* events) override {
    MutexLock lock(&network_.mutex_);
    MemoryNetwork::Member& own = network_.members_[member_];
    if (!own.status.ok()) return own.status;
    const auto some = [&](auto* from, const auto& act) {
      std::shuffle(from->begin(), from->end(), network_.random_);
      const size_t count = from->empty() ? 0 : network_.random_() % (from->size() + 1);
      for (size_t i = 0; i < count; ++i) {
        const auto item = from->back();
        from->pop_back();
        act(item);
      }
    };
    some(&own.sent, [&](uint64_t token) { events->push_back({token, nullptr}); });
    some(&own.arrived, [&](const MemoryNetwork::Key& key)
                           ABSL_NO_THREAD_SAFETY_ANALYSIS { network_.Take(member_, key, events); });
    return absl::OkStatus();
  }

  absl::Status Wait(int64_t until_ns) override {
    MutexLock lock(&network_.mutex_);
    MemoryNetwork::Member& own = network_.members_[member_];
    while (own.status.ok() && own.sent.empty() && own.arrived.empty() && !own.woken) {
      if (until_ns == kNeverNs) {
        network_.changed_.Wait(&network_.mutex_);
      } else if (!network_.changed_.WaitUntil(&network_.mutex_, SteadyTime(until_ns))) {
        break;
      }
    }
    own.woken = false;
    return own.status;
  }

  void Wake() override {
    MutexLock lock(&network_.mutex_);
    network_.members_[member_].woken = true;
    network_.changed_.NotifyAll();
  }

  std::vector<int> Awaited() const override {
    MutexLock lock(&network_.mutex_);
    std::set<int> members;
    for (const auto& [key, wanted] : network_.wanted_) {
      if (std::get<1>(key) == member_ && network_.sent_.count(key) == 0) members.insert(std::get<0>(key));
    }
    return {members.begin(), members.end()};
  }

  uint64_t Reached(int member) const override {
    MutexLock lock(&network_.mutex_);
    const std::map<int, uint64_t>& reached = network_.members_[member_].reached;
    const auto found = reached.find(member);
    return found == reached.end() ? 0 : found->second;
  }

  Mismatch mismatch() const override {
    MutexLock lock(&network_.mutex_);
    return network_.members_[member_].mismatch;
  }

 private:
  void Want(int member, const MemoryNetwork::Wanted& wanted) ABSL_EXCLUSIVE_LOCKS_REQUIRED(network_.mutex_) {
    const MemoryNetwork::Key key = {member, member_, wanted.id.op, wanted.id.tag};
    SHOAL_CHECK(network_.wanted_.emplace(key, wanted).second) << "awaited twice: tag " << wanted.id.tag;
    network_.Match(key);
  }

  MemoryNetwork& network_;
  const int member_;
};

MemoryNetwork::MemoryNetwork(int members, uint64_t seed) : random_(seed), members_(members) {}

std::unique_ptr<Channel> MemoryNetwork::Open(int member) { return std::make_unique<MemoryChannel>(this, member); }

void MemoryNetwork::End(const absl::Status& status) {
  MutexLock lock(&mutex_);
  for (Member& member : members_) {
    if (member.status.ok()) member.status = status;
  }
  changed_.NotifyAll();
}

bool MemoryNetwork::Empty() {
  MutexLock lock(&mutex_);
  return sent_.empty() && wanted_.empty() && std::all_of(members_.begin(), members_.end(), [](const Member& member) {
           return member.sent.empty() && member.arrived.empty() && member.views.empty();
         });
}

void MemoryNetwork::Fail(int member, const Mismatch& mismatch) {
  Member& failed = members_[member];
  if (!failed.status.ok()) return;
  failed.status = absl::FailedPreconditionError("a message does not fit");
  failed.mismatch = mismatch;
}

void MemoryNetwork::CheckSignatures(const Key& key) {
  const auto& [from, to, op, tag] = key;
  const auto sent = sent_.find(key);
  if (sent == sent_.end()) return;
  Mismatch mismatch = {from, {op, tag, 0}, sent->second.id, 0, sent->second.bytes};
  if (members_[to].finished.count(op) != 0) return Fail(to, mismatch);
  for (const auto& [other, wanted] : wanted_) {
    if (std::get<1>(other) != to || std::get<2>(other) != op) continue;
    const bool fits = wanted.id.signature == sent->second.id.signature &&
                      (other != key || wanted.bytes == sent->second.bytes);
    mismatch.ours = wanted.id;
    mismatch.our_bytes = wanted.bytes;
    if (!fits) Fail(to, mismatch);
  }
}

void MemoryNetwork::Note(int from, int to, uint64_t op) {
  uint64_t& reached = members_[to].reached[from];
  if ((op >> 63) == 0) reached = std::max(reached, op);
}

void MemoryNetwork::Post(const Key& key, Sent sent) {
  SHOAL_CHECK(sent_.count(key) == 0) << "sent twice: tag " << std::get<3>(key);
  sent.eager = random_() % 2 == 0;
  if (sent.eager) {
    sent.copy.assign(sent.data, sent.data + sent.bytes);
    if (!sent.lent) members_[std::get<0>(key)].sent.push_back(sent.token);
  }
  sent_.emplace(key, std::move(sent));
  Match(key);
}

void MemoryNetwork::Match(const Key& key) {
  CheckSignatures(key);
  if (sent_.count(key) != 0 && wanted_.count(key) != 0) members_[std::get<1>(key)].arrived.push_back(key);
  changed_.NotifyAll();
}

void MemoryNetwork::Take(int member, const Key& key, std::vector<Channel::Event>* events) {
  Sent sent = std::move(sent_[key]);
  const Wanted wanted = wanted_[key];
  SHOAL_CHECK(sent.lent == wanted.borrow) << "lent on one side alone";
  sent_.erase(key);
  wanted_.erase(key);
  const std::byte* const bytes = sent.eager ? sent.copy.data() : sent.data;
  if (wanted.view) {
    events->push_back({wanted.token, bytes});
    members_[member].views.emplace(bytes, std::pair(std::move(sent), wanted.token));
    return;
  }
  if (sent.bytes > 0) std::memcpy(wanted.into, bytes, sent.bytes);
  events->push_back({wanted.token, nullptr});
  if (!sent.eager) {
    members_[std::get<0>(key)].sent.push_back(sent.token);
    changed_.NotifyAll();
  }
}

}  // namespace shoal
