// Files and folders of the host: whole reads, maps, and writes that are atomic and durable. Every error
// carries the path. All functions block; they are thread-safe as long as two callers do not write the same
// path at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace shoal {

enum class DiskStep : uint8_t { kCreate, kWrite, kSync, kRename, kSyncFolder, kMakeFolder, kRemove };

// One step that is about to change the disk.
struct DiskAction {
  DiskStep step;
  std::string path;
  std::string new_path;  // Of kRename.
  int64_t bytes = 0;     // Of kWrite.
};

// The seam for tests: a full disk, or the end of the process between any two steps. Null everywhere else.
class DiskFaults {
 public:
  virtual ~DiskFaults() = default;
  // Called before every step, on the thread that makes it. An error replaces the step; of a write,
  // `action.bytes` bytes still reach the disk (the callee may lower the number).
  virtual absl::Status Before(DiskAction& action) = 0;
};

// NOT_FOUND, PERMISSION_DENIED, INVALID_ARGUMENT (a folder), ...
absl::StatusOr<std::string> ReadFile(const std::string& path);

// Writes a file piece by piece under a temporary name in its folder; only Commit gives it its name. A reader
// sees the old file or the whole new one, also after a power failure. Not thread-safe.
class FileWriter {
 public:
  // `bytes_wanted`: the final size, for the error of a full disk.
  static absl::StatusOr<std::unique_ptr<FileWriter>> Create(std::string path, int64_t bytes_wanted,
                                                            DiskFaults* faults = nullptr);
  ~FileWriter();  // Without Commit: removes what was written.
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  // RESOURCE_EXHAUSTED: the disk is full; the message has the path and how much of how much was written.
  absl::Status Append(const void* data, int64_t bytes);
  // Syncs the file, renames it, syncs the folder. At most once, last.
  absl::Status Commit();

 private:
  FileWriter(std::string path, std::string temporary, int fd, int64_t bytes_wanted, DiskFaults* faults);
  absl::Status WriteAll(const char* data, int64_t bytes);

  const std::string path_;
  const std::string temporary_;
  const int64_t bytes_wanted_;
  DiskFaults* const faults_;
  int fd_;
  int64_t written_ = 0;
  bool renamed_ = false;
};

absl::Status WriteFileAtomic(const std::string& path, std::string_view contents,
                             DiskFaults* faults = nullptr);

// A read-only map of a whole file. Immutable; the bytes live as long as the object. Truncating the file
// meanwhile kills the process (SIGBUS), so map only files that are replaced, never rewritten.
class MappedFile {
 public:
  static absl::StatusOr<std::shared_ptr<const MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  absl::Span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }
  const std::string& path() const { return path_; }

 private:
  MappedFile(std::string path, void* data, size_t size) : path_(std::move(path)), data_(data), size_(size) {}

  const std::string path_;
  void* const data_;
  const size_t size_;
};

std::string JoinPath(std::string_view folder, std::string_view name);
bool IsFolder(const std::string& path);
// Bytes of a regular file. NOT_FOUND; INVALID_ARGUMENT: something else than a file.
absl::StatusOr<int64_t> FileBytes(const std::string& path);
// Names in the folder, sorted.
absl::StatusOr<std::vector<std::string>> ListFolder(const std::string& path);
// Like mkdir -p, durable. ALREADY_EXISTS: a part of the path is a file.
absl::Status MakeFolders(const std::string& path, DiskFaults* faults = nullptr);
// Removes a file, or a folder with all that is in it; follows no links. OK when there is nothing.
absl::Status RemoveTree(const std::string& path, DiskFaults* faults = nullptr);
// Renames within one folder and syncs that folder.
absl::Status RenameDurably(const std::string& from, const std::string& to, DiskFaults* faults = nullptr);

}  // namespace shoal
