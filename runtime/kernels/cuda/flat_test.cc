// Kernels on flat data: elementwise.h, optimizer.h and sums of tensors.
#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/device_dispatch.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/optimizer.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

const int64_t kSizes[] = {0, 1, 3, 33, 257, 40001};

TEST(CudaConvert, RoundsToNearestEven) {
  const std::unique_ptr<Stream> stream = TestStream();
  const uint32_t special[] = {0x00000000, 0x80000000, 0x3f808000, 0x3f818000, 0x3f808001, 0x7f7fffff, 0x7f800000,
                              0xff800000, 0x7f800001, 0xffc00000, 0x00000001, 0x00008000, 0x007fffff};
  std::mt19937 engine(1);
  for (const int64_t N : kSizes) {
    const Tensor x = Empty({N}, DType::kF32);
    for (int64_t i = 0; i < N; ++i) {
      const uint32_t random = static_cast<uint32_t>(engine());
      const uint32_t bits = i % 3 == 0 ? special[static_cast<size_t>(i / 3) % std::size(special)] : random;
      x.data<float>()[i] = std::bit_cast<float>(bits);
    }
    for (const bool odd : {false, true}) {
      const Tensor from = odd ? ToOddAddress(x, *stream) : ToDevice(x, *stream);
      const Tensor narrow = Empty({N}, DType::kBF16, *stream), wide = Empty({N}, DType::kF32, *stream), copy = Empty({N}, DType::kF32, *stream);
      Convert(from, narrow, *stream);
      Convert(narrow, wide, *stream);
      Convert(from, copy, *stream);
      const Tensor got = ToHost(narrow, *stream), back = ToHost(wide, *stream);
      for (int64_t i = 0; i < N; ++i) {
        const float value = x.data<float>()[i];
        const BFloat16 narrowed = got.data<BFloat16>()[i];
        if (std::isnan(value)) {
          ASSERT_TRUE(std::isnan(static_cast<float>(narrowed)) && std::isnan(back.data<float>()[i])) << i;
          continue;
        }
        ASSERT_EQ(narrowed.bits, BFloat16(value).bits) << i << ": " << value;
        ASSERT_EQ(std::bit_cast<uint32_t>(back.data<float>()[i]), static_cast<uint32_t>(narrowed.bits) << 16) << i;
      }
      const Tensor copied = ToHost(copy, *stream);
      EXPECT_TRUE(N == 0 || std::memcmp(copied.raw(), x.raw(), static_cast<size_t>(x.bytes())) == 0);
    }
  }
}

TEST(CudaConvert, CopiesAnyType) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const DType dtype : {DType::kBF16, DType::kU8, DType::kI64}) {
    const Tensor x = Empty({1001}, dtype);
    std::mt19937 engine(2);
    for (int64_t i = 0; i < x.bytes(); ++i) static_cast<uint8_t*>(x.raw())[i] = static_cast<uint8_t>(engine());
    for (const bool odd : {false, true}) {
      const Tensor copy = Empty({1001}, dtype, *stream);
      Convert(odd ? ToOddAddress(x, *stream) : ToDevice(x, *stream), copy, *stream);
      EXPECT_EQ(std::memcmp(ToHost(copy, *stream).raw(), x.raw(), static_cast<size_t>(x.bytes())), 0);
    }
  }
}

TEST(CudaAddTo, MatchesReference) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const int64_t N : kSizes) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const bool odd : {false, true}) {
        const Tensor x = Random({N}, dtype, 1), before = Random({N}, DType::kF32, 2), want = Copy(before);
        ref::AddTo(x, want, cpu);
        const Tensor sum = odd ? ToOddAddress(before, *stream) : ToDevice(before, *stream);
        AddTo(ToDevice(x, *stream), sum, *stream);
        ExpectSameBits(ToHost(sum, *stream), want, "sum");
      }
    }
  }
}

// The words are the CPU's; logarithms and cosines in f64 may differ in their last bits, which f32 seldom shows.
TEST(CudaFillNormal, IsTheCpusFunctionOfTheIndex) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const RandomKey key = {.seed = 0x123456789abcdefull, .stream = 0xfedcba9876543210ull};
  for (const uint64_t first : {uint64_t{0}, uint64_t{7}, (uint64_t{1} << 33) + 1}) {
    for (const int64_t N : {0, 1, 2, 1001, 2000}) {
      const Tensor want = Empty({N}, DType::kF32), got = Empty({N}, DType::kF32, *stream);
      FillNormal(key, first, 0.5, 0.02, want, cpu);
      FillNormal(key, first, 0.5, 0.02, got, *stream);
      ExpectNear(ToHost(got, *stream), want, 0x1p-23, 0, "x");
    }
  }
}

