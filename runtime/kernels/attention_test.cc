#include "runtime/kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "runtime/kernels/cpu/attention.h"
#include "runtime/kernels/ref/attention_f64.h"
#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {

void FillNormal(const Tensor& tensor, double stddev, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, static_cast<float>(stddev));
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    if (tensor.dtype() == DType::kBF16) {
      tensor.data<BFloat16>()[i] = BFloat16(normal(random));
    } else {
      tensor.data<float>()[i] = normal(random);
    }
  }
}

double At(const Tensor& tensor, int64_t i) {
  return tensor.dtype() == DType::kBF16 ? static_cast<float>(tensor.data<BFloat16>()[i])
                                        : tensor.data<float>()[i];
}

struct Tensors {
  Tensor qkv, first, out, lse, dout, dqkv;
  Tensors(const AttentionShape& s, DType dtype, uint64_t seed)
      : qkv(Empty({s.rows * s.seq, s.qkv_width()}, dtype)),
        out(Empty({s.rows * s.seq, s.q_width()}, dtype)),
        lse(Empty({s.rows * s.seq, s.heads}, DType::kF32)),
        dout(Empty(out.shape(), dtype)),
        dqkv(Empty(qkv.shape(), dtype)) {
    FillNormal(qkv, 1, seed);
    FillNormal(dout, 1, seed + 1);
    for (const Tensor* output : {&out, &lse, &dqkv}) {  // NaN: nothing may be left unwritten.
      if (output->bytes() > 0) std::memset(output->raw(), 0xff, static_cast<size_t>(output->bytes()));
    }
  }
};

// Errors in units of the largest magnitude of the tensor. f32: sums of up to max(seq * group, dim) terms in
// some order, each term from a score whose own error (dim terms) the exponential turns into a relative one:
// (dim + terms) * 2^-24 bounds it for random data with room to spare. bf16: inputs are exact, so storing the
// result adds 2^-8 of its value; the backward pass reads `out` rounded to bf16, which enters every gradient
// through delta with 2^-8 more.
double Tolerance(const AttentionShape& s, DType dtype, int bf16_roundings) {
  const double terms = static_cast<double>(s.dim + s.seq * (s.heads / s.kv_heads));
  return 8 * terms * 0x1p-24 + (dtype == DType::kBF16 ? bf16_roundings * 0x1p-8 : 0.0);
}

void ExpectClose(const char* what, const Tensor& actual, const Tensor& expected, double tolerance) {
  double largest = 0;
  for (int64_t i = 0; i < expected.elements(); ++i) largest = std::max(largest, std::abs(At(expected, i)));
  for (int64_t i = 0; i < actual.elements(); ++i) {
    // Written so that NaN fails.
    ASSERT_TRUE(std::abs(At(actual, i) - At(expected, i)) <= tolerance * largest)
        << what << " element " << i << ": " << At(actual, i) << " against " << At(expected, i)
        << ", tolerance " << tolerance * largest;
  }
}

Isa BestIsa() { return ActiveIsa(); }

void RunOnCpu(Isa isa, const AttentionShape& shape, const Tensors& t) {
  cpu::Attention(isa, shape, t.qkv, t.first, t.out, t.lse);
  cpu::AttentionBackward(isa, shape, t.qkv, t.first, t.out, t.lse, t.dout, t.dqkv);
}

void ExpectLikeReference(Isa isa, const AttentionShape& shape, DType dtype, const Tensors& actual) {
  Stream stream;
  Tensors expected(shape, dtype, 1);
  expected.qkv = actual.qkv, expected.first = actual.first, expected.dout = actual.dout;
  ref::Attention(shape, expected.qkv, expected.first, expected.out, expected.lse, stream);
  ref::AttentionBackward(shape, expected.qkv, expected.first, expected.out, expected.lse, expected.dout,
                         expected.dqkv, stream);
  RunOnCpu(isa, shape, actual);
  ExpectClose("out", actual.out, expected.out, Tolerance(shape, dtype, 2));
  ExpectClose("lse", actual.lse, expected.lse, Tolerance(shape, DType::kF32, 0));
  ExpectClose("dqkv", actual.dqkv, expected.dqkv, Tolerance(shape, dtype, 3));
}

void ExpectSameBits(const Tensors& a, const Tensors& b) {
  testing::ExpectSameBits(a.out, b.out, "out");
  testing::ExpectSameBits(a.lse, b.lse, "lse");
  testing::ExpectSameBits(a.dqkv, b.dqkv, "dqkv");
}

