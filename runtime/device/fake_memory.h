// Memory of a fake device (fake_device.h): host memory that cannot be touched (PROT_NONE) but while work of the device runs, and that
// other processes of this host can open, as a driver's handles between processes allow. What another "process" of this one opens is the
// same memory; it lives until the last one has closed it.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "runtime/device/device_api.h"

namespace shoal {

// Not thread-safe.
class FakeMemory {
 public:
  explicit FakeMemory(bool protect) : protect_(protect) {}

  // Full of NaN. A page that is never opened lies behind it.
  void* Allocate(int64_t bytes, int device);
  // These return false for what is not the start of an allocation, or was not opened.
  bool Release(void* memory);
  bool Export(void* memory, DeviceIpcHandle* handle) const;
  bool Close(void* memory);
  // Null: whoever allocated it has released it, or is gone.
  void* Open(const DeviceIpcHandle& handle);

  // Opened memory of other processes among it.
  bool Contains(const void* address) const;
  int64_t bytes() const;
  int64_t BytesOf(int device) const;
  bool empty() const { return ranges_.empty(); }

  // Device memory can be touched while one of these exists.
  class Touching {
   public:
    explicit Touching(FakeMemory* memory) : memory_(*memory) {
      if (memory_.touching_++ == 0) memory_.ProtectAll();
    }
    ~Touching() {
      if (--memory_.touching_ == 0) memory_.ProtectAll();
    }
    Touching(const Touching&) = delete;

   private:
    FakeMemory& memory_;
  };

 private:
  struct Range {
    int64_t bytes;
    int device;          // kOfOthers: of another process.
    int fd;              // Of what is ours: others find it by its number. Else -1.
    std::string handle;  // Of what is another process's.
    int opened = 0;
    bool released = false;  // By whom it was allocated.
  };
  using Ranges = std::map<char*, Range>;
  static constexpr int kOfOthers = -1;

  void Protect(char* base, int64_t bytes) const;
  void ProtectAll();
  void* Map(int fd, Range range);
  void Unmap(Ranges::iterator range);

  const bool protect_;
  Ranges ranges_;
  int touching_ = 0;
};

}  // namespace shoal