void ExpectAdamWMatches(int64_t N, const AdamWStep& step, DType copy_type, bool with_copy, bool numbers_there, bool odd) {
  SCOPED_TRACE(N);
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const auto place = [&](const Tensor& host) { return odd ? ToOddAddress(host, *stream) : ToDevice(host, *stream); };
  const Tensor grad = Random({N}, DType::kF32, 4), master = Random({N}, DType::kF32, 1), m = Random({N}, DType::kF32, 2, 0.1);
  const Tensor v = Random({N}, DType::kF32, 3, 0.01);
  for (float& value : v.span<float>()) value = std::abs(value);
  const Tensor want_master = As(master, DType::kF64), want_m = As(m, DType::kF64), want_v = As(v, DType::kF64);
  ref::AdamW(step, grad, want_master, want_m, want_v, Tensor(), cpu);
  const Tensor got_master = place(master), got_m = place(m), got_v = place(v);
  const Tensor copy = with_copy ? Empty({N}, copy_type, *stream) : Tensor();
  if (numbers_there) {
    AdamWStep other = step;
    other.grad_scale = 77;  // Not read; nor are these.
    other.learning_rate = 88;
    other.update = 99;
    AdamW(other, ToDevice(AdamWNumbersOf(step), *stream), place(grad), got_master, got_m, got_v, copy, *stream);
  } else {
    AdamW(step, place(grad), got_master, got_m, got_v, copy, *stream);
  }
  const double g = MaxAbs(grad) * static_cast<double>(step.grad_scale);
  double change = 0;
  for (int64_t i = 0; i < N; ++i) change = std::max(change, std::abs(Get(want_master, i) - Get(master, i)));
  ExpectNear(ToHost(got_master, *stream), want_master, 0x1p-24, 12 * 0x1p-24 * change, "master");
  ExpectNear(ToHost(got_m, *stream), want_m, 0, 4 * 0x1p-24 * (MaxAbs(m) + g), "m");
  ExpectNear(ToHost(got_v, *stream), want_v, 6 * 0x1p-24, 0, "v");
  if (with_copy) ExpectSameBits(ToHost(copy, *stream), As(ToHost(got_master, *stream), copy_type), "copy");
}

TEST(CudaAdamW, MatchesReference) {
  const AdamWStep step = {.learning_rate = 3e-3, .beta1 = 0.9, .beta2 = 0.999, .epsilon = 1e-6, .weight_decay = 0.1, .update = 1000,
                          .grad_scale = 0.37f};
  for (const int64_t N : {0, 1, 3, 33, 257, 20003}) {
    for (const bool odd : {false, true}) {
      ExpectAdamWMatches(N, step, DType::kBF16, /*with_copy=*/true, /*numbers_there=*/true, odd);
      ExpectAdamWMatches(N, step, DType::kF32, /*with_copy=*/true, /*numbers_there=*/false, odd);
      ExpectAdamWMatches(N, {.learning_rate = 1e-3}, DType::kF32, /*with_copy=*/false, /*numbers_there=*/false, odd);
    }
  }
}

// The update that clipping forbids changes nothing, in no type.
TEST(CudaAdamW, LeavesAllAsItIsWhereItIsNotToBeApplied) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor numbers = AdamWNumbersOf({.learning_rate = 0.1, .update = 3}), x = Random({1001}, DType::kF32, 1);
  numbers.data<double>()[kApply] = 0;
  const Tensor narrow = As(x, DType::kBF16);
  std::vector<Tensor> got;
  for (int i = 0; i < 4; ++i) got.push_back(ToDevice(i < 3 ? x : narrow, *stream));
  AdamW({}, ToDevice(numbers, *stream), ToDevice(x, *stream), got[0], got[1], got[2], got[3], *stream);
  for (int i = 0; i < 4; ++i) ExpectSameBits(ToHost(got[static_cast<size_t>(i)], *stream), i < 3 ? x : narrow, "untouched");
}

