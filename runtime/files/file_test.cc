#include "runtime/files/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "runtime/files/faulty_disk.h"
#include "runtime/files/json.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::TempDir;

TEST(File, WhatIsWrittenIsReadBack) {
  const TempDir folder;
  std::string contents(100'000, 'x');
  contents[7] = '\0';
  ASSERT_TRUE(WriteFileAtomic(folder / "a", contents).ok());
  EXPECT_EQ(*ReadFile(folder / "a"), contents);
  EXPECT_EQ(*FileBytes(folder / "a"), 100'000);
  ASSERT_TRUE(WriteFileAtomic(folder / "a", "").ok());
  EXPECT_EQ(*ReadFile(folder / "a"), "");
  EXPECT_THAT(*ListFolder(folder.path()), ElementsAre("a"));
}

TEST(File, FilesWithoutKnownSizeAreReadWhole) {
  const absl::StatusOr<std::string> status = ReadFile("/proc/self/status");
  ASSERT_TRUE(status.ok());
  EXPECT_THAT(*status, HasSubstr("VmRSS"));
}

TEST(File, ErrorsNameThePath) {
  const TempDir folder;
  const std::string missing = folder / "no/such";
  for (const absl::Status& status :
       {ReadFile(missing).status(), MappedFile::Open(missing).status(), FileBytes(missing).status(),
        ListFolder(missing).status(), WriteFileAtomic(missing, "x"), RenameDurably(missing, folder / "b")}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(missing));
  }
  EXPECT_EQ(ReadFile(folder.path()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MappedFile::Open(folder.path()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(File, MapShowsTheBytesAndOutlivesReplacement) {
  const TempDir folder;
  ASSERT_TRUE(WriteFileAtomic(folder / "a", "old").ok());
  ASSERT_TRUE(WriteFileAtomic(folder / "empty", "").ok());
  const auto map = *MappedFile::Open(folder / "a");
  ASSERT_TRUE(WriteFileAtomic(folder / "a", "newer").ok());
  ASSERT_EQ(map->bytes().size(), 3u);
  EXPECT_EQ(static_cast<char>(map->bytes()[0]), 'o');
  EXPECT_TRUE((*MappedFile::Open(folder / "empty"))->bytes().empty());
}

TEST(File, FoldersAreMadeListedAndRemoved) {
  const TempDir folder;
  ASSERT_TRUE(MakeFolders(folder / "a/b/c").ok());
  ASSERT_TRUE(MakeFolders(folder / "a/b/c/").ok());
  ASSERT_TRUE(WriteFileAtomic(folder / "a/file", "x").ok());
  ASSERT_TRUE(WriteFileAtomic(folder / "kept", "x").ok());
  ASSERT_EQ(symlink((folder / "kept").c_str(), (folder / "a/link").c_str()), 0);
  EXPECT_THAT(*ListFolder(folder / "a"), ElementsAre("b", "file", "link"));
  EXPECT_EQ(MakeFolders(folder / "a/file").code(), absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(RemoveTree(folder / "a").ok());
  ASSERT_TRUE(RemoveTree(folder / "a").ok());
  EXPECT_THAT(*ListFolder(folder.path()), ElementsAre("kept"));
}

TEST(File, FullDiskLeavesTheOldFileAndNothingElse) {
  const TempDir folder;
  ASSERT_TRUE(WriteFileAtomic(folder / "a", "old").ok());
  FaultyDisk disk(FaultyDisk::Kind::kFull, 0);
  const absl::Status status = WriteFileAtomic(folder / "a", "0123456789", &disk);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr(folder / "a"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("5 of 10 bytes"));
  EXPECT_EQ(*ReadFile(folder / "a"), "old");
  EXPECT_THAT(*ListFolder(folder.path()), ElementsAre("a"));
}

// The system's own refusal, at a real limit.
TEST(File, SizeLimitOfTheSystemIsResourceExhausted) {
  const TempDir folder;
  rlimit old_limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit limit = {8192, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const absl::Status status = WriteFileAtomic(folder / "a", std::string(20'000, 'x'));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  signal(SIGXFSZ, old_handler);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("8192 of 20000 bytes"));
  EXPECT_THAT(*ListFolder(folder.path()), IsEmpty());
}

TEST(File, CrashAtAnyStepLeavesTheOldOrTheNewFile) {
  int crashes = 0;
  for (int at = 0;; ++at) {
    const TempDir folder;
    ASSERT_TRUE(WriteFileAtomic(folder / "a", "old").ok());
    FaultyDisk disk(FaultyDisk::Kind::kCrash, at);
    const absl::Status status = WriteFileAtomic(folder / "a", "newer", &disk);
    disk.LoseUnsynced();
    EXPECT_THAT(*ReadFile(folder / "a"), AnyOf("old", "newer")) << "crash at step " << at;
    if (status.ok()) {
      EXPECT_FALSE(disk.failed());
      EXPECT_EQ(*ReadFile(folder / "a"), "newer");
      break;
    }
    ++crashes;
  }
  EXPECT_EQ(crashes, 5);  // Create, write, sync, rename, sync the folder.
}

TEST(Json, ErrorsNameSourcePlaceAndReason) {
  const auto message = [](std::string_view text) {
    const absl::Status status = ParseJson(text, "x.json").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    return std::string(status.message());
  };
  EXPECT_THAT(message("{\"a\": 1,\n \"b\" 2}"), AllOf(HasSubstr("x.json"), HasSubstr("line 2, column 6")));
  EXPECT_THAT(message(R"({"a": {"b": 1, "c": 2, "b": 3}})"), HasSubstr("\"b\" stands twice"));
  EXPECT_THAT(message(R"([{"a": 1, "a": 1}])"), HasSubstr("\"a\" stands twice"));
  EXPECT_THAT(message(std::string(1'000'000, '[')), HasSubstr("nested deeper than 16"));
  EXPECT_THAT(message(""), HasSubstr("not valid JSON"));
  EXPECT_LT(message("{" + std::string(100'000, 'x')).size(), 500u);
  // Equal keys in different objects, and brackets in strings, are no mistakes.
  EXPECT_TRUE(ParseJson(R"([{"a": {"a": 1}}, {"a": "[[[[[[[[[[[[[[[[[[[[\"[["}])", "x").ok());
}

}  // namespace
}  // namespace shoal
