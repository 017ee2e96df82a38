#include "collectives/engine/tcp/data_mesh.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "collectives/engine/recent.h"
#include "collectives/engine/tcp/data_flow.h"
#include "collectives/engine/tcp/data_port.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Per flow and turn, so that no peer and no group starves another.
constexpr int64_t kReadBudget = 1 << 20, kWriteBudget = 1 << 20;
constexpr size_t kDirectFlows = 4;  // Up to here every socket is asked, without asking epoll first.
constexpr int kReadyMax = 64;
// A sleeping thread's wake-up costs 25 us and more: waiting begins with asking again and again, which goes on
// longer when it pays. Others that want the core get it in between.
constexpr int64_t kSpinMaxNs = 100'000, kSpinMinNs = 5'000;
// How long who moves bytes for all steps aside at most for those who want the lock.
constexpr int64_t kLetInNs = 200'000;
constexpr int64_t kSleepMaxNs = 50'000'000;  // Ends are also announced by Wake; this bounds a lost one.
// How long the control connection has to say why a peer's data connections closed.
constexpr int64_t kGraceNs = 500'000'000;
constexpr int64_t kEarlyGroupsMax = 4096;
constexpr size_t kClosedGroupsMax = 1 << 16;
constexpr uint64_t kWakeTag = ~uint64_t{0};
constexpr char kLeft[] = "nothing is sent to it any more: this process has left the epoch";

}  // namespace

struct DataMesh::Impl {
  struct Flow final : DataFlow::Sink {
    Flow(Impl* mesh, int rank, Fd socket, uint64_t epoch)
        : mesh(mesh), rank(rank), bytes(std::move(socket), epoch) {}
    absl::StatusOr<std::byte*> OnHeader(const DataHeader& header) override;
    void OnPayload(const DataHeader& header) override;
    void OnSent(void* owner, const DataHeader& header) override;

    Impl* const mesh;
    const int rank;
    DataFlow bytes;
  };
  struct Peer {
    std::vector<Flow*> flows;
    int64_t came_ns = 0;    // When bytes came last, once MayBeUnderWay has been asked.
    absl::Status status;    // Why nothing is sent to it any more.
    int64_t closed_ns = 0;  // When that began; what it had sent before is still read.
  };

  explicit Impl(uint64_t epoch) { shared.epoch = epoch; }
  absl::Status Start(std::vector<DataPeer> data_peers);

  Port* Find(uint64_t group);
  void Remove(uint64_t group);
  // Lets go of all memory of a failed port.
  void Detach(Port* port);
  void DetachFailed(Port* port) {
    if (!port->failure.ok() && !port->detached) Detach(port);
  }
  // What follows from the state of the world: the group's end, a peer that is gone.
  void CheckPort(Port* port);
  void ClosePeer(int rank, const absl::Status& status);

  // Move what can be moved now; true when something was.
  bool Pump();
  void EmptyOutboxes(int64_t* moved);
  void ListDirty(int rank);
  void PumpOut(int rank, int64_t* moved);
  enum class Wanted : uint8_t { kSmall, kAny };
  bool NextFrame(int rank, Wanted wanted, DataFlow::Frame* frame);
  void ReadFlow(Flow* flow, int64_t* moved);
  int PollFlows(int64_t timeout_ns, epoll_event* ready);
  void HandleReady(const epoll_event* ready, int count, int64_t* moved);
  void ArmBlocked();
  void WakeWaiters();

  bool Ready(const Port* port) const;
  void LetIn() ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void Lead(Port* port, int64_t until_ns) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void Sleep(Port* port, int64_t until_ns) ABSL_NO_THREAD_SAFETY_ANALYSIS;
  void WriteWake() const;

  Mutex mutex;
  std::atomic<int> knocking{0};  // Threads that wait for the mutex, but for those in `waiters`.
  Port::Shared shared;
  Fd epoll, wake;
  std::vector<Peer> peers;
  std::vector<std::unique_ptr<Flow>> flows;
  size_t open_flows = 0;
  bool some_closed = false, left = false;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Port>> ports;
  struct Closed {};
  Recent<Closed> closed_groups{kClosedGroupsMax};  // What still comes for them is thrown away.
  Port* leader = nullptr;  // Whose thread asks the sockets; the other waiting threads sleep meanwhile.
  bool asleep = false;     // The leader, in the kernel.
  std::vector<Port*> waiters;
  std::vector<int> emptied;  // Of EmptyOutboxes.
  int64_t spin_ns = kSpinMaxNs;
};

