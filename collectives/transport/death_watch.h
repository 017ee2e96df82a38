// Notices the death of processes on this host within microseconds. A connection of a dead process is closed only after its
// memory has been freed, which takes 50 to 180 ms for a GiB of 4 KiB pages; but the kernel walks the robust futexes of each
// of its threads before that. So every process holds one in a page that it shares with its peers: its sign of life. The
// kernel marks it when the holder dies and wakes one of those who wait for it, who wakes the others.
//
// Thread-safe. On kernels without futex_waitv(2) (before 5.16) the peers' signs are looked at every few milliseconds.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/transport/socket.h"
#include "runtime/base/mutex.h"

namespace shoal {

class DeathWatch {
 public:
  // Starts the thread that holds this process's sign and watches those of peers. `on_death` runs on it, once for each
  // peer that died. RESOURCE_EXHAUSTED: no memory or descriptors.
  static absl::StatusOr<std::unique_ptr<DeathWatch>> Create(std::function<void(int peer)> on_death);
  // As Release; `on_death` does not run any more.
  ~DeathWatch();
  DeathWatch(const DeathWatch&) = delete;
  DeathWatch& operator=(const DeathWatch&) = delete;

  // A descriptor of this process's sign, for one peer to hand to Watch.
  absl::StatusOr<Fd> Sign() const;
  // Watches `peer`, any number that the caller knows it by. Beyond kWatchedMax peers the surplus is not watched.
  // INVALID_ARGUMENT: the descriptor is not a sign of life.
  absl::Status Watch(int peer, Fd sign);
  // From now on the end of this process is no death to its peers.
  void Release();

  static constexpr int kWatchedMax = 127;  // FUTEX_WAITV_MAX, less one for waking this thread.

 private:
  struct Page;
  struct Watched;
  struct State;
  explicit DeathWatch(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace shoal
