#include "collectives/backend/nccl_meeting.h"

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "collectives/backend/rank_messages.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Code = DeviceResult::Code;

// Between two looks at a communicator that is being connected.
constexpr std::chrono::microseconds kPause(200);

struct Introduction {
  char device[sizeof(DeviceProperties::uuid)];
  char missing[400];  // "": this rank has NCCL.
  int32_t version;
};

struct Invitation {
  char failure[400];
  NcclId id;
};

// Why these ranks cannot have a communicator of NCCL; "": they can.
std::string ObstacleOf(absl::Span<const Introduction> ranks) {
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const Introduction& own = ranks[rank];
    if (own.missing[0] != '\0') return absl::StrCat("rank ", rank, ": ", own.missing);
    if (own.version != ranks[0].version) {
      return absl::StrCat("rank 0 has version ", ranks[0].version, " of NCCL, rank ", rank, " ", own.version);
    }
    for (size_t other = 0; other < rank; ++other) {
      if (std::strcmp(own.device, ranks[other].device) == 0) {
        return absl::StrCat("ranks ", other, " and ", rank, " share the device ", own.device, ", and NCCL has one rank on a device");
      }
    }
  }
  return "";
}

}  // namespace

absl::StatusOr<std::string> FindNcclObstacle(Communicator& host, const Device& device, const absl::StatusOr<const NcclApi*>& nccl,
                                             absl::Time deadline) {
  Introduction own = {};
  SetText(own.device, device.properties().uuid);
  if (nccl.ok()) {
    own.version = (*nccl)->library_version;
  } else {
    SetText(own.missing, nccl.status().message());
  }
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Introduction> ranks, FromAll(host, own, deadline, "devices"), "comparing the devices of ranks");
  return ObstacleOf(ranks);
}

absl::StatusOr<NcclId> ShareNcclId(Communicator& host, const Device& device, const NcclApi& api, absl::Time deadline) {
  Invitation invitation = {};
  if (host.index() == 0) {
    const absl::Status made = device.StatusOf(api.unique_id(&invitation.id), "making an id for NCCL");
    if (!made.ok()) SetText(invitation.failure, made.message());
  }
  // Of rank 0; all take part, so that all have come this far.
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Invitation> invitations, FromAll(host, invitation, deadline, "NCCL id"),
                         "sharing an id for NCCL");
  if (invitations[0].failure[0] != '\0') return absl::AbortedError(absl::StrCat("rank 0: ", invitations[0].failure));
  return invitations[0].id;
}

absl::StatusOr<NcclComm*> MeetInNccl(const NcclId& id, Communicator& host, Device& device, const NcclApi& api, absl::Time deadline) {
  NcclComm* comm = nullptr;
  device.Use();
  DeviceResult met = api.connect(&id, host.index(), host.size(), &comm);
  absl::Status status;
  while (met.code == Code::kNotReady) {
    std::this_thread::sleep_for(kPause);
    met = api.progress(comm);
    status = host.status();
    if (status.ok() && absl::Now() > deadline) status = absl::DeadlineExceededError("not all ranks have connected NCCL in time");
    if (!status.ok()) break;
  }
  if (status.ok()) status = device.StatusOf(met, "connecting NCCL");
  if (status.ok()) return comm;
  if (comm != nullptr) device.StatusOf(api.abort(comm), "aborting NCCL").IgnoreError();
  return status;
}

}  // namespace shoal
