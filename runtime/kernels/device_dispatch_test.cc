#include "runtime/kernels/device_dispatch.h"

#include <vector>

#include "gtest/gtest.h"
#include "runtime/device/fake_device.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/optimizer.h"

namespace shoal::kernels {
namespace {

using Progress = FakeDeviceOptions::Progress;

// What the kernels below were called with.
std::vector<DeviceTensor> g_tensors;
std::vector<int64_t> g_addresses;
std::vector<int32_t> g_segments;
double g_grad_scale = 0;

DeviceResult TakeNorm(const DeviceTensor& x, const DeviceTensor& delta, const DeviceTensor& weight, float, const DeviceTensor& sum,
                      const DeviceTensor& y, const DeviceTensor& rstd, DeviceStream*) {
  g_tensors = {x, delta, weight, sum, y, rstd};
  return {};
}
DeviceResult RefuseIds(const DeviceTensor&, const DeviceTensor&, const DeviceTensor&, DeviceStream*) {
  return {DeviceResult::Code::kFailed, "too many tokens"};
}
DeviceResult TakeLists(const DeviceTensor&, const DeviceTensor& weights, const DeviceTensor& segments, const DeviceTensor&,
                       DeviceStream* stream) {
  return FakeDevice::Current().Submit(stream, [weights, segments] {
    const auto* address = static_cast<const int64_t*>(weights.data);
    const auto* segment = static_cast<const int32_t*>(segments.data);
    g_addresses.assign(address, address + weights.elements);
    g_segments.assign(segment, segment + segments.elements);
    return DeviceResult{};
  });
}
DeviceResult TakeScale(double, double, double, double, const DeviceTensor& numbers, const DeviceTensor&, const DeviceTensor&,
                       const DeviceTensor&, const DeviceTensor&, const DeviceTensor&, DeviceStream* stream) {
  return FakeDevice::Current().Submit(stream, [numbers] {
    g_grad_scale = static_cast<const double*>(numbers.data)[kGradScale];
    return DeviceResult{};
  });
}
DeviceResult PutSum(const DeviceTensor&, const DeviceTensor& sum, DeviceStream* stream) {
  return FakeDevice::Current().Submit(stream, [sum] {
    *static_cast<double*>(sum.data) = 42;
    return DeviceResult{};
  });
}

DeviceKernels Kernels() {
  DeviceKernels kernels = {};
  kernels.rms_norm = TakeNorm;
  kernels.embedding = RefuseIds;
  kernels.grouped_matmul = TakeLists;
  kernels.adamw = TakeScale;
  kernels.sum_of_squares = PutSum;
  return kernels;
}

class DispatchTest : public testing::Test {
 protected:
  Tensor There(Shape shape, DType dtype = DType::kF32) { return Zeros(std::move(shape), dtype, *stream_); }

