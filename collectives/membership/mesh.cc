#include "collectives/membership/mesh.h"

#include <poll.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_format.h"
#include "collectives/membership/endpoint.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/wire.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kRetryNs = 10'000'000;        // Between two attempts to reach a peer.
constexpr int64_t kAttemptNs = 2'000'000'000;   // A dial without an answer for so long is made anew.
constexpr int64_t kParkedNs = 10'000'000'000;   // A guest of a later epoch waits so long.
constexpr size_t kParkedMax = 4096;
constexpr uint64_t kControlKey = 1ULL << 63;    // Events of control connections: this bit and the rank.
constexpr uint64_t kFlowsMax = 64;
constexpr int kFlowsLoopback = 1;
constexpr int kFlowsNetwork = 4;

}  // namespace

// What the dialler of a connection says it is.
struct Mesh::Hello {
  uint64_t lineage = 0, epoch = 0, from = 0, to = 0;  // Ids of the members.
  uint64_t flow = 0;
  uint64_t flows = 0;  // 0: the control connection.

  std::string Bytes() const {
    return WireWriter().U64(lineage).U64(epoch).U64(from).U64(to).U64(flow).U64(flows).Take();
  }
  static absl::StatusOr<Hello> Read(const Frame& frame) {
    WireReader reader(frame.body);
    Hello hello;
    for (uint64_t* field :
         {&hello.lineage, &hello.epoch, &hello.from, &hello.to, &hello.flow, &hello.flows}) {
      *field = reader.U64();
    }
    const bool sane = frame.type == FrameType::kPeerHello && reader.AtEnd() && hello.flows <= kFlowsMax &&
                      (hello.flows == 0 ? hello.flow == 0 : hello.flow < hello.flows);
    if (!sane) return absl::DataLossError("not a peer of this job");
    return hello;
  }
};

// Its bytes on the control connection: the host of the sender as it found out.
struct HostWords {
  uint64_t host = 0;
};

struct Mesh::Peer {
  PeerLink link;
  bool host_told = false;   // To the peer.
  bool host_known = false;  // From it: link.host.
  std::string host_bytes;   // What has come of its HostWords.
  size_t flows = 0;         // How many data connections there will be, once known.
  size_t flows_here = 0;
  absl::Status trouble;     // The last failure to reach it.
  bool let_go = false;      // It was reached since, and closed: it has given up, for reasons of its own.
};

struct Mesh::Dial {
  int rank = 0;
  Hello hello;
  std::vector<std::string> addresses;  // In turn.
  size_t next = 0;
  std::unique_ptr<PendingDial> pending;  // Null between two attempts.
  int64_t due_ns = 0;                    // Of the next attempt, or of giving up the present one.
};

struct Mesh::Parked {
  Hello hello;
  Fd socket;
  int64_t since_ns = 0;
};

absl::StatusOr<std::unique_ptr<Mesh>> Mesh::Create(const WorldOptions& options) {
  Fd epoll(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll.valid()) return ErrnoStatus(errno, "epoll_create1");
  return std::unique_ptr<Mesh>(new Mesh(options, std::move(epoll)));
}

Mesh::Mesh(const WorldOptions& options, Fd epoll) : options_(options), epoll_(std::move(epoll)) {}
Mesh::~Mesh() = default;

void Mesh::Watch(int fd, uint32_t events, uint64_t key) const {
  epoll_event event = {};
  event.events = events;
  event.data.u64 = key;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) == 0 || errno != ENOENT) return;
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
}

