#include "runtime/kernels/documents.h"

#include "runtime/kernels/testing.h"

namespace shoal::kernels {
namespace {
using namespace testing;  // NOLINT: the vocabulary of these tests.

std::vector<int32_t> StartsOf(std::vector<int32_t> ids, int64_t rows, int32_t end_of_document) {
  const int64_t tokens = static_cast<int64_t>(ids.size());
  const Tensor batch = Empty({rows, tokens / rows}, DType::kI32), first = Empty({tokens}, DType::kI32);
  std::copy(ids.begin(), ids.end(), batch.data<int32_t>());
  Stream stream;
  DocumentStarts(batch, end_of_document, first, stream);
  return {first.span<int32_t>().begin(), first.span<int32_t>().end()};
}

TEST(DocumentStarts, ADocumentEndsWithItsLastTokenAndASequenceBeginsOne) {
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(StartsOf({5, 9, 6, 7, 9, 8}, 1, 9), (Ids{0, 0, 2, 2, 2, 5}));
  EXPECT_EQ(StartsOf({9, 9, 9, 5}, 1, 9), (Ids{0, 1, 2, 3}));       // Documents of one token.
  EXPECT_EQ(StartsOf({5, 6, 7, 9, 6, 7, 9, 8}, 2, 9), (Ids{0, 0, 0, 0, 0, 0, 0, 3}));  // The end of a sequence is no token of the next.
  EXPECT_EQ(StartsOf({5, 6, 7}, 1, 9), (Ids{0, 0, 0}));
  EXPECT_EQ(StartsOf({0, 5}, 1, 0), (Ids{0, 1}));
}

TEST(DocumentStarts, MatchesTheReferenceWithAnyNumberOfThreads) {
  Stream stream;
  for (const auto& [rows, seq] : {std::pair(int64_t{0}, int64_t{3}), {1, 1}, {7, 33}, {40, 1000}}) {
    const Tensor tokens = RandomIds({rows, seq}, 9, /*seed=*/5), want = Empty({rows * seq}, DType::kI32);
    ref::DocumentStarts(tokens, 4, want, stream);
    for (const int threads : {1, 3}) {
      SetThreads(threads);
      const Tensor first = Empty({rows * seq}, DType::kI32);
      DocumentStarts(tokens, 4, first, stream);
      ExpectSameBits(first, want, "first");
    }
    SetThreads(1);
  }
}

}  // namespace
}  // namespace shoal::kernels
