// Bandwidth of the memory-bound kernels: bench_kernels [threads [seconds per case [substring of the cases]]].
// Each case is verified against its reference on a few rows first, then timed at the size of a training step:
// GB/s of the best and the median run, counting every byte that must be read or written once, and the best's
// share of a triad's (a = b + s * c, arrays of 64 MiB) in the same run. A share above 100 % means that the
// data stayed in a cache.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/cross_entropy.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/optimizer.h"
#include "runtime/kernels/permute.h"
#include "runtime/kernels/ref/access.h"
#include "runtime/kernels/rope.h"
#include "runtime/kernels/router.h"
#include "runtime/kernels/swiglu.h"

namespace shoal::kernels {
namespace {

constexpr int64_t kWidth = 512, kHidden = 1024, kVocab = 32000, kTokens = 2048, kTokensToVerify = 16;
constexpr int64_t kExperts = 8, kChoices = 2, kHeads = 12, kHeadWidth = 64;

enum class Impl { kCpu, kRef };
// Tensors of one kernel call for `tokens` tokens, ready to run, and what it writes.
struct Call {
  std::function<void()> run;
  std::vector<Tensor> outputs;
  double bytes = 0;
};
struct Case {
  std::string name;
  std::function<Call(Impl, int64_t tokens, DType act)> make;
};

Stream& TheStream() {
  static Stream stream;
  return stream;
}

// The same numbers in each call with the same seed.
Tensor Random(Shape shape, DType dtype, uint64_t seed, double stddev = 1) {
  const Tensor wide = Empty(shape, DType::kF32), tensor = Empty(shape, dtype);
  FillNormal({.seed = seed, .stream = 0}, 0, 0, stddev, wide, TheStream());
  Convert(wide, tensor, TheStream());
  return tensor;
}

Tensor RandomIds(Shape shape, int64_t limit) {
  Tensor ids = Empty(std::move(shape), DType::kI32);
  for (int64_t i = 0; i < ids.elements(); ++i) {
    ids.data<int32_t>()[i] = static_cast<int32_t>(
        RandomBits({.seed = 9, .stream = 9}, static_cast<uint64_t>(i)) % static_cast<uint64_t>(limit));
  }
  return ids;
}

double BytesOf(std::initializer_list<Tensor> tensors) {
  double bytes = 0;
  for (const Tensor& tensor : tensors) bytes += static_cast<double>(tensor.bytes());
  return bytes;
}

Call NormCall(Impl impl, int64_t T, DType act) {
  const Tensor x = Random({T, kWidth}, DType::kF32, 1), delta = Random({T, kWidth}, act, 2);
  const Tensor weight = Random({kWidth}, DType::kF32, 3), sum = Empty({T, kWidth}, DType::kF32);
  const Tensor y = Empty({T, kWidth}, act), rstd = Empty({T}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? RmsNorm : ref::RmsNorm;
  return {[=] { kernel(x, delta, weight, 1e-5f, sum, y, rstd, TheStream()); },
          {sum, y, rstd},
          BytesOf({x, delta, sum, y})};
}

Call NormBackwardCall(Impl impl, int64_t T, DType act) {
  const Tensor x = Random({T, kWidth}, DType::kF32, 1), dy = Random({T, kWidth}, act, 2);
  const Tensor weight = Random({kWidth}, DType::kF32, 3), rstd = Random({T}, DType::kF32, 4);
  const Tensor dx = Zeros({T, kWidth}, DType::kF32), dweight = Zeros({kWidth}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? RmsNormBackward : ref::RmsNormBackward;
  return {[=] { kernel(dy, x, weight, rstd, dx, dweight, TheStream()); },
          {dx, dweight},
          BytesOf({x, dy, dx, dx})};
}

Call RopeCall(Impl impl, int64_t T, DType act) {
  const int64_t seq = std::min<int64_t>(T, 512);
  const Tensor x = Random({T, kHeads * kHeadWidth}, act, 1);
  const RopeTable table = MakeRopeTable(seq, kHeadWidth, 10000);
  const auto kernel = impl == Impl::kCpu ? Rope : ref::Rope;
  return {[=] { kernel(x, kHeads, kHeadWidth, table, RopeDirection::kForward, TheStream()); },
          {x},
          BytesOf({x, x})};
}

Call SwiGluCall(Impl impl, int64_t T, DType act) {
  const Tensor gate_up = Random({T * kChoices, 2 * kHidden}, act, 1), h = Empty({T * kChoices, kHidden}, act);
  const auto kernel = impl == Impl::kCpu ? SwiGlu : ref::SwiGlu;
  return {[=] { kernel(gate_up, h, TheStream()); }, {h}, BytesOf({gate_up, h})};
}

Call SwiGluBackwardCall(Impl impl, int64_t T, DType act) {
  const Tensor gate_up = Random({T * kChoices, 2 * kHidden}, act, 1),
               dh = Random({T * kChoices, kHidden}, act, 2);
  const Tensor dgate_up = Empty({T * kChoices, 2 * kHidden}, act), h = Empty({T * kChoices, kHidden}, act);
  const auto kernel = impl == Impl::kCpu ? SwiGluBackward : ref::SwiGluBackward;
  return {[=] { kernel(dh, gate_up, dgate_up, h, TheStream()); },
          {dgate_up, h},
          BytesOf({dh, gate_up, dgate_up, h})};
}

struct Routing {
  Tensor probs, chosen, weights, logz;
};
Routing MakeRouting(int64_t T) {
  return {Empty({T, kExperts}, DType::kF32), Empty({T, kChoices}, DType::kI32),
          Empty({T, kChoices}, DType::kF32), Empty({T}, DType::kF32)};
}

Call RouterCall(Impl impl, int64_t T, DType) {
  const Tensor logits = Random({T, kExperts}, DType::kF32, 1);
  const Routing r = MakeRouting(T);
  const auto run = [=](const auto& kernel) { kernel(logits, Renormalize::kYes, r.probs, r.chosen, r.weights, r.logz, TheStream()); };
  return {[=] { impl == Impl::kCpu ? run([](auto&&... operands) { TopKSoftmax(operands...); }) : run(ref::TopKSoftmax); },
          {r.probs, r.chosen, r.weights, r.logz},
          BytesOf({logits, r.probs, r.chosen, r.weights, r.logz})};
}

Call RouterBackwardCall(Impl impl, int64_t T, DType) {
  const Routing r = MakeRouting(T);
  TopKSoftmax(Random({T, kExperts}, DType::kF32, 1), Renormalize::kYes, r.probs, r.chosen, r.weights, r.logz,
              TheStream());
  const Tensor dweights = Random({T, kChoices}, DType::kF32, 2), dprob = Random({kExperts}, DType::kF32, 3);
  const Tensor dlogits = Empty({T, kExperts}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? TopKSoftmaxBackward : ref::TopKSoftmaxBackward;
  return {[=] {
            kernel(r.probs, r.chosen, r.weights, r.logz, Renormalize::kYes, dweights, dprob, 0.01f, dlogits,
                   TheStream());
          },
          {dlogits},
          BytesOf({r.probs, r.chosen, r.weights, r.logz, dweights, dlogits})};
}

Call SigmoidCall(Impl impl, int64_t T, DType) {
  const Tensor logits = Random({T, kExperts}, DType::kF32, 1), bias = Random({kExperts}, DType::kF32, 2);
  const Routing r = MakeRouting(T);
  const auto run = [=](const auto& kernel) { kernel(logits, bias, 2.5f, r.probs, r.chosen, r.weights, TheStream()); };
  return {[=] { impl == Impl::kCpu ? run([](auto&&... operands) { TopKSigmoid(operands...); }) : run(ref::TopKSigmoid); },
          {r.probs, r.chosen, r.weights},
          BytesOf({logits, r.probs, r.chosen, r.weights})};
}

Call SigmoidBackwardCall(Impl impl, int64_t T, DType) {
  const Routing r = MakeRouting(T);
  TopKSigmoid(Random({T, kExperts}, DType::kF32, 1), Random({kExperts}, DType::kF32, 2), 2.5f, r.probs, r.chosen, r.weights,
              TheStream());
  const Tensor dweights = Random({T, kChoices}, DType::kF32, 3), dshare = Random({1, kExperts}, DType::kF32, 4);
  const Tensor dlogits = Empty({T, kExperts}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? TopKSigmoidBackward : ref::TopKSigmoidBackward;
  return {[=] { kernel(r.probs, r.chosen, r.weights, 2.5f, dweights, dshare, dlogits, TheStream()); },
          {dlogits},
          BytesOf({r.probs, r.chosen, r.weights, dweights, dlogits})};
}

// Random choices of T tokens, their rows sorted by expert.
struct Slots {
  Tensor offset, slot, token;
};
Slots MakeSlots(int64_t T) {
  const Slots slots = {Empty({T + 1}, DType::kI32), Empty({T * kChoices}, DType::kI32), Empty({T * kChoices}, DType::kI32)};
  for (int64_t t = 0; t <= T; ++t) slots.offset.data<int32_t>()[t] = static_cast<int32_t>(t * kChoices);
  const Tensor chosen = RandomIds({T * kChoices}, kExperts);
  int32_t row = 0;
  for (int32_t expert = 0; expert < kExperts; ++expert) {
    for (int64_t pair = 0; pair < T * kChoices; ++pair) {
      if (chosen.data<int32_t>()[pair] != expert) continue;
      slots.token.data<int32_t>()[row] = static_cast<int32_t>(pair / kChoices);
      slots.slot.data<int32_t>()[pair] = row++;
    }
  }
  return slots;
}

Call GatherCall(Impl impl, int64_t T, DType act) {
  const Slots s = MakeSlots(T);
  const Tensor x = Random({T, kWidth}, act, 1), slots = Empty({T * kChoices, kWidth}, act);
  const auto kernel = impl == Impl::kCpu ? GatherRows : ref::GatherRows;
  return {[=] { kernel(x, s.token, slots, TheStream()); }, {slots}, BytesOf({x, slots})};
}

Call SumSlotsCall(Impl impl, int64_t T, DType act) {
  const Slots s = MakeSlots(T);
  const Tensor drows = Random({T * kChoices, kWidth}, act, 1);
  const Tensor dx = Empty({T, kWidth}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? SumSlots : ref::SumSlots;
  return {[=] { kernel(drows, s.offset, s.slot, dx, TheStream()); }, {dx}, BytesOf({drows, dx})};
}

Call CombineCall(Impl impl, int64_t T, DType act) {
  const Slots s = MakeSlots(T);
  const Tensor residual = Random({T, kWidth}, DType::kF32, 1), y = Random({T * kChoices, kWidth}, act, 2);
  const Tensor weight = Random({T * kChoices}, DType::kF32, 3);
  const Tensor out = Empty({T, kWidth}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? CombineSlots : ref::CombineSlots;
  return {[=] { kernel(residual, y, s.offset, s.slot, weight, out, TheStream()); }, {out}, BytesOf({residual, y, out})};
}

Call CombineBackwardCall(Impl impl, int64_t T, DType act) {
  const Slots s = MakeSlots(T);
  const Tensor dout = Random({T, kWidth}, DType::kF32, 1), y = Random({T * kChoices, kWidth}, act, 2);
  const Tensor weight = Random({T * kChoices}, DType::kF32, 3);
  const Tensor dy = Empty({T * kChoices, kWidth}, act), dweight = Empty({T * kChoices}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? CombineSlotsBackward : ref::CombineSlotsBackward;
  return {[=] { kernel(dout, y, s.offset, s.slot, weight, dy, dweight, TheStream()); },
          {dy, dweight},
          BytesOf({dout, y, dy})};
}

// A chunk of an eighth of the tokens, as the loss calls it.
Call CrossEntropyCall(Impl impl, int64_t T, DType act) {
  const int64_t C = std::max<int64_t>(T / 8, 2);
  const Tensor logits = Random({C, kVocab}, DType::kF32, 1), targets = RandomIds({C}, kVocab);
  const Tensor loss = Empty({C}, DType::kF32), dlogits = Empty({C, kVocab}, act);
  const auto kernel = impl == Impl::kCpu ? CrossEntropy : ref::CrossEntropy;
  return {[=] { kernel(logits, targets, 1, loss, dlogits, TheStream()); },
          {loss, dlogits},
          BytesOf({logits, dlogits})};
}

Call EmbeddingCall(Impl impl, int64_t T, DType act) {
  const Tensor table = Random({kVocab, kWidth}, act, 1), ids = RandomIds({T}, kVocab);
  const Tensor out = Empty({T, kWidth}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? Embedding : ref::Embedding;
  return {[=] { kernel(table, ids, out, TheStream()); },
          {out},
          BytesOf({out}) * (1 + static_cast<double>(SizeOf(act)) / 4)};
}

Call EmbeddingBackwardCall(Impl impl, int64_t T, DType) {
  const Tensor dtable = Zeros({kVocab, kWidth}, DType::kF32), ids = RandomIds({T}, kVocab);
  const Tensor dout = Random({T, kWidth}, DType::kF32, 1);
  const auto kernel = impl == Impl::kCpu ? EmbeddingBackward : ref::EmbeddingBackward;
  return {[=] { kernel(dout, ids, dtable, TheStream()); }, {dtable}, BytesOf({dout, dout, dout})};
}

// As many parameters as 16 experts of this size.
Call AdamWCall(Impl impl, int64_t T, DType act) {
  const int64_t N = T < kTokens ? 1000 : 16 * 3 * kWidth * kHidden;
  const Tensor grad = Random({N}, DType::kF32, 1), master = Random({N}, DType::kF32, 2),
               copy = Empty({N}, act);
  const Tensor m = Zeros({N}, DType::kF32), v = Zeros({N}, DType::kF32);
  const AdamWStep step = {.learning_rate = 1e-4, .weight_decay = 0.1, .grad_scale = 0.5f};
  using Kernel = void (*)(const AdamWStep&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Stream&);
  const auto kernel = impl == Impl::kCpu ? static_cast<Kernel>(AdamW) : ref::AdamW;
  return {[=] { kernel(step, grad, master, m, v, copy, TheStream()); },
          {master, m, v, copy},
          BytesOf({grad, master, master, m, m, v, v, copy})};
}

Call SumOfSquaresCall(Impl impl, int64_t T, DType) {
  const Tensor x = Random({T < kTokens ? 1000 : 16 * 3 * kWidth * kHidden}, DType::kF32, 1),
               sum = Empty({1}, DType::kF64);
  const auto kernel = impl == Impl::kCpu ? static_cast<double (*)(const Tensor&, Stream&)>(SumOfSquares) : ref::SumOfSquares;
  return {[=] { sum.data<double>()[0] = kernel(x, TheStream()); }, {sum}, BytesOf({x})};
}

Call ConvertCall(Impl impl, int64_t T, DType) {
  const Tensor x = Random({T * kHidden * 8}, DType::kF32, 1), y = Empty({T * kHidden * 8}, DType::kBF16);
  const auto kernel = impl == Impl::kCpu ? Convert : ref::Convert;
  return {[=] { kernel(x, y, TheStream()); }, {y}, BytesOf({x, y})};
}

Call AddToCall(Impl impl, int64_t T, DType act) {
  const Tensor x = Random({T * kHidden * 8}, act, 1), sum = Zeros({T * kHidden * 8}, DType::kF32);
  const auto kernel = impl == Impl::kCpu ? AddTo : ref::AddTo;
  return {[=] { kernel(x, sum, TheStream()); }, {sum}, BytesOf({x, sum, sum})};
}

const Case kCases[] = {{"RmsNorm + residual", NormCall},
                       {"RmsNormBackward", NormBackwardCall},
                       {"Rope", RopeCall},
                       {"SwiGlu", SwiGluCall},
                       {"SwiGluBackward", SwiGluBackwardCall},
                       {"TopKSoftmax", RouterCall},
                       {"TopKSoftmaxBackward", RouterBackwardCall},
                       {"TopKSigmoid", SigmoidCall},
                       {"TopKSigmoidBackward", SigmoidBackwardCall},
                       {"GatherRows", GatherCall},
                       {"SumSlots", SumSlotsCall},
                       {"CombineSlots", CombineCall},
                       {"CombineSlotsBackward", CombineBackwardCall},
                       {"CrossEntropy", CrossEntropyCall},
                       {"Embedding", EmbeddingCall},
                       {"EmbeddingBackward", EmbeddingBackwardCall},
                       {"AdamW", AdamWCall},
                       {"SumOfSquares", SumOfSquaresCall},
                       {"Convert to bf16", ConvertCall},
                       {"AddTo", AddToCall}};

void Verify(const Case& test, DType act) {
  const Call cpu = test.make(Impl::kCpu, kTokensToVerify, act),
             ref = test.make(Impl::kRef, kTokensToVerify, act);
  cpu.run();
  ref.run();
  for (size_t i = 0; i < cpu.outputs.size(); ++i) {
    const double relative = cpu.outputs[i].dtype() == DType::kBF16 ? 0x1p-6 : 1e-4;
    for (int64_t j = 0; j < cpu.outputs[i].elements(); ++j) {
      const double got = ref::Get(cpu.outputs[i], j), want = ref::Get(ref.outputs[i], j);
      SHOAL_CHECK(std::abs(got - want) <= relative * (1 + std::abs(want)))
          << test.name << " output " << i << "[" << j << "]: " << got << ", want " << want;
    }
  }
}

struct Rate {
  double best = 0, median = 0;  // GB/s.
};
Rate Measure(const std::function<void()>& run, double bytes, double seconds) {
  using Clock = std::chrono::steady_clock;
  run();  // Touches the memory.
  std::vector<double> times;
  const Clock::time_point begin = Clock::now();
  while (times.size() < 5 || std::chrono::duration<double>(Clock::now() - begin).count() < seconds) {
    const Clock::time_point start = Clock::now();
    run();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return {bytes / times.front() * 1e-9, bytes / times[times.size() / 2] * 1e-9};
}

Rate MeasureTriad(double seconds) {
  const int64_t N = 16 << 20;
  const Tensor a = Zeros({N}, DType::kF32), b = Zeros({N}, DType::kF32), c = Zeros({N}, DType::kF32);
  const auto run = [&] {
    ParallelFor(N, kElementsPerThreadMin, [&](int64_t begin, int64_t end) {
      float* to = a.data<float>();
      const float* from = b.data<float>();
      const float* scaled = c.data<float>();
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) to[i] = from[i] + 3 * scaled[i];
    });
  };
  return Measure(run, BytesOf({a, b, c}), seconds);
}

int Main(int argc, char** argv) {
  SetThreads(argc > 1 ? std::atoi(argv[1]) : UsableCores());
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.2;
  const std::string filter = argc > 3 ? argv[3] : "";
  const Rate triad = MeasureTriad(seconds);
  std::printf("%d threads, %s; triad %.1f GB/s (median %.1f)\n", Threads(),
              std::string(Name(ActiveIsa())).c_str(), triad.best, triad.median);
  std::printf("%-22s %5s %9s %9s %9s %7s\n", "kernel", "act", "MB", "GB/s", "median", "triad");
  for (const Case& test : kCases) {
    if (test.name.find(filter) == std::string::npos) continue;
    for (DType act : {DType::kF32, DType::kBF16}) {
      Verify(test, act);
      const Call call = test.make(Impl::kCpu, kTokens, act);
      const Rate rate = Measure(call.run, call.bytes, seconds);
      std::printf("%-22s %5s %9.2f %9.1f %9.1f %6.0f%%\n", test.name.c_str(), std::string(Name(act)).c_str(),
                  call.bytes * 1e-6, rate.best, rate.median, 100 * rate.best / triad.best);
    }
  }
  return 0;
}

}  // namespace
}  // namespace shoal::kernels

int main(int argc, char** argv) { return shoal::kernels::Main(argc, argv); }
