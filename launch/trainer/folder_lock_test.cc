#include "launch/trainer/folder_lock.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

TEST(FolderLock, OneHolderAtATime) {
  testing::TempDir dir;
  const std::string folder = dir / "runs/a";
  auto first = FolderLock::Take(folder);
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = FolderLock::Take(folder);
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status()));
  EXPECT_THAT(std::string(second.status().message()),
              ::testing::HasSubstr(folder + ": another job is writing there"));
  EXPECT_TRUE(FolderLock::Take(dir / "runs/b").ok());
  first->reset();
  EXPECT_TRUE(FolderLock::Take(folder).ok());
}

TEST(FolderLock, NeedsAFolder) {
  testing::TempDir dir;
  testing::WriteFile(dir / "file", "");
  EXPECT_FALSE(FolderLock::Take(dir / "file").ok());
}

}  // namespace
}  // namespace shoal
