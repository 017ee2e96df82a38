#include "models/layers/projection.h"

#include <cstring>

#include "collectives/communicator.h"
#include "gtest/gtest.h"
#include "models/model_config.h"
#include "runtime/kernels/swiglu.h"
#include "runtime/kernels/testing.h"

namespace shoal {
namespace {

using kernels::Accumulate;
using kernels::Fp8Weights;
using kernels::Products;
using kernels::testing::ExpectSameBits;
using kernels::testing::Random;

constexpr int64_t kWidth = 64, kTokens = 20;

// A store with one layer of two experts, in bf16.
class Fixture {
 public:
  explicit Fixture(Products products, DensePolicy dense = DensePolicy::kReplicated, ExpertPolicy experts = ExpertPolicy::kKeep) {
    ModelConfig config;
    config.hidden_size = kWidth;
    config.intermediate_size = 40;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.num_local_experts = 2;
    config.vocab_size = 50;
    world_ = *ConnectWorld({});
    store = *ParameterStore::Create(ParameterSpecs(config), {GroupedPlacement(1, 2, 1, 1)[0]}, *world_,
                                    {.compute = DType::kBF16, .dense = dense, .experts = experts, .products = products});
    SetWeights(1);
  }
  // Other random weights.
  void SetWeights(uint64_t seed) {
    store->InitializeOwned(seed, 0.1, stream);
    EXPECT_TRUE(store->GatherWeights(stream).ok());
  }
  Tensor Weight() const { return store->Weight(kName, {kWidth, kWidth}); }
  Projection MakeProjection() const { return Projection(kName, {kWidth, kWidth}, *store); }
  Tensor Forward(Projection& projection, const Tensor& x) {
    const Tensor y = Empty({kTokens, kWidth}, DType::kBF16);
    projection.Forward(x, Tensor(), y, stream);
    return y;
  }
  // By the kernels, of the weights as they are now.
  Tensor Want(const Tensor& x) {
    Fp8Weights weights;
    kernels::QuantiseWeights({Weight()}, &weights, stream);
    const Tensor y = Empty({kTokens, kWidth}, DType::kBF16);
    kernels::MatMul(x, weights, Tensor(), y, stream);
    return y;
  }

  static constexpr char kName[] = "model.layers.0.self_attn.o_proj.weight";
  Stream stream;
  std::unique_ptr<ParameterStore> store;

