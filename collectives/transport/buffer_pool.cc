#include "collectives/transport/buffer_pool.h"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <cstring>

#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr size_t kPrefixBytes = 64;  // Before the buffer: its class.
constexpr int64_t kLeastBytes = 256;
constexpr size_t kHugePageBytes = 2 << 20;

int64_t BytesOf(int size_class) { return int64_t{1} << size_class; }

}  // namespace

BufferPool::~BufferPool() {
  for (auto& buffers : free_) {
    for (std::byte* buffer : buffers) std::free(buffer - kPrefixBytes);
  }
}

std::byte* BufferPool::Take(int64_t bytes) {
  const auto rounded = std::bit_ceil(static_cast<uint64_t>(bytes < kLeastBytes ? kLeastBytes : bytes));
  const int size_class = std::countr_zero(rounded);
  SHOAL_CHECK(size_class < kClasses) << bytes << " bytes";
  std::vector<std::byte*>& free = free_[size_class];
  if (!free.empty()) {
    std::byte* buffer = free.back();
    free.pop_back();
    kept_bytes_ -= BytesOf(size_class);
    return buffer;
  }
  // Only what is used of a large buffer is ever touched: rounding up costs addresses, not memory.
  void* memory = nullptr;
  const size_t alignment = rounded >= kHugePageBytes ? kHugePageBytes : kPrefixBytes;
  SHOAL_CHECK(posix_memalign(&memory, alignment, rounded + kPrefixBytes) == 0)
      << rounded << " bytes for a message";
  if (rounded >= kHugePageBytes) (void)madvise(memory, rounded + kPrefixBytes, MADV_HUGEPAGE);
  std::memcpy(memory, &size_class, sizeof size_class);
  return static_cast<std::byte*>(memory) + kPrefixBytes;
}

void BufferPool::Give(const std::byte* buffer) {
  std::byte* begin = const_cast<std::byte*>(buffer) - kPrefixBytes;
  int size_class = 0;
  std::memcpy(&size_class, begin, sizeof size_class);
  if (kept_bytes_ + BytesOf(size_class) > kept_bytes_max_) {
    std::free(begin);
    return;
  }
  kept_bytes_ += BytesOf(size_class);
  free_[size_class].push_back(const_cast<std::byte*>(buffer));
}

}  // namespace shoal
