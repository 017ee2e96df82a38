// Rates of matrix products and attention: bench_kernels_matmul [threads [seconds per case [substring of the
// cases]]]. Each case is verified against the reference on a few rows first, then timed: GFLOP/s of the
// median and the best run, and the best's share of the peak that MeasureMatMulPeak finds in the same run.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "runtime/base/check.h"
#include "runtime/device/cpu.h"
#include "runtime/kernels/attention.h"
#include "runtime/kernels/matmul.h"

namespace shoal::kernels {
namespace {

struct Options {
  int threads = UsableCores();
  double seconds = 0.3;
  std::string filter;
};

Tensor Random(Shape shape, DType dtype) {
  static std::mt19937 random(1);
  const Tensor tensor = Empty(std::move(shape), dtype);
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    const float value = static_cast<float>(random() >> 8) * 0x1p-23f - 1;
    if (dtype == DType::kBF16) {
      tensor.data<BFloat16>()[i] = BFloat16(value);
    } else {
      tensor.data<float>()[i] = value;
    }
  }
  return tensor;
}

double At(const Tensor& tensor, int64_t i) {
  return tensor.dtype() == DType::kBF16 ? static_cast<float>(tensor.data<BFloat16>()[i])
                                        : tensor.data<float>()[i];
}

void CheckClose(const Tensor& actual, const Tensor& expected, double tolerance) {
  for (int64_t i = 0; i < expected.elements(); ++i) {
    SHOAL_CHECK(std::abs(At(actual, i) - At(expected, i)) <= tolerance)
        << "element " << i << ": " << At(actual, i) << " against " << At(expected, i);
  }
}

class Bench {
 public:
  explicit Bench(Options options) : options_(std::move(options)) {
    SetThreads(options_.threads);
    Stream stream;
    peak_[0] = MeasureMatMulPeak(DType::kF32, options_.seconds, stream);
    peak_[1] = MeasureMatMulPeak(DType::kBF16, options_.seconds, stream);
    std::printf("%d threads, %s; peak of 1024^3: f32 %.0f, bf16 %.0f GFLOP/s\n", options_.threads,
                std::string(Name(ActiveIsa())).c_str(), peak_[0], peak_[1]);
    std::printf("%-44s %10s %10s %8s\n", "case", "median", "best", "of peak");
  }

  bool Wants(const std::string& name) const { return name.find(options_.filter) != std::string::npos; }

  void Report(const std::string& name, DType dtype, double flops, const std::function<void()>& run) {
    using Clock = std::chrono::steady_clock;
    run();
    std::vector<double> seconds;
    double total = 0;
    while (seconds.size() < 3 || total < options_.seconds) {
      const Clock::time_point start = Clock::now();
      run();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
      total += seconds.back();
    }
    std::sort(seconds.begin(), seconds.end());
    const double best = flops / seconds.front() * 1e-9;
    std::printf("%-44s %10.0f %10.0f %7.0f%%\n", name.c_str(), flops / seconds[seconds.size() / 2] * 1e-9,
                best, 100 * best / peak_[dtype == DType::kBF16 ? 1 : 0]);
    std::fflush(stdout);
  }

