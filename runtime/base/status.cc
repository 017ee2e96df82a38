#include "runtime/base/status.h"

#include <cerrno>
#include <cstring>

namespace shoal {

absl::Status Annotate(const absl::Status& status, std::string_view context) {
  if (status.ok() || context.empty()) return status;
  return absl::Status(status.code(), absl::StrCat(AbslSv(context), ": ", status.message()));
}

absl::Status ErrnoStatus(int error_number, std::string_view what) {
  absl::StatusCode code = absl::StatusCode::kUnknown;
  switch (error_number) {
    case ENOENT: code = absl::StatusCode::kNotFound; break;
    case EEXIST: case EADDRINUSE: code = absl::StatusCode::kAlreadyExists; break;
    case EACCES: case EPERM: case EROFS: code = absl::StatusCode::kPermissionDenied; break;
    case ENOSPC: case EDQUOT: case ENOMEM: case EMFILE: case ENFILE: case EFBIG:
      code = absl::StatusCode::kResourceExhausted; break;
    case EINVAL: case ENOTDIR: case EISDIR: code = absl::StatusCode::kInvalidArgument; break;
    case ECONNREFUSED: case ECONNRESET: case EPIPE: case EHOSTUNREACH: case ENETUNREACH:
      code = absl::StatusCode::kUnavailable; break;
    case ETIMEDOUT: code = absl::StatusCode::kDeadlineExceeded; break;
    default: break;
  }
  return absl::Status(code, absl::StrCat(AbslSv(what), ": ", std::strerror(error_number)));
}

}  // namespace shoal