// The lock of a call. A mutex is not fair: the leader, which takes it again and again, must know that somebody waits.
class ABSL_SCOPED_LOCKABLE DataMesh::Visit {
 public:
  explicit Visit(Impl* impl) ABSL_EXCLUSIVE_LOCK_FUNCTION(impl->mutex) : impl_(impl) {
    impl_->knocking.fetch_add(1, std::memory_order_relaxed);
    impl_->mutex.Lock();
    impl_->knocking.fetch_sub(1, std::memory_order_relaxed);
  }
  ~Visit() ABSL_UNLOCK_FUNCTION() { impl_->mutex.Unlock(); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  Impl* const impl_;
};

// ---- Flows: frames to ports.

absl::StatusOr<std::byte*> DataMesh::Impl::Flow::OnHeader(const DataHeader& header) {
  Port* port = mesh->Find(header.group);
  if (port == nullptr) {
    if (mesh->closed_groups.Find(header.group) != nullptr) return nullptr;
    const auto early = [](const auto& entry) { return entry.second->life == nullptr; };
    if (std::count_if(mesh->ports.begin(), mesh->ports.end(), early) >= kEarlyGroupsMax)
      return absl::DataLossError("speaks of too many groups that this rank does not have");
    port = (mesh->ports[header.group] = std::make_unique<Port>(&mesh->shared, header.group)).get();
  }
  absl::StatusOr<std::byte*> into = port->OnHeader(rank, header);
  mesh->DetachFailed(port);
  return into;
}

void DataMesh::Impl::Flow::OnPayload(const DataHeader& header) {
  Port* port = mesh->Find(header.group);
  if (port == nullptr) return;
  port->OnPayload(rank, header);
  mesh->DetachFailed(port);
}

void DataMesh::Impl::Flow::OnSent(void* owner, const DataHeader& header) {
  auto* out = static_cast<Port::Outgoing*>(owner);
  out->port->OnSent(out, header);
}

// ---- Peers.

absl::Status DataMesh::Impl::Start(std::vector<DataPeer> data_peers) {
  epoll = Fd(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll.valid()) return ErrnoStatus(errno, "epoll_create1");
  wake = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake.valid()) return ErrnoStatus(errno, "eventfd");
  epoll_event event = {};
  event.events = EPOLLIN;
  event.data.u64 = kWakeTag;
  if (epoll_ctl(epoll.get(), EPOLL_CTL_ADD, wake.get(), &event) != 0) return ErrnoStatus(errno, "epoll_ctl");
  peers.resize(data_peers.size());
  shared.outboxes = std::vector<Port::Outbox>(data_peers.size());
  for (size_t rank = 0; rank < data_peers.size(); ++rank) {
    shared.names.push_back(std::move(data_peers[rank].name));
    if (data_peers[rank].flows.empty()) peers[rank].status = absl::InternalError("no data connection");
    for (Fd& socket : data_peers[rank].flows) {
      event.data.u64 = flows.size();
      if (epoll_ctl(epoll.get(), EPOLL_CTL_ADD, socket.get(), &event) != 0) return ErrnoStatus(errno, "epoll_ctl");
      if (peers[rank].flows.empty() && data_peers[rank].flows.size() > 1) SendUrgently(socket.get());  // See PumpOut.
      flows.push_back(std::make_unique<Flow>(this, static_cast<int>(rank), std::move(socket), shared.epoch));
      peers[rank].flows.push_back(flows.back().get());
    }
  }
  open_flows = flows.size();
  return absl::OkStatus();
}

DataMesh::Port* DataMesh::Impl::Find(uint64_t group) {
  const auto found = ports.find(group);
  return found == ports.end() ? nullptr : found->second.get();
}

