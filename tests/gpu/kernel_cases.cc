#include "tests/gpu/kernel_cases.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "runtime/kernels/attention.h"
#include "runtime/kernels/cross_entropy.h"
#include "runtime/kernels/elementwise.h"
#include "runtime/kernels/embedding.h"
#include "runtime/kernels/fp8.h"
#include "runtime/kernels/gated_matmul.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/norm.h"
#include "runtime/kernels/optimizer.h"
#include "runtime/kernels/permute.h"
#include "runtime/kernels/rope.h"
#include "runtime/kernels/router.h"
#include "runtime/kernels/swiglu.h"

namespace shoal::gpu_bench {
namespace {

using kernels::Accumulate;
using kernels::Segment;
using kernels::Transpose;

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;

// Small tensors are made by the CPU, so that all streams get the same bits.
Tensor Random(Shape shape, DType dtype, uint64_t number, Stream& stream, double mean = 0, double stddev = 1) {
  constexpr int64_t kSmall = 1 << 16;
  const bool small = ElementCount(shape) <= kSmall;
  Stream cpu;
  Stream& maker = small ? cpu : stream;
  const Tensor wide = Empty(shape, kF32, maker);
  kernels::FillNormal({.seed = 7, .stream = number}, 0, mean, stddev, wide, maker);
  Tensor made = wide;
  if (dtype != kF32) {
    made = Empty(shape, dtype, maker);
    kernels::Convert(wide, made, maker);
  }
  return small ? ToDevice(made, stream) : made;
}

Tensor Integers(int64_t count, const std::function<int64_t(int64_t)>& value, Stream& stream) {
  const Tensor host = Empty({count}, DType::kI32);
  for (int64_t i = 0; i < count; ++i) host.data<int32_t>()[i] = static_cast<int32_t>(value(i));
  return ToDevice(host, stream);
}
Tensor RandomIntegers(int64_t count, int64_t below, uint64_t number, Stream& stream) {
  return Integers(count, [&](int64_t i) { return static_cast<int64_t>(kernels::RandomBits({9, number}, static_cast<uint64_t>(i)) %
                                                                     static_cast<uint64_t>(below)); }, stream);
}

int64_t Bytes(const std::vector<Tensor>& tensors) {
  return std::accumulate(tensors.begin(), tensors.end(), int64_t{0}, [](int64_t sum, const Tensor& t) { return sum + t.bytes(); });
}
// A kernel that is bound by memory: `in` is read, `out` written. What is both stands in both.
Prepared Moves(const std::vector<Tensor>& in, const std::vector<Tensor>& out, std::function<void()> run) {
  return {std::move(run), out, Bytes(in) + Bytes(out)};
}

// Pairs of tokens and experts in the order of experts, as a router with even choices leaves them.
struct Pairs {
  Tensor offset, slot, token, weight;
};
Pairs MakePairs(const Sizes& s, Stream& stream) {
  const int64_t T = s.tokens(), K = s.top_k, E = s.experts;
  std::vector<std::vector<int64_t>> of_expert(static_cast<size_t>(E));
  for (int64_t pair = 0; pair < T * K; ++pair) {
    const uint64_t first = kernels::RandomBits({9, 77}, static_cast<uint64_t>(pair / K)) % static_cast<uint64_t>(E);
    of_expert[(first + static_cast<uint64_t>(pair % K * std::max<int64_t>(1, E / K))) % static_cast<uint64_t>(E)].push_back(pair);
  }
  std::vector<int64_t> slot(static_cast<size_t>(T * K)), token(static_cast<size_t>(T * K));
  int64_t at = 0;
  for (const std::vector<int64_t>& pairs : of_expert) {
    for (const int64_t pair : pairs) {
      slot[static_cast<size_t>(pair)] = at;
      token[static_cast<size_t>(at++)] = pair / K;
    }
  }
  return {Integers(T + 1, [&](int64_t t) { return t * K; }, stream),
          Integers(T * K, [&](int64_t i) { return slot[static_cast<size_t>(i)]; }, stream),
          Integers(T * K, [&](int64_t i) { return token[static_cast<size_t>(i)]; }, stream),
          Random({T * K}, kF32, 78, stream, 0.2, 0.02)};
}

Prepared PrepareCopy(const Sizes& s, Stream& stream) {
  const Tensor from = Random({s.flat}, kF32, 1, stream), to = Empty({s.flat}, kF32, stream);
  return Moves({from}, {to}, [=, &stream] { Copy(from, to, stream); });
}
Prepared PrepareConvert(const Sizes& s, Stream& stream) {
  const Tensor from = Random({s.flat}, kF32, 1, stream), to = Empty({s.flat}, kBF16, stream);
  return Moves({from}, {to}, [=, &stream] { kernels::Convert(from, to, stream); });
}
Prepared PrepareAddTo(const Sizes& s, Stream& stream) {
  const Tensor x = Random({s.flat}, kBF16, 1, stream), sum = Random({s.flat}, kF32, 2, stream);
  return Moves({x, sum}, {sum}, [=, &stream] { kernels::AddTo(x, sum, stream); });
}
Prepared PrepareAdamW(const Sizes& s, Stream& stream) {
  const Tensor grad = Random({s.flat}, kF32, 1, stream), master = Random({s.flat}, kF32, 2, stream);
  const Tensor m = Zeros({s.flat}, kF32, stream), v = Zeros({s.flat}, kF32, stream), copy = Empty({s.flat}, kBF16, stream);
  const kernels::AdamWStep step = {.learning_rate = 0.1, .weight_decay = 0.1, .update = 3, .grad_scale = 0.5f};
  const Tensor numbers = ToDevice(AdamWNumbersOf(step), stream);
  return Moves({grad, master, m, v}, {master, m, v, copy}, [=, &stream] {
    kernels::AdamW(step, numbers, grad, master, m, v, copy, stream);
  });
}
Prepared PrepareSumOfSquares(const Sizes& s, Stream& stream) {
  const Tensor x = Random({s.flat}, kF32, 1, stream), sum = Empty({1}, DType::kF64, stream);
  return Moves({x}, {sum}, [=, &stream] { kernels::SumOfSquares(x, sum, stream); });
}

Prepared PrepareEmbedding(const Sizes& s, Stream& stream) {
  const Tensor table = Random({s.vocab, s.width}, kBF16, 1, stream), ids = RandomIntegers(s.tokens(), s.vocab, 2, stream);
  const Tensor out = Empty({s.tokens(), s.width}, kF32, stream);
  Prepared prepared = Moves({ids}, {out}, [=, &stream] { kernels::Embedding(table, ids, out, stream); });
  prepared.bytes += s.tokens() * s.width * SizeOf(kBF16);  // A row for each token.
  return prepared;
}
Prepared PrepareEmbeddingBackward(const Sizes& s, Stream& stream) {
  const Tensor dout = Random({s.tokens(), s.width}, kF32, 1, stream), ids = RandomIntegers(s.tokens(), s.vocab, 2, stream);
  const Tensor dtable = Zeros({s.vocab, s.width}, kF32, stream);
  Prepared prepared = Moves({dout, ids}, {dtable}, [=, &stream] { kernels::EmbeddingBackward(dout, ids, dtable, stream); });
  // Rows that tokens name are read and written; as many as there would be were all tokens different is close.
  prepared.bytes += 2 * std::min(s.tokens(), s.vocab) * s.width * SizeOf(kF32) - dtable.bytes();
  return prepared;
}
Prepared PrepareRmsNorm(const Sizes& s, Stream& stream) {
  const int64_t T = s.tokens();
  const Tensor x = Random({T, s.width}, kF32, 1, stream), delta = Random({T, s.width}, kBF16, 2, stream);
  const Tensor weight = Random({s.width}, kF32, 3, stream, 1, 0.1), sum = Empty({T, s.width}, kF32, stream);
  const Tensor y = Empty({T, s.width}, kBF16, stream), rstd = Empty({T}, kF32, stream);
  return Moves({x, delta, weight}, {sum, y, rstd}, [=, &stream] { kernels::RmsNorm(x, delta, weight, 1e-5f, sum, y, rstd, stream); });
}
Prepared PrepareRmsNormBackward(const Sizes& s, Stream& stream) {
  const int64_t T = s.tokens();
  const Tensor x = Random({T, s.width}, kF32, 1, stream), dy = Random({T, s.width}, kBF16, 2, stream);
  const Tensor weight = Random({s.width}, kF32, 3, stream, 1, 0.1), rstd = Random({T}, kF32, 4, stream, 1, 0.01);
  const Tensor dx = Random({T, s.width}, kF32, 5, stream), dweight = Zeros({s.width}, kF32, stream);
  return Moves({x, dy, weight, rstd, dx, dweight}, {dx, dweight}, [=, &stream] {
    kernels::RmsNormBackward(dy, x, weight, rstd, dx, dweight, stream);
  });
}
Prepared PrepareRope(const Sizes& s, Stream& stream) {
  const int rotated = s.heads + s.kv_heads;
  const Tensor qkv = Random({s.tokens(), static_cast<int64_t>(rotated + s.kv_heads) * s.dim}, kBF16, 1, stream);
  const kernels::RopeTable table = kernels::MakeRopeTable(s.seq, s.dim, 1e6, stream);
  Prepared prepared = Moves({table.cos, table.sin}, {}, [=, &stream] {
    kernels::Rope(qkv, rotated, s.dim, table, kernels::RopeDirection::kForward, stream);
  });
  prepared.outputs = {qkv};
  prepared.bytes += 2 * s.tokens() * rotated * s.dim * SizeOf(kBF16);  // Not V.
  return prepared;
}
Prepared PrepareSwiGlu(const Sizes& s, Stream& stream) {
  const Tensor gate_up = Random({s.pairs(), 2 * s.inner}, kBF16, 1, stream), h = Empty({s.pairs(), s.inner}, kBF16, stream);
  return Moves({gate_up}, {h}, [=, &stream] { kernels::SwiGlu(gate_up, h, stream); });
}
Prepared PrepareSwiGluBackward(const Sizes& s, Stream& stream) {
  const Tensor gate_up = Random({s.pairs(), 2 * s.inner}, kBF16, 1, stream), dh = Random({s.pairs(), s.inner}, kBF16, 2, stream);
  const Tensor dgate_up = Empty(gate_up.shape(), kBF16, stream), h = Empty(dh.shape(), kBF16, stream);
  return Moves({gate_up, dh}, {dgate_up, h}, [=, &stream] { kernels::SwiGluBackward(dh, gate_up, dgate_up, h, stream); });
}
Prepared PrepareCrossEntropy(const Sizes& s, Stream& stream) {
  const int64_t C = std::min(s.loss_chunk, s.tokens());
  const Tensor logits = Random({C, s.vocab}, kF32, 1, stream), targets = RandomIntegers(C, s.vocab, 2, stream);
  const Tensor loss = Empty({C}, kF32, stream), dlogits = Empty({C, s.vocab}, kBF16, stream);
  return Moves({logits, targets}, {loss, dlogits}, [=, &stream] {
    kernels::CrossEntropy(logits, targets, 1.0f, loss, dlogits, stream);
  });
}

Prepared PrepareTopKSoftmax(const Sizes& s, Stream& stream) {
  const int64_t T = s.tokens();
  const Tensor logits = Random({T, s.experts}, kF32, 1, stream), probs = Empty({T, s.experts}, kF32, stream);
  const Tensor chosen = Empty({T, s.top_k}, DType::kI32, stream), weights = Empty({T, s.top_k}, kF32, stream);
  const Tensor logz = Empty({T}, kF32, stream);
  const kernels::Tally tally = kernels::MakeTally(T, s.experts, /*pieces=*/1, kernels::TallySums::kYes, stream);
  return Moves({logits}, {probs, chosen, weights, logz, tally.counts, tally.sums}, [=, &stream] {
    kernels::TopKSoftmax(logits, kernels::Renormalize::kYes, probs, chosen, weights, logz, stream, tally);
  });
}
Prepared PrepareTopKSoftmaxBackward(const Sizes& s, Stream& stream) {
  const Prepared forward = PrepareTopKSoftmax(s, stream);
  forward.run();
  const Tensor probs = forward.outputs[0], chosen = forward.outputs[1], weights = forward.outputs[2], logz = forward.outputs[3];
  const Tensor dweights = Random(weights.shape(), kF32, 2, stream), dprob = Random({s.experts}, kF32, 3, stream);
  const Tensor dlogits = Empty(probs.shape(), kF32, stream);
  return Moves({probs, chosen, weights, logz, dweights, dprob}, {dlogits}, [=, &stream] {
    kernels::TopKSoftmaxBackward(probs, chosen, weights, logz, kernels::Renormalize::kYes, dweights, dprob, 1e-3f, dlogits, stream);
  });
}
Prepared PrepareOrderByExpert(const Sizes& s, Stream& stream) {
  const Prepared forward = PrepareTopKSoftmax(s, stream);
  forward.run();
  const Tensor chosen = forward.outputs[1];
  const kernels::Tally tally = {.pieces = 1, .counts = forward.outputs[4], .sums = forward.outputs[5]};
  const Tensor offset = Empty({s.tokens() + 1}, DType::kI32, stream), segments = Empty({s.experts, 3}, DType::kI32, stream);
  const Tensor slot = Empty({s.pairs()}, DType::kI32, stream), token = Empty({s.pairs()}, DType::kI32, stream);
  const Tensor sums = Zeros({2 * s.experts + 1}, DType::kF64, stream);
  const kernels::TallyTotals totals = {
      .counts = sums.Rows(0, s.experts), .probs = sums.Rows(s.experts, s.experts), .z = sums.Rows(2 * s.experts, 1)};
  Prepared prepared = Moves({chosen, tally.counts, tally.sums, sums}, {offset, segments, slot, token, sums}, [=, &stream] {
    kernels::OrderByExpert(chosen, tally, offset, segments, slot, token, totals, stream);
  });
  prepared.outputs.pop_back();  // Each call adds to the sums.
  return prepared;
}
// Of one of several ranks that sends its rows in four chunks.
Prepared PrepareOrderByShares(const Sizes& s, Stream& stream) {
  constexpr int kPieces = 4;
  const int64_t T = s.tokens(), E = s.experts;
  const Tensor logits = Random({T, E}, kF32, 1, stream), probs = Empty({T, E}, kF32, stream), logz = Empty({T}, kF32, stream);
  const Tensor chosen = Empty({T, s.top_k}, DType::kI32, stream), weights = Empty({T, s.top_k}, kF32, stream);
  const kernels::Tally tally = kernels::MakeTally(T, E, kPieces, kernels::TallySums::kNo, stream);
  const Tensor totals = Empty({kPieces * E}, DType::kF64, stream);
  kernels::TopKSoftmax(logits, kernels::Renormalize::kYes, probs, chosen, weights, logz, stream, tally);
  kernels::SumTally(tally, totals, stream);
  // The rows of each piece and expert are one run, those of a piece behind each other.
  const Tensor counts = ToHost(totals, stream), shares = Empty({3 * kPieces * E + 1}, DType::kI32);
  double row = 0;
  for (int64_t i = 0; i < kPieces * E; ++i) {
    const double rows = counts.data<double>()[i];
    shares.data<int32_t>()[i] = static_cast<int32_t>(i);
    shares.data<int32_t>()[kPieces * E + 1 + 2 * i] = static_cast<int32_t>(rows);
    shares.data<int32_t>()[kPieces * E + 2 + 2 * i] = static_cast<int32_t>(row);
    row += rows;
  }
  shares.data<int32_t>()[kPieces * E] = static_cast<int32_t>(kPieces * E);
  const Tensor list = ToDevice(shares, stream), offset = Empty({T + 1}, DType::kI32, stream);
  const Tensor slot = Empty({s.pairs()}, DType::kI32, stream), token = Empty({s.pairs()}, DType::kI32, stream);
  return Moves({chosen, tally.counts, list}, {offset, slot, token}, [=, &stream] {
    kernels::OrderByShares(chosen, tally, list, offset, slot, token, stream);
  });
}
Prepared PrepareGatherRows(const Sizes& s, Stream& stream) {
  const Pairs pairs = MakePairs(s, stream);
  const Tensor x = Random({s.tokens(), s.width}, kBF16, 1, stream), rows = Empty({s.pairs(), s.width}, kBF16, stream);
  return Moves({x, pairs.token}, {rows}, [=, &stream] { kernels::GatherRows(x, pairs.token, rows, stream); });
}
Prepared PrepareSumSlots(const Sizes& s, Stream& stream) {
  const Pairs pairs = MakePairs(s, stream);
  const Tensor drows = Random({s.pairs(), s.width}, kBF16, 1, stream), dx = Empty({s.tokens(), s.width}, kBF16, stream);
  return Moves({drows, pairs.offset, pairs.slot}, {dx}, [=, &stream] {
    kernels::SumSlots(drows, pairs.offset, pairs.slot, dx, stream);
  });
}
Prepared PrepareCombineSlots(const Sizes& s, Stream& stream) {
  const Pairs pairs = MakePairs(s, stream);
  const Tensor residual = Random({s.tokens(), s.width}, kF32, 1, stream), y = Random({s.pairs(), s.width}, kBF16, 2, stream);
  const Tensor out = Empty(residual.shape(), kF32, stream);
  return Moves({residual, y, pairs.offset, pairs.slot, pairs.weight}, {out}, [=, &stream] {
    kernels::CombineSlots(residual, y, pairs.offset, pairs.slot, pairs.weight, out, stream);
  });
}
Prepared PrepareCombineSlotsBackward(const Sizes& s, Stream& stream) {
  const Pairs pairs = MakePairs(s, stream);
  const Tensor dout = Random({s.tokens(), s.width}, kF32, 1, stream), y = Random({s.pairs(), s.width}, kBF16, 2, stream);
  const Tensor dy = Empty(y.shape(), kBF16, stream), dweight = Empty({s.pairs()}, kF32, stream);
  return Moves({dout, y, pairs.offset, pairs.slot, pairs.weight}, {dy, dweight}, [=, &stream] {
    kernels::CombineSlotsBackward(dout, y, pairs.offset, pairs.slot, pairs.weight, dy, dweight, stream);
  });
}

// c[M, N] = op(a) op(b), all of the experts' rows at once: what a grouped product of the same rows is measured against.
Prepared PrepareDense(int64_t rows, int64_t out, int64_t in, Stream& stream) {
  const Tensor x = Random({rows, in}, kBF16, 1, stream), w = Random({out, in}, kBF16, 2, stream, 0, 0.02);
  const Tensor y = Empty({rows, out}, kBF16, stream);
  Prepared prepared = Moves({x, w}, {y}, [=, &stream] {
    kernels::MatMul(x, Transpose::kNo, w, Transpose::kYes, Accumulate::kOverwrite, y, stream);
  });
  prepared.flops = 2.0 * static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in);
  return prepared;
}

enum class Load { kEven, kSkewed };
// Skewed: expert e has a share like 1 / (e + 1) of the rows, in a shuffled order, none of which is a multiple of a tile.
std::vector<Segment> Segments(int64_t rows, int experts, Load load) {
  std::vector<double> share(static_cast<size_t>(experts), 1.0);
  if (load == Load::kSkewed) {
    for (int e = 0; e < experts; ++e) share[static_cast<size_t>(e * 5 % experts)] = 1.0 / (e + 1);
  }
  const double all = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<Segment> segments;
  int64_t begin = 0;
  double sum = 0;
  for (int e = 0; e < experts; ++e) {
    sum += share[static_cast<size_t>(e)];
    const int64_t end = e + 1 == experts ? rows : static_cast<int64_t>(static_cast<double>(rows) * (sum / all));
    segments.push_back({e, begin, end - begin});
    begin = end;
  }
  return segments;
}

enum class Pass { kForward, kGradInput, kGradWeight };

Prepared PrepareGrouped(int64_t rows, int experts, int64_t out, int64_t in, Load load, Pass pass, Stream& stream) {
  const bool by_weight = pass == Pass::kGradWeight;
  const Tensor matrices = by_weight ? Zeros({experts * out, in}, kF32, stream) : Random({experts * out, in}, kBF16, 2, stream, 0, 0.02);
  std::vector<Tensor> each;
  for (int e = 0; e < experts; ++e) each.push_back(matrices.Rows(e * out, out));
  const Tensor list = kernels::MatrixList(each, stream), segments = kernels::SegmentList(Segments(rows, experts, load), stream);
  const Tensor x = pass == Pass::kGradInput ? Empty({rows, in}, kBF16, stream) : Random({rows, in}, kBF16, 1, stream);
  const Tensor y = pass == Pass::kForward ? Empty({rows, out}, kBF16, stream) : Random({rows, out}, kBF16, 3, stream);
  Prepared prepared;
  prepared.outputs = {pass == Pass::kForward ? y : pass == Pass::kGradInput ? x : matrices};
  prepared.bytes = Bytes({x, y, matrices});
  prepared.flops = 2.0 * static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in);
  prepared.run = [=, &stream] {
    (void)matrices;  // Kept alive: the list has addresses only.
    if (pass == Pass::kForward) kernels::GroupedMatMul(x, list, segments, y, stream);
    if (pass == Pass::kGradInput) kernels::GroupedMatMulGradInput(y, list, segments, x, stream);
    if (pass == Pass::kGradWeight) kernels::GroupedMatMulGradWeight(y, x, segments, Accumulate::kOverwrite, list, stream);
  };
  return prepared;
}

