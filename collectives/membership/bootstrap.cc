#include "collectives/membership/bootstrap.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <fstream>
#include <map>
#include <random>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "collectives/membership/frame.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/wire.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kRetryNs = 20'000'000;  // Between two attempts to reach rank 0.
constexpr int kSizeMax = 16384;           // A table of all ranks stays far below the frame limit.

enum class Channel : uint64_t { kControl, kData };

// What every rank tells about itself.
struct Identity {
  int rank = 0;
  int64_t pid = 0;
  std::string host_name;
  std::string boot;  // Equal on processes that run on one kernel; "" when unknown.
  std::string unix_name;
  std::string ip;  // As rank 0 sees it; "" for rank 0 itself.
  int port = 0;

  void Write(WireWriter* writer) const {
    writer->U64(rank).U64(pid).String(host_name).String(boot).String(unix_name).String(ip).U64(port);
  }
  static Identity Read(WireReader* reader) {
    Identity identity;
    identity.rank = static_cast<int>(reader->U64());
    identity.pid = static_cast<int64_t>(reader->U64());
    identity.host_name = reader->String();
    identity.boot = reader->String();
    identity.unix_name = reader->String();
    identity.ip = reader->String();
    identity.port = static_cast<int>(reader->U64());
    return identity;
  }
  std::string Name() const { return absl::StrCat("rank ", rank, " (pid ", pid, ", host ", host_name, ")"); }
};

struct Table {
  uint64_t nonce = 0;  // Proves on later connections that the peer has seen this table.
  std::vector<Identity> ranks;
};

// What one rank listens on for its peers.
struct Doors {
  Fd unix_listener;
  Fd tcp_listener;
  SocketAddress master;
  Identity self;

  std::vector<int> Listeners() const {
    std::vector<int> fds;
    if (unix_listener.valid()) fds.push_back(unix_listener.get());
    if (tcp_listener.valid()) fds.push_back(tcp_listener.get());
    return fds;
  }
};

uint64_t RandomNumber() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string HostName() {
  char name[HOST_NAME_MAX + 1] = "";
  (void)gethostname(name, sizeof name - 1);
  return name;
}

std::string Missing(const std::vector<bool>& here) {
  std::vector<int> missing;
  for (size_t rank = 0; rank < here.size(); ++rank) {
    if (!here[rank]) missing.push_back(static_cast<int>(rank));
  }
  constexpr size_t kShown = 16;
  std::string text = missing.size() == 1 ? "rank " : "ranks ";
  absl::StrAppend(&text, absl::StrJoin(absl::MakeSpan(missing).subspan(0, kShown), ", "));
  if (missing.size() > kShown) absl::StrAppend(&text, " and ", missing.size() - kShown, " more");
  return text;
}

// A name may appear only when the machine behind it does.
absl::StatusOr<SocketAddress> ResolveMaster(const WorldOptions& options, int64_t deadline_ns) {
  while (true) {
    absl::StatusOr<SocketAddress> address = ResolveAddress(options.master_host, options.master_port);
    if (!absl::IsUnavailable(address.status()) || NowNs() + kRetryNs > deadline_ns) return address;
    (void)poll(nullptr, 0, kRetryNs / 1'000'000);
  }
}

absl::StatusOr<Doors> OpenDoors(const WorldOptions& options, int64_t deadline_ns) {
  Doors doors;
  SHOAL_ASSIGN_OR_RETURN(doors.master, ResolveMaster(options, deadline_ns), "the master address");
  const int family = doors.master.family();
  doors.self.rank = options.rank;
  doors.self.pid = getpid();
  doors.self.host_name = HostName();
  if (options.transport == "auto") {
    doors.self.boot = FirstLine("/proc/sys/kernel/random/boot_id");
    doors.self.unix_name = absl::StrFormat("shoal-%016x%016x", RandomNumber(), RandomNumber());
    SHOAL_ASSIGN_OR_RETURN(const SocketAddress address, ResolveAddress("unix:" + doors.self.unix_name, 0));
    SHOAL_ASSIGN_OR_RETURN(doors.unix_listener, Listen(address));
  }
  // Ranks that meet at a name of one host, or at its loopback address, are all there: open nothing to the
  // network.
  if (family != AF_UNIX || options.transport == "tcp") {
    const int tcp_family = family == AF_INET6 ? AF_INET6 : AF_INET;
    SHOAL_ASSIGN_OR_RETURN(doors.tcp_listener, Listen(AnyAddress(tcp_family, doors.master.IsLoopback())));
    doors.self.port = LocalAddressOf(doors.tcp_listener.get()).port();
  }
  return doors;
}

