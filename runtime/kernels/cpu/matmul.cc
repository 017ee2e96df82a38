#include "runtime/kernels/matmul.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "runtime/base/check.h"
#include "runtime/device/cpu.h"
#include "runtime/kernels/cpu/gemm.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/cpu/tasks.h"
#include "runtime/kernels/device_dispatch.h"
#include "runtime/kernels/group_lists.h"

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
      << Name(a.dtype()) << ShapeString(a.shape()) << " times " << Name(b.dtype()) << ShapeString(b.shape())
      << " to " << Name(c.dtype()) << ShapeString(c.shape());
}

void CheckSegment(const Segment& segment, size_t experts, int64_t rows) {
  SHOAL_CHECK(segment.expert >= 0 && segment.expert < static_cast<int>(experts) && segment.begin >= 0 &&
              segment.count >= 0 && segment.begin + segment.count <= rows)
      << "rows " << segment.begin << "+" << segment.count << " of " << rows << ", expert " << segment.expert
      << " of " << experts;
}

// Of a weight gradient, in one unit of work.
constexpr int64_t kGradRows = 512;

// Rows of one matrix (an expert's inputs, or its gradient) that one thread computes.
struct Unit {
  int expert;
  int64_t begin;
  int64_t count;
};

// Cuts [0, extent) into pieces of `piece` and hands them to `add(begin, count)`.
template <class Add>
void Cut(int64_t extent, int64_t piece, const Add& add) {
  for (int64_t begin = 0; begin < extent; begin += piece) add(begin, std::min(piece, extent - begin));
}

// Row blocks of all segments, the largest first, so that no thread works long after the others. Not smaller
// than needed, because each packs its expert's weights anew. The blocks of a segment are those of its own rows
// alone where that is wanted: the order of a product's sums may depend on its number of rows.
std::vector<Unit> RowUnits(absl::Span<const Segment> segments, Numerics numerics) {
  constexpr int64_t kRowsMin = 256;
  int64_t rows = 0;
  for (const Segment& segment : segments) rows += segment.count;
  const int64_t rows_max =
      numerics == Numerics::kPinned ? kRowsMin : std::max(kRowsMin, rows / (4 * Threads()) / 32 * 32);
  std::vector<Unit> units;
  for (const Segment& segment : segments) {
    const int64_t pieces = (segment.count + rows_max - 1) / rows_max;
    if (pieces == 0) continue;
    const int64_t piece =
        (segment.count / pieces + 32) / 32 * 32;  // Alike, rather than a small one at the end.
    Cut(segment.count, piece, [&](int64_t begin, int64_t count) {
      units.push_back({segment.expert, segment.begin + begin, count});
    });
  }
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.count > b.count; });
  return units;
}

// out[rows, n] = in[rows, k] op(weights of the segment's expert).
void GroupedRows(const Tensor& in, absl::Span<const Tensor> weights, bool transpose_weights,
                 absl::Span<const Segment> segments, const Tensor& out, Stream& stream, Numerics numerics) {
  const int64_t k = in.dim(1);
  const int64_t n = out.dim(1);
  for (const Segment& segment : segments) {
    CheckSegment(segment, weights.size(), std::min(in.dim(0), out.dim(0)));
    const Tensor& w = weights[segment.expert];
    CheckTypes(in, w, out);
    SHOAL_CHECK(w.dim(0) == (transpose_weights ? n : k) && w.dim(1) == (transpose_weights ? k : n))
        << ShapeString(w.shape()) << " for " << ShapeString(in.shape()) << " to " << ShapeString(out.shape());
  }
  const auto kernel = transpose_weights ? &DeviceKernels::grouped_matmul : &DeviceKernels::grouped_matmul_grad_input;
  if (stream.device() != nullptr) {
    const GroupLists lists = UploadLists(weights, segments, stream);
    Offloaded(stream, kernel, in, lists.matrices, lists.segments, out);
    return;
  }
  const std::vector<Unit> units = RowUnits(segments, numerics);
  cpu::RunTasks(static_cast<int64_t>(units.size()), [&](int64_t i) {
    const Unit& unit = units[i];
    Gemm gemm;
    gemm.m = unit.count;
    gemm.n = n;
    gemm.k = gemm.lda = k;
    gemm.ldc = n;
    gemm.ldb = transpose_weights ? k : n;
    gemm.transpose_b = transpose_weights;
    gemm.a = At(in, unit.begin * k);
    gemm.b = weights[unit.expert].raw();
    gemm.c = At(out, unit.begin * n);
    gemm.in = in.dtype();
    gemm.out = out.dtype();
    gemm.varying = cpu::Varying::kM;
    cpu::RunGemm(gemm);
  });
}

}  // namespace

