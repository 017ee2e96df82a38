#include "models/data/text_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "models/data/random.h"
#include "models/data/testing.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Compresses to about half: several buffers of the reader on both sides.
std::string LongText() {
  std::string text;
  for (uint64_t i = 0; i < 1500000; ++i) text.push_back(static_cast<char>('a' + SplitMix64(1, i) % 16));
  return text;
}

absl::StatusOr<std::string> ReadPath(const std::string& path) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<TextReader> reader, TextReader::Open(path));
  return ReadAll(*reader);
}

TEST(TextReader, GivesTheSameTextPlainZstdAndGzip) {
  const testing::TempDir dir;
  for (const std::string& text : {std::string(), std::string("x"), LongText()}) {
    testing::WriteFile(dir / "t.txt", text);
    testing::WriteFile(dir / "t.txt.zst", testing::Zstd(text));
    testing::WriteFile(dir / "t.txt.gz", testing::Gzip(text));
    for (const char* name : {"t.txt", "t.txt.zst", "t.txt.gz"}) {
      const absl::StatusOr<std::string> read = ReadPath(dir / name);
      ASSERT_TRUE(read.ok()) << read.status();
      EXPECT_TRUE(*read == text) << name << ": " << read->size() << " bytes of " << text.size();
    }
  }
}

TEST(TextReader, JoinsFramesAndMembers) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "t.zst",
                     testing::Zstd("Call me ") + testing::Zstd("") + testing::Zstd("Ishmael."));
  testing::WriteFile(dir / "t.gz", testing::Gzip("Call me ") + testing::Gzip("") + testing::Gzip("Ishmael."));
  EXPECT_EQ(ReadPath(dir / "t.zst").value(), "Call me Ishmael.");
  EXPECT_EQ(ReadPath(dir / "t.gz").value(), "Call me Ishmael.");
}

TEST(TextReader, PiecesOfAnySizeMakeTheSameText) {
  const testing::TempDir dir;
  const std::string text = LongText();
  testing::WriteFile(dir / "t.zst", testing::Zstd(text));
  testing::WriteFile(dir / "t.gz", testing::Gzip(text));
  for (const char* name : {"t.zst", "t.gz"}) {
    const auto reader = TextReader::Open(dir / name).value();
    std::string read;
    for (uint64_t i = 0;; ++i) {
      std::string piece(1 + SplitMix64(2, i) % 5000, '\0');
      const size_t count = reader->Read(absl::MakeSpan(&piece[0], piece.size())).value();
      read.append(piece, 0, count);
      if (count < piece.size()) break;
    }
    EXPECT_TRUE(read == text) << name;
  }
}

TEST(TextReader, NamesFileAndByteOfDamage) {
  const testing::TempDir dir;
  const std::string text = LongText();
  struct Case {
    std::string name, bytes;
  };
  std::vector<Case> cases = {{"a.zst", testing::Zstd(text)}, {"a.gz", testing::Gzip(text)}};
  for (Case& c : cases) std::fill_n(c.bytes.begin() + c.bytes.size() / 2, 64, '\x5a');
  cases.push_back({"short.zst", testing::Zstd(text).substr(0, 300000)});
  cases.push_back({"short.gz", testing::Gzip(text).substr(0, 300000)});
  cases.push_back({"empty.zst", ""});
  cases.push_back({"empty.gz", ""});
  cases.push_back({"plain.zst", "Call me Ishmael."});
  cases.push_back({"plain.gz", "Call me Ishmael."});
  cases.push_back({"tail.zst", testing::Zstd("x") + "tail"});
  cases.push_back({"tail.gz", testing::Gzip("x") + "tail"});
  for (const Case& c : cases) {
    testing::WriteFile(dir / c.name, c.bytes);
    const absl::Status status = ReadPath(dir / c.name).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << c.name << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr((dir / c.name) + ": damaged ")) << c.name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(" near byte ")) << c.name;
  }
  const absl::Status cut = ReadPath(dir / "short.zst").status();
  EXPECT_THAT(std::string(cut.message()), HasSubstr("near byte 300000: the data end in the middle"));
}

TEST(TextReader, NamesAMissingFileAndAFolder) {
  const testing::TempDir dir;
  EXPECT_EQ(ReadPath(dir / "none.txt").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(ReadPath(dir / "none.txt").status().message()), HasSubstr(dir / "none.txt"));
  EXPECT_EQ(ReadPath(dir.path()).status().code(), absl::StatusCode::kInvalidArgument);
}

std::vector<std::string> Lines(const std::string& path) {
  const auto reader = TextReader::Open(path).value();
  LineReader lines(*reader);
  std::vector<std::string> all;
  std::string line;
  while (lines.Next(&line).value()) {
    all.push_back(line);
    EXPECT_EQ(lines.number(), static_cast<int64_t>(all.size()));
  }
  return all;
}

TEST(LineReader, TakesBothLineEndsAndNoneAtTheEnd) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "t", "one\r\n\ntwo\rhalf\nthree");
  EXPECT_THAT(Lines(dir / "t"), ElementsAre("one", "", "two\rhalf", "three"));
  testing::WriteFile(dir / "t", "one\n");
  EXPECT_THAT(Lines(dir / "t"), ElementsAre("one"));
  testing::WriteFile(dir / "t", "");
  EXPECT_THAT(Lines(dir / "t"), ElementsAre());
  const std::string wide(700000, 'w');  // Wider than the buffer.
  testing::WriteFile(dir / "t", wide + "\n" + wide + "\n\n");
  EXPECT_THAT(Lines(dir / "t"), ElementsAre(wide, wide, ""));
}

}  // namespace
}  // namespace shoal
