#include "runtime/files/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

int OpenRetrying(const std::string& path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

absl::Status Ask(DiskFaults* faults, DiskStep step, const std::string& path,
                 const std::string& new_path = "") {
  if (faults == nullptr) return absl::OkStatus();
  DiskAction action{step, path, new_path};
  return faults->Before(action);
}

std::string ParentOf(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

absl::Status SyncFolder(const std::string& path, DiskFaults* faults) {
  SHOAL_RETURN_IF_ERROR(Ask(faults, DiskStep::kSyncFolder, path));
  const Fd folder(OpenRetrying(path, O_RDONLY | O_DIRECTORY));
  if (folder.get() < 0) return ErrnoStatus(errno, absl::StrCat("cannot open folder ", path));
  // EINVAL: a file system that has nothing to sync for folders.
  if (fsync(folder.get()) != 0 && errno != EINVAL) {
    return ErrnoStatus(errno, absl::StrCat("cannot sync folder ", path));
  }
  return absl::OkStatus();
}

absl::Status MakeOneFolder(const std::string& path, DiskFaults* faults) {
  if (IsFolder(path)) return absl::OkStatus();
  SHOAL_RETURN_IF_ERROR(Ask(faults, DiskStep::kMakeFolder, path));
  if (mkdir(path.c_str(), 0777) != 0) {
    const int error = errno;
    if (error == EEXIST && IsFolder(path)) return absl::OkStatus();  // Another process was faster.
    return ErrnoStatus(error, absl::StrCat("cannot make folder ", path));
  }
  return SyncFolder(ParentOf(path), faults);
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  const Fd file(OpenRetrying(path, O_RDONLY));
  if (file.get() < 0) return ErrnoStatus(errno, absl::StrCat("cannot open ", path));
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrnoStatus(errno, absl::StrCat("cannot stat ", path));
  std::string contents;
  // One byte more than the file has, so that the read which finds the end needs no second buffer.
  if (S_ISREG(info.st_mode)) contents.resize(static_cast<size_t>(info.st_size) + 1);
  size_t used = 0;
  while (true) {
    // Pipes and /proc do not tell their size beforehand.
    if (used == contents.size()) contents.resize(std::max<size_t>(4096, 2 * used));
    const ssize_t count = read(file.get(), contents.data() + used, contents.size() - used);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return ErrnoStatus(errno, absl::StrCat("cannot read ", path));
    if (count == 0) break;
    used += static_cast<size_t>(count);
  }
  contents.resize(used);
  return contents;
}

absl::StatusOr<std::unique_ptr<FileWriter>> FileWriter::Create(std::string path, int64_t bytes_wanted,
                                                               DiskFaults* faults) {
  std::string temporary = absl::StrCat(path, ".tmp-", getpid());
  SHOAL_RETURN_IF_ERROR(Ask(faults, DiskStep::kCreate, temporary));
  const int fd = OpenRetrying(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (fd < 0) return ErrnoStatus(errno, absl::StrCat("cannot create ", temporary));
  return std::unique_ptr<FileWriter>(
      new FileWriter(std::move(path), std::move(temporary), fd, bytes_wanted, faults));
}

FileWriter::FileWriter(std::string path, std::string temporary, int fd, int64_t bytes_wanted,
                       DiskFaults* faults)
    : path_(std::move(path)),
      temporary_(std::move(temporary)),
      bytes_wanted_(bytes_wanted),
      faults_(faults),
      fd_(fd) {}

FileWriter::~FileWriter() {
  if (fd_ >= 0) close(fd_);
  if (!renamed_ && Ask(faults_, DiskStep::kRemove, temporary_).ok()) unlink(temporary_.c_str());
}

absl::Status FileWriter::WriteAll(const char* data, int64_t bytes) {
  while (bytes > 0) {
    const ssize_t count = write(fd_, data, static_cast<size_t>(bytes));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return ErrnoStatus(errno, absl::StrCat("cannot write ", path_));
    data += count;
    bytes -= count;
    written_ += count;
  }
  return absl::OkStatus();
}

absl::Status FileWriter::Append(const void* data, int64_t bytes) {
  SHOAL_CHECK(fd_ >= 0 && bytes >= 0);
  const int64_t wanted = std::max(bytes_wanted_, written_ + bytes);
  absl::Status injected;
  if (faults_ != nullptr) {
    DiskAction action{DiskStep::kWrite, temporary_, "", bytes};
    injected = faults_->Before(action);
    if (!injected.ok()) bytes = std::min(bytes, action.bytes);
  }
  absl::Status status = WriteAll(static_cast<const char*>(data), bytes);
  if (status.ok())
    status = injected.ok() ? injected : Annotate(injected, absl::StrCat("cannot write ", path_));
  if (status.ok()) return status;
  return absl::Status(status.code(),
                      absl::StrCat(status.message(), " (", written_, " of ", wanted, " bytes written)"));
}

absl::Status FileWriter::Commit() {
  SHOAL_CHECK(fd_ >= 0);
  SHOAL_RETURN_IF_ERROR(Ask(faults_, DiskStep::kSync, temporary_));
  if (fsync(fd_) != 0) {
    return ErrnoStatus(errno, absl::StrCat("cannot sync ", path_, " (", bytes_wanted_, " bytes)"));
  }
  const int closed = close(fd_);
  fd_ = -1;
  if (closed != 0) return ErrnoStatus(errno, absl::StrCat("cannot close ", path_));
  SHOAL_RETURN_IF_ERROR(Ask(faults_, DiskStep::kRename, temporary_, path_));
  if (rename(temporary_.c_str(), path_.c_str()) != 0) {
    return ErrnoStatus(errno, absl::StrCat("cannot rename ", temporary_, " to ", path_));
  }
  renamed_ = true;
  return SyncFolder(ParentOf(path_), faults_);
}

absl::Status WriteFileAtomic(const std::string& path, std::string_view contents, DiskFaults* faults) {
  const int64_t bytes = static_cast<int64_t>(contents.size());
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<FileWriter> writer, FileWriter::Create(path, bytes, faults));
  SHOAL_RETURN_IF_ERROR(writer->Append(contents.data(), bytes));
  return writer->Commit();
}

absl::StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(const std::string& path) {
  const Fd file(OpenRetrying(path, O_RDONLY));
  if (file.get() < 0) return ErrnoStatus(errno, absl::StrCat("cannot open ", path));
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrnoStatus(errno, absl::StrCat("cannot stat ", path));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  const size_t size = static_cast<size_t>(info.st_size);
  void* data = nullptr;
  if (size > 0) {
    data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (data == MAP_FAILED)
      return ErrnoStatus(errno, absl::StrCat("cannot map ", path, " (", size, " bytes)"));
  }
  return std::shared_ptr<const MappedFile>(new MappedFile(path, data, size));
}

MappedFile::~MappedFile() {
  if (size_ > 0) munmap(data_, size_);
}

std::string JoinPath(std::string_view folder, std::string_view name) {
  if (folder.empty()) return std::string(name);
  return absl::StrCat(AbslSv(folder), folder.back() == '/' ? "" : "/", AbslSv(name));
}

bool IsFolder(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

absl::StatusOr<int64_t> FileBytes(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return ErrnoStatus(errno, absl::StrCat("cannot stat ", path));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  return static_cast<int64_t>(info.st_size);
}

absl::StatusOr<std::vector<std::string>> ListFolder(const std::string& path) {
  DIR* const folder = opendir(path.c_str());
  if (folder == nullptr) return ErrnoStatus(errno, absl::StrCat("cannot list folder ", path));
  std::vector<std::string> names;
  errno = 0;
  while (const dirent* entry = readdir(folder)) {
    const std::string_view name = entry->d_name;
    if (name != "." && name != "..") names.emplace_back(name);
    errno = 0;
  }
  const int error = errno;
  closedir(folder);
  if (error != 0) return ErrnoStatus(error, absl::StrCat("cannot list folder ", path));
  std::sort(names.begin(), names.end());
  return names;
}

absl::Status MakeFolders(const std::string& path, DiskFaults* faults) {
  for (size_t end = path.find('/', 1); end != std::string::npos; end = path.find('/', end + 1)) {
    SHOAL_RETURN_IF_ERROR(MakeOneFolder(path.substr(0, end), faults));
  }
  return MakeOneFolder(path, faults);
}

absl::Status RemoveTree(const std::string& path, DiskFaults* faults) {
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : ErrnoStatus(errno, absl::StrCat("cannot stat ", path));
  }
  const bool folder = S_ISDIR(info.st_mode);
  if (folder) {
    SHOAL_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFolder(path));
    for (const std::string& name : names) SHOAL_RETURN_IF_ERROR(RemoveTree(JoinPath(path, name), faults));
  }
  SHOAL_RETURN_IF_ERROR(Ask(faults, DiskStep::kRemove, path));
  if ((folder ? rmdir(path.c_str()) : unlink(path.c_str())) != 0 && errno != ENOENT) {
    return ErrnoStatus(errno, absl::StrCat("cannot remove ", path));
  }
  return absl::OkStatus();
}

absl::Status RenameDurably(const std::string& from, const std::string& to, DiskFaults* faults) {
  SHOAL_RETURN_IF_ERROR(Ask(faults, DiskStep::kRename, from, to));
  if (rename(from.c_str(), to.c_str()) != 0) {
    return ErrnoStatus(errno, absl::StrCat("cannot rename ", from, " to ", to));
  }
  return SyncFolder(ParentOf(to), faults);
}

}  // namespace shoal
