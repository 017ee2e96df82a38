#include "tests/process/network_hosts.h"

#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "tests/harness/subprocess.h"
#include "tests/process/processes.h"

namespace shoal::testing {
namespace {

constexpr char kIp[] = "/usr/sbin/ip";

absl::Status Ip(const std::string& words) {
  SubprocessOptions options;
  options.args = Words(words);
  options.args.insert(options.args.begin(), kIp);
  SHOAL_ASSIGN_OR_RETURN(const ProcessResult result, RunProcess(options, absl::Seconds(30)));
  if (result.ok()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("ip ", words, ": ", result.ToString()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<NetworkHosts>> NetworkHosts::Create() {
  if (geteuid() != 0 || access(kIp, X_OK) != 0) {
    return absl::FailedPreconditionError("network namespaces need root and iproute2");
  }
  std::unique_ptr<NetworkHosts> hosts(new NetworkHosts());
  for (int host : {0, 1}) {
    const std::string name = absl::StrCat("shoal-", getpid(), "-", host);
    SHOAL_RETURN_IF_ERROR(Ip("netns add " + name));
    hosts->names_[host] = name;
    SHOAL_RETURN_IF_ERROR(Ip("-n " + name + " link set lo up"));
  }
  SHOAL_RETURN_IF_ERROR(
      Ip("-n " + hosts->names_[0] + " link add eth0 type veth peer name eth0 netns " + hosts->names_[1]));
  for (int host : {0, 1}) {
    SHOAL_RETURN_IF_ERROR(
        Ip("-n " + hosts->names_[host] + " addr add " + hosts->Address(host) + "/24 dev eth0"));
    SHOAL_RETURN_IF_ERROR(Ip("-n " + hosts->names_[host] + " link set eth0 up"));
  }
  return hosts;
}

NetworkHosts::~NetworkHosts() {
  for (const std::string& name : names_) {
    // What cannot be removed was not made.
    if (!name.empty()) Ip("netns del " + name).IgnoreError();
  }
}

std::vector<std::string> NetworkHosts::On(int host, std::vector<std::string> command) const {
  command.insert(command.begin(), {kIp, "netns", "exec", names_[host]});
  return command;
}

std::string NetworkHosts::Address(int host) const { return absl::StrCat("10.77.0.", host + 1); }

}  // namespace shoal::testing
