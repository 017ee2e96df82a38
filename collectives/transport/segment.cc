#include "collectives/transport/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>

#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kSmallPage = 4096;
constexpr int64_t kHugePage = 2 << 20;

int64_t RoundUp(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// The number in a one-line file of /proc or /sys, or `fallback` (no such file, or a word such as "max").
int64_t NumberIn(const char* path, int64_t fallback) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : fallback;
}

// The sum of the values of `keys` in a file of "key value" lines; `fallback` when none is there.
int64_t SumOf(const char* path, std::initializer_list<std::string_view> keys, int64_t fallback) {
  std::ifstream file(path);
  std::string key, rest;
  int64_t value = 0, sum = 0;
  bool found = false;
  while (file >> key >> value && std::getline(file, rest)) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) continue;
    sum += value;
    found = true;
  }
  return found ? sum : fallback;
}

// What a control group may still use. File pages, which the kernel gives back, do not count.
int64_t GroupAvailableBytes(int64_t limit, int64_t used, int64_t files) {
  return limit - std::max<int64_t>(used - files, 0);
}

// Pages of a memory file have no size limit of their own: past what the machine or the control group has, the
// kernel kills a process. So ask first.
int64_t AvailableBytes() {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const int64_t machine = SumOf("/proc/meminfo", {"MemAvailable:"}, kNone / 1024) * 1024;
  const int64_t v2 = GroupAvailableBytes(
      NumberIn("/sys/fs/cgroup/memory.max", kNone), NumberIn("/sys/fs/cgroup/memory.current", 0),
      SumOf("/sys/fs/cgroup/memory.stat", {"active_file", "inactive_file"}, 0));
  const int64_t v1 = GroupAvailableBytes(
      NumberIn("/sys/fs/cgroup/memory/memory.limit_in_bytes", kNone),
      NumberIn("/sys/fs/cgroup/memory/memory.usage_in_bytes", 0),
      SumOf("/sys/fs/cgroup/memory/memory.stat", {"total_active_file", "total_inactive_file"}, 0));
  return std::max<int64_t>(std::min({machine, v2, v1}), 0);
}

bool HugePagesFree(int64_t bytes) {
  return NumberIn("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", 0) * kHugePage >= bytes;
}

absl::StatusOr<std::byte*> MapFile(int fd, int64_t bytes, Segment::Access access) {
  const bool writes = access == Segment::Access::kReadWrite;
  void* base = mmap(nullptr, bytes, writes ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return ErrnoStatus(errno, "map shared memory");
  (void)madvise(base, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(base);
}

struct MappedFile {
  Fd fd;
  std::byte* base;
};

// A new memory file of `bytes` existing pages.
absl::StatusOr<MappedFile> NewFile(int64_t bytes, unsigned int flags) {
  Fd fd(memfd_create("shoal", MFD_CLOEXEC | flags));
  if (!fd.valid()) return ErrnoStatus(errno, "create a memory file");
  if (ftruncate(fd.get(), bytes) != 0) return ErrnoStatus(errno, "size shared memory");
  // Mapped first: only through a mapping can the kernel be asked for large pages.
  SHOAL_ASSIGN_OR_RETURN(std::byte * base, MapFile(fd.get(), bytes, Segment::Access::kReadWrite));
#ifdef MADV_POPULATE_WRITE
  // Pages and page tables now, in one go, instead of a fault of 2 us per page in the first operation. Best
  // effort. Only their owner's: a peer reads or writes a part of them, where a fault finds 16 pages that exist, in
  // 1 us; all pages of all peers would keep the cores busy for tenths of a second.
  (void)madvise(base, bytes, MADV_POPULATE_WRITE);
#endif
  int error = 0;
  do {
    error = fallocate(fd.get(), 0, 0, bytes) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error != 0) {
    munmap(base, bytes);
    return ErrnoStatus(error, "allocate shared memory");
  }
  return MappedFile{std::move(fd), base};
}

}  // namespace

int64_t AvailableMemoryBytes() { return AvailableBytes(); }

absl::Status CheckMemoryAvailable(int64_t bytes) {
  const int64_t available = AvailableMemoryBytes();
  if (bytes <= available) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("memory: wanted ", bytes, " bytes, ", available, " are available"));
}

absl::StatusOr<std::unique_ptr<Segment>> Segment::Create(uint64_t id, int64_t bytes) {
  SHOAL_RETURN_IF_ERROR(CheckMemoryAvailable(bytes), "shared");
  if (bytes >= kHugePage && HugePagesFree(bytes)) {
    const int64_t rounded = RoundUp(bytes, kHugePage);
    absl::StatusOr<MappedFile> file = NewFile(rounded, MFD_HUGETLB);
    // Somebody else may have taken the pages meanwhile: small ones do too.
    if (file.ok()) {
      return std::unique_ptr<Segment>(new Segment(id, rounded, kHugePage, std::move(file->fd), file->base));
    }
  }
  const int64_t rounded = RoundUp(std::max<int64_t>(bytes, 1), kSmallPage);
  SHOAL_ASSIGN_OR_RETURN(MappedFile file, NewFile(rounded, 0), "wanted ", bytes, " bytes");
  return std::unique_ptr<Segment>(new Segment(id, rounded, kSmallPage, std::move(file.fd), file.base));
}

absl::StatusOr<std::unique_ptr<Segment>> Segment::Map(uint64_t id, int64_t bytes, Fd fd, Access access) {
  struct stat info = {};
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, "a peer's shared memory");
  if (bytes <= 0 || info.st_size < bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a peer's shared memory has ", info.st_size, " bytes, it says ", bytes));
  }
  SHOAL_ASSIGN_OR_RETURN(std::byte * base, MapFile(fd.get(), bytes, access));
  // The mapping keeps the memory; the descriptor is not needed, and there may be many.
  return std::unique_ptr<Segment>(new Segment(id, bytes, kSmallPage, Fd(), base));
}

Segment::~Segment() { munmap(base_, bytes_); }

bool Segment::Contains(const void* data, int64_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(data);
  return begin >= base_ && bytes <= bytes_ && begin + bytes <= base_ + bytes_;
}

absl::Status Segment::MakePrivate(int64_t offset, int64_t bytes) {
  const int64_t begin = offset / page_bytes_ * page_bytes_;
  const int64_t size = std::min(RoundUp(offset + bytes, page_bytes_), bytes_) - begin;
  // In two steps, because a failed mmap(2) over the old place could leave a hole there.
  void* copy = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd_.get(), begin);
  if (copy == MAP_FAILED) return ErrnoStatus(errno, "map shared memory as private");
  if (mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, base_ + begin) == MAP_FAILED) {
    const absl::Status status = ErrnoStatus(errno, "move a private mapping over a shared one");
    munmap(copy, size);
    return status;
  }
  // A private page is the shared one until it is first written to. A write that changes nothing, whoever else writes.
  for (int64_t page = begin; page < begin + size; page += page_bytes_) {
    std::atomic_ref<uint8_t> byte(*reinterpret_cast<uint8_t*>(base_ + page));
    uint8_t value = byte.load(std::memory_order_relaxed);
    while (!byte.compare_exchange_weak(value, value)) {
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Fd> Segment::Duplicate() const {
  Fd copy(fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy.valid()) return ErrnoStatus(errno, "duplicate a descriptor of shared memory");
  return copy;
}

}  // namespace shoal
