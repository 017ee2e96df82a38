#include "collectives/membership/membership.h"

namespace shoal {

absl::StatusOr<std::unique_ptr<Membership>> Membership::Join(const MembershipOptions&) {
  return absl::UnimplementedError("elastic groups");
}

}  // namespace shoal
