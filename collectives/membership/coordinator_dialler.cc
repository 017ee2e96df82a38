#include "collectives/membership/coordinator_dialler.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "collectives/membership/endpoint.h"
#include "collectives/membership/etcd.h"
#include "collectives/membership/frame.h"
#include "collectives/transport/clock.h"
#include "collectives/transport/handshake.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr char kEtcd[] = "etcd:";
constexpr int64_t kPlaceNs = 2'000'000'000;  // Then the next place gets its chance.

absl::StatusOr<Fd> DialPlace(const CoordinatorPlaces& places, std::string place, int64_t deadline_ns) {
  if (absl::StartsWith(place, kEtcd)) {
    const std::vector<std::string> endpoints = absl::StrSplit(place.substr(sizeof kEtcd - 1), ',');
    SHOAL_ASSIGN_OR_RETURN(place, FindLeader(endpoints, places.job_id, deadline_ns), place);
  }
  SHOAL_ASSIGN_OR_RETURN(const SocketAddress address, ResolveEndpoint(place), "the coordinator's address");
  const Credentials credentials = {places.job_id, places.secret, Purpose::kCoordinator};
  SHOAL_ASSIGN_OR_RETURN(Fd socket, DialAuthenticated(address, credentials, deadline_ns));
  SHOAL_RETURN_IF_ERROR(SendFrame(socket.get(), FrameType::kMember, "", deadline_ns), place);
  return socket;
}

}  // namespace

std::vector<std::string> SplitCoordinators(const std::string& text) {
  if (absl::StartsWith(text, kEtcd)) return {text};
  return absl::StrSplit(text, ',');
}

absl::StatusOr<Fd> DialCoordinator(const CoordinatorPlaces& places, int64_t deadline_ns) {
  if (places.coordinators.empty()) return absl::InvalidArgumentError("no coordinator is given");
  absl::Status last, final;
  std::vector<std::string> causes;
  for (const std::string& place : places.coordinators) {
    absl::StatusOr<Fd> socket = DialPlace(places, place, std::min(deadline_ns, NowNs() + kPlaceNs));
    if (socket.ok()) return socket;
    last = socket.status();
    const bool refused = absl::IsPermissionDenied(last) || absl::IsFailedPrecondition(last);
    if (refused || absl::IsInvalidArgument(last)) final = last;
    causes.emplace_back(last.message());
  }
  if (!final.ok() || absl::IsInvalidArgument(last)) return final.ok() ? last : final;
  return absl::UnavailableError(absl::StrJoin(causes, "; "));
}

absl::StatusOr<std::unique_ptr<CoordinatorDialler>> CoordinatorDialler::Create(const CoordinatorPlaces& places) {
  Fd done(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!done.valid()) return ErrnoStatus(errno, "eventfd");
  return std::unique_ptr<CoordinatorDialler>(new CoordinatorDialler(places, std::move(done)));
}

CoordinatorDialler::CoordinatorDialler(const CoordinatorPlaces& places, Fd done)
    : places_(places), done_(std::move(done)), thread_([this] { Run(); }) {}

CoordinatorDialler::~CoordinatorDialler() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void CoordinatorDialler::Start(absl::Duration timeout) {
  MutexLock lock(&mutex_);
  ++wanted_;
  timeout_ = timeout;
  changed_.NotifyAll();
}

void CoordinatorDialler::Forget() {
  MutexLock lock(&mutex_);
  if (begun_ == wanted_) ++wanted_;
  begun_ = wanted_;
}

bool CoordinatorDialler::Take(absl::StatusOr<Fd>* result) {
  uint64_t count = 0;
  (void)!read(done_.get(), &count, sizeof count);
  MutexLock lock(&mutex_);
  if (ended_ == 0 || ended_ != wanted_) return false;
  *result = std::move(result_);
  ended_ = 0;
  return true;
}

void CoordinatorDialler::Run() {
  while (true) {
    uint64_t number = 0;
    int64_t deadline_ns = 0;
    {
      MutexLock lock(&mutex_);
      while (!stop_ && begun_ == wanted_) changed_.Wait(&mutex_);
      if (stop_) return;
      number = begun_ = wanted_;
      deadline_ns = NowNs() + absl::ToInt64Nanoseconds(timeout_);
    }
    absl::StatusOr<Fd> socket = DialCoordinator(places_, deadline_ns);
    MutexLock lock(&mutex_);
    if (number != wanted_) continue;  // Nobody waits for it any more.
    result_ = std::move(socket);
    ended_ = number;
    const uint64_t one = 1;
    (void)!write(done_.get(), &one, sizeof one);
  }
}

}  // namespace shoal
