#include "models/data/pack.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "models/data/megatron.h"
#include "models/data/testing.h"
#include "models/tokenizer/byte_tokenizer.h"
#include "runtime/files/file.h"
#include "runtime/kernels/documents.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The documents of a pair, as text; ids past the bytes appear as <id>.
std::vector<std::string> Documents(const std::string& prefix) {
  const MegatronIndex index = ReadMegatronIndex(prefix + ".idx").value();
  const TokenSourcePtr source = OpenMegatron(prefix).value();
  std::vector<std::string> documents;
  int64_t at = 0;
  for (const int32_t length : index.sequence_lengths) {
    std::vector<int32_t> ids(length);
    SHOAL_CHECK_OK(source->Read(at, absl::MakeSpan(ids)));
    at += length;
    documents.emplace_back();
    for (const int32_t id : ids) {
      documents.back() +=
          id < kByteVocabulary ? std::string(1, static_cast<char>(id)) : absl::StrCat("<", id, ">");
    }
  }
  return documents;
}

TEST(PackFiles, ATextFileIsOneDocument) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "a.txt", "Call me\nIshmael.\n");
  testing::WriteFile(dir / "b.txt.zst", testing::Zstd("Some years ago"));
  testing::WriteFile(dir / "empty.txt", "");
  PackReport report;
  SHOAL_CHECK_OK(
      PackFiles({.inputs = {dir / "a.txt", dir / "empty.txt", dir / "b.txt.zst"}, .output_prefix = dir / "p"},
                &report));
  EXPECT_THAT(Documents(dir / "p"), ElementsAre("Call me\nIshmael.\n", "Some years ago"));
  EXPECT_EQ(report.documents, 2);
  EXPECT_EQ(report.empty_documents, 1);
  EXPECT_EQ(report.tokens, 17 + 14);
  EXPECT_EQ(report.type, "u16");
}

TEST(PackFiles, ALineIsOneDocumentWhenAsked) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "a.txt", "one\r\n\ntwo\n");
  PackReport report;
  SHOAL_CHECK_OK(PackFiles({.inputs = {dir / "a.txt"},
                            .output_prefix = dir / "p",
                            .append_eod = 0,
                            .text_document = DocumentUnit::kLine},
                           &report));
  EXPECT_THAT(Documents(dir / "p"), ElementsAre(std::string("one\0", 4), std::string("two\0", 4)));
  EXPECT_EQ(report.empty_documents, 1);
  EXPECT_EQ(report.tokens, 8);
}

TEST(PackFiles, JsonlTakesTheKeyOfEveryLine) {
  const testing::TempDir dir;
  testing::WriteFile(
      dir / "a.jsonl",
      "{\"text\": \"no\", \"body\": \"caf\\u00e9\"}\n\n{\"body\": \"line\\nend\"}\n{\"body\": \"\"}");
  testing::WriteFile(dir / "b.jsonl.gz", testing::Gzip("{\"body\":\"packed\"}\n"));
  PackReport report;
  SHOAL_CHECK_OK(PackFiles({.inputs = {dir / "a.jsonl", dir / "b.jsonl.gz"},
                            .output_prefix = dir / "p",
                            .json_key = "body",
                            .append_eod = 256},
                           &report));
  EXPECT_THAT(Documents(dir / "p"), ElementsAre("caf\xc3\xa9<256>", "line\nend<256>", "packed<256>"));
  EXPECT_EQ(report.empty_documents, 2);
}

