// For tests: the ranks of one group on one host, in one process, without a world. Made by one thread each;
// afterwards used by threads, or by processes forked when the threads are gone.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "collectives/engine/shm/host_group.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"

namespace shoal {

class TestLife final : public GroupLife {
 public:
  TestLife(uint64_t key, std::vector<int> ranks, int index) : GroupLife(key, std::move(ranks), index) {}
  bool ProcessDied(int member) const override { return member == dead_member; }
  std::atomic<int> dead_member{-1};
  absl::Status End(const std::string& cause) override {
    Finish(absl::AbortedError(cause));
    return status();
  }
};

inline void OnThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

class ShmRanks {
 public:
  explicit ShmRanks(int size) : lives(size), memories(size) {
    for (int rank = 0; rank < size; ++rank) {
      const auto to_peers = [this, rank](const std::function<absl::Status(SharedMemory&)>& tell) {
        absl::Status status;
        for (size_t peer = 0; peer < memories.size(); ++peer) {
          if (static_cast<int>(peer) != rank && memories[peer] != nullptr)
            status.Update(tell(*memories[peer]));
        }
        return status;
      };
      SharedMemory::Announcer announcer;
      announcer.added = [to_peers, rank](const Segment& segment) {
        return to_peers([&](SharedMemory& peer) {
          absl::StatusOr<Fd> fd = segment.Duplicate();
          if (!fd.ok()) return fd.status();
          return peer.AddPeerSegment(rank, segment.id(), segment.bytes(), *std::move(fd));
        });
      };
      announcer.freed = [to_peers, rank](uint64_t id) {
        (void)to_peers([&](SharedMemory& peer) {
          peer.RemovePeerSegment(rank, id);
          return absl::OkStatus();
        });
      };
      memories[rank] = std::make_shared<SharedMemory>(size, announcer);
    }
    groups = NewGroup(/*key=*/1, &lives);
  }
  ~ShmRanks() {
    // An end is announced to the others: all of them are still there then.
    groups.clear();
    for (auto& memory : memories) memory->Fence();
  }

  std::vector<std::shared_ptr<HostGroup>> NewGroup(uint64_t key,
                                                   std::vector<std::shared_ptr<TestLife>>* group_lives) {
    const int size = static_cast<int>(memories.size());
    std::vector<int> ranks(size);
    std::iota(ranks.begin(), ranks.end(), 0);
    std::vector<std::shared_ptr<HostGroup>> made(size);
    group_lives->resize(size);
    OnThreads(size, [&](int rank) {
      (*group_lives)[rank] = std::make_shared<TestLife>(key, ranks, rank);
      absl::StatusOr<std::shared_ptr<HostGroup>> group =
          HostGroup::Create(memories[rank], (*group_lives)[rank], ranks, NowNs() + 60'000'000'000);
      SHOAL_CHECK_OK(group.status());
      made[rank] = *std::move(group);
    });
    return made;
  }

  std::vector<std::shared_ptr<TestLife>> lives;  // By rank.
  std::vector<std::shared_ptr<SharedMemory>> memories;
  std::vector<std::shared_ptr<HostGroup>> groups;
};

}  // namespace shoal