// Explicitly: a descriptor that a forked child has as well would stay watched when it is closed here.
void Mesh::Unwatch(int fd) const { (void)epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

void Mesh::Cancel() {
  for (const auto& [key, dial] : dials_) {
    if (dial.pending != nullptr) Unwatch(dial.pending->fd());
  }
  for (const Peer& peer : peers_) {
    if (peer.link.control.valid()) Unwatch(peer.link.control.get());
  }
  dials_.clear();
  peers_.clear();
  data_dialled_ = false;
  accusations_.clear();
  state_ = State::kIdle;
}

void Mesh::Begin(const View& view, int rank, int64_t deadline_ns) {
  Cancel();
  view_ = view;
  rank_ = rank;
  begun_ns_ = NowNs();
  lack_ = absl::OkStatus();
  deadline_ns_ = deadline_ns;
  state_ = State::kForming;
  for (const MemberInfo& member : view.members) {
    Peer& peer = peers_.emplace_back();
    peer.link.pid = member.pid;
    peer.link.host_name = member.host_name;
  }
  for (int peer = 0; peer < rank; ++peer) AddDial(peer, /*flow=*/0, /*flows=*/0, begun_ns_);
  std::vector<Parked> parked;
  parked.swap(parked_);
  for (Parked& guest : parked) {
    if (!Place(guest.hello, &guest.socket)) parked_.push_back(std::move(guest));
  }
}

// ---- Dialling.

// flows 0: the control connection.
void Mesh::AddDial(int rank, int flow, int flows, int64_t due_ns) {
  const MemberInfo& self = view_.members[rank_];
  const MemberInfo& peer = view_.members[rank];
  Dial dial;
  dial.rank = rank;
  dial.hello = {view_.lineage, static_cast<uint64_t>(view_.epoch), self.id, peer.id,
                static_cast<uint64_t>(flow), static_cast<uint64_t>(flows)};
  const bool maybe_here = !self.boot.empty() && self.boot == peer.boot && !peer.unix_name.empty();
  if (flows == 0 && maybe_here) dial.addresses.push_back("unix:" + peer.unix_name);
  dial.addresses.insert(dial.addresses.end(), peer.addresses.begin(), peer.addresses.end());
  if (dial.addresses.empty()) {
    peers_[rank].trouble = absl::UnavailableError("it is on another host and has no address");
    return;
  }
  dial.due_ns = due_ns;
  const uint64_t key = ++last_dial_;
  dials_.emplace(key, std::move(dial));
  AdvanceDial(key, NowNs());
}

void Mesh::StartDial(uint64_t key, Dial& dial, int64_t now_ns) {
  const std::string& text = dial.addresses[dial.next % dial.addresses.size()];
  ++dial.next;
  const absl::StatusOr<SocketAddress> address = ResolveEndpoint(text);
  if (!address.ok()) {
    peers_[dial.rank].trouble = address.status();
    dial.due_ns = now_ns + kRetryNs;
    return;
  }
  const Purpose purpose = dial.hello.flows == 0 ? Purpose::kControl : Purpose::kData;
  dial.pending = std::make_unique<PendingDial>(
      *address, Credentials{options_.job_id, options_.secret, purpose}, dial.hello.Bytes());
  dial.due_ns = now_ns + kAttemptNs;
  AdvanceDial(key, now_ns);
}

void Mesh::AdvanceDial(uint64_t key, int64_t now_ns) {
  const auto found = dials_.find(key);
  if (found == dials_.end()) return;
  Dial& dial = found->second;
  if (dial.pending == nullptr) {
    if (now_ns >= dial.due_ns) StartDial(key, dial, now_ns);
    return;
  }
  switch (dial.pending->Advance()) {
    case PendingDial::Progress::kMore:
      if (now_ns < dial.due_ns) {
        Watch(dial.pending->fd(), dial.pending->events() == POLLOUT ? EPOLLOUT : EPOLLIN, key);
        return;
      }
      peers_[dial.rank].trouble = absl::UnavailableError(
          absl::StrCat("no answer from ", dial.addresses[(dial.next - 1) % dial.addresses.size()]));
      Unwatch(dial.pending->fd());
      break;
    case PendingDial::Progress::kFailed:
      peers_[dial.rank].trouble = dial.pending->status();
      if (absl::IsResourceExhausted(dial.pending->status())) Lack(dial.pending->status());
      break;
    case PendingDial::Progress::kDone: {
      Fd socket = dial.pending->TakeSocket();
      const int rank = dial.rank;
      const Hello hello = dial.hello;
      Unwatch(socket.get());
      dials_.erase(found);
      Install(rank, hello, std::move(socket));
      return;
    }
  }
  dial.pending.reset();
  // The next address at once, a new round after a moment.
  const bool tried_all = dial.next % dial.addresses.size() == 0;
  if (tried_all) peers_[dial.rank].let_go = false;
  dial.due_ns = tried_all ? now_ns + kRetryNs : now_ns;
  if (now_ns >= dial.due_ns) StartDial(key, dial, now_ns);
}

void Mesh::Install(int rank, const Hello& hello, Fd socket) {
  Peer& peer = peers_[rank];
  peer.trouble = lack_ = absl::OkStatus();
  peer.let_go = false;
  if (hello.flows == 0) {
    Watch(socket.get(), EPOLLIN, kControlKey | static_cast<uint64_t>(rank));
    peer.link.control = std::move(socket);
    peer.host_told = peer.host_known = false;
    peer.host_bytes.clear();
    return;
  }
  peer.flows = hello.flows;
  peer.link.data.resize(hello.flows);
  Fd& place = peer.link.data[hello.flow];
  if (!place.valid()) ++peer.flows_here;
  place = std::move(socket);
}

// ---- Being dialled.

// Whether the connection had a place in the present attempt, or was refused; otherwise it may be for a later one.
bool Mesh::Place(const Hello& hello, Fd* socket) {
  const auto epoch = static_cast<uint64_t>(view_.epoch);
  const bool same_lineage = hello.lineage == view_.lineage;
  if (state_ == State::kForming && same_lineage && hello.epoch == epoch) {
    const int from = view_.RankOf(hello.from);
    if (from > rank_ && hello.to == view_.members[rank_].id) {
      Install(from, hello, std::move(*socket));
    } else {
      SHOAL_LOG(kWarning) << "refused " << PeerAddressOf(socket->get()).ToString()
                          << ": no peer of this process in epoch " << epoch;
    }
    return true;
  }
  // Stale epochs are refused, without a word: in times of churn proposals overtake each other.
  return same_lineage && hello.epoch <= epoch;
}

void Mesh::Accept(Fd socket, const Frame& frame) {
  const absl::StatusOr<Hello> hello = Hello::Read(frame);
  if (!hello.ok()) {
    SHOAL_LOG(kWarning) << "refused " << PeerAddressOf(socket.get()).ToString() << ": "
                        << hello.status().message();
    return;
  }
  if (Place(*hello, &socket)) return;
  DropOldGuests(NowNs());
  if (parked_.size() == kParkedMax) parked_.erase(parked_.begin());
  parked_.push_back({*hello, std::move(socket), NowNs()});
}

void Mesh::DropOldGuests(int64_t now_ns) {
  std::erase_if(parked_, [now_ns](const Parked& guest) { return now_ns - guest.since_ns > kParkedNs; });
}

// ---- Who shares memory with whom.

int Mesh::OwnHost() const {
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    if (static_cast<int>(rank) == rank_) return rank_;
    if (LocalAddressOf(peers_[rank].link.control.get()).family() == AF_UNIX) return static_cast<int>(rank);
  }
  return rank_;
}

