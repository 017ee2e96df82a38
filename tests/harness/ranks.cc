#include "tests/harness/ranks.h"

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
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

RankProcesses::RankProcesses(const WorldOptions& options,
                             const std::function<void(Communicator&, const Say&)>& body) {
  for (int rank = 0; rank < options.size; ++rank) {
    int ends[2];
    SHOAL_CHECK(pipe(ends) == 0);
    const pid_t pid = fork();
    SHOAL_CHECK(pid >= 0);
    if (pid == 0) {
      close(ends[0]);
      const Say say = [fd = ends[1]](const std::string& line) {
        const std::string bytes = line + "\n";
        SHOAL_CHECK(write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
      };
      WorldOptions own = options;
      own.rank = rank;
      absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(own);
      if (world.ok()) {
        body(**world, say);
        world->reset();
      } else {
        say(world.status().ToString());
      }
      _exit(0);
    }
    close(ends[1]);
    ranks_.push_back({pid, ends[0]});
  }
}

RankProcesses::~RankProcesses() {
  for (const Rank& rank : ranks_) {
    kill(rank.pid, SIGKILL);
    (void)waitpid(rank.pid, nullptr, 0);
    close(rank.fd);
  }
}

void RankProcesses::Signal(int rank, int signal_number) const {
  SHOAL_CHECK(kill(ranks_[rank].pid, signal_number) == 0);
}

std::string RankProcesses::Line(int rank) {
  std::string line;
  char byte = 0;
  pollfd entry = {ranks_[rank].fd, POLLIN, 0};
  while (poll(&entry, 1, 60'000) == 1 && read(ranks_[rank].fd, &byte, 1) == 1 && byte != '\n')
    line.push_back(byte);
  return line;
}

}  // namespace shoal
