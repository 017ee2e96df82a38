// A piece of memory that several processes can map: an anonymous memory file, so that nothing is left behind
// after a crash. All of its pages exist from the start: a write never dies of too little memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "collectives/transport/socket.h"

namespace shoal {

// What the machine, and this process's control group, can still give.
int64_t AvailableMemoryBytes();

// RESOURCE_EXHAUSTED: the machine or this process's control group has less; the message says how much was
// wanted.
absl::Status CheckMemoryAvailable(int64_t bytes);

class Segment {
 public:
  // New zeroed memory, rounded up to whole pages; 2 MiB pages where the system has them reserved.
  // RESOURCE_EXHAUSTED: too little memory (of the machine or of the control group) or too few descriptors.
  static absl::StatusOr<std::unique_ptr<Segment>> Create(uint64_t id, int64_t bytes);
  enum class Access { kRead, kReadWrite };
  // A peer's memory, through the descriptor that it passed.
  static absl::StatusOr<std::unique_ptr<Segment>> Map(uint64_t id, int64_t bytes, Fd fd, Access access);

  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  uint64_t id() const { return id_; }
  std::byte* base() const { return base_; }
  int64_t bytes() const { return bytes_; }
  bool Contains(const void* data, int64_t bytes) const;
  // A second descriptor of the memory file.
  absl::StatusOr<Fd> Duplicate() const;

  // A part of an own segment, rounded to whole pages, becomes memory of this process alone, with what it holds: what peers
  // write there from now on nobody sees here. Threads may use the memory meanwhile. Before CloseDescriptor().
  // RESOURCE_EXHAUSTED and others: it stays shared.
  absl::Status MakePrivate(int64_t offset, int64_t bytes);
  int64_t page_bytes() const { return page_bytes_; }

  // No peer can be told any more; the memory stays.
  void CloseDescriptor() { fd_ = Fd(); }

 private:
  Segment(uint64_t id, int64_t bytes, int64_t page_bytes, Fd fd, std::byte* base)
      : id_(id), bytes_(bytes), page_bytes_(page_bytes), fd_(std::move(fd)), base_(base) {}

  uint64_t id_;
  int64_t bytes_, page_bytes_;
  Fd fd_;
  std::byte* base_;
};

}  // namespace shoal
