#include "collectives/membership/coordinator.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <deque>
#include <map>
#include <thread>

#include "collectives/membership/doors.h"
#include "collectives/membership/endpoint.h"
#include "collectives/membership/etcd.h"
#include "collectives/membership/frame.h"
#include "collectives/membership/message_link.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/handshake.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Connection = CoordinatorCore::Connection;

constexpr int64_t kFarewellNs = 1'000'000'000;  // A refused process has so long to read why.

class Server final : public CoordinatorServer {
 public:
  Server(const CoordinatorServerOptions& options, std::string address, Fd listener, Fd epoll, Fd wake);
  ~Server() override;
  std::string address() const override { return address_; }

 private:
  struct Guest {
    explicit Guest(Fd socket) : link(std::move(socket)), from(PeerAddressOf(link.fd()).ToString()) {}
    MessageLink link;
    std::string from;
    bool watches_output = false;
    int64_t close_ns = kNeverNs;  // Told to go: waits until it has gone itself.
  };

  void Run();
  void Lead();
  void StandBy();
  void Admit(Greeter::Event event);
  void Serve();
  void Read(Connection connection);
  void Act(std::vector<CoordinatorCore::Action> actions);
  void Perform(const CoordinatorCore::Action& action);
  void Lose(Connection connection, const std::string& why);
  void Watch(Connection connection, Guest& guest, int operation) const;
  void DropLeaving();

  const CoordinatorServerOptions options_;
  const std::string address_;
  Fd listener_, epoll_, wake_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> elected_;
  // The thread's own.
  std::unique_ptr<CoordinatorCore> core_;  // Null while another coordinator leads.
  std::map<Connection, Guest> guests_;
  Connection last_connection_ = 0;
  std::deque<CoordinatorCore::Action> actions_;
  bool acting_ = false;
  std::thread thread_;
  std::unique_ptr<Election> election_;  // Null without etcd.
};

Server::Server(const CoordinatorServerOptions& options, std::string address, Fd listener, Fd epoll, Fd wake)
    : options_(options),
      address_(std::move(address)),
      listener_(std::move(listener)),
      epoll_(std::move(epoll)),
      wake_(std::move(wake)),
      elected_(options.etcd.empty()),
      thread_([this] { Run(); }) {
  if (options.etcd.empty()) return;
  ElectionOptions election;
  election.etcd = options.etcd;
  election.job_id = options.job_id;
  election.address = address_;
  election_ = std::make_unique<Election>(election, [this](bool leads) {
    elected_.store(leads, std::memory_order_release);
    const uint64_t one = 1;
    (void)!write(wake_.get(), &one, sizeof one);
  });
}

Server::~Server() {
  election_.reset();
  stop_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
  thread_.join();
}

// ---- The thread.

void Server::Lead() {
  core_ = std::make_unique<CoordinatorCore>(options_.core, RandomNumber(), NowNs());
  if (!options_.etcd.empty()) SHOAL_LOG(kInfo) << "coordinator " << address_ << " leads job '" << options_.job_id << "'";
}

void Server::StandBy() {
  SHOAL_LOG(kWarning) << "coordinator " << address_ << " leads no more: its lease in etcd has ended";
  core_.reset();
  guests_.clear();  // They look for the new leader.
}

