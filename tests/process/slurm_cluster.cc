#include "tests/process/slurm_cluster.h"

#include <sys/stat.h>
#include <unistd.h>

#include <random>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "tests/process/processes.h"

namespace shoal::testing {
namespace {

constexpr absl::Duration kStartMax = absl::Seconds(60);

// Random job numbers: Shoal derives a port from them.
constexpr char kConfiguration[] = R"(ClusterName=shoal-test
SlurmctldHost=HOSTNAME(127.0.0.1)
SlurmctldPort=CONTROL_PORT
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=DIR/munge.socket
StateSaveLocation=DIR/state
SlurmdSpoolDir=DIR/spool-%n
SlurmctldPidFile=DIR/slurmctld.pid
SlurmdPidFile=DIR/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
SlurmdParameters=config_overrides
FirstJobId=FIRST_JOB
NodeName=127.0.0.1 NodeAddr=127.0.0.1 Port=FIRST_PORT CPUs=4
NodeName=127.0.0.2 NodeAddr=127.0.0.2 Port=SECOND_PORT CPUs=4
PartitionName=all Nodes=127.0.0.1,127.0.0.2 Default=YES MaxTime=INFINITE State=UP
)";

std::string HostName() {
  char name[256] = "";
  SHOAL_CHECK_EQ(gethostname(name, sizeof(name) - 1), 0);
  return name;
}

std::string Find(const std::string& command) {
  const std::string found = FindCommand(command);
  return !found.empty() || access(("/usr/sbin/" + command).c_str(), X_OK) != 0 ? found
                                                                               : "/usr/sbin/" + command;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SlurmCluster>> SlurmCluster::Start() {
  if (geteuid() != 0) return absl::FailedPreconditionError("slurmd needs root");
  for (const char* command : {"munged", "slurmctld", "slurmd", "srun"}) {
    if (Find(command).empty())
      return absl::FailedPreconditionError(absl::StrCat(command, " is not installed"));
  }
  std::unique_ptr<SlurmCluster> cluster(new SlurmCluster());
  cluster->WriteConfiguration();
  SHOAL_RETURN_IF_ERROR(cluster->StartDaemons());
  return cluster;
}

void SlurmCluster::WriteConfiguration() const {
  std::random_device random;
  const auto port = [] { return absl::StrCat(ProbablyFreePort()); };
  WriteFile(conf(),
            absl::StrReplaceAll(kConfiguration, {{"DIR", dir_.path()},
                                                 {"HOSTNAME", HostName()},
                                                 {"CONTROL_PORT", port()},
                                                 {"FIRST_PORT", port()},
                                                 {"SECOND_PORT", port()},
                                                 {"FIRST_JOB", absl::StrCat(1 + random() % 1000000)}}));
  WriteFile(dir_ / "cgroup.conf", "CgroupPlugin=cgroup/v1\n");
  WriteFile(dir_ / "state/.keep", "");
  std::string key;
  for (int i = 0; i < 256; ++i) key += absl::StrFormat("%08x", random());
  WriteFile(dir_ / "munge.key", key);
  SHOAL_CHECK_EQ(chmod((dir_ / "munge.key").c_str(), 0400), 0);
}

absl::Status SlurmCluster::StartDaemons() {
  struct Daemon {
    std::vector<std::string> args;
    std::string ready;
  };
  const std::vector<Daemon> plan = {
      {{Find("munged"), "--foreground", "--force", "--key-file=" + (dir_ / "munge.key"),
        "--socket=" + (dir_ / "munge.socket"), "--pid-file=" + (dir_ / "munge.pid"),
        "--log-file=" + (dir_ / "munge.log"), "--seed-file=" + (dir_ / "munge.seed")},
       "work threads"},
      {{Find("slurmctld"), "-D", "-i", "-f", conf()}, "Running as primary controller"},
      {{Find("slurmd"), "-D", "-N", "127.0.0.1", "-f", conf()}, "slurmd started on"},
      {{Find("slurmd"), "-D", "-N", "127.0.0.2", "-f", conf()}, "slurmd started on"}};
  for (const Daemon& daemon : plan) {
    SubprocessOptions options;
    options.args = daemon.args;
    options.env["SLURM_CONF"] = conf();
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Subprocess> process, Subprocess::Start(options));
    SHOAL_RETURN_IF_ERROR(process->WaitForOutput(daemon.ready, kStartMax));
    daemons_.push_back(std::move(process));
  }
  return absl::OkStatus();
}

}  // namespace shoal::testing