// Forward of experts with evenly many rows, the SwiGLU in the epilogue.
Prepared PrepareGroupedSwiGlu(const Sizes& s, Stream& stream) {
  const Tensor matrices = Random({s.experts * 2 * s.inner, s.width}, kBF16, 2, stream, 0, 0.02);
  std::vector<Tensor> each;
  for (int e = 0; e < s.experts; ++e) each.push_back(matrices.Rows(e * 2 * s.inner, 2 * s.inner));
  const Tensor list = kernels::MatrixList(each, stream), x = Random({s.pairs(), s.width}, kBF16, 1, stream);
  const Tensor segments = kernels::SegmentList(Segments(s.pairs(), s.experts, Load::kEven), stream);
  const Tensor gate_up = Empty({s.pairs(), 2 * s.inner}, kBF16, stream), h = Empty({s.pairs(), s.inner}, kBF16, stream);
  Prepared prepared = Moves({x, matrices}, {gate_up, h}, [=, &stream] {
    (void)matrices;  // Kept alive: the list has addresses only.
    kernels::GroupedMatMulSwiGlu(x, list, segments, gate_up, h, stream);
  });
  prepared.flops = 4.0 * static_cast<double>(s.pairs()) * static_cast<double>(s.inner) * static_cast<double>(s.width);
  return prepared;
}

