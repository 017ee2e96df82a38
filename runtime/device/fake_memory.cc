#include "runtime/device/fake_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int64_t kPage = 4096;

// What a DeviceIpcHandle holds.
struct Place {
  int64_t process;
  int64_t fd;
  int64_t file;  // Its number: another file may have the descriptor by now.
  int64_t bytes;
  void* memory;  // In that process.
};
static_assert(sizeof(Place) <= sizeof(DeviceIpcHandle));

int64_t FileOf(int fd) {
  struct stat file = {};
  SHOAL_CHECK(fstat(fd, &file) == 0);
  return static_cast<int64_t>(file.st_ino);
}

}  // namespace

void FakeMemory::Protect(char* base, int64_t bytes) const {
  if (!protect_) return;
  SHOAL_CHECK_EQ(mprotect(base, static_cast<size_t>(bytes), touching_ > 0 ? PROT_READ | PROT_WRITE : PROT_NONE), 0);
}

void FakeMemory::ProtectAll() {
  for (const auto& [base, range] : ranges_) Protect(base, range.bytes);
}

void* FakeMemory::Map(int fd, Range range) {
  const auto bytes = static_cast<size_t>(range.bytes);
  void* const base = mmap(nullptr, bytes + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  SHOAL_CHECK(base != MAP_FAILED) << bytes << " bytes";
  SHOAL_CHECK(mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0) == base) << bytes << " bytes";
  ranges_[static_cast<char*>(base)] = std::move(range);
  return base;
}

void FakeMemory::Unmap(Ranges::iterator range) {
  munmap(range->first, static_cast<size_t>(range->second.bytes + kPage));
  if (range->second.fd >= 0) close(range->second.fd);
  ranges_.erase(range);
}

void* FakeMemory::Allocate(int64_t bytes, int device) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  const int fd = memfd_create("fake device", MFD_CLOEXEC);
  SHOAL_CHECK(fd >= 0 && ftruncate(fd, bytes) == 0) << bytes << " bytes";
  void* const base = Map(fd, {.bytes = bytes, .device = device, .fd = fd, .handle = ""});
  std::memset(base, 0xff, static_cast<size_t>(bytes));
  Protect(static_cast<char*>(base), bytes);
  return base;
}

bool FakeMemory::Release(void* memory) {
  const auto found = ranges_.find(static_cast<char*>(memory));
  if (found == ranges_.end() || found->second.released || found->second.device == kOfOthers) return false;
  found->second.released = true;
  if (found->second.opened == 0) Unmap(found);
  return true;
}

bool FakeMemory::Export(void* memory, DeviceIpcHandle* handle) const {
  const auto found = ranges_.find(static_cast<char*>(memory));
  if (found == ranges_.end() || found->second.released || found->second.device == kOfOthers) return false;
  const Range& range = found->second;
  const Place place = {getpid(), range.fd, FileOf(range.fd), range.bytes, memory};
  *handle = {};
  std::memcpy(handle->bytes, &place, sizeof(place));
  return true;
}

void* FakeMemory::Open(const DeviceIpcHandle& handle) {
  Place place;
  std::memcpy(&place, handle.bytes, sizeof(place));
  const std::string name(handle.bytes, sizeof(handle.bytes));
  for (auto& [base, range] : ranges_) {
    if (place.process == getpid() ? base != place.memory || range.released : range.handle != name) continue;
    ++range.opened;
    return base;
  }
  if (place.process == getpid()) return nullptr;
  const int fd = open(absl::StrCat("/proc/", place.process, "/fd/", place.fd).c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* base = nullptr;
  if (FileOf(fd) == place.file) {
    base = Map(fd, {.bytes = place.bytes, .device = kOfOthers, .fd = -1, .handle = name, .opened = 1});
    Protect(static_cast<char*>(base), place.bytes);
  }
  close(fd);
  return base;
}

bool FakeMemory::Close(void* memory) {
  const auto found = ranges_.find(static_cast<char*>(memory));
  if (found == ranges_.end() || found->second.opened == 0) return false;
  if (--found->second.opened == 0 && (found->second.released || found->second.device == kOfOthers)) Unmap(found);
  return true;
}

bool FakeMemory::Contains(const void* address) const {
  auto found = ranges_.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  return found != ranges_.begin() && static_cast<const char*>(address) < (--found)->first + found->second.bytes;
}

int64_t FakeMemory::bytes() const {
  int64_t bytes = 0;
  for (const auto& [base, range] : ranges_) bytes += range.bytes;
  return bytes;
}

int64_t FakeMemory::BytesOf(int device) const {
  int64_t bytes = 0;
  for (const auto& [base, range] : ranges_) bytes += range.device == device ? range.bytes : 0;
  return bytes;
}

}  // namespace shoal
