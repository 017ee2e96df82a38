#include "tests/process/network_hosts.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "tests/harness/subprocess.h"
#include "tests/process/processes.h"

namespace shoal::testing {
namespace {

constexpr char kIp[] = "/usr/sbin/ip", kTc[] = "/usr/sbin/tc";
constexpr int kSwitchByte = 254;
// A host never loses what it sends itself (a connection whose first packet is, waits for 200 ms), as its kernel limits what
// waits, and lets urgent connections overtake others; a switch does neither, and loses what comes after 20 ms or 512 KiB.
constexpr int64_t kHostQueue = 4 << 20, kSwitchQueueMin = 512 << 10;
// No interface has it: frames to it reach nobody.
constexpr char kNobody[] = "02:00:00:00:00:fe";

absl::Status Run(const char* tool, const std::string& words) {
  SubprocessOptions options;
  options.args = Words(words);
  options.args.insert(options.args.begin(), tool);
  SHOAL_ASSIGN_OR_RETURN(const ProcessResult result, RunProcess(options, absl::Seconds(30)));
  if (result.ok()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(tool, " ", words, ": ", result.ToString()));
}

absl::Status Ip(const std::string& words) { return Run(kIp, words); }

// What leaves `space` by `device`. The kernel hands out packets of many segments: small enough that one takes 0.13 ms, so
// that flows take turns, but never below 16 KiB, as each costs the processor several microseconds. The bucket holds a
// packet and what flows while a timer is 0.1 ms late: more would let every burst through for nothing. `queue`: bytes that
// wait there; what finds no room is lost.
absl::Status Shape(const std::string& space, const std::string& device, int64_t bits_per_second, int64_t queue) {
  constexpr int64_t kPacketMin = 16 << 10, kPacketMax = 64 << 10;
  const int64_t bytes = bits_per_second / 8;
  const int64_t packet =
      bytes == 0 ? kPacketMax : std::clamp(bytes / 1'000'000 * 131, kPacketMin, kPacketMax);
  SHOAL_RETURN_IF_ERROR(
      Ip(absl::StrCat("-n ", space, " link set dev ", device, " gso_max_size ", packet)));
  const std::string at = absl::StrCat("-n ", space, " qdisc ");
  // Not `replace`: a bucket that becomes smaller while packets wait may never let them go. What waits is lost, and sent again.
  Run(kTc, absl::StrCat(at, "del dev ", device, " root")).IgnoreError();  // There may be none.
  if (bytes == 0) return absl::OkStatus();
  return Run(kTc, absl::StrCat(at, "add dev ", device, " root handle 1: tbf rate ", bits_per_second, "bit burst ",
                               packet + 128 + bytes / 10'000, " limit ", queue));
}

}  // namespace

NetworkHosts::NetworkHosts(int hosts)
    : cables_(hosts, Cable::kUp), paths_(hosts, std::vector<Path>(hosts, Path::kOpen)) {}

absl::StatusOr<std::unique_ptr<NetworkHosts>> NetworkHosts::Create(int hosts) {
  if (geteuid() != 0 || access(kIp, X_OK) != 0) {
    return absl::FailedPreconditionError("network namespaces need root and iproute2");
  }
  std::unique_ptr<NetworkHosts> network(new NetworkHosts(hosts));
  SHOAL_RETURN_IF_ERROR(network->Build());
  return network;
}

absl::Status NetworkHosts::Build() {
  for (int host = kSwitch; host < hosts(); ++host) {
    SHOAL_RETURN_IF_ERROR(Ip("netns add " + Name(host)));
    made_.push_back(Name(host));
    SHOAL_RETURN_IF_ERROR(Ip("-n " + Name(host) + " link set lo up"));
  }
  const std::string at_switch = "-n " + Name(kSwitch);
  SHOAL_RETURN_IF_ERROR(Ip(at_switch + " link add eth0 type bridge"));
  SHOAL_RETURN_IF_ERROR(Ip(at_switch + " addr add " + Address(kSwitch) + "/24 dev eth0"));
  SHOAL_RETURN_IF_ERROR(Ip(at_switch + " link set eth0 up"));
  for (int host = 0; host < hosts(); ++host) {
    const std::string port = absl::StrCat("port", host);
    SHOAL_RETURN_IF_ERROR(
        Ip(at_switch + " link add " + port + " mtu 9000 type veth peer name eth0 mtu 9000 netns " + Name(host)));
    SHOAL_RETURN_IF_ERROR(Ip(at_switch + " link set " + port + " master eth0 up"));
    SHOAL_RETURN_IF_ERROR(Ip("-n " + Name(host) + " addr add " + Address(host) + "/24 dev eth0"));
    SHOAL_RETURN_IF_ERROR(Ip("-n " + Name(host) + " link set eth0 up"));
    SHOAL_RETURN_IF_ERROR(ApplyRoute(host));
  }
  return absl::OkStatus();
}

NetworkHosts::~NetworkHosts() {
  for (const std::string& name : made_) Ip("netns del " + name).IgnoreError();
}

std::string NetworkHosts::Name(int host) const {
  return absl::StrCat("shoal-", getpid(), "-", host == kSwitch ? "switch" : absl::StrCat(host));
}

std::vector<std::string> NetworkHosts::On(int host, std::vector<std::string> command) const {
  command.insert(command.begin(), {kIp, "netns", "exec", Name(host)});
  return command;
}

absl::Status NetworkHosts::Enter(int host) const {
  const std::string& name = made_[host - kSwitch];  // Not Name: the caller may be a forked process.
  const std::string path = "/run/netns/" + name;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  const std::string host_name = host == kSwitch ? "switch" : absl::StrCat("host-", host);
  const bool entered = setns(fd, CLONE_NEWNET) == 0 && unshare(CLONE_NEWUTS) == 0 &&
                       sethostname(host_name.data(), host_name.size()) == 0;
  const int error = errno;
  close(fd);
  if (!entered)
    return absl::FailedPreconditionError(absl::StrCat("entering ", path, ": ", std::strerror(error)));
  return absl::OkStatus();
}

std::string NetworkHosts::Address(int host) const {
  return absl::StrCat("10.77.0.", host == kSwitch ? kSwitchByte : host + 1);
}

absl::Status NetworkHosts::SetCable(int host, Cable cable) {
  const Cable before = cables_[host];
  cables_[host] = cable;
  const std::string port = absl::StrCat("-n ", Name(kSwitch), " link set port", host);
  const std::string interface = absl::StrCat("-n ", Name(host), " link set eth0");
  if (cable == Cable::kPulled) return Ip(port + " down");
  if (cable == Cable::kDown) return Ip(interface + " down");
  if (before == Cable::kPulled) return Ip(port + " up");
  SHOAL_RETURN_IF_ERROR(Ip(interface + " up"));
  // The interface has forgotten its route and its neighbours.
  SHOAL_RETURN_IF_ERROR(ApplyRoute(host));
  for (int to = 0; to < hosts(); ++to) {
    if (paths_[host][to] == Path::kCut) SHOAL_RETURN_IF_ERROR(ApplyPath(host, to));
  }
  return absl::OkStatus();
}

absl::Status NetworkHosts::SetRate(int host, int64_t bits_per_second) {
  SHOAL_RETURN_IF_ERROR(Shape(Name(host), "eth0", bits_per_second, kHostQueue));
  if (bits_per_second > 0) {
    SHOAL_RETURN_IF_ERROR(Run(kTc, absl::StrCat("-n ", Name(host), " qdisc add dev eth0 parent 1:1 pfifo_fast")));
  }
  return Shape(Name(kSwitch), absl::StrCat("port", host), bits_per_second,
               std::max(bits_per_second / 8 / 50, kSwitchQueueMin));
}

// What is lost in a full queue comes again after 10 ms, not 200. Cubic, where the kernel has it: BBR stops every 10 s to
// measure, and paces by timers that cost the processor more than the bytes.
absl::Status NetworkHosts::ApplyRoute(int host) const {
  const std::string route = absl::StrCat("-n ", Name(host), " route change 10.77.0.0/24 dev eth0 src ", Address(host),
                                         " rto_min 10ms");
  return Ip(route + " congctl cubic").ok() ? absl::OkStatus() : Ip(route);
}

absl::Status NetworkHosts::SetPath(int from, int to, Path path) {
  if (paths_[from][to] == path) return absl::OkStatus();
  paths_[from][to] = path;
  return cables_[from] == Cable::kDown ? absl::OkStatus() : ApplyPath(from, to);
}

absl::Status NetworkHosts::ApplyPath(int from, int to) const {
  const std::string neighbour = absl::StrCat(Address(to), " dev eth0");
  const std::string at = absl::StrCat("-n ", Name(from), " neigh ");
  if (paths_[from][to] == Path::kCut)
    return Ip(at + "replace " + neighbour + " lladdr " + kNobody + " nud permanent");
  return Ip(at + "del " + neighbour);
}

bool NetworkHosts::Reaches(int from, int to) const {
  if (from == to) return true;
  const auto up = [this](int host) { return host == kSwitch || cables_[host] == Cable::kUp; };
  const bool open = from == kSwitch || to == kSwitch || paths_[from][to] == Path::kOpen;
  return up(from) && up(to) && open;
}

}  // namespace shoal::testing
