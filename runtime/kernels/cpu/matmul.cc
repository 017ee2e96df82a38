#include "runtime/kernels/matmul.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "runtime/base/check.h"
#include "runtime/device/cpu.h"
#include "runtime/kernels/cpu/gemm.h"

namespace shoal::kernels {
namespace {

using cpu::Gemm;

void* At(const Tensor& tensor, int64_t element) {
  return static_cast<std::byte*>(tensor.raw()) + element * SizeOf(tensor.dtype());
}

bool IsOperand(const Tensor& tensor) {
  return tensor.rank() == 2 && (tensor.dtype() == DType::kF32 || tensor.dtype() == DType::kBF16);
}

void CheckTypes(const Tensor& a, const Tensor& b, const Tensor& c) {
  SHOAL_CHECK(IsOperand(a) && IsOperand(b) && IsOperand(c) && a.dtype() == b.dtype() &&
              (c.dtype() == DType::kF32 || c.dtype() == a.dtype()))
      << Name(a.dtype()) << ShapeString(a.shape()) << " times " << Name(b.dtype()) << ShapeString(b.shape()) << " to "
      << Name(c.dtype()) << ShapeString(c.shape());
}

// Rows or columns of one product that one thread computes.
struct Unit {
  const Segment* segment;
  int64_t begin;
  int64_t count;
};

// Cuts [0, extent) into pieces of `piece` and hands them to `add(begin, count)`.
template <class Add>
void Cut(int64_t extent, int64_t piece, const Add& add) {
  for (int64_t begin = 0; begin < extent; begin += piece) add(begin, std::min(piece, extent - begin));
}

// Row blocks of all segments, so many that the last to finish keeps no thread waiting for long.
std::vector<Unit> RowUnits(absl::Span<const Segment> segments) {
  int64_t rows = 0;
  for (const Segment& segment : segments) rows += segment.count;
  const int64_t per_unit = std::max<int64_t>(256, (rows / (8 * Threads()) + 63) / 64 * 64);
  std::vector<Unit> units;
  for (const Segment& segment : segments) {
    Cut(segment.count, per_unit, [&](int64_t begin, int64_t count) { units.push_back({&segment, begin, count}); });
  }
  return units;
}

// out[rows, n] = in[rows, k] op(weights of the segment's expert).
void GroupedRows(const Tensor& in, absl::Span<const Tensor> weights, bool transpose_weights,
                 absl::Span<const Segment> segments, const Tensor& out) {
  const int64_t k = in.dim(1);
  const int64_t n = out.dim(1);
  for (const Segment& segment : segments) {
    SHOAL_CHECK(segment.expert >= 0 && segment.expert < static_cast<int>(weights.size()));
    SHOAL_CHECK(segment.begin >= 0 && segment.count >= 0 && segment.begin + segment.count <= in.dim(0) &&
                segment.begin + segment.count <= out.dim(0))
        << segment.begin << "+" << segment.count;
    const Tensor& w = weights[segment.expert];
    CheckTypes(in, w, out);
    SHOAL_CHECK(w.dim(0) == (transpose_weights ? n : k) && w.dim(1) == (transpose_weights ? k : n))
        << ShapeString(w.shape()) << " for " << ShapeString(in.shape()) << " to " << ShapeString(out.shape());
  }
  const std::vector<Unit> units = RowUnits(segments);
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < units.size(); ++i) {
    const Unit& unit = units[i];
    const int64_t row = unit.segment->begin + unit.begin;
    Gemm gemm;
    gemm.m = unit.count;
    gemm.n = n;
    gemm.k = gemm.lda = k;
    gemm.ldc = n;
    gemm.ldb = transpose_weights ? k : n;
    gemm.transpose_b = transpose_weights;
    gemm.a = At(in, row * k);
    gemm.b = weights[unit.segment->expert].raw();
    gemm.c = At(out, row * n);
    gemm.in = in.dtype();
    gemm.out = out.dtype();
    cpu::RunGemm(gemm);
  }
}

}  // namespace