void Server::Run() {
  Greeter greeter({listener_.get()}, Credentials{options_.job_id, options_.secret, Purpose::kCoordinator});
  while (!stop_.load(std::memory_order_acquire)) {
    const bool elected = elected_.load(std::memory_order_acquire);
    if (elected && core_ == nullptr) Lead();
    if (!elected && core_ != nullptr) StandBy();
    const int64_t next_ns = core_ == nullptr ? kNeverNs : core_->NextTimeNs();
    absl::StatusOr<Greeter::Event> event = greeter.Next({epoll_.get(), wake_.get()}, next_ns);
    if (!event.ok() && !absl::IsDeadlineExceeded(event.status())) {
      // Out of descriptors: those who are here are served on; newcomers wait.
      SHOAL_LOG(kError) << "coordinator " << address_ << ": " << event.status().message();
      (void)PollOne(epoll_.get(), POLLIN, NowNs() + 10'000'000);
      Serve();
    } else if (event.ok() && event->socket.valid()) {
      Admit(*std::move(event));
    } else if (event.ok() && event->readable == epoll_.get()) {
      Serve();
    } else if (event.ok()) {
      uint64_t count = 0;
      (void)!read(wake_.get(), &count, sizeof count);
    }
    if (core_ != nullptr && NowNs() >= core_->NextTimeNs()) Act(core_->OnTime(NowNs()));
    DropLeaving();
  }
}

void Server::Admit(Greeter::Event event) {
  const std::string from = PeerAddressOf(event.socket.get()).ToString();
  if (event.frame.type != FrameType::kMember) {
    SHOAL_LOG(kWarning) << "refused " << from << ": it takes this coordinator for rank 0 of a static job";
    return;
  }
  if (core_ == nullptr) return;  // Another leads: the member asks etcd again.
  const Connection connection = ++last_connection_;
  Guest& guest = guests_.emplace(connection, Guest(std::move(event.socket))).first->second;
  Watch(connection, guest, EPOLL_CTL_ADD);
}

void Server::Watch(Connection connection, Guest& guest, int operation) const {
  epoll_event event = {};
  guest.watches_output = guest.link.HasUnsent();
  event.events = guest.watches_output ? EPOLLIN | EPOLLOUT : EPOLLIN;
  event.data.u64 = connection;
  if (epoll_ctl(epoll_.get(), operation, guest.link.fd(), &event) != 0) {
    SHOAL_LOG(kError) << "coordinator " << address_ << ": " << ErrnoStatus(errno, "epoll_ctl").message();
  }
}

void Server::Serve() {
  epoll_event events[64];
  const int ready = epoll_wait(epoll_.get(), events, 64, 0);
  for (int i = 0; i < ready; ++i) {
    const Connection connection = events[i].data.u64;
    const auto found = guests_.find(connection);
    if (found == guests_.end()) continue;
    if ((events[i].events & EPOLLOUT) != 0) {
      (void)found->second.link.Flush();  // What is broken is found out by reading.
      if (!found->second.link.HasUnsent()) Watch(connection, found->second, EPOLL_CTL_MOD);
    }
    if ((events[i].events & ~EPOLLOUT) != 0) Read(connection);
  }
}

void Server::Read(Connection connection) {
  Guest& guest = guests_.find(connection)->second;
  std::vector<std::string> messages;
  const absl::Status status = guest.link.Read(&messages);
  const bool leaving = guest.close_ns != kNeverNs;
  for (const std::string& bytes : messages) {
    if (leaving) break;
    const absl::StatusOr<MemberMessage> message = DecodeMemberMessage(bytes);
    if (!message.ok()) return Lose(connection, absl::StrCat("sent ", message.status().message()));
    Act(core_->OnMessage(connection, *message, NowNs()));
    const auto found = guests_.find(connection);
    if (found == guests_.end() || found->second.close_ns != kNeverNs) break;
  }
  if (!status.ok() && guests_.contains(connection)) Lose(connection, std::string(status.message()));
}

void Server::Lose(Connection connection, const std::string& why) {
  const auto found = guests_.find(connection);
  if (found == guests_.end()) return;
  const bool told = found->second.close_ns != kNeverNs;
  if (!told && why != "connection closed") SHOAL_LOG(kWarning) << "lost " << found->second.from << ": " << why;
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.link.fd(), nullptr);
  guests_.erase(found);
  if (!told && core_ != nullptr) Act(core_->OnClosed(connection, NowNs()));
}

