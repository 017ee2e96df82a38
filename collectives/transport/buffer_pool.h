// Memory for messages that arrive, kept from one to the next so that no message costs page faults. Not
// thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace shoal {

class BufferPool {
 public:
  // At most so many free bytes are kept.
  explicit BufferPool(int64_t kept_bytes_max) : kept_bytes_max_(kept_bytes_max) {}
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  // At least `bytes`, aligned to a cache line; contents are undefined.
  std::byte* Take(int64_t bytes);
  void Give(const std::byte* buffer);

 private:
  static constexpr int kClasses = 40;  // Powers of two.
  std::array<std::vector<std::byte*>, kClasses> free_;
  int64_t kept_bytes_ = 0;
  const int64_t kept_bytes_max_;
};

}  // namespace shoal