  const DeviceKernels kernels_ = Kernels();
  FakeDevice fake_{{.progress = Progress::kByWaits, .kernels = &kernels_}};
  std::unique_ptr<Device> device_ = *Device::Create(fake_.api(), 0);
  std::unique_ptr<Stream> stream_ = *device_->NewStream();
};

TEST_F(DispatchTest, TensorsArriveInOrderAndNoneIsNull) {
  const Tensor x = There({2, 3}), weight = There({3}), y = There({2, 3}, DType::kBF16), rstd = There({2});
  RmsNorm(x, Tensor(), weight, 1e-5f, Tensor(), y, rstd, *stream_);
  ASSERT_EQ(g_tensors.size(), 6u);
  EXPECT_EQ(g_tensors[0].data, x.raw());
  EXPECT_EQ(g_tensors[1].data, nullptr);
  EXPECT_EQ(g_tensors[1].elements, 0);
  EXPECT_EQ(g_tensors[4].dtype, DType::kBF16);
  EXPECT_EQ(g_tensors[4].rank, 2);
  EXPECT_EQ(g_tensors[4].shape[1], 3);
  EXPECT_EQ(device_->waits().waits, 0);
}

TEST_F(DispatchTest, AFailureNamesTheFunctionAndStopsWhatFollows) {
  const Tensor ids = There({4}, DType::kI32), table = There({10, 2}), out = There({4, 2});
  Embedding(table, ids, out, *stream_);  // Would end here if it looked at the ids.
  EXPECT_EQ(stream_->status(), absl::InternalError("fake:0: Embedding: too many tokens"));
  g_tensors.clear();
  RmsNorm(There({2, 3}), Tensor(), There({3}), 1e-5f, Tensor(), There({2, 3}), There({2}), *stream_);
  EXPECT_TRUE(g_tensors.empty());
}

TEST_F(DispatchTest, AKernelThatIsMissingIsAFailure) {
  AddTo(There({4}), There({4}), *stream_);
  EXPECT_EQ(stream_->status(), absl::InternalError("fake:0: AddTo: the plug-in has no such kernel"));
}

TEST_F(DispatchTest, ListsOfGroupedProductsAreOnTheDeviceWithoutWaiting) {
  const std::vector<Tensor> weights = {There({5, 3}), There({5, 3}), There({5, 3})};
  {
    const std::vector<Segment> segments = {{2, 0, 4}, {0, 4, 0}, {1, 4, 6}};
    GroupedMatMul(There({10, 3}), weights, segments, There({10, 5}), *stream_);
  }
  EXPECT_EQ(device_->waits().waits, 0);
  EXPECT_EQ(fake_.Calls("pageable_copy"), 0);
  ASSERT_TRUE(stream_->Wait().ok()) << stream_->status();
  ASSERT_EQ(g_addresses.size(), 3u);
  for (int e = 0; e < 3; ++e) EXPECT_EQ(g_addresses[e], reinterpret_cast<int64_t>(weights[e].raw()));
  EXPECT_EQ(g_segments, (std::vector<int32_t>{2, 0, 4, 0, 4, 0, 1, 4, 6}));
}

TEST_F(DispatchTest, ScaleAndSumGoThroughDeviceMemory) {
  const Tensor x = There({8});
  AdamW({.grad_scale = 0.25f}, x, x, x, x, Tensor(), *stream_);
  EXPECT_EQ(device_->waits().waits, 0);
  EXPECT_EQ(SumOfSquares(x, *stream_), 42);
  EXPECT_EQ(device_->waits().waits, 1);
  EXPECT_EQ(g_grad_scale, 0.25);
}

// On the CPU the lists are read where they are.
TEST(GroupLists, OnTheCpuGiveTheSameProducts) {
  Stream stream;
  std::vector<Tensor> weights, grads, grads_by_list;
  for (int e = 0; e < 3; ++e) {
    weights.push_back(Empty({5, 4}, DType::kF32));
    for (int64_t i = 0; i < 20; ++i) weights[e].data<float>()[i] = static_cast<float>((i * 5 + e) % 9) - 4;
    grads.push_back(Zeros({5, 4}, DType::kF32));
    grads_by_list.push_back(Zeros({5, 4}, DType::kF32));
  }
  const std::vector<Segment> segments = {{1, 0, 3}, {0, 3, 2}, {1, 5, 1}};
  const Tensor x = Empty({6, 4}, DType::kF32), y = Empty({6, 5}, DType::kF32), by_list = Empty({6, 5}, DType::kF32);
  for (int64_t i = 0; i < 24; ++i) x.data<float>()[i] = static_cast<float>(i % 7) - 3;
  const Tensor list = SegmentList(segments, stream);
  GroupedMatMul(x, weights, segments, y, stream);
  GroupedMatMul(x, MatrixList(weights, stream), list, by_list, stream);
  for (int64_t i = 0; i < y.elements(); ++i) EXPECT_EQ(by_list.data<float>()[i], y.data<float>()[i]);
  const Tensor dx = Empty({6, 4}, DType::kF32), dx_by_list = Empty({6, 4}, DType::kF32);
  GroupedMatMulGradInput(y, weights, segments, dx, stream);
  GroupedMatMulGradInput(y, MatrixList(weights, stream), list, dx_by_list, stream);
  for (int64_t i = 0; i < dx.elements(); ++i) EXPECT_EQ(dx_by_list.data<float>()[i], dx.data<float>()[i]);
  GroupedMatMulGradWeight(y, x, segments, Accumulate::kAdd, grads, stream);
  GroupedMatMulGradWeight(y, x, list, Accumulate::kAdd, MatrixList(grads_by_list, stream), stream);
  for (int e = 0; e < 3; ++e) {
    for (int64_t i = 0; i < 20; ++i) EXPECT_EQ(grads_by_list[e].data<float>()[i], grads[e].data<float>()[i]);
  }
}

}  // namespace
}  // namespace shoal::kernels
