// Matrix products with operands in 8 bits, as DeepSeek-V3 trains (arXiv 2412.19437, 3.3): activations and gradients are quantised as
// they are multiplied, weights once for all products until they change. Codes are e4m3 (runtime/tensor/e4m3.h). Each block, 1 x 128 of
// activations along the inner dimension and 128 x 128 of weights (fewer at the edges), has a scale: the smallest power of two, at least
// 2^-100, that brings its largest magnitude to at most 448. A number becomes the nearest code times scale, ties to even; a block with an
// infinity or a NaN is NaN, so that an overflow is not hidden (and what rounds to more than the largest float is an infinity). No row's
// result depends on other rows.
//
// With scales that are powers of two a quantised number is a bf16 one: the CPU multiplies those by its products of bf16. Devices
// multiply codes, add 128 products at a time and sum these in f32 with their scales. So all devices agree to the rounding of sums.
//
// Operands are bf16, results bf16 or f32. Devices without such products (GPUs before compute capability 8.9) fail their stream with
// UNAVAILABLE. Shapes that do not fit are CHECKed.
#pragma once

#include "absl/types/span.h"
#include "runtime/kernels/matmul.h"

namespace shoal::kernels {

constexpr int64_t kFp8Block = 128;

// What products of projections and experts multiply: operands as they are, or quantised.
enum class Products : uint8_t { kSame, kFp8 };

// Weights [N, K] of E matrices, quantised. On the CPU values are bf16 [E, N, K], what codes and scales mean, and that is all. On a
// device they are codes (u8) with rows padded by zeros to whole blocks, as are those of `transposed` [E, K, N], and scales are
// f32 [E, ceil(N / 128), ceil(K / 128)].
struct Fp8Weights {
  int64_t rows = 0, columns = 0;  // N, K
  Tensor values, transposed, scales;
};

// `weights`: bf16 [N, K] each, at least one. Into the memory of *to where it has what these need.
void QuantiseWeights(absl::Span<const Tensor> weights, Fp8Weights* to, Stream& stream);

// As the products of matmul.h; x and dy are quantised on the way. `weights` has one matrix for the first two, y = addend + x w^T and
// dx = addend + dy w (addend f32 as y must be then, maybe y itself; empty: none), else that of expert e at e.
void MatMul(const Tensor& x, const Fp8Weights& weights, const Tensor& addend, const Tensor& y, Stream& stream);
void MatMulGradInput(const Tensor& dy, const Fp8Weights& weights, const Tensor& addend, const Tensor& dx, Stream& stream);
void GroupedMatMul(const Tensor& x, const Fp8Weights& weights, absl::Span<const Segment> segments, const Tensor& y, Stream& stream,
                   Numerics numerics = Numerics::kFast);
void GroupedMatMulGradInput(const Tensor& dy, const Fp8Weights& weights, absl::Span<const Segment> segments, const Tensor& dx,
                            Stream& stream, Numerics numerics = Numerics::kFast);
void GroupedMatMul(const Tensor& x, const Fp8Weights& weights, const Tensor& segments, const Tensor& y, Stream& stream);
void GroupedMatMulGradInput(const Tensor& dy, const Fp8Weights& weights, const Tensor& segments, const Tensor& dx, Stream& stream);

// As MatMul and GroupedMatMul, and then SwiGlu (swiglu.h) of gate_up = y, all bf16: w is [2F, K], h is [rows, F], undefined outside of
// segments. One kernel on devices where F is a multiple of 128.
void MatMulSwiGlu(const Tensor& x, const Fp8Weights& weights, const Tensor& gate_up, const Tensor& h, Stream& stream);
void GroupedMatMulSwiGlu(const Tensor& x, const Fp8Weights& weights, absl::Span<const Segment> segments, const Tensor& gate_up,
                         const Tensor& h, Stream& stream, Numerics numerics = Numerics::kFast);
void GroupedMatMulSwiGlu(const Tensor& x, const Fp8Weights& weights, const Tensor& segments, const Tensor& gate_up, const Tensor& h,
                         Stream& stream);

namespace ref {
// values[R, C] (any type): what x[R, C] (bf16) means once it is quantised in blocks of block_rows x 128.
void RoundToFp8(const Tensor& x, int64_t block_rows, const Tensor& values);
}
}  // namespace shoal::kernels
