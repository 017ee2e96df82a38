#include "collectives/engine/world.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "collectives/engine/tcp/data_mesh.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/wire.h"
#include "runtime/base/check.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// How long a closing process waits for its peers to hear its last words, before the kernel may throw them away. Who closes
// what has ended is in a hurry to recover, and its peers are too.
constexpr int64_t kFarewellNs = 1'000'000'000;
constexpr int64_t kHastyFarewellNs = 5'000'000;
// How long a peer that lives may take nothing of the data that it has not got yet; while the world lives it is as long as a
// peer may be silent.
constexpr int64_t kHastyDeliveryNs = 200'000'000;

}  // namespace

// ---- The lives of groups

class World::Life final : public GroupLife {
 public:
  Life(World* world, uint64_t key, std::vector<int> ranks, int index, std::vector<uint64_t> ancestors)
      : GroupLife(key, std::move(ranks), index),
        world_(world),
        anchor_(world->anchor_),
        ancestors_(std::move(ancestors)) {}
  ~Life() override {
    MutexLock lock(&anchor_->mutex);
    if (anchor_->world != nullptr) anchor_->world->Forget(number_);
  }

  absl::Status End(const std::string& cause) override { return world_->EndGroup(*this, cause); }
  bool ProcessDied(int member) const override { return world_->ProcessDied(ranks()[member]); }

  using GroupLife::Finish;
  using GroupLife::RunCallbacks;
  using GroupLife::WakeSleepers;

  uint64_t number() const { return number_; }
  void set_number(uint64_t number) { number_ = number; }
  const std::vector<uint64_t>& ancestors() const { return ancestors_; }

  // When the note changed last, as far as the monitor has seen.
  uint64_t noted = 0;
  int64_t noted_ns = 0;

 protected:
  void RunCallbacksSoon() override {
    if (world_->monitor_.joinable()) {
      world_->WakeMonitor();
    } else {
      RunCallbacks();
    }
  }

 private:
  World* const world_;
  const std::shared_ptr<Anchor> anchor_;
  const std::vector<uint64_t> ancestors_;  // Keys.
  uint64_t number_ = 0;                    // The core's.
};

std::shared_ptr<World::Life> World::NewLife(uint64_t key, std::vector<int> ranks, int index,
                                            std::vector<uint64_t> ancestors) {
  auto life = std::make_shared<Life>(this, key, ranks, index, ancestors);
  std::string over;
  MutexLock lock(&mutex_);
  life->set_number(core_->AddGroup(key, std::move(ranks), std::move(ancestors), &over));
  lives_[life->number()] = {life.get(), life};
  if (over.empty()) return life;
  life->Finish(absl::AbortedError(over));
  if (mesh_ != nullptr) mesh_->Drop(key);
  return life;
}

std::shared_ptr<GroupLife> World::NewGroup(uint64_t key, std::vector<int> ranks, int index,
                                           const GroupLife* parent) {
  std::vector<uint64_t> ancestors;
  if (parent != nullptr) {
    const auto* life = dynamic_cast<const Life*>(parent);
    SHOAL_CHECK(life != nullptr) << "a group of another world";
    ancestors = life->ancestors();
    ancestors.push_back(life->key());
  }
  return NewLife(key, std::move(ranks), index, std::move(ancestors));
}

void World::Forget(uint64_t group) {
  MutexLock lock(&mutex_);
  core_->RemoveGroup(group);
  lives_.erase(group);
}

absl::Status World::EndGroup(const Life& life, const std::string& cause) {
  {
    MutexLock lock(&mutex_);
    EpochCore::Effects effects;
    core_->End(life.number(), cause, &effects);
    Apply(effects);
  }
  if (!monitor_.joinable()) RunCallbacks();
  return life.status();
}

absl::Status World::End(const std::string& cause) {
  {
    MutexLock lock(&mutex_);
    EpochCore::Effects effects;
    core_->EndAll(cause, &effects);
    Apply(effects);
  }
  if (!monitor_.joinable()) RunCallbacks();
  return status();
}