class AttentionTest : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > BestIsa()) GTEST_SKIP() << "this processor has no " << Name(GetParam());
  }
  void TearDown() override { SetThreads(1); }
  Stream stream_;
};
INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, ::testing::Values(Isa::kPlain, Isa::kAvx2, Isa::kAvx512),
                         [](const auto& info) { return std::string(Name(info.param)); });

// {rows, seq, heads, kv_heads, dim}: one token, odd sizes, both sides of the block sizes 48 and 64, grouped
// heads, heads wider than a tile, and one the tests' models have.
const AttentionShape kShapes[] = {
    {1, 1, 1, 1, 1},    {1, 1, 4, 2, 8},     {2, 5, 3, 1, 3},    {3, 47, 2, 2, 16},
    {1, 48, 2, 1, 17},  {1, 49, 1, 1, 64},   {2, 64, 4, 2, 32},  {1, 65, 6, 2, 20},
    {1, 130, 2, 1, 80}, {1, 193, 2, 2, 100}, {1, 300, 8, 4, 32}, {1, 97, 1, 1, 160},
};

TEST_P(AttentionTest, ForwardAndBackwardMatchTheReference) {
  for (const AttentionShape& shape : kShapes) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const int threads : {1, 2}) {
        SCOPED_TRACE(::testing::Message()
                     << Name(dtype) << " rows " << shape.rows << " seq " << shape.seq << " heads "
                     << shape.heads << "/" << shape.kv_heads << " dim " << shape.dim);
        SetThreads(threads);
        Tensors t(shape, dtype, 7);
        ExpectLikeReference(GetParam(), shape, dtype, t);
        t.first = testing::RandomFirst(shape.rows, shape.seq, /*seed=*/shape.seq);
        ExpectLikeReference(GetParam(), shape, dtype, t);
      }
    }
  }
}

// Lengths around those of blocks, so that documents begin and end at their borders and beside them; threads cut sequences up.
TEST_P(AttentionTest, DocumentsOfAllLengthsMatchTheReference) {
  const std::vector<std::vector<int64_t>> lengths = {
      {1}, {2, 1}, {48}, {64}, {47, 49, 1}, {63, 65}, {192, 1, 1}, {1, 191}, {400}, {100, 3, 150}};
  for (const AttentionShape& shape : {AttentionShape{2, 400, 2, 1, 16}, AttentionShape{1, 333, 4, 2, 20}}) {
    for (const std::vector<int64_t>& documents : lengths) {
      for (const int threads : {1, 3}) {
        SCOPED_TRACE(::testing::Message() << documents.front() << " " << documents.back() << " of " << shape.seq);
        SetThreads(threads);
        Tensors t(shape, DType::kF32, 7);
        t.first = testing::FirstOfDocuments(shape.rows, shape.seq, documents);
        ExpectLikeReference(GetParam(), shape, DType::kF32, t);
      }
    }
  }
}

// The first document is as long as several blocks of all kinds; one of the two is full of NaN.
TEST_P(AttentionTest, BlocksOfOtherDocumentsAreNotRead) {
  constexpr int64_t kFirst = 384, kSecond = 100;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const auto& [begin, own] : {std::pair(kFirst, kSecond), {int64_t{0}, kFirst}}) {
      for (const int threads : {1, 3}) {
        SetThreads(threads);
        const AttentionShape shape = {1, kFirst + kSecond, 4, 2, 16}, alone = {1, own, 4, 2, 16};
        Tensors packed(shape, dtype, 7), want(alone, dtype, 7);
        packed.first = testing::FirstOfDocuments(1, shape.seq, {kFirst, kSecond});
        testing::PlaceAmongNan(want.qkv, begin, packed.qkv);
        testing::PlaceAmongNan(want.dout, begin, packed.dout);
        RunOnCpu(GetParam(), shape, packed);
        RunOnCpu(GetParam(), alone, want);
        ExpectClose("out", packed.out.Rows(begin, own), want.out, Tolerance(alone, dtype, 1));
        ExpectClose("lse", packed.lse.Rows(begin, own), want.lse, Tolerance(alone, DType::kF32, 0));
        ExpectClose("dqkv", packed.dqkv.Rows(begin, own), want.dqkv, Tolerance(alone, dtype, 2));
      }
    }
  }
}

TEST_P(AttentionTest, OneDocumentIsPlainCausalAttention) {
  const AttentionShape shape = {2, 150, 4, 2, 24};
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Tensors plain(shape, dtype, 3), one(shape, dtype, 3);
    one.first = Zeros({shape.rows * shape.seq}, DType::kI32);
    RunOnCpu(GetParam(), shape, plain);
    RunOnCpu(GetParam(), shape, one);
    ExpectSameBits(one, plain);
  }
}

