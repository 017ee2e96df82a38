#include "runtime/device/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <new>

#include "runtime/base/check.h"
#include "runtime/base/mutex.h"

namespace shoal {
namespace {

constexpr int64_t kHugePageBytes = 2 << 20;
// Below this a block comes from the C library: small tensors must not each take a huge page.
constexpr int64_t kSmallBytes = 256 << 10;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

void* MapHuge(int64_t bytes) {
  const int64_t span = bytes + kHugePageBytes;
  void* raw = mmap(nullptr, static_cast<size_t>(span), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  if (aligned > begin) munmap(raw, aligned - begin);
  const uintptr_t end = begin + static_cast<uintptr_t>(span);
  if (end > aligned + static_cast<uintptr_t>(bytes)) {
    munmap(reinterpret_cast<void*>(aligned + static_cast<uintptr_t>(bytes)), end - aligned - static_cast<uintptr_t>(bytes));
  }
  madvise(reinterpret_cast<void*>(aligned), static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return reinterpret_cast<void*>(aligned);
}

}  // namespace

struct HostMemory::Impl {
  mutable Mutex mutex;
  std::multimap<int64_t, void*> free ABSL_GUARDED_BY(mutex);
  HostMemoryStats stats ABSL_GUARDED_BY(mutex);

  void Count(int64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    stats.in_use_bytes += bytes;
    stats.peak_bytes = std::max(stats.peak_bytes, stats.in_use_bytes);
  }

  void Release(void* block, int64_t block_bytes, int64_t needed_bytes) {
    MutexLock lock(&mutex);
    stats.in_use_bytes -= needed_bytes;
    free.emplace(block_bytes, block);
  }

  // The size of the block found and the block, or null. A block may be up to a quarter (or a huge page) too large.
  std::pair<int64_t, void*> TakeFree(int64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    const auto found = free.lower_bound(bytes);
    if (found == free.end() || found->first > bytes + std::max(bytes / 4, kHugePageBytes)) return {0, nullptr};
    const std::pair<int64_t, void*> block = *found;
    free.erase(found);
    return block;
  }

  void ReturnAllToSystem() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    for (const auto& [bytes, block] : free) {
      munmap(block, static_cast<size_t>(bytes));
      stats.reserved_bytes -= bytes;
    }
    free.clear();
  }
};

HostMemory::HostMemory() : impl_(new Impl) {}

HostMemory& HostMemory::Get() {
  static HostMemory* memory = new HostMemory();
  return *memory;
}

std::shared_ptr<void> HostMemory::Allocate(int64_t bytes) {
  Impl* impl = impl_;
  if (bytes < kSmallBytes) {
    const size_t size = static_cast<size_t>(RoundUp(std::max<int64_t>(bytes, 1), 64));
    return std::shared_ptr<void>(::operator new(size, std::align_val_t(64)),
                                 [](void* block) { ::operator delete(block, std::align_val_t(64)); });
  }
  const int64_t needed = RoundUp(bytes, kHugePageBytes);
  int64_t size = needed;
  MutexLock lock(&impl->mutex);
  auto [found_size, block] = impl->TakeFree(size);
  if (block != nullptr) {
    size = found_size;
  } else {
    block = MapHuge(size);
    if (block == nullptr) {
      impl->ReturnAllToSystem();
      block = MapHuge(size);
    }
    SHOAL_CHECK(block != nullptr) << "out of memory: " << bytes << " bytes wanted, " << impl->stats.in_use_bytes
                                  << " in use, " << impl->stats.reserved_bytes << " reserved";
    impl->stats.reserved_bytes += size;
  }
  impl->Count(needed);
  return std::shared_ptr<void>(block, [impl, size, needed](void* freed) { impl->Release(freed, size, needed); });
}

HostMemoryStats HostMemory::stats() const {
  MutexLock lock(&impl_->mutex);
  return impl_->stats;
}

void HostMemory::ResetPeak() {
  MutexLock lock(&impl_->mutex);
  impl_->stats.peak_bytes = impl_->stats.in_use_bytes;
}

}  // namespace shoal
