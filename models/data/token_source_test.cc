#include "models/data/token_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "models/data/testing.h"
#include "models/tokenizer/byte_tokenizer.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<int32_t> Ids(const TokenSource& source, int64_t offset, int64_t count) {
  std::vector<int32_t> ids(count);
  SHOAL_CHECK_OK(source.Read(offset, absl::MakeSpan(ids)));
  return ids;
}

TEST(ByteTokenizer, GivesBackAnyText) {
  std::string text;
  for (int byte = 0; byte < 256; ++byte) text.push_back(static_cast<char>(byte));
  std::vector<int32_t> ids;
  EncodeBytes(text, &ids);
  EXPECT_EQ(ids.size(), 256u);
  EXPECT_EQ(ids[200], 200);
  EXPECT_EQ(DecodeBytes(ids).value(), text);
  EXPECT_EQ(DecodeBytes({65, 256}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DecodeBytes({-1}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TokenSource, TextIsItsBytesAtAnyPlace) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "t.txt.zst", testing::Zstd("ab\xff\n"));
  const TokenSourcePtr source = OpenText(dir / "t.txt.zst").value();
  EXPECT_EQ(source->size(), 4);
  EXPECT_EQ(source->vocabulary_bound(), 256);
  EXPECT_THAT(Ids(*source, 0, 4), ElementsAre('a', 'b', 255, '\n'));
  EXPECT_THAT(Ids(*source, 2, 1), ElementsAre(255));
  EXPECT_THAT(Ids(*source, 4, 0), ElementsAre());
}

TEST(TokenSource, ASliceShiftsPositions) {
  const TokenSourcePtr slice = Slice(std::make_shared<testing::CountingTokens>(100), 30, 20);
  EXPECT_EQ(slice->size(), 20);
  EXPECT_THAT(Ids(*slice, 18, 2), ElementsAre(48, 49));
  EXPECT_EQ(Slice(slice, 20, 0)->size(), 0);
}

TEST(TokenSourceDeathTest, ReadingPastASliceIsOurOwnMistake) {
  const TokenSourcePtr slice = Slice(std::make_shared<testing::CountingTokens>(100), 30, 20);
  EXPECT_DEATH(Ids(*slice, 19, 2), "tokens 19\\+2 of 20");
  EXPECT_DEATH(Slice(slice, 1, 20), "tokens 1\\+20 of 20");
}

TEST(TokenSource, RandomTokensDependOnSeedAndPlaceAlone) {
  const TokenSourcePtr a = RandomTokens(1, 1000, 1 << 20);
  const std::vector<int32_t> all = Ids(*a, 5000, 1000);
  EXPECT_EQ(Ids(*RandomTokens(1, 1000, 1 << 30), 5000, 1000), all);
  EXPECT_EQ(Ids(*a, 5500, 500), std::vector<int32_t>(all.begin() + 500, all.end()));
  EXPECT_NE(Ids(*RandomTokens(2, 1000, 1 << 20), 5000, 1000), all);
}

TEST(TokenSource, RandomTokensCoverTheVocabularyEvenly) {
  constexpr int64_t kVocabulary = 7;
  std::vector<int> counts(kVocabulary);
  for (const int32_t id : Ids(*RandomTokens(3, kVocabulary, 70000), 0, 70000)) ++counts.at(id);
  for (const int count : counts) EXPECT_NEAR(count, 10000, 500);  // Five standard deviations.
}

TEST(TokenSource, CheckVocabularyNamesTokenAndPlace) {
  const TokenSourcePtr source = std::make_shared<testing::CountingTokens>(100);
  EXPECT_EQ(CheckVocabulary(source, 100, "count"), source);
  const TokenSourcePtr checked = CheckVocabulary(source, 50, "count");
  EXPECT_EQ(checked->vocabulary_bound(), 50);
  EXPECT_THAT(Ids(*checked, 48, 2), ElementsAre(48, 49));
  std::vector<int32_t> ids(10);
  const absl::Status status = checked->Read(45, absl::MakeSpan(ids));
  EXPECT_EQ(status, absl::InvalidArgumentError("count: token 50 at 50 does not fit a vocabulary of 50"));
}

}  // namespace
}  // namespace shoal