void World::Apply(const EpochCore::Effects& effects) {
  if (!effects.died.empty()) {
    std::vector<Deaths::Death> deaths;
    for (const auto& [rank, cause] : core_->dead()) deaths.push_back({rank, cause, ProcessDied(rank)});
    deaths_->Set(std::move(deaths));
  }
  for (const auto& [group, cause] : effects.ended) lives_.at(group).raw->Finish(absl::AbortedError(cause));
  for (uint64_t key : effects.over) {
    if (mesh_ != nullptr) mesh_->Drop(key);
  }
  for (int rank : effects.left) peers_[rank]->left.store(true, std::memory_order_release);
  std::set<int> urgent;
  for (const auto& [rank, type, body] : effects.messages) {
    ControlLink& link = *peers_[rank]->control;
    // Whoever has unread words of ours need not be told more often.
    if (type == ControlType::kHeartbeat && link.HasUnsent()) continue;
    link.Push({type, body, Fd()});
    if (type != ControlType::kHeartbeat) urgent.insert(rank);
  }
  for (int rank : effects.closing) peers_[rank]->closing.store(true, std::memory_order_release);
  if (!effects.ended.empty() || !effects.left.empty() || !effects.died.empty()) {
    // The root has all ranks, so it is among them.
    for (auto& [number, entry] : lives_) {
      const std::vector<int>& ranks = entry.raw->ranks();
      const bool concerned = entry.raw == root_.get() ||
                             std::any_of(effects.left.begin(), effects.left.end(), [&](int rank) {
                               return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
                             });
      if (concerned) entry.raw->WakeSleepers();
    }
  }
  // Verdicts do not wait until the monitor gets a core. When a link fails here the monitor finds out.
  for (int rank : urgent) (void)peers_[rank]->control->Flush();
  WakeMonitor();
}

void World::RunCallbacks() {
  std::vector<std::shared_ptr<Life>> ended;
  {
    MutexLock lock(&mutex_);
    for (auto& [number, entry] : lives_) {
      if (!entry.raw->Ended()) continue;
      if (std::shared_ptr<Life> life = entry.shared.lock()) ended.push_back(std::move(life));
    }
  }
  for (const auto& life : ended) life->RunCallbacks();
}

// ---- Start and end

World::World(const WorldOptions& options) : options_(options) {
  MutexLock lock(&anchor_->mutex);
  anchor_->world = this;
}

absl::StatusOr<std::shared_ptr<World>> World::Connect(const WorldOptions& options) {
  std::vector<PeerLink> links;
  if (options.size > 1) {
    SHOAL_ASSIGN_OR_RETURN(links, FormMesh(options));
  }
  return Create(options, std::move(links));
}

absl::StatusOr<std::shared_ptr<World>> World::Create(const WorldOptions& options,
                                                     std::vector<PeerLink> links) {
  if (options.size == 1 && links.empty()) {
    links.emplace_back();
    links[0].pid = getpid();
    char name[256] = "";
    (void)gethostname(name, sizeof name - 1);
    links[0].host_name = name;
  }
  SHOAL_CHECK(static_cast<int>(links.size()) == options.size);
  std::shared_ptr<World> world(new World(options));
  SHOAL_RETURN_IF_ERROR(world->Start(std::move(links)));
  return world;
}

