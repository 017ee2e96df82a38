// Channels between members in one process, for tests: messages arrive in a random order from one seed, some are copied at
// once (eager) and some stay with their sender until they have been read (rendezvous).
#pragma once

#include <map>
#include <memory>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "collectives/transport/channel.h"
#include "runtime/base/mutex.h"

namespace shoal {

// Thread-safe. Outlives its channels.
class MemoryNetwork {
 public:
  MemoryNetwork(int members, uint64_t seed);
  std::unique_ptr<Channel> Open(int member);
  // Every channel fails with `status`.
  void End(const absl::Status& status);
  // No message or event is left anywhere.
  bool Empty();

 private:
  friend class MemoryChannel;
  using Key = std::tuple<int, int, uint64_t, uint32_t>;  // From, to, operation, tag.
  struct Sent {
    MessageId id;
    const std::byte* data = nullptr;
    int64_t bytes = 0;
    uint64_t token = 0;
    std::vector<std::byte> copy;  // Of an eager message.
    bool eager = false;
    bool lent = false;
  };
  struct Wanted {
    MessageId id;
    std::byte* into = nullptr;
    int64_t bytes = 0;
    uint64_t token = 0;
    bool view = false;
    bool borrow = false;
  };
  struct Member {
    std::vector<uint64_t> sent;     // Tokens that wait to be told: of what was sent, lent or given back.
    std::vector<Key> arrived;       // Matched messages that wait to be taken.
    std::map<const std::byte*, std::pair<Sent, uint64_t>> views;  // With the receive's token.
    std::set<uint64_t> finished;    // Operations.
    bool woken = false;
    std::map<int, uint64_t> reached;  // By sender.
    absl::Status status;
    Mismatch mismatch;
  };

  void Note(int from, int to, uint64_t op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Post(const Key& key, Sent sent) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Match(const Key& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CheckSignatures(const Key& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Fail(int member, const Mismatch& mismatch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Take(int member, const Key& key, std::vector<Channel::Event>* events) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  CondVar changed_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
  std::vector<Member> members_ ABSL_GUARDED_BY(mutex_);
  std::map<Key, Sent> sent_ ABSL_GUARDED_BY(mutex_);
  std::map<Key, Wanted> wanted_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
