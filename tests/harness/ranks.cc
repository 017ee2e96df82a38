#include "tests/harness/ranks.h"

#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/base/check.h"

namespace shoal {

std::string UniqueRendezvous() {
  static std::atomic<int> count{0};
  return absl::StrCat("unix:shoal-test-", getpid(), "-", ++count);
}

WorldOptions RankOptions(int rank, int size, const std::string& transport, const std::string& rendezvous) {
  WorldOptions options;
  options.rank = rank;
  options.size = size;
  options.master_host = rendezvous;
  options.job_id = "test";
  options.transport = transport;
  options.connect_timeout = absl::Seconds(60);
  options.timeout = absl::Seconds(60);
  options.heartbeat_timeout = absl::Seconds(30);
  return options;
}

void RunRanks(int size, const std::string& transport, const std::function<void(Communicator&)>& body) {
  const std::string rendezvous = UniqueRendezvous();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      absl::StatusOr<std::unique_ptr<Communicator>> world =
          ConnectWorld(RankOptions(rank, size, transport, rendezvous));
      SHOAL_CHECK(world.ok()) << world.status().ToString();
      body(**world);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace shoal
