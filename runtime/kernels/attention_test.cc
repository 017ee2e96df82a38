#include "runtime/kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "runtime/kernels/cpu/attention.h"
#include "runtime/kernels/ref/attention_f64.h"

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
  Tensor qkv, out, lse, dout, dqkv;
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

class AttentionTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > BestIsa()) GTEST_SKIP() << "this processor has no " << Name(GetParam());
  }
  void TearDown() override { SetThreads(1); }
  Stream stream_;
};
INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, testing::Values(Isa::kPlain, Isa::kAvx2, Isa::kAvx512),
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
        SCOPED_TRACE(testing::Message()
                     << Name(dtype) << " rows " << shape.rows << " seq " << shape.seq << " heads "
                     << shape.heads << "/" << shape.kv_heads << " dim " << shape.dim);
        SetThreads(threads);
        const Tensors actual(shape, dtype, 7);
        const Tensors expected(shape, dtype, 7);
        cpu::Attention(GetParam(), shape, actual.qkv, actual.out, actual.lse);
        ref::Attention(shape, expected.qkv, expected.out, expected.lse, stream_);
        ExpectClose("out", actual.out, expected.out, Tolerance(shape, dtype, 2));
        ExpectClose("lse", actual.lse, expected.lse, Tolerance(shape, DType::kF32, 0));
        cpu::AttentionBackward(GetParam(), shape, actual.qkv, actual.out, actual.lse, actual.dout,
                               actual.dqkv);
        ref::AttentionBackward(shape, expected.qkv, expected.out, expected.lse, expected.dout, expected.dqkv,
                               stream_);
        ExpectClose("dqkv", actual.dqkv, expected.dqkv, Tolerance(shape, dtype, 3));
      }
    }
  }
}

TEST_P(AttentionTest, BitsDoNotDependOnThreadsNorOnHowASequenceIsCutUp) {
  const AttentionShape shape = {1, 333, 4, 2,
                                24};  // Two (row, KV head) pairs: with more threads, sequences are cut.
  std::vector<Tensors> runs;
  for (const int threads : {1, 2, 3, 5, 2}) {
    SetThreads(threads);
    runs.emplace_back(shape, DType::kF32, 3);
    cpu::Attention(GetParam(), shape, runs.back().qkv, runs.back().out, runs.back().lse);
    cpu::AttentionBackward(GetParam(), shape, runs.back().qkv, runs.back().out, runs.back().lse,
                           runs.back().dout, runs.back().dqkv);
  }
  for (const Tensors& run : runs) {
    const auto same = [](const Tensor& a, const Tensor& b) {
      return std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0;
    };
    EXPECT_TRUE(same(run.out, runs[0].out));
    EXPECT_TRUE(same(run.lse, runs[0].lse));
    EXPECT_TRUE(same(run.dqkv, runs[0].dqkv));
  }
}

// Scores of +-1000: the running maximum must keep every exponential in range.
TEST_P(AttentionTest, LargeScoresStayFinite) {
  const AttentionShape shape = {1, 200, 2, 1, 16};
  const Tensors actual(shape, DType::kF32, 5);
  for (float& value : actual.qkv.span<float>()) value *= 20;
  const Tensors expected(shape, DType::kF32, 5);
  for (float& value : expected.qkv.span<float>()) value *= 20;
  cpu::Attention(GetParam(), shape, actual.qkv, actual.out, actual.lse);
  ref::Attention(shape, expected.qkv, expected.out, expected.lse, stream_);
  // A score's error, 2^-24 of about 1000 per term of its sum, becomes relative in the exponential.
  ExpectClose("out", actual.out, expected.out, 1000 * 16 * 0x1p-24);
  ExpectClose("lse", actual.lse, expected.lse, 16 * 0x1p-24);
}

TEST_P(AttentionTest, NoRowsAndNoTokensAreAllowed) {
  for (const AttentionShape& shape : {AttentionShape{0, 4, 2, 1, 8}, AttentionShape{3, 0, 2, 1, 8}}) {
    const Tensors t(shape, DType::kF32, 1);
    cpu::Attention(GetParam(), shape, t.qkv, t.out, t.lse);
    cpu::AttentionBackward(GetParam(), shape, t.qkv, t.out, t.lse, t.dout, t.dqkv);
  }
}

// Central differences in f64 err by about h^2 = 1e-10 and 1e-16 / h = 1e-11, relative to values around 1.
TEST(AttentionReference, BackwardIsTheDerivativeOfForward) {
  for (const AttentionShape& shape : {AttentionShape{2, 5, 4, 2, 3}, AttentionShape{1, 1, 1, 1, 1}}) {
    std::mt19937_64 random(11);
    std::normal_distribution<double> normal;
    std::vector<double> qkv(static_cast<size_t>(shape.rows * shape.seq * shape.qkv_width()));
    std::vector<double> dout(static_cast<size_t>(shape.rows * shape.seq * shape.q_width()));
    for (double& value : qkv) value = normal(random);
    for (double& value : dout) value = normal(random);
    const std::vector<double> gradient = ref::AttentionBackwardF64(shape, qkv, dout);
    const auto loss = [&] {
      const std::vector<double> out = ref::AttentionForwardF64(shape, qkv).out;
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

TEST(AttentionDeathTest, RefusesTensorsThatDoNotFit) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  Stream stream;
  const AttentionShape shape = {1, 4, 2, 1, 8};
  const Tensors t(shape, DType::kF32, 1);
  EXPECT_DEATH(Attention(shape, t.qkv, t.qkv, t.lse, stream), "out is f32\\[4, 32\\], wanted f32\\[4, 16\\]");
  AttentionShape odd = shape;
  odd.heads = 3;
  odd.kv_heads = 2;
  EXPECT_DEATH(Attention(odd, t.qkv, t.out, t.lse, stream), "3 heads on 2");
}

}  // namespace
}  // namespace shoal::kernels