// Rank 0's side: lets the ranks in, one by one.
class Leader {
 public:
  Leader(const WorldOptions& options, const Doors& doors, int64_t deadline_ns)
      : options_(options), deadline_ns_(deadline_ns), sockets_(options.size), here_(options.size, false) {
    table_.nonce = RandomNumber();
    table_.ranks.resize(options.size);
    table_.ranks[0] = doors.self;
    here_[0] = true;
  }

  absl::StatusOr<Table> Gather(int listener);
  // The second question: who shares memory with whom. Answered by all, told to all.
  absl::StatusOr<std::vector<int>> AgreeOnHosts(int own_host);

 private:
  struct Verdict {
    enum { kWelcome, kRefuse, kFail } what = kWelcome;
    std::string text;
  };

  Verdict Judge(const Frame& frame, Identity* identity) const;
  absl::Status Admit(Greeter::Event& event);
  void Drop(int fd);
  void Broadcast(FrameType type, std::string_view body) const;
  absl::Status Fail(const absl::Status& status) const;

  const WorldOptions& options_;
  const int64_t deadline_ns_;
  Table table_;
  std::vector<Fd> sockets_;
  std::vector<bool> here_;
};

void Leader::Broadcast(FrameType type, std::string_view body) const {
  // A peer that does not take it is noticed when it is read from.
  for (const Fd& socket : sockets_) {
    if (socket.valid()) (void)SendFrame(socket.get(), type, body, NowNs() + 1'000'000'000);
  }
}

absl::Status Leader::Fail(const absl::Status& status) const {
  Broadcast(FrameType::kFailed,
            WireWriter().U64(static_cast<uint64_t>(status.code())).String(StdSv(status.message())).Take());
  return status;
}

Leader::Verdict Leader::Judge(const Frame& frame, Identity* identity) const {
  if (frame.version != kProtocolVersion) {
    return {Verdict::kRefuse, absl::StrCat("protocol version ", frame.version, ", want ", kProtocolVersion)};
  }
  WireReader reader(frame.body);
  const std::string job = reader.String();
  const uint64_t epoch = reader.U64();
  const uint64_t size = reader.U64();
  const std::string transport = reader.String();
  *identity = Identity::Read(&reader);
  if (frame.type != FrameType::kHello || !reader.AtEnd()) return {Verdict::kRefuse, "not a greeting"};
  if (job != options_.job_id) {
    return {Verdict::kRefuse, absl::StrCat("job '", job, "', want '", options_.job_id, "'")};
  }
  if (epoch != static_cast<uint64_t>(options_.epoch)) {
    return {Verdict::kRefuse,
            absl::StrCat("epoch ", epoch, ", want ", static_cast<uint64_t>(options_.epoch))};
  }
  const std::string name = identity->Name();
  if (size != static_cast<uint64_t>(options_.size)) {
    return {Verdict::kFail,
            absl::StrCat(name, " says that the job has ", size, " ranks, rank 0 says ", options_.size)};
  }
  if (transport != options_.transport) {
    return {Verdict::kFail,
            absl::StrCat(name, " wants transport ", transport, ", rank 0 ", options_.transport)};
  }
  if (identity->rank < 0 || identity->rank >= options_.size) {
    return {Verdict::kFail, absl::StrCat(name, " of a job of ", options_.size)};
  }
  if (here_[identity->rank]) {
    return {
        Verdict::kFail,
        absl::StrCat("two processes claim one rank: ", table_.ranks[identity->rank].Name(), " and ", name)};
  }
  return {};
}

absl::Status Leader::Admit(Greeter::Event& event) {
  Identity identity;
  const Verdict verdict = Judge(event.frame, &identity);
  const SocketAddress from = PeerAddressOf(event.socket.get());
  const int64_t soon_ns = NowNs() + 1'000'000'000;
  if (verdict.what == Verdict::kRefuse) {
    SHOAL_LOG(kWarning) << "refused " << from.ToString() << ": " << verdict.text;
    (void)SendFrame(event.socket.get(), FrameType::kRefused, verdict.text, soon_ns);
    return absl::OkStatus();
  }
  if (verdict.what == Verdict::kFail) {
    const absl::Status status = absl::InvalidArgumentError(verdict.text);
    (void)SendFrame(event.socket.get(), FrameType::kFailed,
                    WireWriter().U64(static_cast<uint64_t>(status.code())).String(verdict.text).Take(),
                    soon_ns);
    return status;
  }
  identity.ip = from.Ip();
  here_[identity.rank] = true;
  sockets_[identity.rank] = std::move(event.socket);
  table_.ranks[identity.rank] = std::move(identity);
  return absl::OkStatus();
}

void Leader::Drop(int fd) {
  for (int rank = 0; rank < options_.size; ++rank) {
    if (sockets_[rank].get() != fd) continue;
    SHOAL_LOG(kWarning) << table_.ranks[rank].Name() << " left while the job forms";
    sockets_[rank].Reset();
    here_[rank] = false;
  }
}

absl::StatusOr<Table> Leader::Gather(int listener) {
  Greeter greeter({listener});
  while (std::count(here_.begin(), here_.end(), false) > 0) {
    std::vector<int> watched;
    for (const Fd& socket : sockets_) {
      if (socket.valid()) watched.push_back(socket.get());
    }
    absl::StatusOr<Greeter::Event> event = greeter.Next(watched, deadline_ns_);
    if (absl::IsDeadlineExceeded(event.status())) {
      return Fail(absl::DeadlineExceededError(
          absl::StrCat("after ", absl::FormatDuration(options_.connect_timeout), ": ", Missing(here_), " of ",
                       options_.size, " did not come")));
    }
    if (!event.ok()) return Fail(event.status());
    if (event->readable >= 0) {
      Drop(event->readable);  // Nobody speaks before the table is out: it closed.
    } else if (absl::Status status = Admit(*event); !status.ok()) {
      return Fail(status);
    }
    if (std::count(here_.begin(), here_.end(), false) > 0) Broadcast(FrameType::kWaiting, Missing(here_));
  }
  WireWriter writer;
  writer.U64(table_.nonce);
  for (const Identity& identity : table_.ranks) identity.Write(&writer);
  Broadcast(FrameType::kTable, writer.Take());
  return table_;
}

absl::StatusOr<std::vector<int>> Leader::AgreeOnHosts(int own_host) {
  std::vector<int> hosts(options_.size, own_host);
  for (int rank = 1; rank < options_.size; ++rank) {
    absl::StatusOr<Frame> frame = ReceiveFrame(sockets_[rank].get(), deadline_ns_);
    if (!frame.ok()) return Fail(Annotate(frame.status(), table_.ranks[rank].Name()));
    WireReader reader(frame->body);
    const uint64_t host = reader.U64();
    if (frame->type != FrameType::kHost || !reader.AtEnd() || host > static_cast<uint64_t>(rank)) {
      return Fail(absl::UnavailableError(absl::StrCat(table_.ranks[rank].Name(), " answers nonsense")));
    }
    hosts[rank] = static_cast<int>(host);
  }
  WireWriter writer;
  for (int host : hosts) writer.U64(host);
  Broadcast(FrameType::kHosts, writer.Take());
  return hosts;
}

// The other ranks' side of the talk with rank 0.
class Follower {
 public:
  Follower(const WorldOptions& options, const Doors& doors, int64_t deadline_ns)
      : options_(options), doors_(doors), deadline_ns_(deadline_ns) {}

  absl::StatusOr<Table> Join();
  absl::StatusOr<std::vector<int>> AgreeOnHosts(int own_host);

 private:
  // One dial and what follows. UNAVAILABLE: worth another try.
  absl::StatusOr<Table> Attempt();
  absl::StatusOr<Frame> Await(FrameType type);

  const WorldOptions& options_;
  const Doors& doors_;
  const int64_t deadline_ns_;
  Fd socket_;
  std::string waiting_for_;
};

// The next frame of `type`; failures that rank 0 reports come back as they are.
absl::StatusOr<Frame> Follower::Await(FrameType type) {
  while (true) {
    SHOAL_ASSIGN_OR_RETURN(Frame frame, ReceiveFrame(socket_.get(), deadline_ns_), "rank 0");
    WireReader reader(frame.body);
    if (frame.type == type) return frame;
    if (frame.type == FrameType::kWaiting) {
      waiting_for_ = frame.body;
    } else if (frame.type == FrameType::kRefused) {
      return absl::UnavailableError(absl::StrCat("rank 0 refused this process: ", frame.body));
    } else if (frame.type == FrameType::kFailed) {
      const auto code = static_cast<absl::StatusCode>(reader.U64());
      return absl::Status(code == absl::StatusCode::kUnavailable ? absl::StatusCode::kAborted : code,
                          reader.String());
    } else {
      return absl::UnavailableError("rank 0 answers nonsense");
    }
  }
}

absl::StatusOr<Table> Follower::Attempt() {
  SHOAL_ASSIGN_OR_RETURN(socket_, Dial(doors_.master, deadline_ns_));
  WireWriter hello;
  hello.String(options_.job_id).U64(static_cast<uint64_t>(options_.epoch)).U64(options_.size);
  hello.String(options_.transport);
  doors_.self.Write(&hello);
  SHOAL_RETURN_IF_ERROR(SendFrame(socket_.get(), FrameType::kHello, hello.Take(), deadline_ns_));
  SHOAL_ASSIGN_OR_RETURN(const Frame frame, Await(FrameType::kTable));
  WireReader reader(frame.body);
  Table table;
  table.nonce = reader.U64();
  for (int rank = 0; rank < options_.size; ++rank) table.ranks.push_back(Identity::Read(&reader));
  if (!reader.AtEnd()) return absl::UnavailableError("rank 0 sent a table that makes no sense");
  // What rank 0 calls its loopback is, seen from here, the address where rank 0 itself was found.
  const SocketAddress zero = PeerAddressOf(socket_.get());
  for (Identity& identity : table.ranks) {
    absl::StatusOr<SocketAddress> address = ResolveAddress(identity.ip, 0);
    if (identity.ip.empty() || (address.ok() && address->IsLoopback())) identity.ip = zero.Ip();
  }
  return table;
}

absl::StatusOr<Table> Follower::Join() {
  while (true) {
    absl::StatusOr<Table> table = Attempt();
    if (table.ok()) return table;
    absl::Status status = table.status();
    if (absl::IsDeadlineExceeded(status) && !waiting_for_.empty()) {
      return absl::DeadlineExceededError(absl::StrCat("after ",
                                                      absl::FormatDuration(options_.connect_timeout), ": ",
                                                      waiting_for_, " of ", options_.size, " did not come"));
    }
    const bool again = absl::IsUnavailable(status) || absl::IsDataLoss(status);
    if (!again || NowNs() + kRetryNs > deadline_ns_) {
      return absl::Status(again ? absl::StatusCode::kUnavailable : status.code(),
                          absl::StrCat("joining at ", doors_.master.ToString(), ": ", status.message()));
    }
    (void)poll(nullptr, 0, kRetryNs / 1'000'000);
  }
}

absl::StatusOr<std::vector<int>> Follower::AgreeOnHosts(int own_host) {
  SHOAL_RETURN_IF_ERROR(
      SendFrame(socket_.get(), FrameType::kHost, WireWriter().U64(own_host).Take(), deadline_ns_), "rank 0");
  SHOAL_ASSIGN_OR_RETURN(const Frame frame, Await(FrameType::kHosts));
  WireReader reader(frame.body);
  std::vector<int> hosts;
  for (int rank = 0; rank < options_.size; ++rank) hosts.push_back(static_cast<int>(reader.U64()));
  if (!reader.AtEnd()) return absl::UnavailableError("rank 0 sent hosts that make no sense");
  return hosts;
}

// The lowest rank that shares memory with this one. Equal kernels are not enough: restored snapshots share an
// id, and network namespaces hide the sockets that descriptors travel on. Reaching the peer's socket is the
// test.
int FindHost(const Table& table, int rank, int64_t deadline_ns) {
  const Identity& self = table.ranks[rank];
  for (int other = 0; other < rank && !self.boot.empty(); ++other) {
    if (table.ranks[other].boot != self.boot) continue;
    absl::StatusOr<SocketAddress> address = ResolveAddress("unix:" + table.ranks[other].unix_name, 0);
    if (address.ok() && Dial(*address, deadline_ns).ok()) return other;
  }
  return rank;
}

absl::StatusOr<Fd> DialPeer(const WorldOptions& options, const Table& table, int peer, bool same_host,
                            Channel channel, int64_t deadline_ns) {
  const Identity& identity = table.ranks[peer];
  const bool over_unix = same_host && channel == Channel::kControl;
  SHOAL_ASSIGN_OR_RETURN(
      const SocketAddress address,
      ResolveAddress(over_unix ? "unix:" + identity.unix_name : identity.ip, identity.port));
  absl::StatusOr<Fd> socket = Dial(address, deadline_ns);
  // A full backlog drains as the peer accepts.
  while (!socket.ok() && absl::IsUnavailable(socket.status()) && NowNs() + kRetryNs < deadline_ns) {
    (void)poll(nullptr, 0, kRetryNs / 1'000'000);
    socket = Dial(address, deadline_ns);
  }
  SHOAL_RETURN_IF_ERROR(socket.status(), identity.Name());
  WireWriter hello;
  hello.U64(table.nonce).U64(options.rank).U64(peer).U64(static_cast<uint64_t>(channel));
  SHOAL_RETURN_IF_ERROR(SendFrame(socket->get(), FrameType::kPeerHello, hello.Take(), deadline_ns),
                        identity.Name());
  return socket;
}

// Puts an accepted connection into its place. Strangers are closed with a log line.
void AcceptPeer(const WorldOptions& options, const Table& table, Greeter::Event& event,
                std::vector<PeerLink>* links) {
  WireReader reader(event.frame.body);
  const uint64_t nonce = reader.U64(), from = reader.U64(), to = reader.U64(), channel = reader.U64();
  const bool known = event.frame.type == FrameType::kPeerHello && event.frame.version == kProtocolVersion &&
                     reader.AtEnd() && nonce == table.nonce && to == static_cast<uint64_t>(options.rank) &&
                     from > to && from < table.ranks.size() && channel <= 1;
  if (!known) {
    SHOAL_LOG(kWarning) << "refused " << PeerAddressOf(event.socket.get()).ToString()
                        << ": not a peer of this job and epoch";
    return;
  }
  PeerLink& link = (*links)[from];
  if (channel == static_cast<uint64_t>(Channel::kControl)) {
    link.control = std::move(event.socket);
  } else if (link.data.empty()) {
    link.data.push_back(std::move(event.socket));
  }
}

absl::StatusOr<std::vector<PeerLink>> Connect(const WorldOptions& options, const Doors& doors,
                                              const Table& table, const std::vector<int>& hosts,
                                              int64_t deadline_ns) {
  const bool needs_tcp = std::any_of(hosts.begin(), hosts.end(), [](int host) { return host != 0; });
  std::vector<PeerLink> links(options.size);
  for (int rank = 0; rank < options.size; ++rank) {
    links[rank].pid = table.ranks[rank].pid;
    links[rank].host_name = table.ranks[rank].host_name;
    links[rank].host = hosts[rank];
  }
  for (int peer = 0; peer < options.rank; ++peer) {
    const bool same_host = hosts[peer] == hosts[options.rank];
    SHOAL_ASSIGN_OR_RETURN(links[peer].control,
                           DialPeer(options, table, peer, same_host, Channel::kControl, deadline_ns));
    if (!needs_tcp) continue;
    SHOAL_ASSIGN_OR_RETURN(Fd data,
                           DialPeer(options, table, peer, same_host, Channel::kData, deadline_ns));
    links[peer].data.push_back(std::move(data));
  }
  Greeter greeter(doors.Listeners());
  while (true) {
    std::vector<bool> here(options.size, true);
    for (int peer = options.rank + 1; peer < options.size; ++peer) {
      here[peer] = links[peer].control.valid() && (!needs_tcp || !links[peer].data.empty());
    }
    if (std::count(here.begin(), here.end(), false) == 0) return links;
    absl::StatusOr<Greeter::Event> event = greeter.Next({}, deadline_ns);
    if (absl::IsDeadlineExceeded(event.status())) {
      return absl::DeadlineExceededError(absl::StrCat("after ", absl::FormatDuration(options.connect_timeout),
                                                      ": ", Missing(here), " did not connect to rank ",
                                                      options.rank));
    }
    SHOAL_RETURN_IF_ERROR(event.status());
    AcceptPeer(options, table, *event, &links);
  }
}

// The master's listener: on its own address where that is an address of this host, else (behind a translated
// address) on all of them.
absl::StatusOr<Fd> ListenAsMaster(const SocketAddress& master, int port) {
  absl::StatusOr<Fd> listener = Listen(master);
  if (!listener.ok() && master.family() != AF_UNIX && !absl::IsAlreadyExists(listener.status())) {
    SocketAddress any = AnyAddress(master.family(), /*loopback_only=*/false);
    absl::StatusOr<SocketAddress> with_port = ResolveAddress(any.Ip(), port);
    if (with_port.ok()) listener = Listen(*with_port);
  }
  if (!listener.ok()) {
    return absl::UnavailableError(absl::StrCat("rank 0 cannot ", listener.status().message()));
  }
  return listener;
}

}  // namespace