// y = x w^T in fp8, rows quantised on the way: of all rows with one matrix, or of experts with evenly many.
Prepared PrepareFp8(int64_t rows, int experts, int64_t out, int64_t in, Pass pass, Stream& stream) {
  const Tensor matrices = Random({experts * out, in}, kBF16, 2, stream, 0, 0.02);
  std::vector<Tensor> each;
  for (int e = 0; e < experts; ++e) each.push_back(matrices.Rows(e * out, out));
  kernels::Fp8Weights weights;
  kernels::QuantiseWeights(each, &weights, stream);
  const Tensor segments = kernels::SegmentList(Segments(rows, experts, Load::kEven), stream);
  const bool forward = pass == Pass::kForward;
  const Tensor x = Random({rows, forward ? in : out}, kBF16, 1, stream), y = Empty({rows, forward ? out : in}, kBF16, stream);
  Prepared prepared = Moves({x, weights.values}, {y}, [=, &stream] {
    if (forward) kernels::GroupedMatMul(x, weights, segments, y, stream);
    if (!forward) kernels::GroupedMatMulGradInput(x, weights, segments, y, stream);
  });
  prepared.flops = 2.0 * static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in);
  return prepared;
}

// What experts' weights take once a step.
Prepared PrepareQuantiseWeights(const Sizes& s, Stream& stream) {
  const Tensor matrices = Random({s.experts * 2 * s.inner, s.width}, kBF16, 2, stream, 0, 0.02);
  std::vector<Tensor> each;
  for (int e = 0; e < s.experts; ++e) each.push_back(matrices.Rows(e * 2 * s.inner, 2 * s.inner));
  const auto weights = std::make_shared<kernels::Fp8Weights>();
  kernels::QuantiseWeights(each, weights.get(), stream);
  Prepared prepared = Moves({matrices}, {weights->values, weights->transposed, weights->scales},
                            [=, &stream] { kernels::QuantiseWeights(each, weights.get(), stream); });
  prepared.outputs.clear();  // The CPU has no codes: products by them are compared.
  return prepared;
}

