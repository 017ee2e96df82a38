#include "collectives/backend/peer_memory.h"

#include <unistd.h>

#include <fstream>
#include <vector>

#include "collectives/backend/operation_group.h"
#include "collectives/backend/rank_messages.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// One rank's offer to be read.
struct Offer {
  char boot[64];      // Of the host's system.
  char failure[400];  // "": the tensor is shared.
  SharedTensor tensor;
  int64_t secret;  // Its element.
};

struct Verdict {
  char failure[400];  // "": this rank has read all others'.
};

int64_t SecretOf(int rank) { return (int64_t{getpid()} << 20) + rank; }

std::string BootOfHost() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  std::getline(file, boot);
  return boot;
}

absl::StatusOr<int64_t> Read(const SharedTensor& shared, PeerMemory* opened, Stream& stream) {
  SHOAL_ASSIGN_OR_RETURN(std::byte* const address, opened->Open(shared));
  SHOAL_ASSIGN_OR_RETURN(const Tensor host, Download(Tensor(address, {1}, DType::kI64), stream));
  return host.data<int64_t>()[0];
}

// Reads what all others offer.
std::string Try(absl::Span<const Offer> offers, int own, Device& device, Stream& stream) {
  PeerMemory opened(device);
  for (size_t rank = 0; rank < offers.size(); ++rank) {
    if (static_cast<int>(rank) == own) continue;
    const absl::StatusOr<int64_t> read = Read(offers[rank].tensor, &opened, stream);
    if (!read.ok()) return absl::StrCat("rank ", own, " cannot read memory of rank ", rank, ": ", read.status().message());
    if (*read != offers[rank].secret) return absl::StrCat("rank ", own, " reads something else than what rank ", rank, " wrote");
  }
  return "";
}

}  // namespace

absl::StatusOr<SharedTensor> Share(const Tensor& tensor, Device& device) {
  if (tensor.empty()) return SharedTensor{};
  SHOAL_ASSIGN_OR_RETURN(const DevicePool::Exported exported, device.memory().Export(tensor.raw()));
  return SharedTensor{exported.handle, exported.offset_bytes, tensor.bytes()};
}

PeerMemory::~PeerMemory() {
  device_.Use();
  for (const auto& [handle, memory] : opened_) {
    const absl::Status closed = device_.StatusOf(device_.api().close_memory(memory), "closing memory of a peer");
    if (!closed.ok()) SHOAL_LOG(kWarning) << std::string(closed.message());
  }
}

absl::StatusOr<std::byte*> PeerMemory::Open(const SharedTensor& shared) {
  void*& memory = opened_[std::string(shared.handle.bytes, sizeof(shared.handle.bytes))];
  if (memory == nullptr) {
    device_.Use();
    const absl::Status opened = device_.StatusOf(device_.api().open_memory(&shared.handle, &memory), "opening memory of a peer");
    if (!opened.ok()) {
      opened_.erase(std::string(shared.handle.bytes, sizeof(shared.handle.bytes)));
      return opened;
    }
  }
  return static_cast<std::byte*>(memory) + shared.offset_bytes;
}

absl::StatusOr<std::string> FindPeerObstacle(Communicator& host, Device& device, absl::Time deadline) {
  Offer offer = {.secret = SecretOf(host.index())};
  SetText(offer.boot, BootOfHost());
  const absl::StatusOr<std::unique_ptr<Stream>> stream = device.NewStream();
  Tensor tensor;  // Until all have read it.
  absl::Status shared = stream.status();
  if (shared.ok()) {
    tensor = Empty({1}, DType::kI64, **stream);
    Copy(Tensor(&offer.secret, {1}, DType::kI64), tensor, **stream);
    shared = (*stream)->Wait();
  }
  if (shared.ok()) {
    const absl::StatusOr<SharedTensor> own = Share(tensor, device);
    shared = own.status();
    if (own.ok()) offer.tensor = *own;
  }
  if (!shared.ok()) SetText(offer.failure, shared.message());
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Offer> offers, FromAll(host, offer, deadline, "device memory"), "sharing device memory");
  for (size_t rank = 0; rank < offers.size(); ++rank) {
    if (offers[rank].failure[0] != '\0') return absl::StrCat("rank ", rank, " cannot share its memory: ", offers[rank].failure);
    if (std::strcmp(offers[rank].boot, offers[0].boot) != 0) return absl::StrCat("ranks 0 and ", rank, " are on different hosts");
  }
  if (offers.size() > kSummedMax) return absl::StrCat(offers.size(), " ranks are more than can be summed at once, ", kSummedMax);
  Verdict verdict = {};
  SetText(verdict.failure, Try(offers, host.index(), device, **stream));
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Verdict> verdicts, FromAll(host, verdict, deadline, "opened device memory"),
                         "sharing device memory");
  for (const Verdict& other : verdicts) {
    if (other.failure[0] != '\0') return other.failure;
  }
  return "";
}

}  // namespace shoal
