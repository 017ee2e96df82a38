#include "collectives/engine/world.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "collectives/engine/control_page.h"
#include "collectives/engine/tcp_mesh.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/wire.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// How long a closing process waits for its peers to hear its last words, before the kernel may throw them
// away.
constexpr int64_t kFarewellNs = 1'000'000'000;
constexpr int kBeatsPerTimeout = 5;

}  // namespace

World::World(const WorldOptions& options) : options_(options) {}

absl::StatusOr<std::shared_ptr<World>> World::Connect(const WorldOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(std::vector<PeerLink> links, FormMesh(options));
  std::shared_ptr<World> world(new World(options));
  SHOAL_RETURN_IF_ERROR(world->Start(std::move(links)));
  return world;
}

absl::Status World::Start(std::vector<PeerLink> links) {
  wake_ = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  Fd mesh_wake(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake_.valid() || !mesh_wake.valid()) return ErrnoStatus(errno, "eventfd");
  std::vector<Fd> data(links.size());
  bool over_tcp = false;
  for (size_t rank = 0; rank < links.size(); ++rank) {
    auto peer = std::make_unique<Peer>();
    over_tcp = over_tcp || !links[rank].data.empty();
    if (!links[rank].data.empty()) data[rank] = std::move(links[rank].data[0]);
    if (links[rank].control.valid()) {
      peer->control = std::make_unique<ControlLink>(std::move(links[rank].control));
      peer->heard_ns = NowNs();
    } else {
      peer->open = false;
    }
    peer->link = std::move(links[rank]);
    peers_.push_back(std::move(peer));
  }
  memory_ = std::make_shared<SharedMemory>(options_.size, Announcer());
  if (over_tcp)
    mesh_ = std::make_unique<TcpMesh>(this, options_.epoch, std::move(mesh_wake), std::move(data));
  monitor_ = std::thread([this] { RunMonitor(); });
  if (RanksOnThisHost() > 1) {
    SHOAL_ASSIGN_OR_RETURN(control_segment_, memory_->NewGroupSegment(kControlSegment, sizeof(ControlPage)), "the control page");
    control_slots_ = std::make_unique<ControlSlots>(reinterpret_cast<ControlPage*>(control_segment_->base()));
  }
  return absl::OkStatus();
}

SharedMemory::Announcer World::Announcer() {
  const auto to_host_mates = [this](const std::function<void(ControlLink*)>& push) {
    for (const auto& peer : peers_) {
      if (peer->control != nullptr && peer->link.host == peers_[options_.rank]->link.host)
        push(peer->control.get());
    }
    WakeMonitor();
  };
  const auto added = [to_host_mates](const Segment& segment) {
    absl::Status status;
    to_host_mates([&](ControlLink* link) {
      absl::StatusOr<Fd> fd = segment.Duplicate();
      if (!fd.ok()) {
        status = fd.status();
        return;
      }
      link->Push({ControlType::kSegment, WireWriter().U64(segment.id()).U64(segment.bytes()).Take(),
                  *std::move(fd)});
    });
    return status;
  };
  const auto freed = [to_host_mates](uint64_t id) {
    to_host_mates([id](ControlLink* link) {
      link->Push({ControlType::kFree, WireWriter().U64(id).Take(), Fd()});
    });
  };
  return {added, freed};
}

World::~World() {
  leaving_.store(true, std::memory_order_release);
  if (!Ended()) PushToAll(ControlType::kBye, "");
  {
    MutexLock lock(&mutex_);
    closing_ = true;
  }
  WakeMonitor();
  if (monitor_.joinable()) monitor_.join();
  mesh_.reset();
  // Tensors may outlive the epoch; their end must not reach for links that are gone.
  if (memory_ != nullptr) memory_->Fence();
}

std::string World::RankName(int rank) const {
  const PeerLink& link = peers_[rank]->link;
  return absl::StrCat("rank ", rank, " (pid ", link.pid, ", host ", link.host_name, ")");
}

std::string World::RankNames(const std::vector<int>& ranks) const {
  return absl::StrJoin(ranks, ", ", [this](std::string* out, int rank) { out->append(RankName(rank)); });
}

bool World::OneHost(const std::vector<int>& ranks) const {
  return std::all_of(ranks.begin(), ranks.end(),
                     [&](int rank) { return peers_[rank]->link.host == peers_[ranks[0]]->link.host; });
}