void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b, Accumulate accumulate,
            const Tensor& c, Stream&) {
  CheckTypes(a, b, c);
  SHOAL_CHECK(accumulate == Accumulate::kOverwrite || c.dtype() == DType::kF32);
  Gemm gemm;
  gemm.transpose_a = transpose_a == Transpose::kYes;
  gemm.transpose_b = transpose_b == Transpose::kYes;
  gemm.m = a.dim(gemm.transpose_a ? 1 : 0);
  gemm.k = a.dim(gemm.transpose_a ? 0 : 1);
  gemm.n = b.dim(gemm.transpose_b ? 0 : 1);
  SHOAL_CHECK(b.dim(gemm.transpose_b ? 1 : 0) == gemm.k && c.dim(0) == gemm.m && c.dim(1) == gemm.n)
      << ShapeString(a.shape()) << (gemm.transpose_a ? "^T" : "") << " times " << ShapeString(b.shape())
      << (gemm.transpose_b ? "^T" : "") << " to " << ShapeString(c.shape());
  gemm.a = a.raw();
  gemm.b = b.raw();
  gemm.c = c.raw();
  gemm.lda = a.dim(1);
  gemm.ldb = b.dim(1);
  gemm.ldc = c.dim(1);
  gemm.accumulate = accumulate == Accumulate::kAdd;
  gemm.in = a.dtype();
  gemm.out = c.dtype();
  cpu::RunGemm(gemm);
}

void GroupedMatMul(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                   const Tensor& y, Stream&) {
  GroupedRows(x, weights, /*transpose_weights=*/true, segments, y);
}

void GroupedMatMulGradInput(const Tensor& dy, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                            const Tensor& dx, Stream&) {
  GroupedRows(dy, weights, /*transpose_weights=*/false, segments, dx);
}

void GroupedMatMulGradWeight(const Tensor& dy, const Tensor& x, absl::Span<const Segment> segments,
                             Accumulate accumulate, absl::Span<const Tensor> weight_grads, Stream&) {
  const int64_t n = dy.dim(1);
  const int64_t k = x.dim(1);
  std::vector<std::vector<Segment>> segments_of(weight_grads.size());
  for (const Segment& segment : segments) {
    SHOAL_CHECK(segment.expert >= 0 && segment.expert < static_cast<int>(weight_grads.size()));
    SHOAL_CHECK(segment.begin >= 0 && segment.count >= 0 && segment.begin + segment.count <= dy.dim(0) &&
                segment.begin + segment.count <= x.dim(0))
        << segment.begin << "+" << segment.count;
    if (segment.count > 0) segments_of[segment.expert].push_back(segment);
  }
  struct Block {
    size_t expert;
    int64_t begin;
    int64_t count;
  };
  std::vector<Block> blocks;
  for (size_t e = 0; e < weight_grads.size(); ++e) {
    CheckTypes(dy, x, weight_grads[e]);
    SHOAL_CHECK(weight_grads[e].dtype() == DType::kF32 && weight_grads[e].dim(0) == n && weight_grads[e].dim(1) == k)
        << ShapeString(weight_grads[e].shape()) << " for " << n << " x " << k;
    Cut(n, 256, [&](int64_t begin, int64_t count) { blocks.push_back({e, begin, count}); });
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    bool add = accumulate == Accumulate::kAdd;
    float* out = weight_grads[block.expert].data<float>() + block.begin * k;
    if (!add && segments_of[block.expert].empty()) std::memset(out, 0, static_cast<size_t>(block.count * k) * 4);
    for (const Segment& segment : segments_of[block.expert]) {
      Gemm gemm;
      gemm.m = block.count;
      gemm.n = gemm.ldb = gemm.ldc = k;
      gemm.k = segment.count;
      gemm.lda = n;
      gemm.transpose_a = true;
      gemm.accumulate = add;
      gemm.a = At(dy, segment.begin * n + block.begin);
      gemm.b = At(x, segment.begin * k);
      gemm.c = out;
      gemm.in = dy.dtype();
      cpu::RunGemm(gemm);
      add = true;
    }
  }
}

double MeasureMatMulPeak(DType dtype, double seconds) {
  constexpr int64_t kSize = 1024;
  const Tensor a = Zeros({kSize, kSize}, dtype);
  const Tensor b = Zeros({kSize, kSize}, dtype);
  const Tensor c = Empty({kSize, kSize}, DType::kF32);
  Stream stream;
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  double best_seconds = 0;
  for (int run = 0; run < 3 || std::chrono::duration<double>(Clock::now() - begin).count() < seconds; ++run) {
    const Clock::time_point start = Clock::now();
    MatMul(a, Transpose::kNo, b, Transpose::kYes, Accumulate::kOverwrite, c, stream);
    const double taken = std::chrono::duration<double>(Clock::now() - start).count();
    if (run == 0) continue;  // Creates the primitive and touches the memory.
    if (best_seconds == 0 || taken < best_seconds) best_seconds = taken;
  }
  return 2.0 * kSize * kSize * kSize / best_seconds * 1e-9;
}

}  // namespace shoal::kernels