absl::StatusOr<std::vector<PeerLink>> FormMesh(const WorldOptions& options) {
  if (options.size > kSizeMax) return absl::InvalidArgumentError(absl::StrCat(options.size, " ranks"));
  const int64_t deadline_ns = NowNs() + absl::ToInt64Nanoseconds(options.connect_timeout);
  SHOAL_ASSIGN_OR_RETURN(Doors doors, OpenDoors(options, deadline_ns));
  if (options.rank == 0) {
    SHOAL_ASSIGN_OR_RETURN(Fd listener, ListenAsMaster(doors.master, options.master_port));
    Leader leader(options, doors, deadline_ns);
    SHOAL_ASSIGN_OR_RETURN(const Table table, leader.Gather(listener.get()));
    listener.Reset();
    SHOAL_ASSIGN_OR_RETURN(const std::vector<int> hosts, leader.AgreeOnHosts(/*own_host=*/0));
    return Connect(options, doors, table, hosts, deadline_ns);
  }
  Follower follower(options, doors, deadline_ns);
  SHOAL_ASSIGN_OR_RETURN(Table table, follower.Join());
  // Ranks that meet at a unix name and want TCP talk over the loopback address.
  for (Identity& identity : table.ranks) {
    if (doors.master.family() == AF_UNIX) identity.ip = "127.0.0.1";
  }
  SHOAL_ASSIGN_OR_RETURN(const std::vector<int> hosts,
                         follower.AgreeOnHosts(FindHost(table, options.rank, deadline_ns)));
  return Connect(options, doors, table, hosts, deadline_ns);
}

}  // namespace shoal
