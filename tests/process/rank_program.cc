// A program that launches and meets as `shoal train` does, and fails in every way that a test asks for.
//   rank_program [launcher flags] [--stubborn] COMMAND ...
// Outside a launched environment it spawns its ranks; inside, it is one. Commands of a rank:
//   show                 prints what DetectEnvironment found
//   variable NAME        prints an environment variable
//   fail RANK exit N     RANK prints its last words and exits with N; the others wait for a signal
//   fail RANK signal N   RANK sends itself signal N
//   peers-lost           the last rank aborts after the launcher has seen the others exit with kExitPeerLost
//   leave                leaves a process behind and exits with 0
//   interrupts           counts SIGINTs until none comes for a while
//   meet                 connects with all ranks and checks a sum over them
//   sums FILE            joins an elastic job and checks sums until FILE is there, whoever comes and goes; prints each
//                        epoch's size
//   endless              meets again and again; rank 0 prints "running" after the first time
// --stubborn: ranks ignore SIGTERM and SIGINT. --crowded: they have more threads than there are cores.
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/communicator.h"
#include "collectives/membership/membership.h"
#include "launch/agent/agent.h"
#include "launch/agent/environment.h"
#include "launch/agent/exit_codes.h"
#include "launch/cli/flags.h"
#include "launch/cli/launch_flags.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"
#include "runtime/device/cpu.h"

namespace shoal {
namespace {

[[noreturn]] void WaitForSignal() {
  while (true) pause();
}

int Show(const RankEnvironment& self) {
  std::printf("rank %d of %d, local %d of %d, node %d of %d, source %s, master %s:%d, job %s\n", self.rank,
              self.world_size, self.local_rank, self.local_world_size, self.node_rank, self.nodes,
              self.source.c_str(), self.master_host.c_str(), self.master_port, self.job_id.c_str());
  return kExitOk;
}

int ShowVariable(const std::vector<std::string>& words) {
  if (words.size() != 2) return kExitUsage;
  std::printf("%s=%s\n", words[1].c_str(), ProcessEnv(words[1]).value_or("(not set)").c_str());
  return kExitOk;
}

int Fail(const RankEnvironment& self, const std::vector<std::string>& words) {
  if (words.size() != 4) return kExitUsage;
  if (self.rank != std::atoi(words[1].c_str())) WaitForSignal();
  const int number = std::atoi(words[3].c_str());
  SHOAL_LOG(kInfo) << "last words of rank " << self.rank;
  if (words[2] == "exit") return number;
  // With the default action, whatever the launcher left for it.
  signal(number, SIG_DFL);
  raise(number);
  WaitForSignal();
}

// The launcher's children that it has not reaped.
int Siblings() {
  const std::string launcher = std::to_string(getppid());
  std::ifstream children("/proc/" + launcher + "/task/" + launcher + "/children");
  int count = 0;
  for (std::string pid; children >> pid;) ++count;
  return count;
}

int PeersLost(const RankEnvironment& self) {
  if (self.rank != self.world_size - 1) return kExitPeerLost;
  while (Siblings() > 1) usleep(1000);
  std::abort();
}

int Leave() {
  const pid_t pid = fork();
  if (pid == 0) WaitForSignal();
  std::printf("left %d behind\n", pid);
  return kExitOk;
}

int CountInterrupts() {
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  sigprocmask(SIG_BLOCK, &interrupt, nullptr);
  SHOAL_LOG(kWarning) << "counting";
  int count = 0;
  int number = 0;
  sigwait(&interrupt, &number);
  do {
    ++count;
    const timespec while_another_may_come = {0, 300'000'000};
    number = sigtimedwait(&interrupt, nullptr, &while_another_may_come);
  } while (number == SIGINT);
  SHOAL_LOG(kWarning) << "interrupts: " << count;
  return kExitSignalBase + SIGINT;
}

absl::Status MeetOnce(Communicator& world) {
  SHOAL_ASSIGN_OR_RETURN(const Tensor sum, world.Allocate({1}, DType::kF32));
  *sum.data<float>() = static_cast<float>(world.index() + 1);
  SHOAL_RETURN_IF_ERROR(world.AllReduce(sum, sum, ReduceOp::kSum, {.label = "meeting"}).Await());
  const float want = static_cast<float>(world.size() * (world.size() + 1) / 2);
  if (*sum.data<float>() == want) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the sum over all ranks is ", *sum.data<float>(), ", want ", want));
}

absl::StatusOr<std::unique_ptr<Communicator>> Connect(const RankEnvironment& self) {
  WorldOptions options;
  options.rank = self.rank;
  options.size = self.world_size;
  options.master_host = self.master_host;
  options.master_port = self.master_port;
  options.job_id = self.job_id;
  return ConnectWorld(options);
}

absl::Status Meet(const RankEnvironment& self) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, Connect(self), "connecting");
  SHOAL_RETURN_IF_ERROR(MeetOnce(*world), "meeting");
  std::printf("met: rank %d of %d by %s\n", self.rank, self.world_size, self.source.c_str());
  return world->Barrier({.label = "parting"}).Await();
}

