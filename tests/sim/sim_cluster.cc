// Runs simulated jobs from many seeds, or one of them with all that happens in it. See README.md.
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "runtime/base/mutex.h"
#include "tests/sim/cluster.h"

namespace shoal::sim {
namespace {

struct Arguments {
  uint64_t from = 1, to = 1000;  // `to` included.
  int jobs = 1;
  bool verbose = false;
  Sabotage sabotage = Sabotage::kNone;
};

int Usage() {
  std::fprintf(stderr,
               "sim_cluster --seeds FROM..TO [--jobs N]   run seeds, report violations\n"
               "sim_cluster --seed S [--verbose]          run one, print what happens\n"
               "            [--sabotage equal_seeds|presume_confirmed]   plant a bug\n");
  return 2;
}

bool Parse(int argc, char** argv, Arguments* arguments) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--verbose") {
      arguments->verbose = true;
      continue;
    }
    if (++i == argc) return false;
    char* rest = nullptr;
    if (flag == "--seed") {
      arguments->from = arguments->to = std::strtoull(argv[i], &rest, 10);
    } else if (flag == "--seeds") {
      arguments->from = std::strtoull(argv[i], &rest, 10);
      if (std::strncmp(rest, "..", 2) != 0) return false;
      arguments->to = std::strtoull(rest + 2, &rest, 10);
    } else if (flag == "--jobs") {
      arguments->jobs = static_cast<int>(std::strtol(argv[i], &rest, 10));
    } else if (flag == "--sabotage") {
      const std::string name = argv[i];
      if (name == "equal_seeds") arguments->sabotage = Sabotage::kEqualSeeds;
      if (name == "presume_confirmed") arguments->sabotage = Sabotage::kPresumeConfirmed;
      if (arguments->sabotage == Sabotage::kNone) return false;
      continue;
    } else {
      return false;
    }
    if (*rest != '\0') return false;
  }
  return arguments->from <= arguments->to && arguments->jobs >= 1;
}

int Run(const Arguments& arguments) {
  Mutex mutex;
  std::atomic<uint64_t> next{arguments.from};
  uint64_t failed = 0, done = 0;
  int64_t events = 0, views = 0, sums = 0;
  const auto began = std::chrono::steady_clock::now();
  const auto work = [&] {
    for (uint64_t seed; (seed = next++) <= arguments.to;) {
      const Outcome outcome =
          Simulate({.seed = seed, .verbose = arguments.verbose, .sabotage = arguments.sabotage});
      bool same = true;
      // A share of the seeds runs twice: chance must come from the seed alone.
      if (seed % 16 == 0)
        same = Simulate({.seed = seed, .sabotage = arguments.sabotage}).digest == outcome.digest;
      MutexLock lock(&mutex);
      ++done;
      events += outcome.events;
      views += outcome.views;
      sums += outcome.sums;
      if (!same || !outcome.violations.empty()) ++failed;
      if (!same) std::printf("seed %" PRIu64 ": two runs differ\n", seed);
      for (const std::string& violation : outcome.violations)
        std::printf("seed %" PRIu64 ": %s\n", seed, violation.c_str());
      if (!outcome.violations.empty())
        std::printf("  replay: sim_cluster --seed %" PRIu64 " --verbose\n", seed);
      if (arguments.from == arguments.to)
        std::printf("unseed %016" PRIx64 ", %.3f s simulated\n", outcome.digest, outcome.simulated_ns * 1e-9);
      std::fflush(stdout);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < arguments.jobs; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  std::printf("%" PRIu64 " seeds, %" PRIu64 " failed; %" PRId64 " epochs, %" PRId64 " sums, %" PRId64
              " events in %.1f s\n",
              done, failed, views, sums, events, seconds);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace shoal::sim

int main(int argc, char** argv) {
  shoal::sim::Arguments arguments;
  if (!shoal::sim::Parse(argc, argv, &arguments)) return shoal::sim::Usage();
  return shoal::sim::Run(arguments);
}
