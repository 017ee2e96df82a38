#include "runtime/device/blocks.h"

#include <algorithm>

#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int64_t kUnit = 512;
constexpr int64_t kMiB = int64_t{1} << 20;
// Small blocks have segments of their own, so that they do not tear large ones.
constexpr int64_t kSmallMax = kMiB;
constexpr int64_t kSmallSegment = 2 * kMiB;
constexpr int64_t kMediumMax = 10 * kMiB;
constexpr int64_t kMediumSegment = 20 * kMiB;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

bool IsSmall(int64_t bytes) { return bytes <= kSmallMax; }

// What is left of a block is kept as one of its own when it is of use.
bool WorthSplitting(int64_t rest, bool small) { return small ? rest >= kUnit : rest > kSmallMax; }

}  // namespace

int64_t BlockBytes(int64_t bytes) { return RoundUp(std::max<int64_t>(bytes, 1), kUnit); }

int64_t SegmentBytes(int64_t block_bytes) {
  if (block_bytes <= kSmallMax) return kSmallSegment;
  if (block_bytes < kMediumMax) return kMediumSegment;
  return RoundUp(block_bytes, kSmallSegment);
}

void* BlockTable::Take(int64_t bytes, int owner) {
  bytes = BlockBytes(bytes);
  const bool small = IsSmall(bytes);
  const auto list = free_.find({owner, small});
  if (list == free_.end()) return nullptr;
  const auto found = list->second.lower_bound({bytes, 0, nullptr});
  if (found == list->second.end()) return nullptr;
  const auto [block_bytes, segment_id, address] = *found;
  list->second.erase(found);
  Segment& segment = segments_.at(segment_id);
  Block& block = blocks_.at(address);
  if (WorthSplitting(block_bytes - bytes, small)) {
    block.bytes = bytes;
    blocks_[address + bytes] = {.bytes = block_bytes - bytes, .segment = segment_id};
    list->second.insert({block_bytes - bytes, segment_id, address + bytes});
  }
  block.free = false;
  ++segment.taken;
  in_use_bytes_ += block.bytes;
  return address;
}

// Of two neighbours that are free and in no list.
BlockTable::Blocks::iterator BlockTable::Join(Blocks::iterator left, Blocks::iterator right) {
  left->second.bytes += right->second.bytes;
  blocks_.erase(right);
  return left;
}

void BlockTable::Free(void* address) {
  auto block = blocks_.find(static_cast<char*>(address));
  SHOAL_CHECK(block != blocks_.end() && !block->second.free) << "not a block in use: " << address;
  const int64_t segment_id = block->second.segment;
  Segment& segment = segments_.at(segment_id);
  FreeList& list = FreeOf(segment);
  in_use_bytes_ -= block->second.bytes;
  --segment.taken;
  block->second.free = true;
  block->second.users.clear();
  const auto joinable = [&](Blocks::iterator other) { return other->second.free && other->second.segment == segment_id; };
  if (const auto next = std::next(block); next != blocks_.end() && joinable(next)) {
    list.erase({next->second.bytes, segment_id, next->first});
    block = Join(block, next);
  }
  if (block != blocks_.begin() && joinable(std::prev(block))) {
    const auto previous = std::prev(block);
    list.erase({previous->second.bytes, segment_id, previous->first});
    block = Join(previous, block);
  }
  list.insert({block->second.bytes, segment_id, block->first});
}

BlockTable::Block* BlockTable::Find(const void* address) {
  auto block = blocks_.upper_bound(const_cast<char*>(static_cast<const char*>(address)));
  if (block == blocks_.begin()) return nullptr;
  --block;
  const bool inside = static_cast<const char*>(address) < block->first + block->second.bytes;
  return inside && !block->second.free ? &block->second : nullptr;
}

void BlockTable::AddSegment(void* base, int64_t bytes, int owner) {
  const int64_t id = next_segment_++;
  char* const address = static_cast<char*>(base);
  const Segment& segment = segments_[id] = {address, bytes, owner, bytes <= kSmallSegment};
  by_base_[address] = id;
  blocks_[address] = {.bytes = bytes, .segment = id};
  FreeOf(segment).insert({bytes, id, address});
  reserved_bytes_ += bytes;
}

std::map<char*, int64_t>::const_iterator BlockTable::SegmentAt(void* base) const {
  const auto found = by_base_.find(static_cast<char*>(base));
  SHOAL_CHECK(found != by_base_.end()) << "no segment at " << base;
  SHOAL_CHECK_EQ(segments_.at(found->second).taken, 0);
  return found;
}

void BlockTable::RemoveSegment(void* base) {
  const auto found = SegmentAt(base);
  const Segment& segment = segments_.at(found->second);
  FreeOf(segment).erase({segment.bytes, found->second, segment.base});
  reserved_bytes_ -= segment.bytes;
  blocks_.erase(segment.base);
  segments_.erase(found->second);
  by_base_.erase(found);
}

void BlockTable::Give(void* base, int owner) {
  const auto found = SegmentAt(base);
  Segment& segment = segments_.at(found->second);
  FreeOf(segment).erase({segment.bytes, found->second, segment.base});
  segment.owner = owner;
  FreeOf(segment).insert({segment.bytes, found->second, segment.base});
}

void BlockTable::HandOver(int from, int to) {
  for (auto& [id, segment] : segments_) {
    if (segment.owner == from) segment.owner = to;
  }
  for (const bool small : {false, true}) {
    FreeList list = std::move(free_[{from, small}]);
    free_.erase({from, small});
    free_[{to, small}].merge(list);
  }
}

std::vector<BlockTable::Idle> BlockTable::AllIdle() const {
  std::vector<Idle> idle;
  for (const auto& [id, segment] : segments_) {
    if (segment.taken == 0 && segment.owner >= kNobody) idle.push_back({segment.base, segment.bytes, segment.owner});
  }
  return idle;
}

std::vector<BlockTable::Idle> BlockTable::IdleFor(int64_t bytes, int owner, int64_t segment_bytes_max) const {
  bytes = BlockBytes(bytes);
  std::vector<Idle> fitting;
  for (const auto& [id, segment] : segments_) {
    const bool fits = segment.bytes >= bytes && segment.bytes <= segment_bytes_max && segment.small == IsSmall(bytes);
    const bool idle = segment.taken == 0 && segment.owner >= kNobody;
    if (idle && segment.owner != owner && fits) fitting.push_back({segment.base, segment.bytes, segment.owner});
  }
  std::stable_sort(fitting.begin(), fitting.end(), [](const Idle& a, const Idle& b) { return a.bytes < b.bytes; });
  return fitting;
}

int64_t BlockTable::largest_free_bytes() const {
  int64_t largest = 0;
  for (const auto& [key, list] : free_) {
    if (!list.empty()) largest = std::max(largest, std::get<0>(*list.rbegin()));
  }
  return largest;
}

}  // namespace shoal
