// Host memory for tensors: a caching allocator over 2 MiB-aligned mappings with transparent huge pages, because mapping and
// first touch of fresh 4 KiB pages costs more than most kernels that use them. Freed blocks are kept and reused.
#pragma once

#include <cstdint>
#include <memory>

namespace shoal {

struct HostMemoryStats {
  int64_t in_use_bytes = 0;    // Pages that tensors need. A block that is used again may have more.
  int64_t peak_bytes = 0;      // Of in_use_bytes, since the last ResetPeak().
  int64_t reserved_bytes = 0;  // Mapped from the system.
};

// Thread-safe. One per process.
class HostMemory {
 public:
  static HostMemory& Get();

  // At least `bytes` (0 gives a valid unique pointer), 64-byte aligned, uninitialised. Returns to the pool with the last
  // reference. CHECKs that the system gives memory.
  std::shared_ptr<void> Allocate(int64_t bytes);
  HostMemoryStats stats() const;
  void ResetPeak();

 private:
  HostMemory();
  ~HostMemory() = delete;
  struct Impl;
  Impl* impl_;
};

}  // namespace shoal
