#include "collectives/membership/seat.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "collectives/membership/endpoint.h"
#include "collectives/membership/setbacks.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/handshake.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kUnsentNs = 5'000'000;      // How often a full connection with the coordinator is tried again.
constexpr int64_t kFarewellNs = 200'000'000;  // How long a leaving member waits for the coordinator to hear it.
constexpr absl::Duration kMeshTimeMin = absl::Seconds(1);

MemberOptions CoreOptions(const MembershipOptions& options) {
  MemberOptions core;
  core.heartbeat_interval = options.heartbeat_interval;
  core.heartbeat_timeout = std::max(options.world.heartbeat_timeout, 3 * options.heartbeat_interval);
  return core;
}

void Wake(const Fd& fd) {
  const uint64_t one = 1;
  (void)!write(fd.get(), &one, sizeof one);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Seat>> Seat::Create(const MembershipOptions& options, Fd coordinator,
                                                   std::function<void(const std::string&)> on_excluded) {
  const SocketAddress local = LocalAddressOf(coordinator.get());
  const SocketAddress remote = PeerAddressOf(coordinator.get());
  std::unique_ptr<Seat> seat(new Seat(options, std::move(coordinator), std::move(on_excluded)));
  SHOAL_RETURN_IF_ERROR(seat->Open(local, remote));
  seat->thread_ = std::thread([raw = seat.get()] { raw->Run(); });
  return seat;
}

Seat::Seat(const MembershipOptions& options, Fd coordinator, std::function<void(const std::string&)> on_excluded)
    : options_(options),
      core_options_(CoreOptions(options)),
      on_excluded_(std::move(on_excluded)),
      first_(std::move(coordinator)) {}

absl::Status Seat::Open(const SocketAddress& local, const SocketAddress& coordinator) {
  const WorldOptions& world = options_.world;
  wake_ = Fd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake_.valid()) return ErrnoStatus(errno, "eventfd");
  SHOAL_ASSIGN_OR_RETURN(dialler_,
                         CoordinatorDialler::Create({options_.coordinators, world.job_id, world.secret}));
  SHOAL_ASSIGN_OR_RETURN(mesh_, Mesh::Create(world));
  SHOAL_ASSIGN_OR_RETURN(doors_, OpenDoors(world.transport, world.interface, coordinator));
  if (doors_.port == 0) return absl::OkStatus();
  SHOAL_ASSIGN_OR_RETURN(addresses_, OwnEndpoints(doors_, world.interface, local));
  return absl::OkStatus();
}

Seat::~Seat() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(&mutex_);
    stop_ = true;
  }
  Wake(wake_);
  thread_.join();
}

// ---- The callers' side.

absl::Status Seat::AwaitRegistration(int64_t deadline_ns) {
  MutexLock lock(&mutex_);
  while (!registered_ && refused_.ok()) {
    if (!changed_.WaitUntil(&mutex_, SteadyTime(deadline_ns)) && NowNs() >= deadline_ns && !registered_) {
      return absl::UnavailableError("the coordinator took the connection and says nothing");
    }
  }
  return refused_;
}

void Seat::Ask(std::vector<Accusation> accusations) {
  {
    MutexLock lock(&mutex_);
    if (asked_ || formed_.has_value()) return;
    asked_ = true;
    waiting_.clear();
    if (excluded_) accusations.clear();
    request_ = std::move(accusations);
  }
  Wake(wake_);
}

void Seat::StandBack(int times) {
  {
    MutexLock lock(&mutex_);
    stand_back_ = times;
    excluded_ = true;
  }
  Wake(wake_);
}

absl::StatusOr<Seat::Formed> Seat::Await(int64_t deadline_ns) {
  MutexLock lock(&mutex_);
  while (!formed_.has_value() && refused_.ok()) {
    if (deadline_ns == kNeverNs) {
      changed_.Wait(&mutex_);
    } else if (!changed_.WaitUntil(&mutex_, SteadyTime(deadline_ns)) && NowNs() >= deadline_ns) {
      if (formed_.has_value()) break;
      return absl::DeadlineExceededError(
          waiting_.empty() ? "no coordinator has answered" : absl::StrCat("the coordinator waits: ", waiting_));
    }
  }
  if (!formed_.has_value()) return refused_;
  Formed formed = *std::move(formed_);
  formed_.reset();
  return formed;
}

// ---- The thread.

void Seat::Run() {
  Greeter greeter(doors_.Listeners(),
                  Credentials{options_.world.job_id, options_.world.secret, Purpose::kControl});
  NewCore(absl::ZeroDuration());
  while (true) {
    {
      MutexLock lock(&mutex_);
      if (stop_) break;
    }
    Turn(&greeter);
  }
  Leave();
}

