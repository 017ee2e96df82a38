// How a member finds its coordinator.
#pragma once

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "collectives/transport/socket.h"
#include "runtime/base/mutex.h"

namespace shoal {

// Where coordinators listen (MembershipOptions::coordinators), and how they know their members.
struct CoordinatorPlaces {
  std::vector<std::string> coordinators;
  std::string job_id;
  std::string secret;
};

// "HOST:PORT,unix:NAME" are two; "etcd:HOST:PORT,HOST:PORT" is one.
std::vector<std::string> SplitCoordinators(const std::string& text);

// Tries each once, in turn; the first that answers. Blocks until `deadline_ns` (NowNs()). PERMISSION_DENIED,
// FAILED_PRECONDITION: one answered and will not have this process; INVALID_ARGUMENT: an address makes no sense;
// UNAVAILABLE: none answers now.
absl::StatusOr<Fd> DialCoordinator(const CoordinatorPlaces& places, int64_t deadline_ns);

// The same on a thread of its own, for somebody who has other things to do. Belongs to one thread.
class CoordinatorDialler {
 public:
  // RESOURCE_EXHAUSTED: no descriptors left.
  static absl::StatusOr<std::unique_ptr<CoordinatorDialler>> Create(const CoordinatorPlaces& places);
  ~CoordinatorDialler();  // Blocks while an attempt is under way.

  // One attempt. Forgets an earlier one.
  void Start(absl::Duration timeout);
  void Forget();
  // Readable when Take has a result.
  int fd() const { return done_.get(); }
  // False while the last attempt goes on, or when there is none.
  bool Take(absl::StatusOr<Fd>* result);

 private:
  CoordinatorDialler(const CoordinatorPlaces& places, Fd done);
  void Run();

  const CoordinatorPlaces places_;
  const Fd done_;
  Mutex mutex_;
  CondVar changed_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t wanted_ ABSL_GUARDED_BY(mutex_) = 0;  // The number of the last attempt that was asked for,
  uint64_t begun_ ABSL_GUARDED_BY(mutex_) = 0;   // begun,
  uint64_t ended_ ABSL_GUARDED_BY(mutex_) = 0;   // and has a result.
  absl::Duration timeout_ ABSL_GUARDED_BY(mutex_);
  absl::StatusOr<Fd> result_ ABSL_GUARDED_BY(mutex_) = absl::UnavailableError("");
  std::thread thread_;
};

}  // namespace shoal
