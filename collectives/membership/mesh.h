// Connects one process with all others of a view: per pair one control connection and, when the job needs TCP, several
// data connections. The lower rank accepts, the higher dials. Who can be reached at its unix name is on the same host:
// that is tried, not believed, because restored snapshots share a kernel's id and network namespaces hide such names. In
// the end all know the same table of hosts.
//
// Never blocks and has no thread: its owner waits for fd(), calls Advance, and hands over what knocks at its doors.
// Belongs to one thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/communicator.h"
#include "collectives/membership/frame.h"
#include "collectives/membership/messages.h"
#include "collectives/membership/pending_dial.h"
#include "collectives/membership/view.h"
#include "collectives/transport/socket.h"

namespace shoal {

struct PeerLink {
  int64_t pid = 0;
  std::string host_name;
  int host = 0;          // The lowest rank that shares memory with this one (its own rank when nobody does).
  Fd control;            // Invalid in the entry of this process.
  std::vector<Fd> data;  // None unless the job needs TCP: several hosts, or transport tcp.
};

class Mesh {
 public:
  // Of `options`: job_id, secret, transport, flows. RESOURCE_EXHAUSTED: no descriptors left.
  static absl::StatusOr<std::unique_ptr<Mesh>> Create(const WorldOptions& options);
  ~Mesh();

  // Connects with everybody in `view`, in which this process is `rank`. Replaces what was under way. Attempts to reach a
  // peer are repeated until `deadline_ns` (NowNs()).
  void Begin(const View& view, int rank, int64_t deadline_ns);
  void Cancel();
  // A connection that a peer made and that said `hello`. Kept for a while when it belongs to a later epoch: peers may hear
  // of that earlier. Others are closed with a log line.
  void Accept(Fd socket, const Frame& hello);
  // Connections of peers cannot be taken (RESOURCE_EXHAUSTED, from who accepts them). An attempt that fails after that is
  // this process's own fault, unless a connection could be made since.
  void Lack(const absl::Status& what) { lack_ = what; }

  enum class State { kIdle, kForming, kFormed, kFailed };
  // Goes on as far as it can without waiting.
  State Advance(int64_t now_ns);
  // Readable when Advance has something to do.
  int fd() const { return epoll_.get(); }
  // When Advance is to be called at the latest.
  int64_t NextTimeNs() const;

  // kFormed: entry r is about rank r. Then idle. Until then a connection that breaks fails the attempt.
  std::vector<PeerLink> TakeLinks();
  // kFailed: whom this process could not connect with, and why. Itself alone, when it has no descriptors left: its peers
  // are not to blame.
  const std::vector<Accusation>& accusations() const { return accusations_; }
  // kFailed: whom it had reached, and who had not reached everybody. They are not to blame for it.
  const std::vector<Accusation>& incomplete() const { return incomplete_; }

 private:
  struct Peer;
  struct Dial;
  struct Parked;
  struct Hello;

  Mesh(const WorldOptions& options, Fd epoll);

  void Watch(int fd, uint32_t events, uint64_t key) const;
  void Unwatch(int fd) const;
  void AddDial(int rank, int flow, int flows, int64_t due_ns);
  void StartDial(uint64_t key, Dial& dial, int64_t now_ns);
  void AdvanceDial(uint64_t key, int64_t now_ns);
  void Install(int rank, const Hello& hello, Fd socket);
  bool Place(const Hello& hello, Fd* socket);
  void OnControl(int rank);
  void LoseControl(int rank, const absl::Status& why);
  void ExchangeHosts();
  void DialData();
  bool DataComplete() const;
  absl::Status CheckHosts() const;
  int OwnHost() const;
  void GiveUp(int64_t now_ns);
  void DropOldGuests(int64_t now_ns);

  const WorldOptions options_;
  Fd epoll_;
  State state_ = State::kIdle;
  View view_;
  int rank_ = -1;
  int64_t begun_ns_ = 0;
  int64_t deadline_ns_ = 0;
  std::vector<Peer> peers_;
  uint64_t last_dial_ = 0;
  std::map<uint64_t, Dial> dials_;  // By the key of their events.
  bool data_dialled_ = false;
  std::vector<Parked> parked_;
  std::vector<Accusation> accusations_, incomplete_;
  absl::Status lack_;
};

}  // namespace shoal
