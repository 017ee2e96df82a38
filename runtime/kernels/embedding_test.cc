#include "runtime/kernels/embedding.h"

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

struct Case {
  int64_t T, V, D;
};
const Case kCases[] = {{0, 3, 8}, {1, 1, 1}, {20, 5, 17}, {33, 256, 64}, {300, 7, 257}};

TEST(Embedding, LooksUpRows) {
  Stream stream;
  for (const Case& c : kCases) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      const Tensor table = Random({c.V, c.D}, dtype, 1), ids = RandomIds({c.T}, c.V, 2);
      const Tensor want = Empty({c.T, c.D}, DType::kF32);
      ref::Embedding(table, ids, want, stream);
      SweepLevels(
          [&]() -> std::vector<Tensor> {
            const Tensor out = Empty({c.T, c.D}, DType::kF32);
            Embedding(table, ids, out, stream);
            return {out};
          },
          [&](const std::vector<Tensor>& got) { ExpectSameBits(got[0], want, "out"); });
    }
  }
}

TEST(EmbeddingBackward, AddsTokensInAscendingOrder) {
  Stream stream;
  for (const Case& c : kCases) {
    const Tensor dout = Random({c.T, c.D}, DType::kF32, 1), ids = RandomIds({c.T}, c.V, 2);
    const Tensor before = Random({c.V, c.D}, DType::kF32, 3);
    // In f32 the reference rounds after each token, so that the order decides the bits.
    const Tensor want = Copy(before);
    ref::EmbeddingBackward(dout, ids, want, stream);
    SweepLevels(
        [&]() -> std::vector<Tensor> {
          const Tensor dtable = Copy(before);
          EmbeddingBackward(dout, ids, dtable, stream);
          return {dtable};
        },
        [&](const std::vector<Tensor>& got) { ExpectSameBits(got[0], want, "dtable"); });
  }
}

TEST(EmbeddingBackward, ReferenceMatchesFiniteDifferences) {
  Stream stream;
  const Tensor table = Random({3, 4}, DType::kF64, 1), ids = RandomIds({5}, 3, 2),
               dout = Random({5, 4}, DType::kF64, 3);
  const Tensor out = Empty({5, 4}, DType::kF64), dtable = Zeros({3, 4}, DType::kF64);
  ref::EmbeddingBackward(dout, ids, dtable, stream);
  CheckGradient(
      table, dtable,
      [&] {
        ref::Embedding(table, ids, out, stream);
        return Dot(out, dout);
      },
      "dtable");
}

TEST(EmbeddingDeathTest, RefusesAnIdOutsideTheTable) {
  Stream stream;
  const Tensor ids = Zeros({2}, DType::kI32);
  ids.data<int32_t>()[1] = 3;
  EXPECT_DEATH(Embedding(Zeros({3, 4}, DType::kF32), ids, Zeros({2, 4}, DType::kF32), stream),
               "ids\\[1\\] is 3");
}

}  // namespace
}  // namespace shoal::kernels
