#include "runtime/tensor/tensor.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "gtest/gtest.h"
#include "runtime/device/memory.h"

namespace shoal {
namespace {

TEST(Tensor, ViewsShareStorageAndKeepItAlive) {
  Tensor rows;
  {
    const Tensor matrix = Empty({4, 3}, DType::kF32);
    for (int i = 0; i < 12; ++i) matrix.data<float>()[i] = static_cast<float>(i);
    rows = matrix.Rows(1, 2);
  }
  EXPECT_EQ(rows.shape(), (Shape{2, 3}));
  EXPECT_EQ(rows.data<float>()[0], 3);
  EXPECT_EQ(rows.Reshape({6}).Elements(4, {2}).data<float>()[1], 8);
}

TEST(TensorDeathTest, RefusesViewsThatDoNotFit) {
  const Tensor matrix = Empty({4, 3}, DType::kF32);
  EXPECT_DEATH(matrix.Rows(3, 2), "rows 3\\+2 of \\[4, 3\\]");
  EXPECT_DEATH(matrix.data<int32_t>(), "tensor is f32");
}

TEST(BFloat16, RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(BFloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(BFloat16(1.00390625f).bits, 0x3f80);  // Half a unit above 1.0: to even.
  EXPECT_EQ(BFloat16(1.01171875f).bits, 0x3f82);  // Half a unit above 1.0078125: to even.
  EXPECT_EQ(BFloat16(std::numeric_limits<float>::infinity()).bits, 0x7f80);
  EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(HostMemory, ReusesBlocksAndCounts) {
  const int64_t before = HostMemory::Get().stats().in_use_bytes;
  void* first = nullptr;
  {
    const Tensor big = Zeros({1 << 20}, DType::kF32);
    first = big.raw();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % (2 << 20), 0u);
    EXPECT_EQ(HostMemory::Get().stats().in_use_bytes, before + (4 << 20));
  }
  EXPECT_EQ(HostMemory::Get().stats().in_use_bytes, before);
  EXPECT_EQ(Empty({1 << 20}, DType::kF32).raw(), first);
}

TEST(HostMemory, EmptyTensorsAreFine) {
  EXPECT_TRUE(Empty({0, 5}, DType::kF32).empty());
  EXPECT_EQ(Empty({0}, DType::kF32).bytes(), 0);
}

}  // namespace
}  // namespace shoal
