// Matrix products. Weights are [out, in], as in Hugging Face files, so a layer's forward pass is y = x w^T.
// Operands are both f32 or both bf16; sums are f32. CPU: f32 by oneDNN; bf16 by an own product where the processor has AMX,
// else by oneDNN, else converted to f32 (ref/: plain loops in f64). Shapes that do not fit are CHECKed.
#pragma once

#include "absl/types/span.h"
#include "runtime/device/stream.h"
#include "runtime/kernels/numerics.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

enum class Transpose : uint8_t { kNo, kYes };
enum class Accumulate : uint8_t { kOverwrite, kAdd };  // kAdd: c += product; c must be f32.

// c[M,N] (+)= op(a)[M,K] op(b)[K,N]. c is f32 or the operands' type. M, N or K may be 0 (K == 0 overwrites with 0).
void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b, Accumulate accumulate,
            const Tensor& c, Stream& stream);
// c = addend + op(a) op(b): addend f32 as c, maybe c itself; empty: none.
void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b, const Tensor& addend, const Tensor& c,
            Stream& stream);
// CHECKs that such an addend fits.
void CheckAddend(const Tensor& addend, const Tensor& c);

// One expert's rows: rows [begin, begin + count) of the row-sorted operands belong to weights[expert]. Segments
// do not overlap; an expert may have several or none.
struct Segment {
  int expert = 0;
  int64_t begin = 0;
  int64_t count = 0;
};

// y[rows,N] = x[rows,K] w_e^T for each segment; w_e is [N,K]. Rows outside all segments are left alone. kPinned: the bits of a
// segment's results depend on its own rows and weights alone.
void GroupedMatMul(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                   const Tensor& y, Stream& stream, Numerics numerics = Numerics::kFast);
// dx[rows,K] = dy[rows,N] w_e: the gradient by the input. kPinned: as above.
void GroupedMatMulGradInput(const Tensor& dy, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                            const Tensor& dx, Stream& stream, Numerics numerics = Numerics::kFast);
// dw_e[N,K] (+)= sum over the segments of e, in their order, of dy^T x. dw_e is f32. With kOverwrite an expert without
// rows gets zeros, and the bits of dw_e depend on the rows of its segments alone.
void GroupedMatMulGradWeight(const Tensor& dy, const Tensor& x, absl::Span<const Segment> segments,
                             Accumulate accumulate, absl::Span<const Tensor> weight_grads, Stream& stream);

// The same with lists in memory of the stream, so that a device's host need not know the counts: segments, i32 [S, 3], rows of expert,
// begin, count (0 allowed); matrices from MatrixList, of the sizes that x, y and dy say. What is in the lists is not checked. On a
// device results are those of kPinned.
Tensor MatrixList(absl::Span<const Tensor> matrices, Stream& stream);  // i64 [E], addresses; does not keep them alive.
Tensor SegmentList(absl::Span<const Segment> segments, Stream& stream);
void GroupedMatMul(const Tensor& x, const Tensor& weights, const Tensor& segments, const Tensor& y, Stream& stream);
void GroupedMatMulGradInput(const Tensor& dy, const Tensor& weights, const Tensor& segments, const Tensor& dx, Stream& stream);
void GroupedMatMulGradWeight(const Tensor& dy, const Tensor& x, const Tensor& segments, Accumulate accumulate,
                             const Tensor& weight_grads, Stream& stream);

// GFLOP/s of a large MatMul (1024^3 with the current thread count, 8192^3 on a device): the peak that benchmarks and the progress line
// quote. Runs for about `seconds`; the best of several repetitions.
double MeasureMatMulPeak(DType dtype, double seconds, Stream& stream);

namespace ref {
void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b, Accumulate accumulate,
            const Tensor& c, Stream& stream);
}
}  // namespace shoal::kernels
