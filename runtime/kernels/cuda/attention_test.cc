#include "runtime/kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "runtime/kernels/cuda/device_testing.h"
#include "runtime/kernels/documents.h"

namespace shoal::kernels {
namespace {

using testing::Get;
using testing::MaxAbs;
using testing::Random;
using testing::Set;
using testing::TestStream;
using testing::ToDevice;
using testing::ToHost;

struct Tensors {
  Tensor qkv, first, out, lse, dout, dqkv;  // Outputs are NaN: nothing may be left unwritten.
  Tensors(const AttentionShape& s, DType dtype, uint64_t seed)
      : qkv(Random({s.rows * s.seq, s.qkv_width()}, dtype, seed)),
        out(Empty({s.rows * s.seq, s.q_width()}, dtype)),
        lse(Empty({s.rows * s.seq, s.heads}, DType::kF32)),
        dout(Random(out.shape(), dtype, seed + 1)),
        dqkv(Empty(qkv.shape(), dtype)) {
    for (const Tensor* output : {&out, &lse, &dqkv}) {
      if (output->bytes() > 0) std::memset(output->raw(), 0xff, static_cast<size_t>(output->bytes()));
    }
  }
};

void ExpectSameBits(const Tensors& a, const Tensors& b) {
  testing::ExpectSameBits(a.out, b.out, "out");
  testing::ExpectSameBits(a.lse, b.lse, "lse");
  testing::ExpectSameBits(a.dqkv, b.dqkv, "dqkv");
}

// `upload(host, stream)` puts an operand on the device.
template <typename Upload> void RunOnDevice(const AttentionShape& shape, Tensors& t, const Upload& upload) {
  const std::unique_ptr<Stream> stream = TestStream();
  const Tensor qkv = upload(t.qkv, *stream), out = upload(t.out, *stream), lse = upload(t.lse, *stream);
  const Tensor first = t.first.empty() ? Tensor() : ToDevice(t.first, *stream);
  const Tensor dout = upload(t.dout, *stream), dqkv = upload(t.dqkv, *stream);
  Attention(shape, qkv, first, out, lse, *stream);
  AttentionBackward(shape, qkv, first, out, lse, dout, dqkv, *stream);
  t.out = ToHost(out, *stream);
  t.lse = ToHost(lse, *stream);
  t.dqkv = ToHost(dqkv, *stream);
}

void RunOnDevice(const AttentionShape& shape, Tensors& t) { RunOnDevice(shape, t, ToDevice); }

// Errors in units of the largest magnitude of the tensor. f32: sums of up to max(seq * group, dim) terms in some order, each term from a
// score whose own error (dim terms) the exponential turns into a relative one; another 2^-20 for the GPU's exponential. bf16: every
// rounding (of probabilities, scores' gradients, results, and the `out` that the backward pass reads) adds 2^-8 of what it rounds.
double Tolerance(const AttentionShape& s, DType dtype, int bf16_roundings) {
  const double terms = static_cast<double>(s.dim + s.seq * (s.heads / s.kv_heads));
  return 8 * terms * 0x1p-24 + 0x1p-20 + (dtype == DType::kBF16 ? bf16_roundings * 0x1p-8 : 0.0);
}

void ExpectClose(const char* what, const Tensor& got, const Tensor& want, double tolerance) {
  ASSERT_EQ(got.shape(), want.shape());
  const double largest = MaxAbs(want);
  for (int64_t i = 0; i < got.elements(); ++i) {
    ASSERT_TRUE(std::abs(Get(got, i) - Get(want, i)) <= tolerance * largest)  // NaN fails.
        << what << " row " << i / got.dim(1) << " column " << i % got.dim(1) << ": " << Get(got, i) << ", want " << Get(want, i)
        << " within " << tolerance * largest;
  }
}

void ExpectLikeReference(const AttentionShape& shape, DType dtype, Tensors& got, double widen = 1) {
  SCOPED_TRACE(::testing::Message() << Name(dtype) << " rows " << shape.rows << " seq " << shape.seq << " heads " << shape.heads << "/"
                                    << shape.kv_heads << " dim " << shape.dim);
  Stream host;
  Tensors want = got;
  want.out = Empty(got.out.shape(), DType::kF32);
  want.lse = Empty(got.lse.shape(), DType::kF32);
  want.dqkv = Empty(got.dqkv.shape(), DType::kF32);
  ref::Attention(shape, want.qkv, want.first, want.out, want.lse, host);
  ref::AttentionBackward(shape, want.qkv, want.first, want.out, want.lse, want.dout, want.dqkv, host);
  RunOnDevice(shape, got);
  ExpectClose("out", got.out, want.out, widen * Tolerance(shape, dtype, 2));
  ExpectClose("lse", got.lse, want.lse, widen * Tolerance(shape, DType::kF32, 0));
  ExpectClose("dqkv", got.dqkv, want.dqkv, widen * Tolerance(shape, dtype, 4));
}

// {rows, seq, heads, kv_heads, dim}: one token, both sides of the tiles of 64 and 128 tokens, groups of 1, 2 and 4 heads, heads that fill
// an instance, are narrower, not a multiple of 16 or 8, and wider than the tensor cores' kernels take.
const AttentionShape kShapes[] = {
    {1, 1, 1, 1, 64},   {2, 17, 4, 1, 64}, {1, 130, 2, 2, 64}, {1, 64, 4, 2, 32},  {1, 65, 2, 1, 80},  {1, 130, 4, 1, 128},
    {1, 129, 1, 1, 16}, {3, 33, 2, 1, 20}, {2, 5, 3, 1, 3},    {1, 70, 1, 1, 256}, {1, 40, 2, 1, 144}, {1, 9, 1, 1, 300},
};

TEST(Attention, Bf16ForwardAndBackwardMatchTheReference) {
  for (const AttentionShape& shape : kShapes) {
    Tensors t(shape, DType::kBF16, 7);
    ExpectLikeReference(shape, DType::kBF16, t);
  }
}

TEST(Attention, F32ForwardAndBackwardMatchTheReference) {
  for (const AttentionShape& shape : kShapes) {
    Tensors t(shape, DType::kF32, 7);
    ExpectLikeReference(shape, DType::kF32, t);
  }
}

// Documents that begin and end at borders of tiles (32 and 64 keys, 32, 64 and 128 queries) and beside them, in heads that fill an
// instance, are narrower, and wider than the tensor cores' kernels take; sequences differ.
struct DocumentCase {
  AttentionShape shape;
  std::vector<int64_t> lengths;
};
const DocumentCase kDocumentCases[] = {
    {{1, 17, 1, 1, 16}, {1}},          {{2, 130, 2, 1, 64}, {64, 1, 70}},          {{1, 200, 2, 2, 64}, {128, 72}},
    {{2, 100, 4, 2, 20}, {40, 3, 33}}, {{1, 193, 2, 1, 128}, {63, 66, 1, 63}},     {{1, 70, 1, 1, 256}, {32, 31, 7}},
    {{1, 40, 2, 1, 144}, {5, 35}},     {{1, 40, 1, 1, 300}, {9, 1}},               {{1, 300, 1, 1, 16}, {190, 2, 108}},
};

TEST(AttentionOfDocuments, Bf16MatchesTheReference) {
  for (const auto& [shape, lengths] : kDocumentCases) {
    Tensors t(shape, DType::kBF16, 7);
    t.first = testing::FirstOfDocuments(shape.rows, shape.seq, lengths);
    ExpectLikeReference(shape, DType::kBF16, t);
  }
}

TEST(AttentionOfDocuments, F32MatchesTheReference) {
  for (const auto& [shape, lengths] : kDocumentCases) {
    Tensors t(shape, DType::kF32, 7);
    t.first = testing::FirstOfDocuments(shape.rows, shape.seq, lengths);
    ExpectLikeReference(shape, DType::kF32, t);
  }
}

TEST(AttentionOfDocuments, OfRandomLengthsMatchTheReference) {
  for (const uint64_t seed : {1, 2}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    const AttentionShape shape = {2, 150, 2, 1, 16};
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      Tensors t(shape, dtype, seed);
      t.first = testing::RandomFirst(shape.rows, shape.seq, seed);
      ExpectLikeReference(shape, dtype, t);
    }
  }
}

// The first document is as long as several tiles of all kinds; one of the two is full of NaN.
TEST(AttentionOfDocuments, BlocksOfOthersAreNotRead) {
  constexpr int64_t kFirst = 256, kSecond = 70;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const auto& [begin, own] : {std::pair(kFirst, kSecond), {int64_t{0}, kFirst}}) {
      const AttentionShape shape = {1, kFirst + kSecond, 2, 1, 32}, alone = {1, own, 2, 1, 32};
      Tensors packed(shape, dtype, 7), want(alone, dtype, 7);
      packed.first = testing::FirstOfDocuments(1, shape.seq, {kFirst, kSecond});
      testing::PlaceAmongNan(want.qkv, begin, packed.qkv);
      testing::PlaceAmongNan(want.dout, begin, packed.dout);
      RunOnDevice(shape, packed);
      RunOnDevice(alone, want);
      ExpectClose("out", packed.out.Rows(begin, own), want.out, Tolerance(alone, dtype, 1));
      ExpectClose("lse", packed.lse.Rows(begin, own), want.lse, Tolerance(alone, DType::kF32, 0));
      ExpectClose("dqkv", packed.dqkv.Rows(begin, own), want.dqkv, Tolerance(alone, dtype, 2));
    }
  }
}