void DataMesh::Impl::Detach(Port* port) {
  for (const auto& flow : flows) flow->bytes.Detach(port->key);
  port->detached = true;
}

void DataMesh::Impl::Remove(uint64_t group) {
  (void)closed_groups.Add(group, {});
  Port* const port = Find(group);
  if (port == nullptr) return;
  port->Fail(absl::CancelledError("the group is closed"));
  Detach(port);
  ports.erase(group);
}

void DataMesh::Impl::ClosePeer(int rank, const absl::Status& status) {
  Peer& peer = peers[rank];
  if (!peer.status.ok()) return;
  peer.status = status;
  peer.closed_ns = NowNs();
  some_closed = true;
  if (!absl::IsDataLoss(status)) return;
  for (Flow* flow : peer.flows) {
    if (flow->bytes.open()) --open_flows;
    flow->bytes.Close();
  }
}

void DataMesh::Impl::CheckPort(Port* port) {
  if (!port->failure.ok() || port->life == nullptr) return DetachFailed(port);
  if (port->life->Ended()) {
    port->Fail(port->life->status());
    return Detach(port);
  }
  if (!some_closed) return;
  for (const int rank : port->life->ranks()) {
    const Peer& peer = peers[rank];
    if (peer.status.ok() || !port->Pending(rank)) continue;
    // Nonsense needs no second witness. Of a closed connection the control connection knows more, in a moment.
    if (!absl::IsDataLoss(peer.status) && NowNs() - peer.closed_ns < kGraceNs) continue;
    port->Fail(Annotate(peer.status, shared.names[rank]));
    return Detach(port);
  }
}

// ---- Bytes.

bool DataMesh::Impl::NextFrame(int rank, Wanted wanted, DataFlow::Frame* frame) {
  Port::Outbox& box = shared.outboxes[rank];
  if (!box.small.empty()) {
    *frame = std::move(box.small.front());
    box.small.pop_front();
    return true;
  }
  if (box.large.empty() || wanted == Wanted::kSmall) return false;
  *frame = box.large.front()->TakeSlice(rank);
  return true;
}

void DataMesh::Impl::ListDirty(int rank) {
  if (!shared.outboxes[rank].listed) shared.dirty.push_back(rank);
  shared.outboxes[rank].listed = true;
}

void DataMesh::Impl::PumpOut(int rank, int64_t* moved) {
  Peer& peer = peers[rank];
  for (Flow* flow : peer.flows) {
    // Of several flows the first is kept free of large messages: what is small does not wait behind them.
    const Wanted wanted = flow == peer.flows[0] && peer.flows.size() > 1 ? Wanted::kSmall : Wanted::kAny;
    const int64_t before = *moved;
    while (peer.status.ok() && flow->bytes.open()) {
      DataFlow::Frame frame;
      while (!flow->bytes.Full() && NextFrame(rank, wanted, &frame)) flow->bytes.Add(std::move(frame));
      if (flow->bytes.Empty()) break;
      const absl::Status status = flow->bytes.Write(flow, moved);
      if (!status.ok()) ClosePeer(rank, left ? absl::UnavailableError(kLeft) : status);
      if (flow->bytes.blocked()) break;
      if (*moved - before < kWriteBudget) continue;
      ListDirty(rank);  // A peer that reads as fast as this rank writes never blocks it.
      break;
    }
  }
}

void DataMesh::Impl::ReadFlow(Flow* flow, int64_t* moved) {
  if (!flow->bytes.open()) return;
  const int64_t before = *moved;
  const absl::StatusOr<DataFlow::Progress> progress = flow->bytes.Read(flow, kReadBudget, moved);
  // The grace of a peer that closed begins behind the last that it had sent.
  Peer& peer = peers[flow->rank];
  if (!peer.status.ok() && *moved > before) peer.closed_ns = NowNs();
  if (peer.came_ns != 0 && *moved > before) peer.came_ns = NowNs();
  if (progress.ok() && *progress != DataFlow::Progress::kEnd) return;
  ClosePeer(flow->rank, progress.ok() ? absl::UnavailableError("data connection closed") : progress.status());
  *moved += 1;
  // The peer's other flows may still have what it sent before.
  if (flow->bytes.open()) --open_flows;
  flow->bytes.Close();
}