int64_t Seat::NextTimeNs() const {
  int64_t next_ns = std::min(core_->NextTimeNs(), mesh_->NextTimeNs());
  if (link_ != nullptr && link_->HasUnsent()) next_ns = std::min(next_ns, NowNs() + kUnsentNs);
  return next_ns;
}

void Seat::Turn(Greeter* greeter) {
  std::vector<int> watched = {wake_.get(), mesh_->fd(), dialler_->fd()};
  if (link_ != nullptr) watched.push_back(link_->fd());
  absl::StatusOr<Greeter::Event> event = greeter->Next(watched, NextTimeNs());
  if (event.ok() && event->socket.valid()) {
    mesh_->Accept(std::move(event->socket), event->frame);
  } else if (!event.ok() && !absl::IsDeadlineExceeded(event.status())) {
    SHOAL_LOG(kError) << "accepting connections of peers: " << event.status().message();
    (void)PollOne(wake_.get(), POLLIN, NowNs() + kUnsentNs);  // Out of descriptors: not in a hot loop.
  }
  if (greeter->closed()) mesh_->Lack(absl::ResourceExhaustedError(greeter->trouble()));
  TakeRequests();
  TakeDial();
  if (link_ != nullptr && link_->HasUnsent()) (void)link_->Flush();
  if (link_ != nullptr && PollOne(link_->fd(), POLLIN, /*deadline_ns=*/0)) ReadCoordinator();
  WatchMesh();
  if (NowNs() >= core_->NextTimeNs()) Act(core_->OnTime(NowNs()));
}

// Which dials the coordinator after `delay`.
void Seat::NewCore(absl::Duration delay) {
  MemberInfo self = DescribeSelf(doors_);
  self.addresses = addresses_;
  self.wanted_rank = options_.wanted_rank;
  id_ = self.id;
  proposed_ = Epoch{0};
  mesh_->Cancel();
  joiners_.store(0, std::memory_order_release);
  MemberOptions core_options = core_options_;
  core_options.first_dial_delay = delay;
  core_ = std::make_unique<MemberCore>(std::move(self), core_options, NowNs());
  bool asked = false;
  {
    MutexLock lock(&mutex_);
    asked = asked_ && !request_.has_value();
  }
  if (asked) Act(core_->Ready({}, NowNs()));
  Act(core_->OnTime(NowNs()));
}

void Seat::TakeRequests() {
  uint64_t count = 0;
  (void)!read(wake_.get(), &count, sizeof count);
  std::optional<std::vector<Accusation>> request;
  int stand_back = 0;
  {
    MutexLock lock(&mutex_);
    stand_back = std::exchange(stand_back_, 0);
    // The new core asks by itself for whom it was asked meanwhile.
    if (stand_back != 0) request_.reset();
    request.swap(request_);
  }
  if (stand_back != 0) {
    const absl::Duration delay = RejoinDelay(core_options_.heartbeat_timeout, stand_back);
    SHOAL_LOG(kWarning) << "this process lacks what it takes to work in the epochs that form; it leaves, and joins again in "
                        << absl::FormatDuration(delay);
    Leave();
    dialler_->Forget();
    link_.reset();
    return NewCore(delay);
  }
  if (request.has_value()) Act(core_->Ready(*std::move(request), NowNs()));
}

void Seat::TakeDial() {
  absl::StatusOr<Fd> socket = absl::UnavailableError("");
  if (!dialler_->Take(&socket)) return;
  if (socket.ok()) {
    link_ = std::make_unique<MessageLink>(*std::move(socket));
  } else {
    MutexLock lock(&mutex_);
    waiting_.clear();
  }
  Act(core_->OnCoordinator(link_ != nullptr, NowNs()));
}

void Seat::ReadCoordinator() {
  std::vector<std::string> texts;
  const MessageLink* const link = link_.get();
  const absl::Status status = link_->Read(&texts);
  for (const std::string& text : texts) {
    const absl::StatusOr<CoordinatorMessage> message = DecodeCoordinatorMessage(text);
    if (!message.ok()) {
      SHOAL_LOG(kError) << "the coordinator sent " << message.status().message();
      return LoseCoordinator();
    }
    {
      MutexLock lock(&mutex_);
      registered_ = true;
      changed_.NotifyAll();
    }
    Act(core_->OnMessage(*message, NowNs()));
    if (link_.get() != link) return;
  }
  if (!status.ok()) LoseCoordinator();
}

