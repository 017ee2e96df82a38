// The data connections of one epoch and process, shared by all of its groups: several flows (TCP connections)
// per peer. There is no thread: whoever polls or waits moves everybody's bytes. Slices of large messages take
// turns, and a group that stops receiving is sent no more than a window, so that one group's data never
// blocks another's. Framing: transport/data_frame.h. Thread-safe; a port belongs to one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "collectives/engine/group_life.h"
#include "collectives/transport/channel.h"
#include "collectives/transport/socket.h"

namespace shoal {

struct DataPeer {
  std::string name;       // For errors: "rank 2 (pid 71, host b)".
  std::vector<Fd> flows;  // Empty: no data travels to that rank (this process itself, a rank that is never
                          // reached by TCP).
};

class DataMesh {
 public:
  // `peers[r]` is rank r. RESOURCE_EXHAUSTED: no descriptors left.
  static absl::StatusOr<std::unique_ptr<DataMesh>> Create(uint64_t epoch, std::vector<DataPeer> peers);
  // All ports are closed by then. Peers read the end of the connections after all that was sent.
  ~DataMesh();
  // This process has said goodbye to its peers. When no port has anything under way, the ends of the connections tell them
  // that nothing more comes; otherwise they find out by MayBeUnderWay, later.
  void Leave();
  // Before the end, when all ports are closed: blocks until the peers' systems have what was sent, or have taken nothing for
  // `patience_ns`. A closed socket answers what still comes with a reset, which takes with it whatever the peer has not got
  // yet. The `dead` get nothing any more.
  void AwaitDelivery(const std::vector<int>& dead, int64_t patience_ns);
  DataMesh(const DataMesh&) = delete;
  DataMesh& operator=(const DataMesh&) = delete;

  // One group's place in the mesh; see TcpChannel for what the calls mean.
  struct Port;
  Port* Open(const GroupLife* life);
  void Close(Port* port);
  // The group ended. Unless it is open: what came for it is let go, and what still comes is thrown away.
  void Drop(uint64_t group);

  void Send(Port* port, int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token);
  enum class Into : uint8_t {
    kCaller,
    kMesh
  };  // The caller's memory, or a buffer of the mesh until Release.
  void Receive(Port* port, int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token,
               Into whose);
  void Release(Port* port, const std::byte* view);
  void Finish(Port* port, MessageId id);
  void Probe(Port* port, int member, MessageId id);
  absl::Status Poll(Port* port, std::vector<Channel::Event>* events);
  absl::Status Wait(Port* port, int64_t until_ns);
  void Wake(Port* port);
  std::vector<int> Awaited(const Port* port) const;
  bool MayBeUnderWay(Port* port, int member);
  uint64_t Reached(const Port* port, int member) const;
  Mismatch MismatchOf(const Port* port) const;

 private:
  struct Impl;
  class Visit;
  explicit DataMesh(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace shoal