 private:
  const Options options_;
  double peak_[2];
};

// Operands are at most 1: each of the K products and its share of the rounding errors, too.
double ProductTolerance(int64_t terms, DType out) {
  return 4 * static_cast<double>(terms + 4) * 0x1p-24 +
         (out == DType::kBF16 ? static_cast<double>(terms) * 0x1p-8 : 0);
}

// A layer of `out` outputs on `tokens` tokens: forward, and the gradients by its input and by its weights.
void BenchLayer(Bench& bench, int64_t tokens, int64_t out, int64_t in, DType dtype) {
  struct Pass {
    const char* name;
    Shape a, b, c;
    Transpose ta, tb;
    DType out_type;
  };
  const Pass passes[] = {
      {"fwd", {tokens, in}, {out, in}, {tokens, out}, Transpose::kNo, Transpose::kYes, dtype},
      {"fwd->f32", {tokens, in}, {out, in}, {tokens, out}, Transpose::kNo, Transpose::kYes, DType::kF32},
      {"dgrad", {tokens, out}, {out, in}, {tokens, in}, Transpose::kNo, Transpose::kNo, dtype},
      {"wgrad", {tokens, out}, {tokens, in}, {out, in}, Transpose::kYes, Transpose::kNo, DType::kF32},
  };
  for (const Pass& pass : passes) {
    if (dtype == DType::kF32 && std::string(pass.name) == "fwd->f32") continue;
    const std::string name =
        absl::StrFormat("%s %dx%dx%d %s", std::string(Name(dtype)), tokens, out, in, pass.name);
    if (!bench.Wants(name)) continue;
    Stream stream;
    const Tensor a = Random(pass.a, dtype);
    const Tensor b = Random(pass.b, dtype);
    const Tensor c = Zeros(pass.c, pass.out_type);
    const auto run = [&] { MatMul(a, pass.ta, b, pass.tb, Accumulate::kOverwrite, c, stream); };
    run();
    if (pass.ta == Transpose::kNo) {
      const int64_t rows = std::min<int64_t>(4, a.dim(0));
      const Tensor expected = Zeros({rows, c.dim(1)}, pass.out_type);
      ref::MatMul(a.Rows(a.dim(0) - rows, rows), pass.ta, b, pass.tb, Accumulate::kOverwrite, expected,
                  stream);
      CheckClose(c.Rows(a.dim(0) - rows, rows), expected, ProductTolerance(a.dim(1), pass.out_type));
    }
    bench.Report(name, dtype, 2.0 * static_cast<double>(tokens * out * in), run);
  }
}

// `experts` experts of `out` outputs; their rows are uneven, `rows` on average.
void BenchGrouped(Bench& bench, int experts, int64_t rows, int64_t out, int64_t in, DType dtype) {
  const std::string shape =
      absl::StrFormat("%s grouped %d x ~%d x (%dx%d)", std::string(Name(dtype)), experts, rows, out, in);
  if (!bench.Wants(shape)) return;
  std::vector<std::vector<Segment>> steps;  // Counts change from step to step, as in training.
  std::mt19937 random(3);
  for (int step = 0; step < 32; ++step) {
    std::vector<Segment> segments;
    int64_t begin = 0;
    for (int e = 0; e < experts; ++e) {
      const int64_t left = experts * rows - begin;
      const int64_t count =
          e + 1 == experts ? left : std::min<int64_t>(left, rows / 2 + static_cast<int64_t>(random() % rows));
      segments.push_back({e, begin, count});
      begin += count;
    }
    steps.push_back(std::move(segments));
  }
  const int64_t total = experts * rows;
  Stream stream;
  const Tensor x = Random({total, in}, dtype), y = Random({total, out}, dtype);
  const Tensor dx = Zeros({total, in}, dtype);
  std::vector<Tensor> weights, grads;
  for (int e = 0; e < experts; ++e) {
    weights.push_back(Random({out, in}, dtype));
    grads.push_back(Zeros({out, in}, DType::kF32));
  }
  size_t step = 0;
  const auto next = [&]() -> const std::vector<Segment>& { return steps[step++ % steps.size()]; };
  const double flops = 2.0 * static_cast<double>(total * out * in);
  bench.Report(shape + " fwd", dtype, flops, [&] { GroupedMatMul(x, weights, next(), y, stream); });
  GroupedMatMul(x, weights, steps[0], y, stream);
  const Tensor expected = Zeros({2, out}, dtype);
  ref::MatMul(x.Rows(0, 2), Transpose::kNo, weights[0], Transpose::kYes, Accumulate::kOverwrite, expected,
              stream);
  CheckClose(y.Rows(0, 2), expected, ProductTolerance(in, dtype));
  bench.Report(shape + " dgrad", dtype, flops,
               [&] { GroupedMatMulGradInput(y, weights, next(), dx, stream); });
  bench.Report(shape + " wgrad", dtype, flops,
               [&] { GroupedMatMulGradWeight(y, x, next(), Accumulate::kOverwrite, grads, stream); });
}

void BenchAttention(Bench& bench, const AttentionShape& shape, DType dtype) {
  const std::string name = absl::StrFormat("%s attention %dx%d heads %d/%d of %d", std::string(Name(dtype)),
                                           shape.rows, shape.seq, shape.heads, shape.kv_heads, shape.dim);
  if (!bench.Wants(name)) return;
  Stream stream;
  const int64_t tokens = shape.rows * shape.seq;
  const Tensor qkv = Random({tokens, shape.qkv_width()}, dtype);
  const Tensor dqkv = Zeros(qkv.shape(), dtype);
  const Tensor out = Zeros({tokens, shape.q_width()}, dtype), dout = Random(out.shape(), dtype);
  const Tensor lse = Zeros({tokens, shape.heads}, DType::kF32);
  Attention(shape, qkv, Tensor(), out, lse, stream);
  AttentionShape one = shape;
  one.rows = 1;
  const Tensor expected = Zeros({shape.seq, shape.q_width()}, dtype);
  ref::Attention(one, qkv.Rows(0, shape.seq), Tensor(), expected, Zeros({shape.seq, shape.heads}, DType::kF32), stream);
  CheckClose(out.Rows(0, shape.seq), expected, dtype == DType::kBF16 ? 0x1p-7 : 0x1p-16);
  // Two products over the keys that the causal mask leaves; backward has five.
  const double forward =
      4.0 * shape.dim * static_cast<double>(shape.seq * (shape.seq + 1) / 2 * shape.heads * shape.rows);
  bench.Report(name + " fwd", dtype, forward, [&] { Attention(shape, qkv, Tensor(), out, lse, stream); });
  bench.Report(name + " bwd", dtype, 2.5 * forward,
               [&] { AttentionBackward(shape, qkv, Tensor(), out, lse, dout, dqkv, stream); });
}

void Run(const Options& options) {
  Bench bench(options);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    BenchLayer(bench, 2048, 768, 256, dtype);
    BenchLayer(bench, 2048, 512, 512, dtype);
    BenchLayer(bench, 1024, 32000, 512, dtype);
    BenchGrouped(bench, 8, 512, 1024, 256, dtype);
    BenchGrouped(bench, 8, 512, 256, 512, dtype);
    BenchGrouped(bench, 8, 512, 2048, 512, dtype);
    BenchGrouped(bench, 64, 32, 512, 256, dtype);
    BenchAttention(bench, {8, 256, 8, 4, 32}, dtype);
    BenchAttention(bench, {4, 512, 8, 4, 64}, dtype);
    BenchAttention(bench, {1, 2048, 8, 4, 64}, dtype);
  }
}

}  // namespace
}  // namespace shoal::kernels

int main(int argc, char** argv) {
#ifndef __OPTIMIZE__
  std::fprintf(stderr, "bench_kernels_matmul: built without optimisation, its numbers would mean nothing\n");
  return 1;
#endif
  shoal::kernels::Options options;
  if (argc > 1) options.threads = std::atoi(argv[1]);
  if (argc > 2) options.seconds = std::atof(argv[2]);
  if (argc > 3) options.filter = argv[3];
  shoal::kernels::Run(options);
  return 0;
}
