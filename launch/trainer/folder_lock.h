// One job at a time in a run's folder. Hides flock: the lock is the kernel's, so it goes with the process,
// however that ends, and leaves no file behind.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace shoal {

class FolderLock {
 public:
  // Makes the folder if it is missing; never waits. FAILED_PRECONDITION: another process holds it. A file
  // system that cannot lock folders (some network ones) grants it to everybody.
  static absl::StatusOr<std::unique_ptr<FolderLock>> Take(const std::string& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  explicit FolderLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace shoal