// From files to what attention is told: where a token's document begins in its row.
TEST(PackFiles, RowsSayWhereDocumentsBegin) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "a.txt", "one\ntwo\n\nthree\nx\nseventeen letters\n");
  PackReport report;
  SHOAL_CHECK_OK(PackFiles({.inputs = {dir / "a.txt"},
                            .output_prefix = dir / "p",
                            .append_eod = 256,
                            .text_document = DocumentUnit::kLine},
                           &report));
  DatasetOptions options = {.kind = DataKind::kMegatron,
                            .path = dir / "p",
                            .order = DataOrder::kSequential,
                            .end_of_document = 256,
                            .vocab_size = 257,
                            .seq = 12,
                            .global_batch = 2};
  const Dataset dataset = OpenDataset(options).value();
  const std::vector<int32_t> rows = testing::Rows(*dataset.train, 0, 0, 2);  // "one<>two<>three<>x<>sevent", with a label each.
  const Tensor tokens = Empty({2, 12}, DType::kI32), first = Empty({24}, DType::kI32);
  for (int64_t i = 0; i < 24; ++i) tokens.data<int32_t>()[i] = rows[static_cast<size_t>(i / 12 * 13 + i % 12)];
  Stream stream;
  kernels::DocumentStarts(tokens, *options.end_of_document, first, stream);
  EXPECT_THAT(first.span<int32_t>(), ElementsAre(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8,  //
                                                 0, 0, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4));
  options.end_of_document = 10;
  EXPECT_THAT(std::string(OpenDataset(options).status().message()), HasSubstr("ends with token 256, not with 10"));
}

TEST(PackFiles, AWideEndOfDocumentTokenWidensTheType) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "a.txt", "x");
  PackReport report;
  SHOAL_CHECK_OK(
      PackFiles({.inputs = {dir / "a.txt"}, .output_prefix = dir / "p", .append_eod = 100000}, &report));
  EXPECT_EQ(report.type, "i32");
  EXPECT_THAT(Documents(dir / "p"), ElementsAre("x<100000>"));
}

TEST(PackFiles, NamesFileAndLineOfABadLineAndWritesNothing) {
  struct Case {
    const char* line;
    const char* message;
  };
  for (const Case& c : std::vector<Case>{{"{\"text\": ", "is no JSON: "},
                                         {"{\"text\": \"\xff\"}", "is no JSON: "},
                                         {"[1]", "is array, want an object"},
                                         {"{\"body\": \"x\"}", "has no key \"text\""},
                                         {"{\"text\": 3}", "\"text\" is number, want a string"}}) {
    const testing::TempDir dir;
    testing::WriteFile(dir / "a.jsonl", std::string("{\"text\": \"fine\"}\n\n") + c.line + "\n");
    PackReport report;
    const absl::Status status = PackFiles({.inputs = {dir / "a.jsonl"}, .output_prefix = dir / "p"}, &report);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), ::testing::StartsWith((dir / "a.jsonl") + ":3: " + c.message));
    EXPECT_THAT(ListFolder(dir.path()).value(), ElementsAre("a.jsonl"));
  }
}

TEST(PackFiles, NamesWhatElseIsWrong) {
  const testing::TempDir dir;
  testing::WriteFile(dir / "a.txt", "x");
  testing::WriteFile(dir / "empty.txt", "");
  PackReport report;
  const auto pack = [&](const PackOptions& options) { return PackFiles(options, &report); };
  EXPECT_EQ(pack({.output_prefix = dir / "p"}).message(), "no input files");
  EXPECT_EQ(pack({.inputs = {dir / "a.txt"}}).message(), "no output prefix");
  EXPECT_THAT(std::string(pack({.inputs = {dir / "empty.txt"}, .output_prefix = dir / "p"}).message()),
              HasSubstr("no document in " + (dir / "empty.txt")));
  EXPECT_EQ(pack({.inputs = {dir / "a.txt"}, .output_prefix = dir / "p", .append_eod = -1}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(pack({.inputs = {dir / "none.txt"}, .output_prefix = dir / "p"}).code(),
            absl::StatusCode::kNotFound);
  const absl::Status folder = pack({.inputs = {dir / "a.txt"}, .output_prefix = dir / "none/p"});
  EXPECT_EQ(folder.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(folder.message()), HasSubstr(dir / "none/p.bin"));
}

}  // namespace
}  // namespace shoal