// What actions cause (a connection that breaks) comes after them.
void Server::Act(std::vector<CoordinatorCore::Action> actions) {
  for (CoordinatorCore::Action& action : actions) actions_.push_back(std::move(action));
  if (acting_) return;
  acting_ = true;
  while (!actions_.empty()) {
    const CoordinatorCore::Action action = std::move(actions_.front());
    actions_.pop_front();
    Perform(action);
  }
  acting_ = false;
}

void Server::Perform(const CoordinatorCore::Action& action) {
  if (action.type == CoordinatorCore::Action::kLog) {
    SHOAL_LOG(kInfo) << "coordinator: " << action.text;
    return;
  }
  const auto found = guests_.find(action.connection);
  if (found == guests_.end() || found->second.close_ns != kNeverNs) return;
  Guest& guest = found->second;
  if (action.type == CoordinatorCore::Action::kClose) {
    // An end of file after what was said; closing at once could destroy that on its way.
    (void)guest.link.Flush();
    (void)shutdown(guest.link.fd(), SHUT_WR);
    guest.close_ns = NowNs() + kFarewellNs;
    return;
  }
  const absl::Status sent = guest.link.Send(Encode(action.message));
  if (!sent.ok()) return Lose(action.connection, std::string(sent.message()));
  if (guest.link.HasUnsent() && !guest.watches_output) Watch(action.connection, guest, EPOLL_CTL_MOD);
}

void Server::DropLeaving() {
  const int64_t now_ns = NowNs();
  std::erase_if(guests_, [now_ns](const auto& entry) { return now_ns >= entry.second.close_ns; });
}

// The address of this host that reaches the first of `etcd` to which there is a way.
absl::StatusOr<SocketAddress> AddressTowardsEtcd(const std::vector<std::string>& etcd) {
  absl::Status status = absl::InvalidArgumentError("the coordinator has no address to listen at");
  for (const std::string& endpoint : etcd) {
    const absl::StatusOr<SocketAddress> remote = ResolveEndpoint(endpoint);
    status = remote.status();
    if (!status.ok()) continue;
    const absl::StatusOr<SocketAddress> local = LocalAddressTowards(*remote);
    if (local.ok()) return local;
    status = local.status();
  }
  return status;
}

// As members on other hosts dial it.
absl::StatusOr<std::string> AddressOf(const Fd& listener, const CoordinatorServerOptions& options) {
  const SocketAddress bound = LocalAddressOf(listener.get());
  if (bound.family() == AF_UNIX) return options.listen;
  if (!bound.IsAny() || options.etcd.empty()) return EndpointText(bound.Ip(), bound.port());
  SHOAL_ASSIGN_OR_RETURN(const SocketAddress reached, AddressTowardsEtcd(options.etcd), "the coordinator's address");
  return EndpointText(reached.Ip(), bound.port());
}

}  // namespace

absl::StatusOr<std::unique_ptr<CoordinatorServer>> CoordinatorServer::Start(
    const CoordinatorServerOptions& options) {
  SHOAL_ASSIGN_OR_RETURN(const SocketAddress wanted,
                         options.listen.empty() ? AddressTowardsEtcd(options.etcd) : ResolveEndpoint(options.listen),
                         "the coordinator's address");
  absl::StatusOr<Fd> listener = Listen(wanted);
  if (!listener.ok()) {
    return absl::UnavailableError(absl::StrCat("the coordinator cannot ", listener.status().message()));
  }
  Fd epoll(epoll_create1(EPOLL_CLOEXEC));
  Fd wake(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!epoll.valid() || !wake.valid()) return ErrnoStatus(errno, "the coordinator's epoll and eventfd");
  SHOAL_ASSIGN_OR_RETURN(std::string address, AddressOf(*listener, options));
  return std::unique_ptr<CoordinatorServer>(std::make_unique<Server>(
      options, std::move(address), *std::move(listener), std::move(epoll), std::move(wake)));
}

}  // namespace shoal