absl::Status World::Start(std::vector<PeerLink> links) {
  wake_ = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake_.valid()) return ErrnoStatus(errno, "eventfd");
  std::vector<DataPeer> data(links.size());
  EpochCore::Options core;
  core.rank = options_.rank;
  core.heartbeat_timeout_ns = absl::ToInt64Nanoseconds(options_.heartbeat_timeout);
  for (size_t rank = 0; rank < links.size(); ++rank) {
    auto peer = std::make_unique<Peer>();
    data[rank].flows = std::move(links[rank].data);
    peer->open = links[rank].control.valid();
    if (peer->open) peer->control = std::make_unique<ControlLink>(std::move(links[rank].control));
    peer->link = std::move(links[rank]);
    peers_.push_back(std::move(peer));
    core.names.push_back(RankName(static_cast<int>(rank)));
    data[rank].name = core.names.back();
  }
  std::vector<int> all(peers_.size());
  for (size_t rank = 0; rank < all.size(); ++rank) all[rank] = static_cast<int>(rank);
  {
    MutexLock lock(&mutex_);
    core_ = std::make_unique<EpochCore>(std::move(core), NowNs());
  }
  root_ = NewLife(kRootKey, std::move(all), options_.rank, {});
  memory_ = std::make_shared<SharedMemory>(options_.size, Announcer());
  if (options_.size == 1) return absl::OkStatus();
  StartWatch();
  if (std::any_of(data.begin(), data.end(), [](const DataPeer& peer) { return !peer.flows.empty(); })) {
    SHOAL_ASSIGN_OR_RETURN(mesh_, DataMesh::Create(static_cast<uint64_t>(options_.epoch), std::move(data)));
  }
  monitor_ = std::thread([this] { RunMonitor(); });
  return absl::OkStatus();
}

// Without it deaths are noticed a little later: nothing to fail for.
void World::StartWatch() {
  if (RanksOnThisHost() == 1) return;
  absl::StatusOr<std::unique_ptr<DeathWatch>> watch =
      DeathWatch::Create([this](int rank) { OnProcessDeath(rank); });
  if (!watch.ok()) {
    SHOAL_LOG(kWarning) << "deaths of peers will be noticed late: " << watch.status().message();
    return;
  }
  watch_ = *std::move(watch);
  for (int rank = 0; rank < options_.size; ++rank) {
    if (peers_[rank]->control == nullptr || !OnThisHost(rank)) continue;
    absl::StatusOr<Fd> sign = watch_->Sign();
    if (sign.ok()) peers_[rank]->control->Push({ControlType::kWatch, "", *std::move(sign)});
  }
}