void CheckAddend(const Tensor& addend, const Tensor& c) {
  SHOAL_CHECK(addend.empty() || (c.dtype() == DType::kF32 && addend.dtype() == DType::kF32 && addend.shape() == c.shape()))
      << Name(addend.dtype()) << ShapeString(addend.shape()) << " to " << Name(c.dtype()) << ShapeString(c.shape());
}

void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b,
            Accumulate accumulate, const Tensor& c, Stream& stream) {
  MatMul(a, transpose_a, b, transpose_b, accumulate == Accumulate::kAdd ? c : Tensor(), c, stream);
}

void MatMul(const Tensor& a, Transpose transpose_a, const Tensor& b, Transpose transpose_b, const Tensor& addend,
            const Tensor& c, Stream& stream) {
  CheckTypes(a, b, c);
  CheckAddend(addend, c);
  Gemm gemm;
  gemm.transpose_a = transpose_a == Transpose::kYes;
  gemm.transpose_b = transpose_b == Transpose::kYes;
  gemm.m = a.dim(gemm.transpose_a ? 1 : 0);
  gemm.k = a.dim(gemm.transpose_a ? 0 : 1);
  gemm.n = b.dim(gemm.transpose_b ? 0 : 1);
  SHOAL_CHECK(b.dim(gemm.transpose_b ? 1 : 0) == gemm.k && c.dim(0) == gemm.m && c.dim(1) == gemm.n)
      << ShapeString(a.shape()) << (gemm.transpose_a ? "^T" : "") << " times " << ShapeString(b.shape())
      << (gemm.transpose_b ? "^T" : "") << " to " << ShapeString(c.shape());
  if (Offloaded(stream, &DeviceKernels::matmul, a, gemm.transpose_a, b, gemm.transpose_b, addend, c)) return;
  gemm.a = a.raw();
  gemm.b = b.raw();
  gemm.c = c.raw();
  gemm.lda = a.dim(1);
  gemm.ldb = b.dim(1);
  gemm.ldc = c.dim(1);
  gemm.accumulate = !addend.empty();
  if (gemm.accumulate && addend.raw() != c.raw()) {
    ParallelFor(c.elements(), kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
      std::memcpy(c.data<float>() + begin, addend.data<float>() + begin, static_cast<size_t>(end - begin) * sizeof(float));
    });
  }
  gemm.in = a.dtype();
  gemm.out = c.dtype();
  cpu::RunGemm(gemm);
}

void GroupedMatMul(const Tensor& x, absl::Span<const Tensor> weights, absl::Span<const Segment> segments,
                   const Tensor& y, Stream& stream, Numerics numerics) {
  GroupedRows(x, weights, /*transpose_weights=*/true, segments, y, stream, numerics);
}

void GroupedMatMulGradInput(const Tensor& dy, absl::Span<const Tensor> weights,
                            absl::Span<const Segment> segments, const Tensor& dx, Stream& stream,
                            Numerics numerics) {
  GroupedRows(dy, weights, /*transpose_weights=*/false, segments, dx, stream, numerics);
}

