// What a C program can do wrong: nothing of it throws or crashes, and the group lives on.
#include "collectives/c_api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/harness/ranks.h"

namespace {

using ::testing::HasSubstr;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

class CApi : public ::testing::Test {
 protected:
  CApi() {
    shoal_group* made = nullptr;
    EXPECT_EQ(shoal_connect(nullptr, &made), SHOAL_OK) << shoal_error();
    group_.reset(made);
  }

  void ExpectRefused(shoal_work* work, const char* why) {
    EXPECT_EQ(shoal_await(work, SHOAL_FOREVER), SHOAL_INVALID_ARGUMENT);
    EXPECT_THAT(shoal_error(), HasSubstr(why));
    EXPECT_EQ(shoal_group_status(group_.get()), SHOAL_OK);
  }

  struct Free {
    void operator()(shoal_group* group) const { shoal_group_free(group); }
  };
  std::unique_ptr<shoal_group, Free> group_;
  float data_[4] = {1, 2, 3, 4};
};

TEST_F(CApi, RunsAnOperation) {
  float out[4] = {};
  EXPECT_EQ(shoal_await(shoal_all_reduce(group_.get(), data_, out, 4, SHOAL_F32, SHOAL_AVERAGE, nullptr), SHOAL_FOREVER),
            SHOAL_OK);
  EXPECT_EQ(out[3], 4);
}

TEST_F(CApi, RefusesCountsThatNoMemoryHas) {
  ExpectRefused(shoal_all_reduce(group_.get(), data_, data_, -1, SHOAL_F32, SHOAL_SUM, nullptr), "count -1");
  ExpectRefused(shoal_all_to_all(group_.get(), data_, data_, kMost, SHOAL_F32, nullptr), "count 9223372036854775807");
  ExpectRefused(shoal_all_gather(group_.get(), data_, &kMost, data_, SHOAL_F32, nullptr), "count 9223372036854775807");
  ExpectRefused(shoal_all_gather(group_.get(), data_, nullptr, data_, SHOAL_F32, nullptr), "no counts");
  shoal_memory* memory = nullptr;
  EXPECT_EQ(shoal_allocate(group_.get(), std::numeric_limits<size_t>::max(), &memory), SHOAL_RESOURCE_EXHAUSTED);
}

// Also where the last byte of the number is that of a known one.
TEST_F(CApi, RefusesUnknownNames) {
  for (int unknown : {-1, 5, 256}) {
    ExpectRefused(shoal_all_reduce(group_.get(), data_, data_, 4, SHOAL_F32, static_cast<shoal_op>(unknown), nullptr),
                  "unknown reduction");
    shoal_op_options options;
    shoal_op_options_init(&options);
    options.wire = static_cast<shoal_wire>(unknown);
    ExpectRefused(shoal_all_reduce(group_.get(), data_, data_, 4, SHOAL_F32, SHOAL_SUM, &options), "wire format");
    shoal_op_options_init(&options);
    options.order = static_cast<shoal_order>(unknown);
    ExpectRefused(shoal_barrier(group_.get(), &options), "order");
  }
  ExpectRefused(shoal_broadcast(group_.get(), data_, 4, static_cast<shoal_dtype>(256), 0, nullptr), "dtype 256");
}

TEST(CApiState, AllHaveTheNewestAfterwards) {
  const std::string name = shoal::UniqueRendezvous();
  std::vector<std::thread> ranks;
  for (int32_t rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&name, rank] {
      shoal_world_options options;
      shoal_world_options_init(&options);
      options.rank = rank;
      options.size = 2;
      options.master_host = name.c_str();
      shoal_group* group = nullptr;
      ASSERT_EQ(shoal_connect(&options, &group), SHOAL_OK) << shoal_error();
      std::vector<double> weights(1000, rank);
      int32_t step = 10 + rank;
      const shoal_state states[] = {{"weights", weights.data(), 1000, SHOAL_F64}, {"step", &step, 1, SHOAL_I32}};
      uint64_t revision = 5 + rank;
      EXPECT_EQ(shoal_sync_state(group, states, 2, SHOAL_EITHER, SHOAL_FOREVER, &revision), SHOAL_OK) << shoal_error();
      EXPECT_EQ(revision, 6u);
      EXPECT_EQ(step, 11);
      EXPECT_EQ(std::count(weights.begin(), weights.end(), 1.0), 1000);
      shoal_group_free(group);
    });
  }
  for (std::thread& rank : ranks) rank.join();
}

TEST_F(CApi, RefusesStatesThatAreNone) {
  uint64_t revision = 1;
  const auto refused = [&](const shoal_state* states, int32_t count, shoal_role role, uint64_t* of) {
    return shoal_sync_state(group_.get(), states, count, role, SHOAL_FOREVER, of) == SHOAL_INVALID_ARGUMENT;
  };
  const shoal_state good = {"x", data_, 4, SHOAL_F32};
  EXPECT_FALSE(refused(&good, 1, SHOAL_EITHER, &revision));
  EXPECT_TRUE(refused(&good, 1, 3, &revision));
  EXPECT_TRUE(refused(&good, 1, SHOAL_EITHER, nullptr));
  EXPECT_TRUE(refused(&good, -1, SHOAL_EITHER, &revision));
  for (const shoal_state& bad : {shoal_state{nullptr, data_, 4, SHOAL_F32}, shoal_state{"x", nullptr, 4, SHOAL_F32},
                                 shoal_state{"x", data_, kMost, SHOAL_F32}, shoal_state{"x", data_, 4, 256}}) {
    EXPECT_TRUE(refused(&bad, 1, SHOAL_EITHER, &revision));
  }
}

TEST_F(CApi, RefusesArraysThatAreNone) {
  shoal_group* part = nullptr;
  const int32_t self = 0;
  EXPECT_EQ(shoal_split(group_.get(), &self, -1, &part), SHOAL_INVALID_ARGUMENT);
  EXPECT_EQ(shoal_split(group_.get(), nullptr, 1, &part), SHOAL_INVALID_ARGUMENT);
  void* const chunks[] = {data_};
  const int64_t counts[] = {4};
  const shoal_sparse_move move = {0, 0, nullptr, 1};
  ExpectRefused(shoal_sparse_all_gather(group_.get(), chunks, counts, -1, SHOAL_F32, nullptr, 0, nullptr), "-1 chunks");
  ExpectRefused(shoal_sparse_all_gather(group_.get(), nullptr, counts, 1, SHOAL_F32, nullptr, 0, nullptr), "1 chunks");
  ExpectRefused(shoal_sparse_all_gather(group_.get(), chunks, counts, 1, SHOAL_F32, nullptr, 1, nullptr), "1 moves");
  ExpectRefused(shoal_sparse_reduce_scatter(group_.get(), chunks, counts, 1, SHOAL_F32, &move, 1, SHOAL_SUM, nullptr),
                "1 holders");
}

}  // namespace