SharedMemory::Announcer World::Announcer() {
  const auto to_host_mates = [this](const std::function<void(ControlLink*)>& push) {
    for (int rank = 0; rank < options_.size; ++rank) {
      if (peers_[rank]->control != nullptr && OnThisHost(rank)) push(peers_[rank]->control.get());
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

void World::Leave() {
  // Before the goodbye: who has heard that does not take the end of this process for a death.
  if (watch_ != nullptr) watch_->Release();
  {
    MutexLock lock(&mutex_);
    if (core_ == nullptr || leaving_.exchange(true, std::memory_order_acq_rel)) return;
    EpochCore::Effects effects;
    core_->Leave(&effects);
    Apply(effects);
  }
  if (mesh_ != nullptr) mesh_->Leave();
}

absl::Status World::CheckPresent() const {
  if (!Leaving()) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat(RankName(options_.rank), " has left epoch ", static_cast<uint64_t>(options_.epoch)));
}

World::~World() {
  Leave();
  {
    MutexLock lock(&mutex_);
    closing_since_ns_ = NowNs();
  }
  WakeMonitor();
  if (monitor_.joinable()) monitor_.join();
  watch_.reset();
  if (mesh_ != nullptr) {
    const int64_t polite_ns = absl::ToInt64Nanoseconds(options_.heartbeat_timeout);
    mesh_->AwaitDelivery(DeadRanks(), root_->Ended() ? std::min(polite_ns, kHastyDeliveryNs) : polite_ns);
  }
  mesh_.reset();
  root_.reset();
  {
    MutexLock lock(&anchor_->mutex);
    anchor_->world = nullptr;
  }
  // Tensors may outlive the epoch; their end must not reach for links that are gone.
  if (memory_ != nullptr) memory_->Fence();
}

// ---- What is known

std::string World::RankName(int rank) const {
  const PeerLink& link = peers_[rank]->link;
  return absl::StrCat("rank ", rank, " (pid ", link.pid, ", host ", link.host_name, ")");
}

std::string World::RankNames(const std::vector<int>& ranks) const {
  const int64_t now_ns = NowNs();
  MutexLock lock(&mutex_);
  std::vector<std::string> names;
  for (int rank : ranks) {
    names.push_back(absl::StrCat(RankName(rank), " (", core_->LastDid(rank, now_ns), ")"));
  }
  return absl::StrJoin(names, ", ");
}

std::vector<World::Deaths::Death> World::Deaths::Get() const {
  MutexLock lock(&mutex_);
  return deaths_;
}

void World::Deaths::Set(std::vector<Death> deaths) {
  MutexLock lock(&mutex_);
  deaths_ = std::move(deaths);
}

bool World::Deaths::TakeOwnLack() {
  MutexLock lock(&mutex_);
  return std::exchange(own_lack_, false);
}

void World::Deaths::SetOwnLack() {
  MutexLock lock(&mutex_);
  own_lack_ = true;
}

bool World::OneHost(const std::vector<int>& ranks) const {
  return std::all_of(ranks.begin(), ranks.end(),
                     [&](int rank) { return peers_[rank]->link.host == peers_[ranks[0]]->link.host; });
}

int World::RanksOnThisHost() const {
  int count = 0;
  for (int rank = 0; rank < options_.size; ++rank) count += OnThisHost(rank) ? 1 : 0;
  return count;
}

// ---- The watch thread

void World::OnProcessDeath(int rank) {
  peers_[rank]->died.store(true, std::memory_order_release);
  MutexLock lock(&mutex_);
  EpochCore::Effects effects;
  core_->OnLost(rank, "process died", &effects);
  Apply(effects);
}

// ---- The monitor thread

void World::WakeMonitor() {
  const uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
}

void World::RunMonitor() {
  while (true) {
    FlushPeers();
    int64_t until_ns = 0;
    {
      MutexLock lock(&mutex_);
      until_ns = core_->NextTickNs();
      if (closing_since_ns_ != 0) until_ns = std::min(until_ns, FarewellEndNs());
    }
    PollLinks(until_ns);
    const int64_t now_ns = NowNs();
    {
      MutexLock lock(&mutex_);
      EpochCore::Effects effects;
      core_->Tick(now_ns, Doing(now_ns), &effects);
      if (!effects.messages.empty() || !effects.ended.empty()) Apply(effects);
      if (closing_since_ns_ != 0 && (AllClosed() || now_ns >= FarewellEndNs())) return;
    }
    RunCallbacks();
  }
}

int64_t World::FarewellEndNs() const {
  return closing_since_ns_ + (root_->Ended() ? kHastyFarewellNs : kFarewellNs);
}

std::vector<int> World::DeadRanks() const {
  MutexLock lock(&mutex_);
  std::vector<int> ranks;
  for (const auto& [rank, cause] : core_->dead()) ranks.push_back(rank);
  return ranks;
}

// Nobody is left who could still be told.
bool World::AllClosed() const {
  for (int rank = 0; rank < options_.size; ++rank) {
    const bool dead = std::any_of(core_->dead().begin(), core_->dead().end(),
                                  [rank](const auto& entry) { return entry.first == rank; });
    if (peers_[rank]->open && !dead) return false;
  }
  return true;
}

// Sleeps until something comes or until_ns, and takes in what came.
void World::PollLinks(int64_t until_ns) {
  std::vector<pollfd> entries = {{wake_.get(), POLLIN, 0}};
  std::vector<int> ranks = {-1};
  for (int rank = 0; rank < options_.size; ++rank) {
    const Peer& peer = *peers_[rank];
    if (!peer.open) continue;
    const bool blocked = peer.control->HasUnsent() && !peer.finished;
    entries.push_back({peer.control->fd(), static_cast<short>(blocked ? POLLIN | POLLOUT : POLLIN), 0});
    ranks.push_back(rank);
  }
  (void)poll(entries.data(), entries.size(), PollTimeoutMs(until_ns));
  uint64_t count = 0;
  (void)!read(wake_.get(), &count, sizeof count);
  for (size_t i = 1; i < entries.size(); ++i) {
    if ((entries[i].revents & ~POLLOUT) != 0) ReadPeer(ranks[i]);
  }
}

void World::FlushPeers() {
  for (const auto& peer : peers_) {
    // Also who has said all it will waits for our end of the link.
    if (peer->control == nullptr || peer->finished) continue;
    const bool closing = peer->closing.load(std::memory_order_acquire);
    // A broken link also reads as ended, with whatever the peer said last before that.
    if (!peer->control->Flush().ok()) {
      peer->finished = true;
    } else if (closing && !peer->control->HasUnsent()) {
      peer->control->ShutdownWrite();
      peer->finished = true;
    }
  }
}

void World::ReadPeer(int rank) {
  Peer& peer = *peers_[rank];
  std::vector<ControlMessage> messages;
  const absl::Status status = peer.control->Read(&messages);
  for (ControlMessage& message : messages) HandleMessage(rank, std::move(message));
  if (status.ok()) return;
  peer.open = false;
  if (absl::IsResourceExhausted(status)) {
    deaths_->SetOwnLack();
    (void)End(absl::StrCat(RankName(options_.rank), " cannot take what ", RankName(rank),
                           " shares: ", std::string(status.message())));
    return;
  }
  MutexLock lock(&mutex_);
  EpochCore::Effects effects;
  core_->OnLost(rank, std::string(status.message()), &effects);
  Apply(effects);
}

void World::HandleMessage(int rank, ControlMessage message) {
  if (message.type == ControlType::kSegment) {
    AddPeerSegment(rank, std::move(message));
  } else if (message.type == ControlType::kFree) {
    memory_->RemovePeerSegment(rank, WireReader(message.body).U64());
  } else if (message.type == ControlType::kWatch && watch_ != nullptr) {
    const absl::Status status = watch_->Watch(rank, std::move(message.fd));
    if (!status.ok()) SHOAL_LOG(kWarning) << "cannot watch " << RankName(rank) << ": " << status.message();
  }
  MutexLock lock(&mutex_);
  EpochCore::Effects effects;
  core_->OnMessage(rank, message.type, message.body, NowNs(), &effects);
  Apply(effects);
}

void World::AddPeerSegment(int rank, ControlMessage message) {
  WireReader reader(message.body);
  const uint64_t id = reader.U64();
  const auto bytes = static_cast<int64_t>(reader.U64());
  const absl::Status status = memory_->AddPeerSegment(rank, id, bytes, std::move(message.fd));
  if (status.ok()) return;
  if (absl::IsResourceExhausted(status)) deaths_->SetOwnLack();
  (void)End(absl::StrCat(RankName(options_.rank), " cannot map memory of ", RankName(rank), ": ",
                         std::string(status.message())));
}

// The operation that was started last; when none runs, the one that ended last.
EpochCore::Doing World::Doing(int64_t now_ns) {
  EpochCore::Doing doing;
  for (auto& [number, entry] : lives_) {
    Life& life = *entry.raw;
    const OperationNote::Value value = life.note().Read();
    if (value.changes == 0) continue;
    if (value.changes != life.noted) life.noted_ns = now_ns;
    life.noted = value.changes;
    const bool running = value.changes % 2 == 1;
    const bool better = doing.operation.empty() || running > doing.running ||
                        (running == doing.running && life.noted_ns > doing.since_ns);
    if (better) doing = {OpName(value.kind, value.label, value.seq), running, life.noted_ns};
  }
  return doing;
}

}  // namespace shoal
