// Which piece of which segment a device allocation gets: the decisions of DevicePool, without a device. A segment is memory that was
// asked of the driver at once; it is cut into blocks, and free neighbours are joined again. A segment belongs to one owner (a
// stream), within whose order of work blocks can be used again at once; an idle one, all free, can be given to another. An owner below
// 0 is a recorded graph, which uses its memory whenever it is launched: no segment of its own is idle.
//
// Deterministic: of blocks that fit the smallest is taken, of equal ones the one in the older segment, then at the lower offset.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace shoal {

// What a request for `bytes` takes up, and the size of a segment that is asked for when none has room.
int64_t BlockBytes(int64_t bytes);
int64_t SegmentBytes(int64_t block_bytes);

// Not thread-safe.
class BlockTable {
 public:
  static constexpr int kNobody = 0;  // Of segments whose owner is gone.

  struct Block {
    int64_t bytes = 0;
    int64_t segment = 0;
    bool free = true;
    std::vector<int> users;  // Streams but the owner that use it.
  };
  struct Idle {
    void* base;
    int64_t bytes;
    int owner;
  };

  // A block of at least `bytes` of the owner's; null: there is none.
  void* Take(int64_t bytes, int owner);
  // Its end. It can be taken again.
  void Free(void* block);
  // The block that `address` lies in; null: no taken block.
  Block* Find(const void* address);
  // Of the segment of a taken block.
  int OwnerOf(const Block& block) const { return segments_.at(block.segment).owner; }
  void* BaseOf(const Block& block) const { return segments_.at(block.segment).base; }

  void AddSegment(void* base, int64_t bytes, int owner);
  void RemoveSegment(void* base);  // Idle.
  void Give(void* base, int owner);
  void HandOver(int from, int to);  // All segments.

  // Idle segments, the oldest first; those that a block of `bytes` would fit in, of other owners, the smallest first. At most
  // `segment_bytes_max` large.
  std::vector<Idle> AllIdle() const;
  std::vector<Idle> IdleFor(int64_t bytes, int owner, int64_t segment_bytes_max) const;

  int64_t in_use_bytes() const { return in_use_bytes_; }
  int64_t reserved_bytes() const { return reserved_bytes_; }
  // Of free blocks, and the largest of them: how torn the memory is.
  int64_t largest_free_bytes() const;

 private:
  struct Segment {
    char* base;
    int64_t bytes;
    int owner;
    bool small;
    int64_t taken = 0;
  };
  using Blocks = std::map<char*, Block>;
  using FreeList = std::set<std::tuple<int64_t, int64_t, char*>>;  // Bytes, segment, address.

  FreeList& FreeOf(const Segment& segment) { return free_[{segment.owner, segment.small}]; }
  Blocks::iterator Join(Blocks::iterator left, Blocks::iterator right);
  std::map<char*, int64_t>::const_iterator SegmentAt(void* base) const;

  std::map<int64_t, Segment> segments_;  // By age.
  std::map<char*, int64_t> by_base_;
  Blocks blocks_;
  std::map<std::pair<int, bool>, FreeList> free_;
  int64_t next_segment_ = 1;
  int64_t in_use_bytes_ = 0;
  int64_t reserved_bytes_ = 0;
};

}  // namespace shoal