void Mesh::ExchangeHosts() {
  const int own_host = OwnHost();
  peers_[rank_].link.host = own_host;
  peers_[rank_].host_known = true;
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    Peer& peer = peers_[rank];
    if (static_cast<int>(rank) == rank_ || peer.host_told) continue;
    const HostWords words = {static_cast<uint64_t>(own_host)};
    const absl::Status sent = SendAll(peer.link.control.get(), &words, sizeof words, NowNs() + kRetryNs);
    peer.host_told = true;
    if (!sent.ok()) LoseControl(static_cast<int>(rank), sent);
  }
}

void Mesh::OnControl(int rank) {
  Peer& peer = peers_[rank];
  if (!peer.link.control.valid()) return;
  if (peer.host_known) {
    // Who has said more than that had formed its mesh before: it has left the epoch, which is for the epoch to handle.
    char byte = 0;
    const bool had_formed = recv(peer.link.control.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0;
    if (!had_formed) return LoseControl(rank, absl::UnavailableError("connection closed"));
    return Unwatch(peer.link.control.get());
  }
  while (peer.host_bytes.size() < sizeof(HostWords)) {
    char bytes[sizeof(HostWords)];
    const ssize_t got = recv(peer.link.control.get(), bytes, sizeof bytes - peer.host_bytes.size(), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got <= 0) {
      return LoseControl(rank, absl::UnavailableError(got == 0 ? "connection closed" : std::strerror(errno)));
    }
    peer.host_bytes.append(bytes, got);
  }
  HostWords words;
  std::memcpy(&words, peer.host_bytes.data(), sizeof words);
  if (words.host > static_cast<uint64_t>(rank)) {
    return LoseControl(rank, absl::DataLossError("it says of its host what makes no sense"));
  }
  peer.link.host = static_cast<int>(words.host);
  peer.host_known = true;
  // What follows belongs to the epoch; only an end is ours.
  Watch(peer.link.control.get(), EPOLLRDHUP, kControlKey | static_cast<uint64_t>(rank));
}

// It closed: it may have died, or gone on to a later proposal that has not come here yet.
void Mesh::LoseControl(int rank, const absl::Status& why) {
  Peer& peer = peers_[rank];
  if (peer.link.control.valid()) Unwatch(peer.link.control.get());
  peer.link.control.Reset();
  peer.host_told = peer.host_known = false;
  peer.host_bytes.clear();
  peer.trouble = why;
  peer.let_go = true;
  if (state_ == State::kFormed) return GiveUp(NowNs());
  if (rank > rank_) return;  // It will dial again.
  AddDial(rank, /*flow=*/0, /*flows=*/0, NowNs() + kRetryNs);
}

// All tables agree when each rank's host is what the links of this rank show.
absl::Status Mesh::CheckHosts() const {
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    if (static_cast<int>(rank) == rank_) continue;
    const bool shares = LocalAddressOf(peers_[rank].link.control.get()).family() == AF_UNIX;
    if (shares != (peers_[rank].link.host == peers_[rank_].link.host)) {
      return absl::UnavailableError(absl::StrCat("rank ", rank, " and rank ", rank_,
                                                 " do not agree on who shares memory with whom"));
    }
  }
  return absl::OkStatus();
}