// Of documents that have 1/16, 2/16, 3/16 and 14/16 of a sequence, in turn, and are cut where it ends.
Tensor FirstOfDocuments(const Sizes& s, Stream& stream) {
  int64_t begin = 0, left = 0, document = 0;
  return Integers(s.tokens(), [&](int64_t token) {
    if (token % s.seq == 0 || left == 0) {
      begin = token % s.seq;
      left = std::max<int64_t>(1, s.seq * (document % 4 == 3 ? 14 : 1 + document % 3) / 16);
      ++document;
    }
    --left;
    return begin;
  }, stream);
}

// Pairs of a query and a key that it sees.
double PairsSeen(const Sizes& s, const Tensor& first) {
  if (first.empty()) return static_cast<double>(s.rows) * static_cast<double>(s.seq) * static_cast<double>(s.seq + 1) / 2;
  double pairs = 0;
  for (int64_t token = 0; token < s.tokens(); ++token) pairs += static_cast<double>(token % s.seq + 1 - first.data<int32_t>()[token]);
  return pairs;
}

Prepared PrepareAttention(const Sizes& s, bool documents, bool backward, Stream& stream) {
  const kernels::AttentionShape shape = {s.rows, s.seq, s.heads, s.kv_heads, s.dim};
  const Tensor qkv = Random({s.tokens(), shape.qkv_width()}, kBF16, 1, stream), out = Empty({s.tokens(), shape.q_width()}, kBF16, stream);
  const Tensor lse = Empty({s.tokens(), s.heads}, kF32, stream);
  Stream cpu;
  const Tensor first = documents ? FirstOfDocuments(s, stream) : Tensor();
  // Two products over the keys that the mask leaves; the backward pass has five.
  const double flops = 4.0 * s.dim * s.heads * PairsSeen(s, documents ? FirstOfDocuments(s, cpu) : Tensor());
  if (!backward) {
    Prepared prepared = Moves({qkv}, {out, lse}, [=, &stream] { kernels::Attention(shape, qkv, first, out, lse, stream); });
    prepared.flops = flops;
    return prepared;
  }
  kernels::Attention(shape, qkv, first, out, lse, stream);
  const Tensor dout = Random(out.shape(), kBF16, 2, stream), dqkv = Empty(qkv.shape(), kBF16, stream);
  Prepared prepared = Moves({qkv, out, lse, dout}, {dqkv}, [=, &stream] {
    kernels::AttentionBackward(shape, qkv, first, out, lse, dout, dqkv, stream);
  });
  prepared.flops = 2.5 * flops;
  return prepared;
}

}  // namespace

