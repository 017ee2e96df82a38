#include "runtime/kernels/elementwise.h"

#include <array>
#include <cmath>
#include <cstring>
#include <numbers>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/cpu/philox.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

// One normal number costs about as much as this many elements of a memory-bound loop.
constexpr int64_t kNormalCost = 100;

uint32_t Low(uint64_t value) { return static_cast<uint32_t>(value); }
uint32_t High(uint64_t value) { return static_cast<uint32_t>(value >> 32); }
uint64_t Join(uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; }

// Elements 2 * block and 2 * block + 1 of a stream, in halves.
std::array<uint32_t, 4> RandomBlock(RandomKey key, uint64_t block) {
  return Philox({Low(block), High(block), Low(key.stream), High(key.stream)},
                {Low(key.seed), High(key.seed)});
}

// Elements 2 * pair and 2 * pair + 1 of the stream of normal numbers.
std::array<double, 2> NormalPair(RandomKey key, uint64_t pair) {
  const std::array<uint32_t, 4> word = RandomBlock(key, pair);
  // The middles of 2^52 equal intervals of (0, 1), all exact: the logarithm is finite.
  const auto uniform = [](uint64_t bits) { return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52; };
  const double radius = std::sqrt(-2 * std::log(uniform(Join(word[0], word[1]))));
  const double angle = 2 * std::numbers::pi * uniform(Join(word[2], word[3]));
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

// SplitMix64's output function, a bijection in which every bit of the input moves half of the output's.
uint64_t Mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

}  // namespace

void Convert(const Tensor& from, const Tensor& to, Stream& stream) {
  const int64_t N = from.elements();
  SHOAL_CHECK_EQ(N, to.elements());
  if (N == 0) return;
  const bool copy = from.dtype() == to.dtype();
  const bool narrow = from.dtype() == DType::kF32 && to.dtype() == DType::kBF16;
  SHOAL_CHECK(copy || narrow || (from.dtype() == DType::kBF16 && to.dtype() == DType::kF32))
      << Name(from.dtype()) << " to " << Name(to.dtype());
  if (Offloaded(stream, &DeviceKernels::convert, from, to)) return;
  const InnerKernels& inner = Inner();
  ParallelFor(N, kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
    const char* source = static_cast<const char*>(from.raw()) + begin * SizeOf(from.dtype());
    char* target = static_cast<char*>(to.raw()) + begin * SizeOf(to.dtype());
    if (copy) {
      std::memcpy(target, source, static_cast<size_t>((end - begin) * SizeOf(to.dtype())));
    } else if (narrow) {
      inner.to_bf16(reinterpret_cast<const float*>(source), reinterpret_cast<uint16_t*>(target), end - begin);
    } else {
      inner.to_f32(reinterpret_cast<const uint16_t*>(source), reinterpret_cast<float*>(target), end - begin);
    }
  });
}

void AddTo(const Tensor& x, const Tensor& sum, Stream& stream) {
  const int64_t N = x.elements();
  SHOAL_CHECK_EQ(N, sum.elements());
  const InnerAct act = CheckAct(x.Reshape({N}), {N}, "x");
  if (Offloaded(stream, &DeviceKernels::add_to, x, sum)) return;
  const auto add_to = Inner().add_to[act];
  ParallelFor(N, kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
    add_to(static_cast<const char*>(x.raw()) + begin * SizeOf(x.dtype()), sum.data<float>() + begin,
           end - begin);
  });
}

uint64_t MakeStream(uint64_t step, uint64_t slice, uint64_t layer, uint64_t op) {
  uint64_t hash = 0;
  for (uint64_t part : {step, slice, layer, op})
    hash = Mix((hash ^ Mix(part + 0x9E3779B97F4A7C15)) + 0x9E3779B97F4A7C15);
  return hash;
}

uint64_t RandomBits(RandomKey key, uint64_t index) {
  const std::array<uint32_t, 4> word = RandomBlock(key, index / 2);
  return index % 2 == 0 ? Join(word[0], word[1]) : Join(word[2], word[3]);
}

void FillNormal(RandomKey key, uint64_t first_index, double mean, double stddev, const Tensor& x, Stream& stream) {
  if (Offloaded(stream, &DeviceKernels::fill_normal, key.seed, key.stream, first_index, mean, stddev, x)) return;
  float* out = x.data<float>();
  ParallelFor(x.elements(), kElementsPerThreadMin / kNormalCost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const uint64_t index = first_index + static_cast<uint64_t>(i);
      const std::array<double, 2> pair = NormalPair(key, index / 2);
      out[i++] = static_cast<float>(mean + stddev * pair[index % 2]);
      if (index % 2 == 0 && i < end) out[i++] = static_cast<float>(mean + stddev * pair[1]);
    }
  });
}

}  // namespace shoal::kernels