TEST(AttentionOfDocuments, OneIsPlainCausalAttention) {
  const AttentionShape shape = {2, 70, 4, 2, 32};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Tensors plain(shape, dtype, 3), one(shape, dtype, 3);
    one.first = Zeros({shape.rows * shape.seq}, DType::kI32);
    RunOnDevice(shape, plain);
    RunOnDevice(shape, one);
    ExpectSameBits(one, plain);
  }
}

// Against the contract: the emulated device's memory is guarded, and every token still sees itself.
TEST(AttentionOfDocuments, WrongOnesReadNothingElse) {
  const AttentionShape shape = {2, 150, 2, 1, 16};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Tensors t(shape, dtype, 3);
    t.first = testing::RandomIds({shape.rows * shape.seq}, int64_t{1} << 32, 5);  // Of all bits.
    RunOnDevice(shape, t);
    for (const Tensor& result : {t.out, t.lse, t.dqkv}) {
      for (int64_t i = 0; i < result.elements(); ++i) ASSERT_TRUE(std::isfinite(Get(result, i))) << i;
    }
  }
}

TEST(DocumentStarts, OnTheDeviceAreThoseOfTheReference) {
  const std::unique_ptr<Stream> stream = TestStream();
  Stream host;
  // Ends are rare, so that documents pass the borders of warps and of a block's turns, or frequent.
  for (const auto& [rows, seq, ids] : {std::tuple(int64_t{0}, int64_t{3}, 4), {1, 1, 1}, {3, 257, 2}, {2, 1000, 4}, {3, 1000, 400}}) {
    const Tensor tokens = testing::RandomIds({rows, seq}, ids, 5), want = Empty({rows * seq}, DType::kI32);
    ref::DocumentStarts(tokens, 0, want, host);
    const Tensor first = Empty({rows * seq}, DType::kI32, *stream);
    DocumentStarts(ToDevice(tokens, *stream), 0, first, *stream);
    testing::ExpectSameBits(ToHost(first, *stream), want, "first");
  }
}

