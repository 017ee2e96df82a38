// The messages of one group over the data connections of an epoch (data_mesh.h).
#pragma once

#include <memory>
#include <vector>

#include "collectives/engine/group_life.h"
#include "collectives/engine/tcp/data_mesh.h"
#include "collectives/transport/channel.h"

namespace shoal {

// Small messages are sent at once and kept by the receiver until they are asked for; large ones travel when
// the receiver has posted. A received view lies in a buffer of the mesh, which stays warm from one message to
// the next.
//
// Poll returns what the group's life says once that has ended; FAILED_PRECONDITION: see mismatch();
// UNAVAILABLE: the connection to a peer that is awaited closed and the group was not ended for it within a
// moment; DATA_LOSS: a peer sent nonsense. All name the peer.
class TcpChannel final : public Channel {
 public:
  // Both outlive the channel. `life` is asked, never told: the caller ends the group when Poll fails.
  TcpChannel(DataMesh* mesh, const GroupLife* life);
  ~TcpChannel() override;  // As after an error: no borrowed memory is touched any more, views are gone.

  void Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) override;
  void Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) override;
  void ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) override;
  void Release(int member, MessageId id, const std::byte* view) override;
  void Finish(MessageId id) override;
  void Probe(int member, MessageId id) override;
  absl::Status Poll(std::vector<Event>* events) override;
  absl::Status Wait(int64_t until_ns) override;
  void Wake() override;
  std::vector<int> Awaited() const override;
  bool MayBeUnderWay(int member) override;
  uint64_t Reached(int member) const override;
  Mismatch mismatch() const override;

 private:
  DataMesh* const mesh_;
  DataMesh::Port* const port_;
};

}  // namespace shoal