Sizes FineSizes() {
  return {.rows = 4, .seq = 4096, .width = 2048, .inner = 1024, .vocab = 50304, .experts = 64, .top_k = 8,
          .heads = 16, .kv_heads = 16, .dim = 128, .loss_chunk = 8192, .flat = int64_t{1} << 28};
}
Sizes CoarseSizes() {
  return {.rows = 2, .seq = 4096, .width = 4096, .inner = 14336, .vocab = 50304, .experts = 8, .top_k = 2,
          .heads = 32, .kv_heads = 8, .dim = 128, .loss_chunk = 8192, .flat = int64_t{1} << 28};
}
Sizes TinySizes() {
  return {.rows = 2, .seq = 40, .width = 64, .inner = 48, .vocab = 112, .experts = 8, .top_k = 2,
          .heads = 4, .kv_heads = 2, .dim = 16, .loss_chunk = 24, .flat = 3001};
}

std::vector<Case> MemoryCases() {
  return {{"copy", "", PrepareCopy},
          {"convert f32 to bf16", "copy", PrepareConvert},
          {"add_to bf16", "copy", PrepareAddTo},
          {"embedding", "copy", PrepareEmbedding},
          {"embedding_backward", "copy", PrepareEmbeddingBackward},
          {"rms_norm", "copy", PrepareRmsNorm},
          {"rms_norm_backward", "copy", PrepareRmsNormBackward},
          {"rope", "copy", PrepareRope},
          {"topk_softmax", "copy", PrepareTopKSoftmax},
          {"topk_softmax_backward", "copy", PrepareTopKSoftmaxBackward},
          {"order_by_expert", "copy", PrepareOrderByExpert},
          {"order_by_shares", "copy", PrepareOrderByShares},
          {"gather_rows", "copy", PrepareGatherRows},
          {"sum_slots", "copy", PrepareSumSlots},
          {"combine_slots", "copy", PrepareCombineSlots},
          {"combine_slots_backward", "copy", PrepareCombineSlotsBackward},
          {"swiglu", "copy", PrepareSwiGlu},
          {"swiglu_backward", "copy", PrepareSwiGluBackward},
          {"quantise weights to fp8", "copy", PrepareQuantiseWeights},
          {"cross_entropy", "copy", PrepareCrossEntropy},
          {"adamw", "copy", PrepareAdamW},
          {"sum_of_squares", "copy", PrepareSumOfSquares}};
}

