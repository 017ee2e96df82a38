#include "collectives/membership/bootstrap.h"

#include <poll.h>

#include <algorithm>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "collectives/membership/doors.h"
#include "collectives/membership/endpoint.h"
#include "collectives/membership/frame.h"
#include "collectives/membership/view_wire.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/handshake.h"
#include "collectives/transport/wire.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kRetryNs = 20'000'000;  // Between two attempts to reach rank 0.
constexpr int kSizeMax = 16384;           // A table of all ranks stays far below the frame limit.

std::string RankName(int rank, const MemberInfo& info) {
  return absl::StrCat("rank ", rank, " (", info.Name(), ")");
}

Credentials CredentialsOf(const WorldOptions& options) {
  return {options.job_id, options.secret, Purpose::kBootstrap};
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

bool IsAny(const SocketAddress& address) {
  return address.Ip() == AnyAddress(address.family(), /*loopback_only=*/false).Ip();
}

// A name may appear only when the machine behind it does.
absl::StatusOr<SocketAddress> ResolveMaster(const WorldOptions& options, int64_t deadline_ns) {
  while (true) {
    absl::StatusOr<SocketAddress> address = ResolveAddress(options.master_host, options.master_port);
    if (!absl::IsUnavailable(address.status()) || NowNs() + kRetryNs > deadline_ns) return address;
    (void)poll(nullptr, 0, kRetryNs / 1'000'000);
  }
}

// What kept others out at this process's own door, to be appended to what they failed to do.
std::string OwnTrouble(const Greeter& greeter, const WorldOptions& options) {
  if (greeter.trouble().empty()) return "";
  return absl::StrCat(" (rank ", options.rank, " turned somebody away: ", greeter.trouble(), ")");
}

// Rank 0's side: lets the ranks in, one by one.
class Leader {
 public:
  Leader(const WorldOptions& options, const MemberInfo& self, int64_t deadline_ns)
      : options_(options), deadline_ns_(deadline_ns), sockets_(options.size), here_(options.size, false) {
    view_.lineage = RandomNumber();  // Proves on later connections that the peer has seen this table.
    view_.epoch = options.epoch;
    view_.members.resize(options.size);
    view_.members[0] = self;
    here_[0] = true;
  }

  absl::StatusOr<View> Gather(int listener);

 private:
  struct Verdict {
    enum { kWelcome, kRefuse, kFail } what = kWelcome;
    std::string text;
  };

  Verdict Judge(const Frame& frame, MemberInfo* info, uint64_t* port) const;
  absl::Status Admit(Greeter::Event& event);
  void Drop(int fd);
  void Broadcast(FrameType type, std::string_view body) const;
  absl::Status Fail(const absl::Status& status) const;

  const WorldOptions& options_;
  const int64_t deadline_ns_;
  View view_;
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

Leader::Verdict Leader::Judge(const Frame& frame, MemberInfo* info, uint64_t* port) const {
  WireReader reader(frame.body);
  const uint64_t epoch = reader.U64();
  const uint64_t size = reader.U64();
  const std::string transport = reader.String();
  *port = reader.U64();
  if (frame.type != FrameType::kHello || !Read(reader, info).ok() || !reader.AtEnd() || *port > 65535) {
    return {Verdict::kRefuse, "not a greeting"};
  }
  if (epoch != static_cast<uint64_t>(options_.epoch)) {
    return {Verdict::kRefuse,
            absl::StrCat("epoch ", epoch, ", want ", static_cast<uint64_t>(options_.epoch))};
  }
  const int rank = info->wanted_rank;
  const std::string name = RankName(rank, *info);
  if (size != static_cast<uint64_t>(options_.size)) {
    return {Verdict::kFail,
            absl::StrCat(name, " says that the job has ", size, " ranks, rank 0 says ", options_.size)};
  }
  if (transport != options_.transport) {
    return {Verdict::kFail,
            absl::StrCat(name, " wants transport ", transport, ", rank 0 ", options_.transport)};
  }
  if (rank < 0 || rank >= options_.size) {
    return {Verdict::kFail, absl::StrCat(name, " of a job of ", options_.size)};
  }
  if (here_[rank]) {
    return {Verdict::kFail, absl::StrCat("two processes claim one rank: ",
                                         RankName(rank, view_.members[rank]), " and ", name)};
  }
  return {};
}

absl::Status Leader::Admit(Greeter::Event& event) {
  MemberInfo info;
  uint64_t port = 0;
  const Verdict verdict = Judge(event.frame, &info, &port);
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
  // Ranks that meet at a unix name and want TCP talk over the loopback address.
  const std::string ip = from.family() == AF_UNIX ? "127.0.0.1" : from.Ip();
  if (info.addresses.empty() && port != 0) info.addresses = {EndpointText(ip, static_cast<int>(port))};
  const int rank = info.wanted_rank;
  here_[rank] = true;
  sockets_[rank] = std::move(event.socket);
  view_.members[rank] = std::move(info);
  return absl::OkStatus();
}

void Leader::Drop(int fd) {
  for (int rank = 0; rank < options_.size; ++rank) {
    if (sockets_[rank].get() != fd) continue;
    SHOAL_LOG(kWarning) << RankName(rank, view_.members[rank]) << " left while the job forms";
    sockets_[rank].Reset();
    here_[rank] = false;
  }
}

absl::StatusOr<View> Leader::Gather(int listener) {
  Greeter greeter({listener}, CredentialsOf(options_));
  while (std::count(here_.begin(), here_.end(), false) > 0) {
    std::vector<int> watched;
    for (const Fd& socket : sockets_) {
      if (socket.valid()) watched.push_back(socket.get());
    }
    absl::StatusOr<Greeter::Event> event = greeter.Next(watched, deadline_ns_);
    if (absl::IsDeadlineExceeded(event.status())) {
      return Fail(absl::DeadlineExceededError(
          absl::StrCat("after ", absl::FormatDuration(options_.connect_timeout), ": ", Missing(here_), " of ",
                       options_.size, " did not come", OwnTrouble(greeter, options_))));
    }
    if (!event.ok()) return Fail(event.status());
    if (event->readable >= 0) {
      Drop(event->readable);  // Nobody speaks before the table is out: it closed.
    } else if (absl::Status status = Admit(*event); !status.ok()) {
      return Fail(status);
    }
    if (std::count(here_.begin(), here_.end(), false) > 0) Broadcast(FrameType::kWaiting, Missing(here_));
  }
  Broadcast(FrameType::kTable, Encode(view_));
  return view_;
}

// The other ranks' side of the talk with rank 0.
class Follower {
 public:
  Follower(const WorldOptions& options, const SocketAddress& master, const MemberInfo& self, int port,
           int64_t deadline_ns)
      : options_(options), master_(master), self_(self), port_(port), deadline_ns_(deadline_ns) {}

  absl::StatusOr<View> Join();

 private:
  // One dial and what follows. UNAVAILABLE: worth another try.
  absl::StatusOr<View> Attempt();
  absl::StatusOr<Frame> Await(FrameType type);

  const WorldOptions& options_;
  const SocketAddress& master_;
  const MemberInfo& self_;
  const int port_;
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

absl::StatusOr<View> Follower::Attempt() {
  SHOAL_ASSIGN_OR_RETURN(socket_, DialAuthenticated(master_, CredentialsOf(options_), deadline_ns_));
  WireWriter hello;
  hello.U64(static_cast<uint64_t>(options_.epoch)).U64(options_.size).String(options_.transport).U64(port_);
  Write(self_, hello);
  SHOAL_RETURN_IF_ERROR(SendFrame(socket_.get(), FrameType::kHello, hello.Take(), deadline_ns_));
  SHOAL_ASSIGN_OR_RETURN(const Frame frame, Await(FrameType::kTable));
  absl::StatusOr<View> view = DecodeView(frame.body);
  if (!view.ok() || static_cast<int>(view->members.size()) != options_.size) {
    return absl::UnavailableError("rank 0 sent a table that makes no sense");
  }
  // What rank 0 calls its loopback is, seen from here, the address where rank 0 itself was found. Its own addresses it
  // may leave open.
  const SocketAddress zero = PeerAddressOf(socket_.get());
  if (zero.family() == AF_UNIX) return view;
  for (MemberInfo& member : view->members) {
    for (std::string& endpoint : member.addresses) {
      const absl::StatusOr<SocketAddress> address = ResolveEndpoint(endpoint);
      if (address.ok() && (address->IsLoopback() || IsAny(*address))) {
        endpoint = EndpointText(zero.Ip(), address->port());
      }
    }
  }
  return view;
}

absl::StatusOr<View> Follower::Join() {
  while (true) {
    absl::StatusOr<View> view = Attempt();
    if (view.ok()) return view;
    absl::Status status = view.status();
    if (absl::IsDeadlineExceeded(status) && !waiting_for_.empty()) {
      return absl::DeadlineExceededError(absl::StrCat("after ",
                                                      absl::FormatDuration(options_.connect_timeout), ": ",
                                                      waiting_for_, " of ", options_.size, " did not come"));
    }
    // Another job, or another version, may hold the address for a moment.
    const bool again =
        absl::IsUnavailable(status) || absl::IsDataLoss(status) || absl::IsFailedPrecondition(status);
    if (!again || NowNs() + kRetryNs > deadline_ns_) {
      return absl::Status(again ? absl::StatusCode::kUnavailable : status.code(),
                          absl::StrCat("joining at ", master_.ToString(), ": ", status.message()));
    }
    (void)poll(nullptr, 0, kRetryNs / 1'000'000);
  }
}

// Connects with all others. The doors take what they dial.
absl::StatusOr<std::vector<PeerLink>> Connect(const WorldOptions& options, const Doors& doors, const View& view,
                                              int64_t deadline_ns) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Mesh> mesh, Mesh::Create(options));
  Greeter greeter(doors.Listeners(), CredentialsOf(options));
  mesh->Begin(view, options.rank, deadline_ns);
  while (true) {
    const Mesh::State state = mesh->Advance(NowNs());
    if (state == Mesh::State::kFormed) return mesh->TakeLinks();
    if (state == Mesh::State::kFailed) {
      std::vector<std::string> causes;
      for (const Accusation& accusation : mesh->accusations().empty() ? mesh->incomplete() : mesh->accusations()) {
        const int rank = view.RankOf(accusation.id);
        causes.push_back(absl::StrCat(RankName(rank, view.members[rank]), ": ", accusation.cause));
      }
      if (causes.empty()) causes.push_back("the ranks do not agree who of them share a host");
      return absl::DeadlineExceededError(absl::StrCat("after ", absl::FormatDuration(options.connect_timeout),
                                                      ": ", absl::StrJoin(causes, "; "),
                                                      OwnTrouble(greeter, options)));
    }
    absl::StatusOr<Greeter::Event> event =
        greeter.Next({mesh->fd()}, std::min(deadline_ns, mesh->NextTimeNs()));
    if (absl::IsDeadlineExceeded(event.status())) continue;
    SHOAL_RETURN_IF_ERROR(event.status());
    if (event->socket.valid()) mesh->Accept(std::move(event->socket), event->frame);
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
  SHOAL_ASSIGN_OR_RETURN(const SocketAddress master, ResolveMaster(options, deadline_ns), "the master address");
  SHOAL_ASSIGN_OR_RETURN(const Doors doors, OpenDoors(options.transport, options.interface, master));
  MemberInfo self = DescribeSelf(doors);
  self.wanted_rank = options.rank;
  if (doors.port != 0 && !options.interface.empty()) {
    SHOAL_ASSIGN_OR_RETURN(self.addresses, OwnEndpoints(doors, options.interface, master));
  } else if (doors.port != 0 && options.rank == 0) {
    const bool here = master.IsLoopback();
    self.addresses = {EndpointText(AnyAddress(master.family(), here).Ip(), doors.port)};
  }
  if (options.rank == 0) {
    SHOAL_ASSIGN_OR_RETURN(Fd listener, ListenAsMaster(master, options.master_port));
    Leader leader(options, self, deadline_ns);
    SHOAL_ASSIGN_OR_RETURN(const View view, leader.Gather(listener.get()));
    listener.Reset();
    return Connect(options, doors, view, deadline_ns);
  }
  Follower follower(options, master, self, doors.port, deadline_ns);
  SHOAL_ASSIGN_OR_RETURN(const View view, follower.Join());
  return Connect(options, doors, view, deadline_ns);
}

}  // namespace shoal