absl::Status MeetEndlessly(const RankEnvironment& self) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, Connect(self), "connecting");
  for (int64_t meeting = 0;; ++meeting) {
    SHOAL_RETURN_IF_ERROR(MeetOnce(*world), "meeting");
    usleep(1000);  // A step.
    if (meeting > 0 || self.rank > 0) continue;
    std::printf("running\n");
    std::fflush(stdout);
  }
}

// Until one member says that it is over (2), or that newcomers wait (1), and all hear of it.
absl::StatusOr<float> SumUntilTold(const Membership& membership, Communicator& group, const std::string& stop_file) {
  SHOAL_ASSIGN_OR_RETURN(const Tensor told, group.Allocate({1}, DType::kF32));
  float* const next = told.data<float>();
  do {
    SHOAL_RETURN_IF_ERROR(MeetOnce(group));
    *next = access(stop_file.c_str(), F_OK) == 0 ? 2 : membership.JoinersWaiting() > 0 ? 1 : 0;
    SHOAL_RETURN_IF_ERROR(group.AllReduce(told, told, ReduceOp::kMax, {}).Await());
  } while (*next == 0);
  return *next;
}

absl::Status SumElastically(const std::string& stop_file) {
  SHOAL_ASSIGN_OR_RETURN(const MembershipOptions options, MembershipOptionsFromEnvironment());
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Membership> membership, Membership::Join(options), "joining");
  while (true) {
    SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> group,
                           membership->NextEpoch(absl::Now() + absl::Minutes(1)), "next epoch");
    SHOAL_LOG(kWarning) << "epoch of " << group->size() << ", restart "
                        << ProcessEnv("TORCHELASTIC_RESTART_COUNT").value_or("?");
    const absl::StatusOr<float> told = SumUntilTold(*membership, *group, stop_file);
    if (told.ok() && *told == 2) return absl::OkStatus();
    if (!told.ok() && !absl::IsAborted(told.status())) return told.status();
  }
}

int ExitCode(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  SHOAL_LOG(kError) << status.message();
  return absl::IsAborted(status) ? kExitPeerLost : kExitFailure;
}

int BeRank(const RankEnvironment& self, const std::vector<std::string>& words) {
  SetLogIdentity(absl::StrCat("rank ", self.rank));
  if (words.empty()) return kExitUsage;
  if (words[0] == "show") return Show(self);
  if (words[0] == "variable") return ShowVariable(words);
  if (words[0] == "fail") return Fail(self, words);
  if (words[0] == "peers-lost") return PeersLost(self);
  if (words[0] == "leave") return Leave();
  if (words[0] == "interrupts") return CountInterrupts();
  if (words[0] == "meet") return ExitCode(Meet(self));
  if (words[0] == "endless") return ExitCode(MeetEndlessly(self));
  return kExitUsage;
}

int Usage(const absl::Status& status) {
  SHOAL_LOG(kError) << status.message();
  return kExitUsage;
}

int Main(const std::vector<std::string>& args) {
  FlagSet flags(args[0], "Launches ranks, or is one.");
  RawLaunchFlags launch;
  launch.usable_cores = UsableCores();
  launch.may_be_elastic = true;
  std::vector<std::string> words;
  bool stubborn = false;
  bool crowded = false;
  flags.AddPositional("COMMAND", "What a rank does, see above.", &words);
  flags.Add({.name = "stubborn", .help = "Ranks ignore SIGTERM and SIGINT."}, &stubborn);
  flags.Add({.name = "crowded", .help = "Ranks have more threads than there are cores."}, &crowded);
  AddLaunchFlags(&flags, &launch);
  const std::vector<std::string> arguments(args.begin() + 1, args.end());
  if (const auto code = ParseOrExit(&flags, arguments)) return *code;
  if (words.size() == 2 && words[0] == "sums" && ProcessEnv("SHOAL_COORDINATOR").has_value()) {
    return ExitCode(SumElastically(words[1]));
  }
  const auto self = DetectEnvironment(ProcessEnv);
  if (!self.ok()) return Usage(self.status());
  if (self->has_value()) {
    if (stubborn) {
      signal(SIGTERM, SIG_IGN);
      signal(SIGINT, SIG_IGN);
    }
    return BeRank(**self, words);
  }
  absl::StatusOr<AgentOptions> options = MakeAgentOptions(launch);
  if (!options.ok()) return Usage(options.status());
  options->more_threads_than_cores = crowded;
  std::vector<std::string> command = args;
  command[0] = SelfExecutable();
  return RunAgent(*options, command);
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main({argv, argv + argc}); }
