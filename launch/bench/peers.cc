#include "launch/bench/peers.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace shoal {
namespace {

struct Peer {
  const char* name;
  const char* launcher;  // "": the program forks its ranks.
  const char* program;
  const char* packages;
};
constexpr Peer kPeers[] = {{"openmpi", "mpirun.openmpi", "mpi_bench_openmpi", "libopenmpi-dev openmpi-bin"},
                           {"mpich", "mpirun.mpich", "mpi_bench_mpich", "libmpich-dev mpich"},
                           {"gloo", "", "gloo_bench", "libgloo-dev"}};

const Peer* FindPeer(std::string_view name) {
  for (const Peer& peer : kPeers) {
    if (name == peer.name) return &peer;
  }
  return nullptr;
}

bool InPath(const std::string& program) {
  const char* path = getenv("PATH");
  for (absl::string_view folder : absl::StrSplit(path == nullptr ? "/usr/bin:/bin" : path, ':')) {
    if (access(absl::StrCat(folder, "/", program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

// Without "_warm".
std::string BaseName(const std::string& library) { return library.substr(0, library.find('_')); }

std::vector<std::string> GlooAlgorithms(std::string_view op) {
  if (op == "all_reduce") return {"ring", "bcube", "c_ring", "c_ring_chunked", "c_hd", "c_bcube"};
  if (op == "reduce_scatter") return {"c_hd"};
  if (op == "all_gather") return {"default", "c_ring"};
  if (op == "broadcast") return {"default", "c_one_to_all"};
  return {"default"};
}

void AddMpi(const Contender& peer, const BenchCase& bench, PeerCommand* command) {
  const bool open = BaseName(peer.library) == "openmpi", tcp = bench.transport == "tcp";
  command->argv.insert(command->argv.end(), {"-n", absl::StrCat(bench.ranks)});
  auto& environment = command->environment;
  if (open) {
    command->argv.push_back("--oversubscribe");
    environment.insert(environment.end(),
                       {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}});
  }
  if (open && tcp) {
    command->argv.insert(command->argv.end(), {"--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca",
                                               "btl_tcp_if_include", "lo"});
  } else if (tcp) {  // MPICH reaches TCP through UCX, once it is told that no rank is near.
    environment.insert(environment.end(),
                       {{"MPIR_CVAR_NOLOCAL", "1"}, {"UCX_TLS", "tcp,self"}, {"UCX_NET_DEVICES", "lo"}});
  }
  if (absl::EndsWith(peer.library,
                     "_warm")) {  // The allocator keeps what it has: no page faults after the first call.
    environment.insert(environment.end(),
                       {{"MALLOC_MMAP_MAX_", "0"}, {"MALLOC_TRIM_THRESHOLD_", "1099511627776"}});
  }
}

}  // namespace

std::vector<Contender> PeerContenders(absl::Span<const std::string> peers, std::string_view op) {
  std::vector<Contender> contenders;
  for (const std::string& peer : peers) {
    if (peer == "gloo") {
      for (const std::string& algorithm : GlooAlgorithms(op)) contenders.push_back({peer, algorithm});
    } else {
      contenders.push_back({peer, ""});
      contenders.push_back({peer + "_warm", ""});
    }
  }
  return contenders;
}

absl::Status CheckPeers(absl::Span<const std::string> peers, const std::string& folder) {
  for (const std::string& name : peers) {
    const Peer* peer = FindPeer(name);
    if (peer == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("no peer \"", name, "\": there are openmpi, mpich and gloo"));
    }
    const std::string program = absl::StrCat(folder, "/", peer->program);
    const bool has_launcher = *peer->launcher == '\0' || InPath(peer->launcher);
    if (has_launcher && access(program.c_str(), X_OK) == 0) continue;
    return absl::NotFoundError(
        absl::StrCat(name, ": there is no ", has_launcher ? program : std::string(peer->launcher),
                     "; install it with\n  apt-get install ", peer->packages,
                     "\nand build the peers' programs with\n  tests/bench/peers/build ", folder));
  }
  return absl::OkStatus();
}

std::string LimitsProgram(const std::string& folder) { return folder + "/../bench_limits"; }

PeerCommand CommandOf(const Contender& contender, const BenchCase& bench, absl::Span<const int64_t> sizes,
                      const std::string& folder) {
  const std::string ranks = absl::StrCat(bench.ranks), seconds = absl::StrFormat("%g", bench.seconds);
  PeerCommand command;
  if (contender.library == "limit") {
    command.argv = {LimitsProgram(folder), bench.transport, bench.op, ranks, seconds};
  } else if (contender.library == "gloo") {
    command.argv = {absl::StrCat(folder, "/gloo_bench"), ranks, bench.op, contender.algorithm, seconds};
  } else {
    const Peer& mpi = *FindPeer(BaseName(contender.library));
    command.argv = {mpi.launcher};
    AddMpi(contender, bench, &command);
    command.argv.insert(command.argv.end(), {absl::StrCat(folder, "/", mpi.program), bench.op,
                                             absl::EndsWith(contender.library, "_warm") ? "warm" : "default",
                                             seconds, bench.in_place ? "1" : "0"});
  }
  for (int64_t bytes : sizes) command.argv.push_back(absl::StrCat(bytes));
  return command;
}

int Execute(const PeerCommand& command) {
  for (const auto& [name, value] : command.environment) setenv(name.c_str(), value.c_str(), 1);
  std::vector<char*> argv;
  for (const std::string& argument : command.argv) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
  return 127;
}

}  // namespace shoal
