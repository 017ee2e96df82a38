// The test device itself: what it must notice.
#include "runtime/kernels/cuda/device_testing.h"

#include <gtest/gtest.h>

#include "runtime/kernels/matmul.h"

namespace shoal::kernels {
namespace {

using testing::ExpectNear;
using testing::Random;
using testing::TestStream;
using testing::ToDevice;
using testing::ToHost;

TEST(TestDevice, MatMulGoesThroughTheTableAndAgreesWithTheCpu) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Tensor a = Random({37, 24}, dtype, 1), b = Random({40, 24}, dtype, 2), c = Random({37, 40}, DType::kF32, 3);
    const Tensor got = ToDevice(c, *stream);
    MatMul(ToDevice(a, *stream), Transpose::kNo, ToDevice(b, *stream), Transpose::kYes, Accumulate::kAdd, got, *stream);
    ref::MatMul(a, Transpose::kNo, b, Transpose::kYes, Accumulate::kAdd, c, cpu);
    ExpectNear(ToHost(got, *stream), c, 1e-5, 1e-4, "c");
  }
}

TEST(TestDevice, TensorsOfNoElementsTravel) {
  const std::unique_ptr<Stream> stream = TestStream();
  EXPECT_EQ(ToHost(ToDevice(Empty({0, 3}, DType::kF32), *stream), *stream).shape(), (Shape{0, 3}));
}

TEST(TestDeviceDeathTest, TheHostCannotReadDeviceMemory) {
  if (testing::OnRealDevice()) GTEST_SKIP() << "ends the process's use of the GPU";
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor x = ToDevice(Random({4}, DType::kF32, 1), *stream);
  ASSERT_TRUE(stream->Wait().ok());
  EXPECT_DEATH({ volatile float value = x.data<float>()[0]; (void)value; }, "");
}

}  // namespace
}  // namespace shoal::kernels