 private:
  std::unique_ptr<Communicator> world_;
};

bool SameBits(const Tensor& a, const Tensor& b) { return std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0; }

TEST(Projection, MultipliesWeightsAsTheyAreUnlessProductsAreInFp8) {
  Fixture same(Products::kSame), fp8(Products::kFp8);
  const Tensor x = Random({kTokens, kWidth}, DType::kBF16, 1), want = Empty({kTokens, kWidth}, DType::kBF16);
  kernels::MatMul(x, kernels::Transpose::kNo, same.Weight(), kernels::Transpose::kYes, Accumulate::kOverwrite, want, same.stream);
  Projection plain = same.MakeProjection(), quantised = fp8.MakeProjection();
  ExpectSameBits(same.Forward(plain, x), want, "same");
  ExpectSameBits(fp8.Forward(quantised, x), fp8.Want(x), "fp8");
  EXPECT_FALSE(SameBits(want, fp8.Want(x)));
}

TEST(Projection, ResidualsAreAddedAndGradientsOfWeightsAreNotQuantised) {
  Fixture same(Products::kSame), fp8(Products::kFp8);
  const Tensor x = Random({kTokens, kWidth}, DType::kBF16, 1), dy = Random({kTokens, kWidth}, DType::kBF16, 2);
  for (Fixture* fixture : {&same, &fp8}) {
    Projection projection = fixture->MakeProjection();
    const Tensor residual = Random({kTokens, kWidth}, DType::kF32, 3), out = Empty(residual.shape(), DType::kF32);
    const Tensor sum = kernels::testing::Copy(residual), zero = Zeros(residual.shape(), DType::kF32);
    projection.Forward(x, residual, out, fixture->stream);
    projection.Forward(x, sum, sum, fixture->stream);
    projection.Forward(x, Tensor(), zero, fixture->stream);
    ExpectSameBits(out, sum, "in place");
    for (int64_t i = 0; i < out.elements(); ++i) {
      ASSERT_NEAR(out.data<float>()[i], residual.data<float>()[i] + zero.data<float>()[i], 1e-5);
    }
    projection.BackwardWeight(dy, x, Accumulate::kOverwrite, fixture->stream);
  }
  ExpectSameBits(fp8.store->Gradient(Fixture::kName, {kWidth, kWidth}), same.store->Gradient(Fixture::kName, {kWidth, kWidth}), "dw");
}

TEST(Projection, WeightsAreQuantisedOnceAPassAndAnewInTheNext) {
  Fixture fixture(Products::kFp8);
  const Tensor x = Random({kTokens, kWidth}, DType::kBF16, 1);
  Projection projection = fixture.MakeProjection();
  fixture.store->BeginPass();
  const Tensor before = fixture.Forward(projection, x);
  fixture.SetWeights(2);
  ExpectSameBits(fixture.Forward(projection, x), before, "the same pass");
  fixture.store->BeginPass();
  const Tensor after = fixture.Forward(projection, x);
  ExpectSameBits(after, fixture.Want(x), "the next pass");
  EXPECT_FALSE(SameBits(after, before));
}

TEST(Projection, QuantisedWeightsAreNotKeptWhereTheStoreKeepsNone) {
  Fixture fixture(Products::kFp8, DensePolicy::kSharded, ExpertPolicy::kRematerialise);
  const Tensor x = Random({kTokens, kWidth}, DType::kBF16, 1);
  Projection projection = fixture.MakeProjection();
  (void)fixture.Forward(projection, x);
  fixture.SetWeights(2);
  ExpectSameBits(fixture.Forward(projection, x), fixture.Want(x), "the same pass");
}

TEST(Projection, WithASwiGluItIsBothOneAfterTheOther) {
  const Tensor x = Random({kTokens, kWidth}, DType::kBF16, 1), want_h = Empty({kTokens, kWidth / 2}, DType::kBF16);
  for (const Products products : {Products::kSame, Products::kFp8}) {
    Fixture fixture(products);
    Projection projection = fixture.MakeProjection();
    const Tensor gate_up = Empty({kTokens, kWidth}, DType::kBF16), h = Empty(want_h.shape(), DType::kBF16);
    projection.ForwardSwiGlu(x, gate_up, h, fixture.stream);
    ExpectSameBits(gate_up, fixture.Forward(projection, x), "gate_up");
    kernels::SwiGlu(gate_up, want_h, fixture.stream);
    ExpectSameBits(h, want_h, "h");
  }
}

TEST(KeptMatrixList, IsMadeAnewWhenMatricesAreElsewhere) {
  Stream stream;
  KeptMatrixList kept;
  const std::vector<Tensor> some = {Zeros({2, 3}, DType::kF32), Zeros({2, 3}, DType::kF32)}, fewer = {some[1]};
  const auto addresses = [](const Tensor& list) {
    return std::vector<int64_t>(list.span<int64_t>().begin(), list.span<int64_t>().end());
  };
  const auto of = [](const Tensor& matrix) { return reinterpret_cast<int64_t>(matrix.raw()); };
  const Tensor first = kept.Of(some, stream);
  EXPECT_EQ(addresses(first), (std::vector<int64_t>{of(some[0]), of(some[1])}));
  EXPECT_EQ(kept.Of(some, stream).raw(), first.raw());
  EXPECT_EQ(addresses(kept.Of(fewer, stream)), std::vector<int64_t>{of(some[1])});
  EXPECT_EQ(addresses(kept.Of(some, stream)), addresses(first));
}

TEST(ExpertProjection, IsTheGroupedProductOfWhatIsWanted) {
  const Tensor x = Random({kTokens, kWidth}, DType::kBF16, 1), dy = Random({kTokens, 40}, DType::kBF16, 2);
  const std::vector<Tensor> weights = {Random({40, kWidth}, DType::kBF16, 3), Random({40, kWidth}, DType::kBF16, 4)};
  const std::vector<kernels::Segment> segments = {{1, 0, 8}, {0, 8, 12}};
  for (const Products products : {Products::kSame, Products::kFp8}) {
    Fixture fixture(products);
    ExpertProjection projection(*fixture.store);
    const Tensor y = Empty({kTokens, 40}, DType::kBF16), dx = Empty({kTokens, kWidth}, DType::kBF16);
    const Tensor want_y = Empty(y.shape(), DType::kBF16), want_dx = Empty(dx.shape(), DType::kBF16);
    if (products == Products::kSame) {
      kernels::GroupedMatMul(x, weights, segments, want_y, fixture.stream);
      kernels::GroupedMatMulGradInput(dy, weights, segments, want_dx, fixture.stream);
    } else {
      Fp8Weights quantised;
      kernels::QuantiseWeights(weights, &quantised, fixture.stream);
      kernels::GroupedMatMul(x, quantised, segments, want_y, fixture.stream);
      kernels::GroupedMatMulGradInput(dy, quantised, segments, want_dx, fixture.stream);
    }
    projection.Forward(x, weights, segments, y, fixture.stream, Numerics::kFast);
    projection.BackwardInput(dy, weights, segments, dx, fixture.stream, Numerics::kFast);
    ExpectSameBits(y, want_y, "y");
    ExpectSameBits(dx, want_dx, "dx");
    const Tensor h = Empty({kTokens, 20}, DType::kBF16), want_h = Empty(h.shape(), DType::kBF16);
    kernels::SwiGlu(want_y, want_h, fixture.stream);
    for (const bool listed : {false, true}) {
      const Tensor gate_up = Empty(y.shape(), DType::kBF16);
      if (listed) {
        projection.ForwardSwiGlu(x, weights, kernels::SegmentList(segments, fixture.stream), gate_up, h, fixture.stream);
      } else {
        projection.ForwardSwiGlu(x, weights, segments, gate_up, h, fixture.stream, Numerics::kFast);
      }
      ExpectSameBits(gate_up, want_y, "gate_up");
      ExpectSameBits(h, want_h, "h");
    }
    projection.Forward(x, weights, kernels::SegmentList(segments, fixture.stream), y, fixture.stream);
    projection.BackwardInput(dy, weights, kernels::SegmentList(segments, fixture.stream), dx, fixture.stream);
    ExpectSameBits(y, want_y, "y by a list");
    ExpectSameBits(dx, want_dx, "dx by a list");
  }
}

}  // namespace
}  // namespace shoal
