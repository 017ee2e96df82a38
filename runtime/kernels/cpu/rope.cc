#include "runtime/kernels/rope.h"

#include <cmath>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {

RopeTable MakeRopeTable(int64_t seq, int dim, double theta) {
  SHOAL_CHECK(dim > 0 && dim % 2 == 0) << "head of width " << dim;
  const int64_t half = dim / 2;
  RopeTable table = {Empty({seq, half}, DType::kF32), Empty({seq, half}, DType::kF32)};
  float* cos = table.cos.data<float>();
  float* sin = table.sin.data<float>();
  for (int64_t i = 0; i < half; ++i) {
    // Each step rounds to f32 as Hugging Face's does; at position 4000 its angles differ from exact ones by
    // 1e-4.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    const float frequency = 1.0f / static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
    for (int64_t position = 0; position < seq; ++position) {
      const float angle = static_cast<float>(position) * frequency;
      cos[position * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      sin[position * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  return table;
}

RopeTable MakeRopeTable(int64_t seq, int dim, double theta, Stream& stream) {
  const RopeTable table = MakeRopeTable(seq, dim, theta);
  return {Upload(table.cos, stream), Upload(table.sin, stream)};
}

void Rope(const Tensor& x, int heads, int dim, const RopeTable& table, RopeDirection direction, Stream& stream) {
  const int64_t T = x.dim(0), width = x.dim(1), seq = table.cos.dim(0);
  SHOAL_CHECK_LE(static_cast<int64_t>(heads) * dim, width);
  SHOAL_CHECK(T == 0 || seq > 0) << "empty table";
  CheckTensor(table.cos, DType::kF32, {seq, dim / 2}, "cos");
  CheckTensor(table.sin, DType::kF32, {seq, dim / 2}, "sin");
  const InnerAct act = CheckAct(x, {T, width}, "x");
  const bool backward = direction == RopeDirection::kBackward;
  if (Offloaded(stream, &DeviceKernels::rope, x, heads, dim, table.cos, table.sin, backward)) return;
  const RopeArgs args = {.x = x.raw(),
                         .cos = table.cos.data<float>(),
                         .sin = table.sin.data<float>(),
                         .sin_sign = direction == RopeDirection::kForward ? 1.0f : -1.0f,
                         .width = width,
                         .seq = seq,
                         .heads = heads,
                         .half = dim / 2};
  const auto rows = Inner().rope[act];
  ParallelFor(T, GrainOfRows(static_cast<int64_t>(heads) * dim),
              [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace shoal::kernels