void DataMesh::Impl::ArmBlocked() {
  for (size_t i = 0; i < flows.size(); ++i) {
    DataFlow& bytes = flows[i]->bytes;
    if (!bytes.open() || bytes.armed == bytes.blocked()) continue;
    bytes.armed = bytes.blocked();
    epoll_event event = {};
    event.events = bytes.armed ? EPOLLIN | EPOLLOUT : EPOLLIN;
    event.data.u64 = i;
    (void)epoll_ctl(epoll.get(), EPOLL_CTL_MOD, bytes.fd(), &event);
  }
}

int DataMesh::Impl::PollFlows(int64_t timeout_ns, epoll_event* ready) {
  const timespec timeout = {timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  return epoll_pwait2(epoll.get(), ready, kReadyMax, &timeout, nullptr);
}

void DataMesh::Impl::HandleReady(const epoll_event* ready, int count, int64_t* moved) {
  for (int i = 0; i < count; ++i) {
    if (ready[i].data.u64 == kWakeTag) {
      uint64_t drained = 0;
      (void)!read(wake.get(), &drained, sizeof drained);
      continue;
    }
    Flow* flow = flows[ready[i].data.u64].get();
    if ((ready[i].events & EPOLLOUT) != 0) PumpOut(flow->rank, moved);
    if ((ready[i].events & ~EPOLLOUT) != 0) ReadFlow(flow, moved);
  }
}

void DataMesh::Impl::EmptyOutboxes(int64_t* moved) {
  emptied.swap(shared.dirty);  // What is listed meanwhile has had its turn.
  for (int rank : emptied) shared.outboxes[rank].listed = false;
  for (int rank : emptied) PumpOut(rank, moved);
  emptied.clear();
}

bool DataMesh::Impl::Pump() {
  int64_t moved = 0;
  EmptyOutboxes(&moved);
  if (open_flows <= kDirectFlows) {
    for (const auto& flow : flows) {
      if (flow->bytes.blocked()) PumpOut(flow->rank, &moved);
      ReadFlow(flow.get(), &moved);
    }
  } else {
    ArmBlocked();
    epoll_event ready[kReadyMax];
    HandleReady(ready, PollFlows(0, ready), &moved);
  }
  EmptyOutboxes(&moved);  // What came may have made something ready to be sent.
  if (moved > 0) WakeWaiters();
  return moved > 0;
}

// ---- Waiting.

void DataMesh::Impl::WakeWaiters() {
  for (Port* port : waiters) {
    if (Ready(port)) port->changed.NotifyOne();
  }
  if (!asleep) return;
  // This thread has moved the bytes of the one that leads, left some to be sent, or filled a socket that only the kernel
  // can empty.
  ArmBlocked();
  if (Ready(leader) || !shared.dirty.empty()) WriteWake();
}

bool DataMesh::Impl::Ready(const Port* port) const {
  return !port->events.empty() || port->woken || !port->failure.ok() || port->life->Ended();
}

void DataMesh::Impl::WriteWake() const {
  const uint64_t one = 1;
  (void)!write(wake.get(), &one, sizeof one);
}

// As long as bytes keep coming nothing else would make the leader let go of the lock.
void DataMesh::Impl::LetIn() {
  const auto wanted = [this] {
    return knocking.load(std::memory_order_relaxed) > 0 ||
           std::any_of(waiters.begin(), waiters.end(), [this](const Port* port) { return Ready(port); });
  };
  for (const int64_t until_ns = NowNs() + kLetInNs; wanted() && NowNs() < until_ns;) {
    mutex.Unlock();
    (void)sched_yield();
    mutex.Lock();
  }
}

void DataMesh::Impl::Lead(Port* port, int64_t until_ns) {
  const int64_t begin_ns = NowNs();
  int64_t now_ns = begin_ns;
  bool spun_out = false;
  while (!Ready(port) && now_ns < until_ns) {
    const bool moved = Pump();
    now_ns = NowNs();
    if (moved) {
      LetIn();
      continue;
    }
    if (now_ns - begin_ns < spin_ns) {
      mutex.Unlock();
      (void)sched_yield();
      mutex.Lock();
      continue;
    }
    spun_out = true;
    ArmBlocked();
    epoll_event ready[kReadyMax];
    asleep = true;
    mutex.Unlock();
    const int count = PollFlows(std::clamp<int64_t>(until_ns - now_ns, 0, kSleepMaxNs), ready);
    mutex.Lock();
    asleep = false;
    int64_t bytes = 0;
    HandleReady(ready, count, &bytes);
    if (bytes > 0) WakeWaiters();
    now_ns = NowNs();
    CheckPort(port);
  }
  // Longer where it would have sufficed, shorter where it was in vain.
  const int64_t waited_ns = now_ns - begin_ns;
  spin_ns = spun_out && waited_ns > 2 * kSpinMaxNs ? std::max(spin_ns / 2, kSpinMinNs)
                                                   : std::min(2 * spin_ns, kSpinMaxNs);
}

void DataMesh::Impl::Sleep(Port* port, int64_t until_ns) {
  waiters.push_back(port);
  const int64_t bound_ns = std::min(until_ns, NowNs() + kSleepMaxNs);
  // The leader announces what it found; when it leaves, one of the others takes its place.
  while (!Ready(port) && leader != nullptr && port->changed.WaitUntil(&mutex, SteadyTime(bound_ns))) {
  }
  std::erase(waiters, port);
}

// ---- The mesh.

DataMesh::DataMesh(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

void DataMesh::Leave() {
  Visit lock(impl_.get());
  for (const auto& [key, port] : impl_->ports) {
    if (port->life != nullptr && !port->life->Ended() && !port->Idle()) return;
  }
  int64_t moved = 0;
  impl_->EmptyOutboxes(&moved);
  impl_->left = true;
  for (size_t rank = 0; rank < impl_->peers.size(); ++rank) {
    const Port::Outbox& box = impl_->shared.outboxes[rank];
    if (!box.small.empty() || !box.large.empty()) continue;
    for (Impl::Flow* flow : impl_->peers[rank].flows) {
      if (flow->bytes.open() && flow->bytes.Empty()) flow->bytes.EndWrites();
    }
  }
}

void DataMesh::AwaitDelivery(const std::vector<int>& dead, int64_t patience_ns) {
  Visit lock(impl_.get());
  std::vector<DataFlow*> flows;
  for (const auto& flow : impl_->flows) {
    if (std::find(dead.begin(), dead.end(), flow->rank) == dead.end()) flows.push_back(&flow->bytes);
  }
  shoal::AwaitDelivery(flows, patience_ns);
}

DataMesh::~DataMesh() {
  Visit lock(impl_.get());
  impl_->ports.clear();
  for (const auto& flow : impl_->flows) flow->bytes.Close();
}

absl::StatusOr<std::unique_ptr<DataMesh>> DataMesh::Create(uint64_t epoch, std::vector<DataPeer> peers) {
  auto impl = std::make_unique<Impl>(epoch);
  SHOAL_RETURN_IF_ERROR(impl->Start(std::move(peers)), "the data connections");
  return std::unique_ptr<DataMesh>(new DataMesh(std::move(impl)));
}

DataMesh::Port* DataMesh::Open(const GroupLife* life) {
  Visit lock(impl_.get());
  Port* port = impl_->Find(life->key());
  if (port == nullptr) port = (impl_->ports[life->key()] = std::make_unique<Port>(&impl_->shared, life->key())).get();
  SHOAL_CHECK(port->life == nullptr) << "group " << life->key() << " is open already";
  port->life = life;
  return port;
}

void DataMesh::Close(Port* port) {
  Visit lock(impl_.get());
  impl_->Remove(port->key);
}

void DataMesh::Drop(uint64_t group) {
  Visit lock(impl_.get());
  const Port* const port = impl_->Find(group);
  if (port == nullptr || port->life == nullptr) impl_->Remove(group);
}

void DataMesh::Send(Port* port, int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) {
  Visit lock(impl_.get());
  const int rank = port->life->ranks()[member];
  port->Send(rank, id, data, bytes, token);
  impl_->DetachFailed(port);
  // It leaves with the next Poll or Wait, and behind the small messages until then: some tell the peer to send.
}

void DataMesh::Receive(Port* port, int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token,
                       Into whose) {
  Visit lock(impl_.get());
  port->Receive(port->life->ranks()[member], id, into, bytes, token, whose);
  impl_->DetachFailed(port);
}

void DataMesh::Release(Port* port, const std::byte* view) {
  Visit lock(impl_.get());
  port->Release(view);
}

void DataMesh::Finish(Port* port, MessageId id) {
  Visit lock(impl_.get());
  port->Finish(id);
  impl_->DetachFailed(port);
}

void DataMesh::Probe(Port* port, int member, MessageId id) {
  Visit lock(impl_.get());
  port->Probe(port->life->ranks()[member], id);
}

absl::Status DataMesh::Poll(Port* port, std::vector<Channel::Event>* events) {
  Visit lock(impl_.get());
  impl_->CheckPort(port);
  int64_t moved = 0;
  if (!port->events.empty()) {
    impl_->EmptyOutboxes(&moved);  // There is something to do already.
    if (moved > 0) impl_->WakeWaiters();
  } else if (port->failure.ok()) {
    impl_->Pump();
  }
  impl_->DetachFailed(port);
  if (!port->failure.ok()) return port->failure;
  events->insert(events->end(), port->events.begin(), port->events.end());
  port->events.clear();
  return absl::OkStatus();
}

absl::Status DataMesh::Wait(Port* port, int64_t until_ns) {
  Impl& impl = *impl_;
  Visit lock(&impl);
  while (true) {
    impl.CheckPort(port);
    if (impl.Ready(port) || NowNs() >= until_ns) break;
    if (impl.leader != nullptr) {
      impl.Sleep(port, until_ns);
      continue;
    }
    impl.leader = port;
    impl.Lead(port, until_ns);
    impl.leader = nullptr;
    if (!impl.waiters.empty()) impl.waiters.front()->changed.NotifyOne();
  }
  port->woken = false;
  return port->failure;
}

void DataMesh::Wake(Port* port) {
  Visit lock(impl_.get());
  port->woken = true;
  port->changed.NotifyOne();
  if (impl_->leader == port && impl_->asleep) impl_->WriteWake();
}

std::vector<int> DataMesh::Awaited(const Port* port) const {
  Visit lock(impl_.get());
  std::vector<int> members;
  const std::vector<int>& ranks = port->life->ranks();
  for (size_t member = 0; member < ranks.size(); ++member) {
    if (port->Pending(ranks[member])) members.push_back(static_cast<int>(member));
  }
  return members;
}

bool DataMesh::MayBeUnderWay(Port* port, int member) {
  Visit lock(impl_.get());
  Impl::Peer& peer = impl_->peers[port->life->ranks()[member]];
  if (peer.came_ns == 0) peer.came_ns = NowNs();
  if (NowNs() - peer.came_ns >= kGraceNs) {
    // Perhaps this process had no core, and it has come long ago.
    int64_t moved = 0;
    for (Impl::Flow* flow : peer.flows) impl_->ReadFlow(flow, &moved);
    if (moved > 0) impl_->WakeWaiters();
  }
  // Connections end behind what was sent. Who left may keep his for a while.
  const bool open =
      std::any_of(peer.flows.begin(), peer.flows.end(), [](const Impl::Flow* flow) { return flow->bytes.open(); });
  return open && NowNs() - peer.came_ns < kGraceNs;
}

uint64_t DataMesh::Reached(const Port* port, int member) const {
  Visit lock(impl_.get());
  return port->Reached(port->life->ranks()[member]);
}

Mismatch DataMesh::MismatchOf(const Port* port) const {
  Visit lock(impl_.get());
  Mismatch mismatch = port->mismatch;
  const std::vector<int>& ranks = port->life->ranks();
  mismatch.member = static_cast<int>(std::find(ranks.begin(), ranks.end(), mismatch.member) - ranks.begin());
  return mismatch;
}

}  // namespace shoal