TEST_P(AttentionTest, BitsDoNotDependOnThreadsNorOnHowASequenceIsCutUp) {
  const AttentionShape shape = {1, 333, 4, 2,
                                24};  // Two (row, KV head) pairs: with more threads, sequences are cut.
  for (const bool documents : {false, true}) {
    std::vector<Tensors> runs;
    for (const int threads : {1, 2, 3, 5, 2}) {
      SetThreads(threads);
      runs.emplace_back(shape, DType::kF32, 3);
      if (documents) runs.back().first = testing::FirstOfDocuments(1, shape.seq, {40, 1, 170});
      RunOnCpu(GetParam(), shape, runs.back());
    }
    for (const Tensors& run : runs) ExpectSameBits(run, runs[0]);
  }
}

// Scores of +-1000: the running maximum must keep every exponential in range.
TEST_P(AttentionTest, LargeScoresStayFinite) {
  const AttentionShape shape = {1, 200, 2, 1, 16};
  const Tensors actual(shape, DType::kF32, 5);
  for (float& value : actual.qkv.span<float>()) value *= 20;
  const Tensors expected(shape, DType::kF32, 5);
  for (float& value : expected.qkv.span<float>()) value *= 20;
  cpu::Attention(GetParam(), shape, actual.qkv, actual.first, actual.out, actual.lse);
  ref::Attention(shape, expected.qkv, expected.first, expected.out, expected.lse, stream_);
  // A score's error, 2^-24 of about 1000 per term of its sum, becomes relative in the exponential.
  ExpectClose("out", actual.out, expected.out, 1000 * 16 * 0x1p-24);
  ExpectClose("lse", actual.lse, expected.lse, 16 * 0x1p-24);
}

TEST_P(AttentionTest, NoRowsAndNoTokensAreAllowed) {
  for (const AttentionShape& shape : {AttentionShape{0, 4, 2, 1, 8}, AttentionShape{3, 0, 2, 1, 8}}) {
    RunOnCpu(GetParam(), shape, Tensors(shape, DType::kF32, 1));
  }
}

std::vector<double> Normal(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = normal(random);
  return values;
}

// Central differences in f64 err by about h^2 = 1e-10 and 1e-16 / h = 1e-11, relative to values around 1.
TEST(AttentionReference, BackwardIsTheDerivativeOfForward) {
  for (const AttentionShape& shape : {AttentionShape{2, 5, 4, 2, 3}, AttentionShape{1, 1, 1, 1, 1}}) {
    std::vector<double> qkv = Normal(shape.rows * shape.seq * shape.qkv_width(), 11);
    const std::vector<double> dout = Normal(shape.rows * shape.seq * shape.q_width(), 12);
    for (const Tensor& first : {Tensor(), testing::FirstOfDocuments(shape.rows, shape.seq, {2, 1})}) {
      const absl::Span<const int32_t> firsts = first.empty() ? absl::Span<int32_t>() : first.span<int32_t>();
      const std::vector<double> gradient = ref::AttentionBackwardF64(shape, qkv, firsts, dout);
      const auto loss = [&] {
        const std::vector<double> out = ref::AttentionForwardF64(shape, qkv, firsts).out;
        double sum = 0;
        for (size_t i = 0; i < out.size(); ++i) sum += out[i] * dout[i];
        return sum;
      };
      constexpr double kStep = 1e-5;
      for (size_t i = 0; i < qkv.size(); ++i) {
        const double value = qkv[i];
        qkv[i] = value + kStep;
        const double above = loss();
        qkv[i] = value - kStep;
        const double below = loss();
        qkv[i] = value;
        ASSERT_NEAR(gradient[i], (above - below) / (2 * kStep), 1e-8) << "element " << i;
      }
    }
  }
}

// out by the definition: a whole matrix of scores, those of other documents and of later tokens minus infinity.
std::vector<double> BruteForce(const AttentionShape& s, const std::vector<double>& qkv, const std::vector<int>& document) {
  std::vector<double> out(static_cast<size_t>(s.rows * s.seq * s.q_width()));
  const int group = s.heads / s.kv_heads;
  const auto at = [&](int64_t token, int64_t column) { return qkv[static_cast<size_t>(token * s.qkv_width() + column)]; };
  for (int64_t query = 0; query < s.rows * s.seq; ++query) {
    for (int head = 0; head < s.heads; ++head) {
      std::vector<double> weights(static_cast<size_t>(s.rows * s.seq));
      double all = 0;
      for (int64_t key = 0; key < s.rows * s.seq; ++key) {
        const bool seen = key <= query && key / s.seq == query / s.seq &&
                          document[static_cast<size_t>(key)] == document[static_cast<size_t>(query)];
        double score = 0;
        for (int i = 0; i < s.dim; ++i) score += at(query, head * s.dim + i) * at(key, s.q_width() + head / group * s.dim + i);
        weights[static_cast<size_t>(key)] = seen ? std::exp(score / std::sqrt(s.dim)) : 0;
        all += weights[static_cast<size_t>(key)];
      }
      for (int64_t key = 0; key < s.rows * s.seq; ++key) {
        for (int i = 0; i < s.dim; ++i) {
          out[static_cast<size_t>(query * s.q_width() + head * s.dim + i)] +=
              weights[static_cast<size_t>(key)] / all * at(key, s.q_width() + s.kv_width() + head / group * s.dim + i);
        }
      }
    }
  }
  return out;
}