void Seat::LoseCoordinator() {
  link_.reset();
  Act(core_->OnCoordinator(/*up=*/false, NowNs()));
}

void Seat::WatchMesh() {
  if (proposed_ == Epoch{0}) return;
  const Mesh::State state = mesh_->Advance(NowNs());
  if (state == Mesh::State::kFormed && !told_) {
    told_ = true;
    Act(core_->OnConnected(proposed_, NowNs()));
  } else if (state == Mesh::State::kFailed && !broke_) {
    broke_ = true;
    Act(core_->OnConnectFailed(proposed_, mesh_->accusations(), NowNs()));
  }
}

// What actions cause (a connection that breaks) comes after them.
void Seat::Act(std::vector<MemberCore::Action> actions) {
  for (MemberCore::Action& action : actions) actions_.push_back(std::move(action));
  if (acting_) return;
  acting_ = true;
  while (!actions_.empty()) {
    MemberCore::Action action = std::move(actions_.front());
    actions_.pop_front();
    Perform(action);
  }
  acting_ = false;
}

void Seat::Perform(MemberCore::Action& action) {
  using Action = MemberCore::Action;
  switch (action.type) {
    case Action::kDial:
      if (!first_.valid()) return dialler_->Start(core_options_.heartbeat_timeout);
      link_ = std::make_unique<MessageLink>(std::move(first_));
      return Act(core_->OnCoordinator(/*up=*/true, NowNs()));
    case Action::kHangUp:
      dialler_->Forget();
      link_.reset();
      return;
    case Action::kSend:
      if (link_ != nullptr && !link_->Send(Encode(action.message)).ok()) LoseCoordinator();
      return;
    case Action::kConnect: {
      const absl::Duration time = std::max(options_.world.heartbeat_timeout, kMeshTimeMin);
      proposed_ = action.view.epoch;
      told_ = broke_ = false;
      mesh_->Begin(action.view, action.view.RankOf(id_), NowNs() + absl::ToInt64Nanoseconds(time));
      return WatchMesh();
    }
    case Action::kCommit:
      return Commit(action.view);
    case Action::kExcluded:
      return OnExcluded(action.text);
    case Action::kRefused: {
      MutexLock lock(&mutex_);
      refused_ = absl::FailedPreconditionError(absl::StrCat("the coordinator refused this process: ", action.text));
      changed_.NotifyAll();
      return;
    }
    case Action::kJoiners:
      joiners_.store(static_cast<int>(action.joiners), std::memory_order_release);
      return;
    case Action::kWaiting: {
      MutexLock lock(&mutex_);
      waiting_ = action.text;
      return;
    }
    case Action::kLog:
      SHOAL_LOG(kInfo) << "member: " << action.text;
      return;
  }
}

// Joins again as a new member: at once after an epoch, later and later when it never gets into one. Each attempt to connect
// with somebody out of reach holds all others up.
void Seat::OnExcluded(const std::string& cause) {
  const absl::Duration delay = RejoinDelay(core_options_.heartbeat_timeout, exclusions_++);
  const std::string text = absl::StrCat("excluded from the job: ", cause, "; joining again as a new member",
                                        exclusions_ > 1 ? absl::StrCat(" in ", absl::FormatDuration(delay)) : "");
  SHOAL_LOG(kWarning) << text;
  {
    MutexLock lock(&mutex_);
    excluded_ = true;
    waiting_.clear();
  }
  on_excluded_(cause);
  actions_.clear();  // Of the core that is over.
  NewCore(delay);
}

void Seat::Commit(const View& view) {
  exclusions_ = 0;
  Formed formed;
  formed.view = view;
  formed.rank = view.RankOf(id_);
  proposed_ = Epoch{0};
  if (told_ && !broke_) {
    formed.links = mesh_->TakeLinks();
  } else {
    formed.accusations = mesh_->accusations();
    mesh_->Cancel();
  }
  MutexLock lock(&mutex_);
  asked_ = false;
  excluded_ = false;
  formed_ = std::move(formed);
  changed_.NotifyAll();
}

void Seat::Leave() {
  if (link_ == nullptr) return;
  // A copy of the descriptor: an end of file after the farewell, closing at once could destroy that on its way.
  const Fd socket(dup(link_->fd()));
  Act(core_->Leave(NowNs()));
  if (!socket.valid() || shutdown(socket.get(), SHUT_WR) != 0) return;
  const int64_t until_ns = NowNs() + kFarewellNs;
  char bytes[1024];
  while (PollOne(socket.get(), POLLIN, until_ns)) {
    if (recv(socket.get(), bytes, sizeof bytes, 0) <= 0) return;
  }
}

}  // namespace shoal
