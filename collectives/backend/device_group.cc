#include "collectives/backend/device_group.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/backend/nccl_meeting.h"
#include "collectives/backend/peer_group.h"
#include "collectives/backend/peer_memory.h"
#include "collectives/backend/rank_messages.h"
#include "collectives/backend/staged_group.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

struct Wish {
  char kind[16];
};

// What SHOAL_DEVICE_GROUP says on all ranks; "": nothing.
absl::StatusOr<std::string> AgreeOnKind(Communicator& host, absl::Time deadline) {
  Wish own = {};
  if (const char* const wanted = std::getenv("SHOAL_DEVICE_GROUP")) SetText(own.kind, wanted);
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Wish> wishes, FromAll(host, own, deadline, "kind of group"), "choosing a group");
  const std::string kind = wishes[0].kind;
  for (size_t rank = 1; rank < wishes.size(); ++rank) {
    if (wishes[rank].kind == kind) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("SHOAL_DEVICE_GROUP is '", kind, "' on rank 0 and '", wishes[rank].kind, "' on rank ", rank));
  }
  if (kind.empty() || kind == "nccl" || kind == "peers" || kind == "staged") return kind;
  return absl::InvalidArgumentError(absl::StrCat("SHOAL_DEVICE_GROUP is '", kind, "', want nccl, peers or staged"));
}

absl::Status Refused(const std::string& kind, const std::string& obstacle) {
  return absl::FailedPreconditionError(absl::StrCat("SHOAL_DEVICE_GROUP is '", kind, "': ", obstacle));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> DeviceGroup(std::unique_ptr<Communicator> host, Device& device,
                                                          const absl::StatusOr<const NcclApi*>& nccl, const NcclOptions& options) {
  const absl::Time deadline = absl::Now() + options.connect_timeout;
  const bool tells = host->index() == 0;
  SHOAL_ASSIGN_OR_RETURN(const std::string kind, AgreeOnKind(*host, deadline));
  std::string no_nccl, no_peers;
  if (kind.empty() || kind == "nccl") {
    SHOAL_ASSIGN_OR_RETURN(no_nccl, FindNcclObstacle(*host, device, nccl, deadline));
    if (no_nccl.empty()) {
      if (tells) SHOAL_LOG(kInfo) << "collectives of " << host->size() << " ranks are NCCL's";
      return ConnectNccl(std::move(host), device, **nccl, options);
    }
    if (!kind.empty()) return Refused(kind, no_nccl);
  }
  if (kind.empty() || kind == "peers") {
    SHOAL_ASSIGN_OR_RETURN(no_peers, FindPeerObstacle(*host, device, deadline));
    if (no_peers.empty()) {
      if (tells) {
        SHOAL_LOG(kInfo) << "collectives of " << host->size() << " ranks read each other's device memory"
                         << (no_nccl.empty() ? "" : "; not NCCL's: ") << no_nccl;
      }
      return ConnectPeers(std::move(host), device);
    }
    if (!kind.empty()) return Refused(kind, no_peers);
  }
  if (tells) {
    SHOAL_LOG(kInfo) << "collectives of " << host->size() << " ranks are staged through the host's memory"
                     << (kind.empty() ? "; not NCCL's: " : "") << no_nccl << (kind.empty() ? "; not by reading device memory: " : "")
                     << no_peers;
  }
  return StageThroughHost(std::move(host), device);
}

}  // namespace shoal
