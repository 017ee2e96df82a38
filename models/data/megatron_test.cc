#include "models/data/megatron.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "models/data/random.h"
#include "models/data/token_source.h"
#include "runtime/base/check.h"
#include "runtime/files/file.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Bytes(const std::vector<int>& bytes) { return {bytes.begin(), bytes.end()}; }

// The documents {1, 2, 3}, {} and {500}, as bytes written by hand from the format's description.
std::string GoldenIndex() {
  return Bytes(
      {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0,                         // Magic.
       1,   0,   0,   0,   0,   0,   0,   0,                            // Version.
       8,                                                               // u16.
       3,   0,   0,   0,   0,   0,   0,   0,                            // Sequences.
       4,   0,   0,   0,   0,   0,   0,   0,                            // Document boundaries.
       3,   0,   0,   0,   0,   0,   0,   0, 1, 0, 0, 0,                // Lengths.
       0,   0,   0,   0,   0,   0,   0,   0,                            // Byte offsets.
       6,   0,   0,   0,   0,   0,   0,   0,                            //
       6,   0,   0,   0,   0,   0,   0,   0,                            //
       0,   0,   0,   0,   0,   0,   0,   0, 1, 0, 0, 0, 0, 0, 0, 0,    // First sequence of each document,
       2,   0,   0,   0,   0,   0,   0,   0, 3, 0, 0, 0, 0, 0, 0, 0});  // and the end.
}
std::string GoldenTokens() { return Bytes({1, 0, 2, 0, 3, 0, 0xf4, 1}); }

std::vector<int32_t> AllIds(const TokenSource& source) {
  std::vector<int32_t> ids(source.size());
  SHOAL_CHECK_OK(source.Read(0, absl::MakeSpan(ids)));
  return ids;
}

TEST(MegatronWriter, WritesTheFormatByteForByte) {
  const testing::TempDir dir;
  const auto writer = MegatronWriter::Create(dir / "p", 501).value();
  for (const std::vector<int32_t>& document : {std::vector<int32_t>{1, 2, 3}, {}, {500}}) {
    SHOAL_CHECK_OK(writer->AddDocument(document));
  }
  SHOAL_CHECK_OK(writer->Finish());
  EXPECT_EQ(writer->documents(), 3);
  EXPECT_EQ(writer->tokens(), 4);
  EXPECT_EQ(testing::ReadFile(dir / "p.idx"), GoldenIndex());
  EXPECT_EQ(testing::ReadFile(dir / "p.bin"), GoldenTokens());
}

TEST(MegatronWriter, TakesMegatronsTypeForTheVocabulary) {
  EXPECT_EQ(MegatronTypeFor(256), MegatronType::kU16);
  EXPECT_EQ(MegatronTypeFor(65499), MegatronType::kU16);
  EXPECT_EQ(MegatronTypeFor(65500), MegatronType::kI32);
}

TEST(MegatronWriter, LongDocumentsRoundTripInBothTypes) {
  for (const int64_t vocab_size : {65499, 70000}) {
    const testing::TempDir dir;
    const auto writer = MegatronWriter::Create(dir / "p", vocab_size).value();
    std::vector<int32_t> all;
    for (uint64_t document = 0; document < 40; ++document) {
      std::vector<int32_t> ids(SplitMix64(9, document) % 60000);
      for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int32_t>(SplitMix64(document, i) % static_cast<uint64_t>(vocab_size));
      }
      SHOAL_CHECK_OK(writer->AddDocument(ids));
      all.insert(all.end(), ids.begin(), ids.end());
    }
    SHOAL_CHECK_OK(writer->Finish());
    const TokenSourcePtr source = OpenMegatron(dir / "p").value();
    EXPECT_TRUE(AllIds(*source) == all) << vocab_size;
    const MegatronIndex index = ReadMegatronIndex(dir / "p.idx").value();
    EXPECT_EQ(index.type, MegatronTypeFor(vocab_size));
    EXPECT_EQ(index.sequence_lengths.size(), 40u);
    EXPECT_EQ(index.document_starts.size(), 41u);
    std::vector<int32_t> two(2);
    SHOAL_CHECK_OK(source->Read(777, absl::MakeSpan(two)));
    EXPECT_THAT(two, ElementsAre(all[777], all[778]));
  }
}

TEST(MegatronWriter, NamesATokenOutsideTheVocabulary) {
  const testing::TempDir dir;
  const auto writer = MegatronWriter::Create(dir / "p", 256).value();
  SHOAL_CHECK_OK(writer->AddDocument({1}));
  EXPECT_EQ(writer->AddDocument({1, 256}),
            absl::InvalidArgumentError("document 1: token 256 at 1 does not fit a vocabulary of 256"));
  EXPECT_FALSE(MegatronWriter::Create(dir / "p", 256).value()->AddDocument({-1}).ok());
}