TEST(Attention, RepeatsBitForBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const AttentionShape shape = {2, 70, 4, 2, 32};
    Tensors first(shape, dtype, 3), second(shape, dtype, 3);
    RunOnDevice(shape, first);
    RunOnDevice(shape, second);
    ExpectSameBits(second, first);
  }
}

// Scores of some hundreds: the running maximum must keep every exponential in range. A score's error, 2^-24 of its size per term of its
// sum, becomes relative in the exponential.
TEST(Attention, LargeScoresStayFinite) {
  const AttentionShape shape = {1, 150, 2, 1, 16};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Tensors t(shape, dtype, 5);
    for (int64_t i = 0; i < t.qkv.elements(); ++i) Set(t.qkv, i, 12 * Get(t.qkv, i));
    ExpectLikeReference(shape, dtype, t, dtype == DType::kF32 ? 16 : 2);
  }
}

TEST(Attention, OddAddresses) {
  const AttentionShape shape = {1, 70, 2, 1, 16};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Tensors aligned(shape, dtype, 9), odd(shape, dtype, 9);
    RunOnDevice(shape, aligned);
    RunOnDevice(shape, odd, [](const Tensor& tensor, Stream& stream) { return testing::ToOddAddress(tensor, stream); });
    ExpectClose("out", odd.out, aligned.out, Tolerance(shape, dtype, 1));
    ExpectClose("dqkv", odd.dqkv, aligned.dqkv, Tolerance(shape, dtype, 1));
  }
}

TEST(Attention, NoRowsAndNoTokensAreAllowed) {
  for (const AttentionShape& shape : {AttentionShape{0, 4, 2, 1, 8}, AttentionShape{3, 0, 2, 1, 8}}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      Tensors t(shape, dtype, 1);
      RunOnDevice(shape, t);
    }
  }
}

}  // namespace
}  // namespace shoal::kernels