int World::RanksOnThisHost() const {
  const int host = peers_[options_.rank]->link.host;
  return std::count_if(peers_.begin(), peers_.end(),
                       [host](const auto& peer) { return peer->link.host == host; });
}

absl::Status World::status() const {
  MutexLock lock(&mutex_);
  return cause_;
}

absl::Status World::End(const std::string& cause) {
  {
    MutexLock lock(&mutex_);
    if (!cause_.ok()) return cause_;
    cause_ = absl::AbortedError(cause);
    // Before any operation can end: afterwards its buffers belong to the caller again.
    memory_->Fence();
    ended_.store(true, std::memory_order_release);
  }
  PushToAll(ControlType::kAbort, cause);
  WakeMonitor();
  WakeSleepers();
  return absl::AbortedError(cause);
}

void World::PushToAll(ControlType type, const std::string& body) {
  for (const auto& peer : peers_) {
    if (peer->control != nullptr) peer->control->Push({type, body, Fd()});
  }
}

void World::NoteOperation(const Op& op) {
  std::string name = OpName(op);
  MutexLock lock(&mutex_);
  last_operation_ = std::move(name);
}

void World::AddSleeper(Sleeper* sleeper) {
  MutexLock lock(&sleepers_mutex_);
  sleepers_.insert(sleeper);
}

void World::RemoveSleeper(Sleeper* sleeper) {
  MutexLock lock(&sleepers_mutex_);
  sleepers_.erase(sleeper);
}

void World::WakeSleepers() {
  MutexLock lock(&sleepers_mutex_);
  for (Sleeper* sleeper : sleepers_) sleeper->Wake();
}

void World::AddCallback(const void* owner, std::function<void(const absl::Status&)> callback) {
  {
    MutexLock lock(&mutex_);
    callbacks_.emplace(owner, std::move(callback));
  }
  WakeMonitor();  // The epoch may be over already.
}

void World::RemoveCallbacks(const void* owner) {
  MutexLock lock(&mutex_);
  callbacks_.erase(owner);
  while (callbacks_run_) callbacks_done_.Wait(&mutex_);
}

void World::WakeMonitor() {
  const uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
}

// ---- The monitor thread.

void World::RunMonitor() {
  const int64_t timeout_ns = absl::ToInt64Nanoseconds(options_.heartbeat_timeout);
  const int64_t beat_ns = std::max<int64_t>(timeout_ns / kBeatsPerTimeout, 1'000'000);
  int64_t next_beat_ns = 0;
  int64_t looked_ns = NowNs();
  int64_t farewell_ns = kNeverNs;
  while (true) {
    FlushPeers();
    std::vector<pollfd> entries = {{wake_.get(), POLLIN, 0}};
    std::vector<int> ranks = {-1};
    for (int rank = 0; rank < options_.size; ++rank) {
      const Peer& peer = *peers_[rank];
      if (!peer.open) continue;
      const bool blocked = peer.control->HasUnsent() && !peer.finished;
      entries.push_back({peer.control->fd(), static_cast<short>(blocked ? POLLIN | POLLOUT : POLLIN), 0});
      ranks.push_back(rank);
    }
    (void)poll(entries.data(), entries.size(), PollTimeoutMs(std::min(next_beat_ns, farewell_ns)));
    uint64_t count = 0;
    (void)!read(wake_.get(), &count, sizeof count);
    for (size_t i = 1; i < entries.size(); ++i) {
      if ((entries[i].revents & ~POLLOUT) != 0) ReadPeer(ranks[i]);
    }
    const int64_t now_ns = NowNs();
    // After a pause of this process itself (a stop, a suspended machine) the silence was ours.
    if (now_ns - looked_ns > beat_ns + timeout_ns / 2) {
      for (const auto& peer : peers_) peer->heard_ns = now_ns;
    }
    looked_ns = now_ns;
    if (now_ns >= next_beat_ns) {
      next_beat_ns = now_ns + beat_ns;
      if (!Ended()) SendHeartbeats();
    }
    if (!Ended() && !leaving_.load(std::memory_order_acquire)) CheckSilence(now_ns);
    if (Ended()) RunCallbacks();
    bool closing = false;
    {
      MutexLock lock(&mutex_);
      closing = closing_;
    }
    if (closing && farewell_ns == kNeverNs) farewell_ns = now_ns + kFarewellNs;
    if (closing && (AllClosed() || now_ns >= farewell_ns)) return;
  }
}