void GroupedMatMulGradWeight(const Tensor& dy, const Tensor& x, absl::Span<const Segment> segments,
                             Accumulate accumulate, absl::Span<const Tensor> weight_grads, Stream& stream) {
  const int64_t n = dy.dim(1);
  const int64_t k = x.dim(1);
  struct Expert {
    std::vector<Segment> segments;
    int64_t rows = 0;
  };
  std::vector<Expert> experts(weight_grads.size());
  for (const Segment& segment : segments) {
    CheckSegment(segment, experts.size(), std::min(dy.dim(0), x.dim(0)));
    if (segment.count == 0) continue;
    experts[segment.expert].segments.push_back(segment);
    experts[segment.expert].rows += segment.count;
  }
  // Rows of one gradient that one thread computes; those with the longest sums first.
  std::vector<Unit> units;
  for (int e = 0; e < static_cast<int>(experts.size()); ++e) {
    CheckTypes(dy, x, weight_grads[e]);
    SHOAL_CHECK(weight_grads[e].dtype() == DType::kF32 && weight_grads[e].dim(0) == n &&
                weight_grads[e].dim(1) == k)
        << ShapeString(weight_grads[e].shape()) << " for " << n << " x " << k;
    Cut(n, kGradRows, [&](int64_t begin, int64_t count) { units.push_back({e, begin, count}); });
  }
  if (stream.device() != nullptr) {
    const GroupLists lists = UploadLists(weight_grads, segments, stream);
    const bool add = accumulate == Accumulate::kAdd;
    Offloaded(stream, &DeviceKernels::grouped_matmul_grad_weight, dy, x, lists.segments, add, lists.matrices);
    return;
  }
  std::stable_sort(units.begin(), units.end(), [&](const Unit& a, const Unit& b) {
    return experts[a.expert].rows > experts[b.expert].rows;
  });
  cpu::RunTasks(static_cast<int64_t>(units.size()), [&](int64_t i) {
    const Unit& unit = units[i];
    bool add = accumulate == Accumulate::kAdd;
    float* out = weight_grads[unit.expert].data<float>() + unit.begin * k;
    if (!add && experts[unit.expert].segments.empty())
      std::memset(out, 0, static_cast<size_t>(unit.count * k) * 4);
    for (const Segment& segment : experts[unit.expert].segments) {
      Gemm gemm;
      gemm.m = unit.count;
      gemm.n = gemm.ldb = gemm.ldc = k;
      gemm.k = segment.count;
      gemm.lda = n;
      gemm.transpose_a = true;
      gemm.accumulate = add;
      gemm.a = At(dy, segment.begin * n + unit.begin);
      gemm.b = At(x, segment.begin * k);
      gemm.c = out;
      gemm.in = dy.dtype();
      gemm.varying = cpu::Varying::kK;
      cpu::RunGemm(gemm);
      add = true;
    }
  });
}

double MeasureMatMulPeak(DType dtype, double seconds, Stream& stream) {
  const int64_t size = stream.device() == nullptr ? 1024 : 8192;
  Tensor a = Empty({size, size}, dtype), b = Empty({size, size}, dtype);
  // 0.75 in both types: a processor may multiply zeros with less power, and so faster.
  for (const Tensor* operand : {&a, &b})
    std::memset(operand->raw(), 0x3f, static_cast<size_t>(operand->bytes()));
  a = ToDevice(a, stream);
  b = ToDevice(b, stream);
  const Tensor c = Empty({size, size}, DType::kF32, stream);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  double best_seconds = 0;
  for (int run = 0; run < 3 || std::chrono::duration<double>(Clock::now() - begin).count() < seconds; ++run) {
    const Clock::time_point start = Clock::now();
    MatMul(a, Transpose::kNo, b, Transpose::kYes, Accumulate::kOverwrite, c, stream);
    if (!stream.Wait().ok()) return 0;
    const double taken = std::chrono::duration<double>(Clock::now() - start).count();
    if (run == 0) continue;  // Creates the primitive and touches the memory.
    if (best_seconds == 0 || taken < best_seconds) best_seconds = taken;
  }
  const double n = static_cast<double>(size);
  return 2.0 * n * n * n / best_seconds * 1e-9;
}

}  // namespace shoal::kernels