// The host's bits: sums of any length, what is above the bound and what is not, and what is not finite.
TEST(CudaClipGradients, HasTheBitsOfTheHost) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (const int64_t B : {0, 1, 5, 1024, 3001}) {
    const Tensor squares = As(Random({B}, DType::kF32, 7), DType::kF64), losses = As(Random({3}, DType::kF32, 8), DType::kF64);
    for (double& square : squares.span<double>()) square *= square;
    for (const double clip : {0.0, 1e-3, 1e9}) {
      for (const double loss : {1.0, infinity, nan}) {
        losses.data<double>()[2] = loss;
        const Tensor numbers = AdamWNumbersOf({.learning_rate = 0.1, .update = 3}), got = ToDevice(numbers, *stream);
        ClipGradients(squares, losses, clip, numbers, cpu);
        ClipGradients(ToDevice(squares, *stream), ToDevice(losses, *stream), clip, got, *stream);
        ExpectSameBits(ToHost(got, *stream), numbers, "numbers");
        EXPECT_EQ(numbers.data<double>()[kApply], std::isfinite(loss) ? 1 : 0);
      }
    }
    if (B == 0) continue;
    squares.data<double>()[B - 1] = nan;
    const Tensor got = ToDevice(AdamWNumbersOf({}), *stream);
    ClipGradients(ToDevice(squares, *stream), Tensor(nullptr, {0}, DType::kF64), 1, got, *stream);
    EXPECT_EQ(ToHost(got, *stream).data<double>()[kApply], 0);
  }
}

TEST(CudaSumOfSquares, AddsInF64TheSameWayEveryTime) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream cpu;
  for (const int64_t N : {0, 1, 3, 31, 4096, 4097, 100003}) {
    const Tensor x = Random({N}, DType::kF32, 1);
    const double want = ref::SumOfSquares(x, cpu);
    for (const bool odd : {false, true}) {
      const Tensor on_device = odd ? ToOddAddress(x, *stream) : ToDevice(x, *stream);
      const double got = SumOfSquares(on_device, *stream);
      EXPECT_NEAR(got, want, 0x1p-53 * static_cast<double>(N) * want) << N;
      EXPECT_EQ(SumOfSquares(on_device, *stream), got) << N;
    }
  }
}

TEST(CudaSumOfSquares, ShowsNaNAndInfinityAndDoesNotOverflow) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const int64_t place : {0, 5, 9999}) {
    const Tensor x = Zeros({10000}, DType::kF32);
    x.data<float>()[place] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(SumOfSquares(ToDevice(x, *stream), *stream))) << place;
    x.data<float>()[place] = -std::numeric_limits<float>::infinity();
    EXPECT_TRUE(std::isinf(SumOfSquares(ToDevice(x, *stream), *stream))) << place;
    x.data<float>()[place] = 1e30f;
    EXPECT_NEAR(SumOfSquares(ToDevice(x, *stream), *stream), 1e60, 1e54) << place;
  }
}

TEST(CudaSumTensors, AddsInOrderAndRoundsOnce) {
  const std::unique_ptr<Stream> stream = TestStream();
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int64_t N : {0, 1, 33, 5003}) {
      for (const int count : {1, 2, 7}) {
        std::vector<Tensor> tensors;
        std::vector<DeviceTensor> from;
        const Tensor want = Empty({N}, dtype);
        std::vector<float> sums(static_cast<size_t>(N));
        for (int k = 0; k < count; ++k) {
          const Tensor x = Random({N}, dtype, static_cast<uint64_t>(k + 1));
          for (int64_t i = 0; i < N; ++i) sums[static_cast<size_t>(i)] += static_cast<float>(Get(x, i));
          tensors.push_back(k == 1 ? ToOddAddress(x, *stream) : ToDevice(x, *stream));
          from.push_back(ToDeviceTensor(tensors.back()));
        }
        for (int64_t i = 0; i < N; ++i) Set(want, i, static_cast<double>(sums[static_cast<size_t>(i)]));
        TestDevice().Use();
        const DeviceResult result = TestDevice().kernels().sum_tensors(from.data(), count, from[0], stream->handle());
        ASSERT_EQ(result.code, DeviceResult::Code::kOk) << result.message;
        ExpectSameBits(ToHost(tensors[0], *stream), want, "sum");
      }
    }
  }
}

}  // namespace
}  // namespace shoal::kernels