// ---- Data connections.

void Mesh::DialData() {
  data_dialled_ = true;
  const bool needed =
      std::any_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.link.host != 0; });
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    Peer& peer = peers_[rank];
    if (static_cast<int>(rank) == rank_) continue;
    if (!needed) {
      peer.flows_here = peer.flows = 0;
      continue;
    }
    if (static_cast<int>(rank) > rank_) {
      peer.flows = std::max<size_t>(peer.flows, 1);  // It says how many it makes.
      continue;
    }
    const std::vector<std::string>& addresses = view_.members[rank].addresses;
    const absl::StatusOr<SocketAddress> first = ResolveEndpoint(addresses.empty() ? "" : addresses[0]);
    const bool near = first.ok() && first->IsLoopback();
    peer.flows = options_.flows > 0 ? std::min<size_t>(options_.flows, kFlowsMax)
                                    : (near || peer.link.host == peers_[rank_].link.host ? kFlowsLoopback
                                                                                         : kFlowsNetwork);
    for (size_t flow = 0; flow < peer.flows; ++flow) {
      AddDial(static_cast<int>(rank), static_cast<int>(flow), static_cast<int>(peer.flows), NowNs());
    }
  }
}

bool Mesh::DataComplete() const {
  return std::all_of(peers_.begin(), peers_.end(),
                     [](const Peer& peer) { return peer.flows_here >= peer.flows; });
}

