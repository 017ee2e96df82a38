#include "collectives/engine/tcp/tcp_channel.h"

namespace shoal {

TcpChannel::TcpChannel(DataMesh* mesh, const GroupLife* life) : mesh_(mesh), port_(mesh->Open(life)) {}
TcpChannel::~TcpChannel() { mesh_->Close(port_); }

void TcpChannel::Send(int member, MessageId id, const std::byte* data, int64_t bytes, uint64_t token) {
  mesh_->Send(port_, member, id, data, bytes, token);
}
void TcpChannel::Receive(int member, MessageId id, std::byte* into, int64_t bytes, uint64_t token) {
  mesh_->Receive(port_, member, id, into, bytes, token, DataMesh::Into::kCaller);
}
void TcpChannel::ReceiveView(int member, MessageId id, int64_t bytes, uint64_t token) {
  mesh_->Receive(port_, member, id, nullptr, bytes, token, DataMesh::Into::kMesh);
}
void TcpChannel::Release(int, MessageId, const std::byte* view) { mesh_->Release(port_, view); }
void TcpChannel::Finish(MessageId id) { mesh_->Finish(port_, id); }
void TcpChannel::Probe(int member, MessageId id) { mesh_->Probe(port_, member, id); }
absl::Status TcpChannel::Poll(std::vector<Event>* events) { return mesh_->Poll(port_, events); }
absl::Status TcpChannel::Wait(int64_t until_ns) { return mesh_->Wait(port_, until_ns); }
void TcpChannel::Wake() { mesh_->Wake(port_); }
std::vector<int> TcpChannel::Awaited() const { return mesh_->Awaited(port_); }
bool TcpChannel::MayBeUnderWay(int member) { return mesh_->MayBeUnderWay(port_, member); }
uint64_t TcpChannel::Reached(int member) const { return mesh_->Reached(port_, member); }
Mismatch TcpChannel::mismatch() const { return mesh_->MismatchOf(port_); }

}  // namespace shoal
