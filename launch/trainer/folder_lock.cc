#include "launch/trainer/folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {

absl::StatusOr<std::unique_ptr<FolderLock>> FolderLock::Take(const std::string& folder) {
  SHOAL_RETURN_IF_ERROR(MakeFolders(folder));
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return ErrnoStatus(errno, folder);
  std::unique_ptr<FolderLock> lock(new FolderLock(fd));
  if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    return absl::FailedPreconditionError(
        absl::StrCat(folder,
                     ": another job is writing there; --set run.name=NAME or --output-dir DIR gives this one "
                     "a folder of its own"));
  }
  return lock;
}

FolderLock::~FolderLock() { close(fd_); }

}  // namespace shoal