// ---- The whole.

Mesh::State Mesh::Advance(int64_t now_ns) {
  if (state_ != State::kForming && state_ != State::kFormed) return state_;
  epoll_event events[64];
  const int ready = epoll_wait(epoll_.get(), events, 64, 0);
  for (int i = 0; i < ready; ++i) {
    const uint64_t key = events[i].data.u64;
    if ((key & kControlKey) != 0) {
      OnControl(static_cast<int>(key & ~kControlKey));
    } else {
      AdvanceDial(key, now_ns);
    }
    if (state_ == State::kFailed) return state_;
  }
  if (state_ == State::kFormed) return state_;
  std::vector<uint64_t> due;
  for (const auto& [key, dial] : dials_) {
    if (now_ns >= dial.due_ns) due.push_back(key);
  }
  for (uint64_t key : due) AdvanceDial(key, now_ns);

  bool connected = true, hosts_known = true;
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    if (static_cast<int>(rank) != rank_) connected = connected && peers_[rank].link.control.valid();
  }
  if (connected) ExchangeHosts();
  for (const Peer& peer : peers_) hosts_known = hosts_known && peer.host_known;
  if (connected && hosts_known && !data_dialled_) {
    if (const absl::Status agreed = CheckHosts(); !agreed.ok()) {
      SHOAL_LOG(kError) << agreed.message();
      GiveUp(now_ns);
      return state_;
    }
    DialData();
  }
  if (connected && data_dialled_ && DataComplete()) {
    state_ = State::kFormed;
  } else if (now_ns >= deadline_ns_) {
    GiveUp(now_ns);
  }
  return state_;
}

int64_t Mesh::NextTimeNs() const {
  if (state_ != State::kForming) return kNeverNs;
  int64_t next_ns = deadline_ns_;
  for (const auto& [key, dial] : dials_) next_ns = std::min(next_ns, dial.due_ns);
  return next_ns;
}

void Mesh::GiveUp(int64_t now_ns) {
  std::vector<Accusation> accusations, incomplete;
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    const Peer& peer = peers_[rank];
    if (static_cast<int>(rank) == rank_) continue;
    if (peer.let_go || (peer.link.control.valid() && !peer.host_known)) {
      const char* const how = peer.let_go ? ", and gave up" : ", but not with all others";
      incomplete.push_back({view_.members[rank].id, absl::StrCat("connected with rank ", rank_, how)});
    }
    const bool reached = peer.link.control.valid() && peer.flows_here >= peer.flows;
    // Who is connected and silent waits for somebody else, and who was has gone to say so.
    if (reached || (peer.let_go && state_ != State::kFormed)) continue;
    const std::string seconds = absl::StrFormat("%.1f s", (now_ns - begun_ns_) * 1e-9);
    const std::string cause = state_ == State::kFormed ? std::string(peer.trouble.message())
                              : peer.trouble.ok()
                                  ? absl::StrCat("did not connect to rank ", rank_, " within ", seconds)
                                  : absl::StrCat("out of reach of rank ", rank_, " for ", seconds, ": ",
                                                 peer.trouble.message());
    accusations.push_back({view_.members[rank].id, cause});
  }
  if (!lack_.ok() && state_ != State::kFormed) {
    accusations = {{view_.members[rank_].id, absl::StrCat("it has no descriptors left: ", lack_.message())}};
  }
  Cancel();
  accusations_ = std::move(accusations);
  incomplete_ = std::move(incomplete);
  state_ = State::kFailed;
}

std::vector<PeerLink> Mesh::TakeLinks() {
  std::vector<PeerLink> links;
  for (const Peer& peer : peers_) {
    if (peer.link.control.valid()) Unwatch(peer.link.control.get());
  }
  for (Peer& peer : peers_) links.push_back(std::move(peer.link));
  peers_.clear();
  Cancel();
  return links;
}

}  // namespace shoal