TEST(MegatronWriter, LeavesTheOldPairAloneUntilFinish) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "p.idx", GoldenIndex());
  testing::WriteFile(dir / "p.bin", GoldenTokens());
  {
    const auto writer = MegatronWriter::Create(dir / "p", 256).value();
    SHOAL_CHECK_OK(writer->AddDocument({7}));
  }
  EXPECT_THAT(AllIds(*OpenMegatron(dir / "p").value()), ElementsAre(1, 2, 3, 500));
  EXPECT_THAT(ListFolder(dir.path()).value(), ElementsAre("p.bin", "p.idx"));
  const auto writer = MegatronWriter::Create(dir / "p", 256).value();
  SHOAL_CHECK_OK(writer->AddDocument({7}));
  SHOAL_CHECK_OK(writer->Finish());
  EXPECT_THAT(AllIds(*OpenMegatron(dir / "p").value()), ElementsAre(7));
}

// An index of one document with `count` tokens of the type.
std::string IndexOf(MegatronType type, int32_t count) {
  std::string index = GoldenIndex().substr(0, 17);
  const auto put = [&index](auto value) {
    index.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  put(static_cast<uint8_t>(type));
  put(uint64_t{1});
  put(uint64_t{2});
  put(count);
  put(int64_t{0});
  put(int64_t{0});
  put(int64_t{1});
  return index;
}

template <class T>
absl::StatusOr<std::vector<int32_t>> ReadTyped(const std::string& prefix, MegatronType type,
                                               std::vector<T> ids) {
  testing::WriteFile(prefix + ".idx", IndexOf(type, static_cast<int32_t>(ids.size())));
  testing::WriteFile(prefix + ".bin", {reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(T)});
  SHOAL_ASSIGN_OR_RETURN(const TokenSourcePtr source, OpenMegatron(prefix));
  EXPECT_GT(source->vocabulary_bound(), int64_t{0});
  std::vector<int32_t> out(ids.size());
  SHOAL_RETURN_IF_ERROR(source->Read(0, absl::MakeSpan(out)));
  return out;
}

TEST(OpenMegatron, ReadsEveryIntegerType) {
  const testing::TempDir dir;
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  EXPECT_THAT(ReadTyped<uint8_t>(dir / "u8", MegatronType::kU8, {0, 255}).value(), ElementsAre(0, 255));
  EXPECT_THAT(ReadTyped<int8_t>(dir / "i8", MegatronType::kI8, {0, 127}).value(), ElementsAre(0, 127));
  EXPECT_THAT(ReadTyped<int16_t>(dir / "i16", MegatronType::kI16, {0, 32767}).value(), ElementsAre(0, 32767));
  EXPECT_THAT(ReadTyped<uint16_t>(dir / "u16", MegatronType::kU16, {0, 65535}).value(),
              ElementsAre(0, 65535));
  EXPECT_THAT(ReadTyped<int32_t>(dir / "i32", MegatronType::kI32, {0, kMax}).value(), ElementsAre(0, kMax));
  EXPECT_THAT(ReadTyped<int64_t>(dir / "i64", MegatronType::kI64, {0, kMax}).value(), ElementsAre(0, kMax));
  EXPECT_EQ(OpenMegatron(dir / "u8").value()->vocabulary_bound(), 256);
  EXPECT_EQ(OpenMegatron(dir / "i64").value()->vocabulary_bound(), int64_t{1} << 31);
}

TEST(OpenMegatron, NamesAnIdThatIsNone) {
  const testing::TempDir dir;
  const absl::Status negative = ReadTyped<int16_t>(dir / "p", MegatronType::kI16, {5, -2}).status();
  EXPECT_EQ(negative, absl::DataLossError((dir / "p.bin") + ": token -2 at 1 is no token id"));
  const absl::Status wide = ReadTyped<int64_t>(dir / "p", MegatronType::kI64, {5, int64_t{1} << 31}).status();
  EXPECT_EQ(wide, absl::DataLossError((dir / "p.bin") + ": token 2147483648 at 1 is no token id"));
}

TEST(OpenMegatron, NamesTheFieldOfEveryContradiction) {
  struct Case {
    size_t at;
    int byte;
    const char* message;
  };
  const testing::TempDir dir;
  const std::string path = dir / "p.idx";
  for (const Case& c : std::vector<Case>{{0, 'X', "magic: "},
                                         {9, 2, "version: is 2, want 1"},
                                         {17, 0, "dtype: is 0"},
                                         {17, 9, "dtype: is 9"},
                                         {17, 6, "dtype: is 6 (floating point)"},
                                         {17, 7, "dtype: is 7 (floating point)"},
                                         {25, 1, "sequence count: is 72057594037927939"},
                                         {33, 128, "document count: is 9223372036854775812"},
                                         {26, 0, "document count: is 0"},
                                         {26, 5, "file size: is 102 bytes, want 110"},
                                         {18, 2, "file size: is 102 bytes, want 90"},
                                         {37, 255, "sequence length 0: is -16777213"},
                                         {34, 2, "sequence offset 1: is 6, want 4"},
                                         {54, 7, "sequence offset 1: is 7, want 6"},
                                         {70, 1, "document 0: starts at sequence 1"},
                                         {78, 3, "document 2: starts at sequence 2"},
                                         {78, 9, "document 1: starts at sequence 9"},
                                         {94, 2, "document 3: starts at sequence 2"}}) {
    std::string bytes = GoldenIndex();
    bytes.at(c.at) = static_cast<char>(c.byte);
    testing::WriteFile(path, bytes);
    const absl::Status status = ReadMegatronIndex(path).status();
    EXPECT_THAT(std::string(status.message()), ::testing::StartsWith(path + ": " + c.message));
  }
}

TEST(OpenMegatron, RefusesAnIndexOfAnyOtherLength) {
  const testing::TempDir dir;
  const std::string path = dir / "p.idx";
  for (size_t size = 0; size < GoldenIndex().size(); ++size) {
    testing::WriteFile(path, GoldenIndex().substr(0, size));
    EXPECT_FALSE(ReadMegatronIndex(path).ok()) << size;
  }
  testing::WriteFile(path, GoldenIndex() + "x");
  EXPECT_THAT(std::string(ReadMegatronIndex(path).status().message()), HasSubstr("file size: is 103"));
  testing::WriteFile(path, GoldenIndex() + std::string(3, '\0'));
  EXPECT_THAT(std::string(ReadMegatronIndex(path).status().message()), HasSubstr("sequence modes: present"));
  testing::WriteFile(path, GoldenIndex());
  EXPECT_TRUE(ReadMegatronIndex(path).ok());
}

// Whatever one damaged byte says, the index is refused or its parts agree.
TEST(ReadMegatronIndex, EveryDamagedByteIsSafe) {
  const testing::TempDir dir;
  const std::string path = dir / "p.idx";
  for (size_t at = 0; at < GoldenIndex().size(); ++at) {
    for (const int flip : {1, 0x80, 0xff}) {
      std::string bytes = GoldenIndex();
      bytes.at(at) = static_cast<char>(bytes.at(at) ^ flip);
      testing::WriteFile(path, bytes);
      const absl::StatusOr<MegatronIndex> index = ReadMegatronIndex(path);
      if (!index.ok()) continue;
      EXPECT_EQ(index->document_starts.back(), static_cast<int64_t>(index->sequence_lengths.size())) << at;
    }
  }
}

TEST(OpenMegatron, LooksWhetherDocumentsEndAsIsSaid) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "p.idx", GoldenIndex());
  testing::WriteFile(dir / "p.bin", GoldenTokens());
  EXPECT_TRUE(OpenMegatron(dir / "p", 3).ok());
  EXPECT_EQ(OpenMegatron(dir / "p", 500).status(),
            absl::InvalidArgumentError((dir / "p") + ": its first document, of 3 tokens, ends with token 3, not with 500"));
  SHOAL_CHECK_OK(MegatronWriter::Create(dir / "none", 256).value()->Finish());
  EXPECT_TRUE(OpenMegatron(dir / "none", 3).ok());  // That it has no tokens is said elsewhere.
  const auto writer = MegatronWriter::Create(dir / "late", 256).value();
  for (const std::vector<int32_t>& document : {std::vector<int32_t>{}, {}, {5, 9}, {9, 5}}) SHOAL_CHECK_OK(writer->AddDocument(document));
  SHOAL_CHECK_OK(writer->Finish());
  EXPECT_TRUE(OpenMegatron(dir / "late", 9).ok());
  EXPECT_FALSE(OpenMegatron(dir / "late", 5).ok());
}

TEST(OpenMegatron, NamesAMissingOrWronglySizedBin) {
  const testing::TempDir dir;
  EXPECT_EQ(OpenMegatron(dir / "p").status().code(), absl::StatusCode::kNotFound);
  testing::WriteFile(dir / "p.idx", GoldenIndex());
  const absl::Status missing = OpenMegatron(dir / "p").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr(dir / "p.bin"));
  for (const std::string& bytes : {GoldenTokens().substr(1), GoldenTokens() + "x", std::string()}) {
    testing::WriteFile(dir / "p.bin", bytes);
    const absl::Status status = OpenMegatron(dir / "p").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr((dir / "p.bin") + ": file size: is "));
  }
  testing::WriteFile(dir / "p.bin", GoldenTokens());
  EXPECT_THAT(AllIds(*OpenMegatron(dir / "p").value()), ElementsAre(1, 2, 3, 500));
}

}  // namespace
}  // namespace shoal