bool World::AllClosed() const {
  return std::none_of(peers_.begin(), peers_.end(), [](const auto& peer) { return peer->open; });
}

void World::FlushPeers() {
  bool closing = false;
  {
    MutexLock lock(&mutex_);
    closing = closing_;
  }
  for (const auto& peer : peers_) {
    if (!peer->open || peer->finished) continue;
    // A broken link also reads as ended, with whatever the peer said last before that.
    if (!peer->control->Flush().ok()) {
      peer->finished = true;
    } else if ((closing || peer->said_last) && !peer->control->HasUnsent()) {
      // Answer the last words with an end of file, so that who waits for us can go.
      peer->control->ShutdownWrite();
      peer->finished = true;
    }
  }
}

void World::ReadPeer(int rank) {
  Peer& peer = *peers_[rank];
  std::vector<ControlMessage> messages;
  const absl::Status status = peer.control->Read(&messages);
  peer.heard_ns = NowNs();
  for (ControlMessage& message : messages) HandleMessage(rank, std::move(message));
  if (status.ok()) return;
  peer.open = false;
  // It may be waiting for our end of the link.
  (void)peer.control->Flush();
  peer.control->ShutdownWrite();
  peer.finished = true;
  if (!peer.said_last && !leaving_.load(std::memory_order_acquire)) {
    (void)End(absl::StrCat(RankName(rank), ": ", status.message()));
  }
}

void World::HandleMessage(int rank, ControlMessage message) {
  Peer& peer = *peers_[rank];
  WireReader reader(message.body);
  switch (message.type) {
    case ControlType::kHeartbeat:
      peer.last_operation = std::move(message.body);
      return;
    case ControlType::kAbort:
      peer.said_last = true;
      (void)End(message.body);
      return;
    case ControlType::kBye:
      peer.said_last = true;
      peer.left.store(true, std::memory_order_release);
      WakeSleepers();
      return;
    case ControlType::kSegment: {
      const uint64_t id = reader.U64();
      const auto bytes = static_cast<int64_t>(reader.U64());
      const absl::Status status = memory_->AddPeerSegment(rank, id, bytes, std::move(message.fd));
      if (!status.ok()) {
        (void)End(absl::StrCat("rank ", options_.rank, " cannot map memory of ", RankName(rank), ": ",
                               status.message()));
      }
      return;
    }
    case ControlType::kFree:
      memory_->RemovePeerSegment(rank, reader.U64());
      return;
  }
}

void World::SendHeartbeats() {
  std::string body;
  {
    MutexLock lock(&mutex_);
    body = last_operation_;
  }
  for (const auto& peer : peers_) {
    // Whoever has unread words of ours need not be told more often.
    if (peer->open && !peer->finished && !peer->control->HasUnsent()) {
      peer->control->Push({ControlType::kHeartbeat, body, Fd()});
    }
  }
}

void World::CheckSilence(int64_t now_ns) {
  const int64_t timeout_ns = absl::ToInt64Nanoseconds(options_.heartbeat_timeout);
  for (int rank = 0; rank < options_.size; ++rank) {
    const Peer& peer = *peers_[rank];
    if (!peer.open || peer.said_last || now_ns - peer.heard_ns < timeout_ns) continue;
    const std::string last =
        peer.last_operation.empty() ? "" : absl::StrCat(" (last: ", peer.last_operation, ")");
    (void)End(
        absl::StrFormat("%s: silent for %.1f s%s", RankName(rank), (now_ns - peer.heard_ns) * 1e-9, last));
    return;
  }
}

void World::RunCallbacks() {
  std::vector<std::function<void(const absl::Status&)>> to_run;
  absl::Status cause;
  {
    MutexLock lock(&mutex_);
    cause = cause_;
    for (auto& [owner, callback] : callbacks_) to_run.push_back(std::move(callback));
    callbacks_.clear();
    callbacks_run_ = !to_run.empty();
  }
  for (const auto& callback : to_run) callback(cause);
  MutexLock lock(&mutex_);
  callbacks_run_ = false;
  callbacks_done_.NotifyAll();
}

}  // namespace shoal