// And each document is as if it were a sequence of its own, gradients included.
TEST(AttentionReference, DocumentsAreThoseOfBruteForceAndOfEachAlone) {
  for (const uint64_t seed : {1, 2, 3, 4, 5}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const AttentionShape shape = {2, 17, 4, 2, 5};
    const int64_t tokens = shape.rows * shape.seq;
    std::vector<int> document(static_cast<size_t>(tokens));
    for (int64_t token = 0; token < tokens; ++token) {
      const bool begins = token % shape.seq == 0 || random() % 4 < (token < shape.seq ? 1 : 3);
      document[static_cast<size_t>(token)] = token == 0 ? 0 : document[static_cast<size_t>(token - 1)] + (begins ? 1 : 0);
    }
    std::vector<int32_t> first(static_cast<size_t>(tokens));
    for (int64_t token = 0; token < tokens; ++token) {
      const auto begin = std::find(document.begin(), document.end(), document[static_cast<size_t>(token)]);
      first[static_cast<size_t>(token)] = static_cast<int32_t>((begin - document.begin()) % shape.seq);
    }
    const std::vector<double> qkv = Normal(tokens * shape.qkv_width(), seed), dout = Normal(tokens * shape.q_width(), seed + 1);
    const std::vector<double> out = ref::AttentionForwardF64(shape, qkv, first).out, brute = BruteForce(shape, qkv, document);
    const std::vector<double> dqkv = ref::AttentionBackwardF64(shape, qkv, first, dout);
    for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], brute[i], 1e-12) << i;
    for (int64_t begin = 0, end = 0; begin < tokens; begin = end) {
      while (end < tokens && document[static_cast<size_t>(end)] == document[static_cast<size_t>(begin)]) ++end;
      AttentionShape alone = shape;
      alone.rows = 1, alone.seq = end - begin;
      const auto part = [&](const std::vector<double>& all, int64_t width) {
        return std::vector<double>(all.begin() + begin * width, all.begin() + end * width);
      };
      const auto expect = [&](const std::vector<double>& got, const std::vector<double>& want) {
        for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-12) << "document at " << begin << " element " << i;
      };
      const std::vector<double> own = part(qkv, shape.qkv_width());
      expect(part(out, shape.q_width()), ref::AttentionForwardF64(alone, own, {}).out);
      expect(part(dqkv, shape.qkv_width()), ref::AttentionBackwardF64(alone, own, {}, part(dout, shape.q_width())));
    }
  }
}

TEST(AttentionDeathTest, RefusesTensorsThatDoNotFit) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  Stream stream;
  const AttentionShape shape = {1, 4, 2, 1, 8};
  const Tensors t(shape, DType::kF32, 1);
  EXPECT_DEATH(Attention(shape, t.qkv, t.first, t.qkv, t.lse, stream), "out is f32\\[4, 32\\], wanted f32\\[4, 16\\]");
  EXPECT_DEATH(Attention(shape, t.qkv, t.lse, t.out, t.lse, stream), "first is f32\\[4, 2\\], wanted i32\\[4\\]");
  const Tensor later = Zeros({4}, DType::kI32), falling = Zeros({4}, DType::kI32);
  later.data<int32_t>()[2] = 3;
  falling.data<int32_t>()[1] = 1;
  EXPECT_DEATH(Attention(shape, t.qkv, later, t.out, t.lse, stream), "token 2 of sequence 0 sees tokens from 3 on, wanted 0 to 2");
  EXPECT_DEATH(AttentionBackward(shape, t.qkv, falling, t.out, t.lse, t.dout, t.dqkv, stream),
               "token 2 of sequence 0 sees tokens from 0 on, wanted 1 to 2");
  AttentionShape odd = shape;
  odd.heads = 3;
  odd.kv_heads = 2;
  EXPECT_DEATH(Attention(odd, t.qkv, t.first, t.out, t.lse, stream), "3 heads on 2");
}

}  // namespace
}  // namespace shoal::kernels