std::vector<Case> ProductCases() {
  std::vector<Case> cases;
  for (const bool up : {true, false}) {
    const auto out = [up](const Sizes& s) { return up ? 2 * s.inner : s.width; };
    const auto in = [up](const Sizes& s) { return up ? s.width : s.inner; };
    const std::string which = up ? "gate_up" : "down", dense = "dense " + which;
    cases.push_back({dense, "", [=](const Sizes& s, Stream& stream) { return PrepareDense(s.pairs(), out(s), in(s), stream); }});
    if (up) cases.push_back({"grouped gate_up even with swiglu", dense, PrepareGroupedSwiGlu});
    for (const auto& [pass, name] : {std::pair(Pass::kForward, " forward"), std::pair(Pass::kGradInput, " grad input")}) {
      const auto fp8 = [=, pass = pass](const Sizes& s, int experts, Stream& stream) {
        return PrepareFp8(s.pairs(), experts, out(s), in(s), pass, stream);
      };
      cases.push_back({"fp8 dense " + which + name, dense, [=](const Sizes& s, Stream& stream) { return fp8(s, 1, stream); }});
      cases.push_back({"fp8 grouped " + which + " even" + name, dense,
                       [=](const Sizes& s, Stream& stream) { return fp8(s, s.experts, stream); }});
    }
    for (const Load load : {Load::kEven, Load::kSkewed}) {
      for (const auto& [pass, name] : {std::pair(Pass::kForward, "forward"), std::pair(Pass::kGradInput, "grad input"),
                                       std::pair(Pass::kGradWeight, "grad weight")}) {
        cases.push_back({"grouped " + which + (load == Load::kEven ? " even " : " skewed ") + name, dense,
                         [=, pass = pass](const Sizes& s, Stream& stream) {
                           return PrepareGrouped(s.pairs(), s.experts, out(s), in(s), load, pass, stream);
                         }});
      }
    }
  }
  return cases;
}

std::vector<Case> AttentionCases() {
  std::vector<Case> cases;
  for (const bool documents : {false, true}) {
    for (const bool backward : {false, true}) {
      const std::string plain = backward ? "attention_backward" : "attention";
      cases.push_back({documents ? plain + " of documents" : plain, documents ? plain : "",
                       [=](const Sizes& s, Stream& stream) { return PrepareAttention(s, documents, backward, stream); }});
    }
  }
  return cases;
}

}  // namespace shoal::gpu_bench
