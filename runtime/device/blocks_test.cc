#include "runtime/device/blocks.h"

#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace shoal {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

char* At(int64_t address) { return reinterpret_cast<char*>(address); }

TEST(BlockTable, TakesTheSmallestThatFitsThenTheOldestThenTheLowest) {
  BlockTable table;
  table.AddSegment(At(100 * kMiB), 40 * kMiB, 1);
  table.AddSegment(At(10 * kMiB), 20 * kMiB, 1);
  table.AddSegment(At(200 * kMiB), 20 * kMiB, 1);
  EXPECT_EQ(table.Take(5 * kMiB, 1), At(10 * kMiB));    // The older of the two small ones, though not the first.
  EXPECT_EQ(table.Take(15 * kMiB, 1), At(15 * kMiB));   // What is left of it fits exactly.
  EXPECT_EQ(table.Take(15 * kMiB, 1), At(200 * kMiB));
  EXPECT_EQ(table.Take(25 * kMiB, 1), At(100 * kMiB));
  EXPECT_EQ(table.Take(25 * kMiB, 1), nullptr);
  EXPECT_EQ(table.in_use_bytes(), 60 * kMiB);
}

TEST(BlockTable, FreeNeighboursAreOneBlockAgain) {
  BlockTable table;
  table.AddSegment(At(64 * kMiB), 20 * kMiB, 1);
  void* const a = table.Take(4 * kMiB, 1);
  void* const b = table.Take(4 * kMiB, 1);
  void* const c = table.Take(4 * kMiB, 1);
  table.Free(a);
  table.Free(c);
  EXPECT_EQ(table.largest_free_bytes(), 12 * kMiB);
  EXPECT_TRUE(table.AllIdle().empty());
  table.Free(b);
  EXPECT_EQ(table.largest_free_bytes(), 20 * kMiB);
  ASSERT_EQ(table.AllIdle().size(), 1u);
  EXPECT_EQ(table.Take(20 * kMiB, 1), At(64 * kMiB));
}

TEST(BlockTable, NeighbouringSegmentsStayApart) {
  BlockTable table;
  table.AddSegment(At(0x10000000), 20 * kMiB, 1);
  table.AddSegment(At(0x10000000 + 20 * kMiB), 20 * kMiB, 1);
  void* const a = table.Take(20 * kMiB, 1);
  void* const b = table.Take(20 * kMiB, 1);
  table.Free(a);
  table.Free(b);
  EXPECT_EQ(table.largest_free_bytes(), 20 * kMiB);
  table.RemoveSegment(a);
  table.RemoveSegment(b);
  EXPECT_EQ(table.reserved_bytes(), 0);
}

TEST(BlockTable, SmallBlocksDoNotTearLargeSegments) {
  BlockTable table;
  table.AddSegment(At(64 * kMiB), 20 * kMiB, 1);
  EXPECT_EQ(table.Take(512, 1), nullptr);
  table.AddSegment(At(32 * kMiB), SegmentBytes(512), 1);
  EXPECT_EQ(table.Take(512, 1), At(32 * kMiB));
  EXPECT_EQ(table.Take(0, 1), At(32 * kMiB + 512)) << "an empty tensor has an address of its own";
}

TEST(BlockTable, AnOwnerSeesOnlyItsOwnSegmentsUntilOneIsGiven) {
  BlockTable table;
  table.AddSegment(At(64 * kMiB), 20 * kMiB, 1);
  EXPECT_EQ(table.Take(2 * kMiB, 2), nullptr);
  ASSERT_EQ(table.IdleFor(2 * kMiB, 2, 100 * kMiB).size(), 1u);
  EXPECT_TRUE(table.IdleFor(2 * kMiB, 1, 100 * kMiB).empty()) << "its own is no other's";
  EXPECT_TRUE(table.IdleFor(2 * kMiB, 2, 19 * kMiB).empty()) << "too large";
  table.Give(At(64 * kMiB), 2);
  void* const block = table.Take(2 * kMiB, 2);
  EXPECT_EQ(block, At(64 * kMiB));
  EXPECT_TRUE(table.IdleFor(2 * kMiB, 1, 100 * kMiB).empty()) << "not idle";
  table.HandOver(2, 3);
  table.Free(block);
  EXPECT_EQ(table.Take(20 * kMiB, 3), At(64 * kMiB));
}

TEST(BlockTable, FindsTheBlockOfAnAddressInside) {
  BlockTable table;
  table.AddSegment(At(64 * kMiB), 20 * kMiB, 7);
  void* const a = table.Take(2 * kMiB, 7);
  ASSERT_NE(table.Find(static_cast<char*>(a) + 100), nullptr);
  EXPECT_EQ(table.OwnerOf(*table.Find(a)), 7);
  EXPECT_EQ(table.Find(static_cast<char*>(a) + 2 * kMiB), nullptr) << "free";
  EXPECT_EQ(table.Find(At(1)), nullptr);
}

TEST(BlockTable, RandomLivesNeverOverlapAndLeaveNothing) {
  constexpr uint32_t kSeed = 20240817;
  SCOPED_TRACE(kSeed);
  std::mt19937 engine(kSeed);
  BlockTable table;
  int64_t next_base = kMiB * 1024;
  std::map<char*, int64_t> taken;
  int64_t in_use = 0;
  for (int step = 0; step < 20000; ++step) {
    if (!taken.empty() && engine() % 100 < 48) {
      auto victim = taken.lower_bound(At(static_cast<int64_t>(engine()) * 4096));
      if (victim == taken.end()) victim = taken.begin();
      in_use -= victim->second;
      table.Free(victim->first);
      taken.erase(victim);
      continue;
    }
    const int owner = 1 + static_cast<int>(engine() % 3);
    const int64_t bytes = engine() % 3 == 0 ? engine() % (30 * kMiB) : engine() % (kMiB / 4);
    void* block = table.Take(bytes, owner);
    if (block == nullptr) {
      const int64_t segment = SegmentBytes(BlockBytes(bytes));
      table.AddSegment(At(next_base), segment, owner);
      next_base += segment;
      block = table.Take(bytes, owner);
    }
    char* const at = static_cast<char*>(block);
    ASSERT_NE(at, nullptr);
    const int64_t size = table.Find(at)->bytes;
    ASSERT_GE(size, bytes);
    const auto after = taken.lower_bound(at);
    ASSERT_TRUE(after == taken.end() || at + size <= after->first);
    ASSERT_TRUE(after == taken.begin() || std::prev(after)->first + std::prev(after)->second <= at);
    taken[at] = size;
    in_use += size;
    ASSERT_EQ(table.in_use_bytes(), in_use);
    ASSERT_LE(in_use, table.reserved_bytes());
  }
  for (const auto& [at, size] : taken) table.Free(at);
  for (const BlockTable::Idle& idle : table.AllIdle()) table.RemoveSegment(idle.base);
  EXPECT_EQ(table.reserved_bytes(), 0);
  EXPECT_EQ(table.in_use_bytes(), 0);
}

}  // namespace
}  // namespace shoal
