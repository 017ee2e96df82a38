#include "runtime/base/status.h"

#include <cerrno>

#include "gtest/gtest.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

absl::Status Fail() { return absl::DataLossError("crc 1f2e, want 9a01"); }
absl::StatusOr<int> FailOr() { return Fail(); }
absl::Status Restore(int step) {
  SHOAL_RETURN_IF_ERROR(absl::OkStatus());
  SHOAL_ASSIGN_OR_RETURN(const int value, FailOr(), "restoring step ", step);
  return value == 0 ? absl::OkStatus() : Fail();
}

TEST(Status, ContextMakesAPathToTheCauseAndKeepsTheCode) {
  EXPECT_EQ(Restore(42), absl::DataLossError("restoring step 42: crc 1f2e, want 9a01"));
  EXPECT_TRUE(Annotate(absl::OkStatus(), "unused").ok());
}

TEST(Status, ErrnoKeepsItsMeaning) {
  EXPECT_EQ(ErrnoStatus(ENOSPC, "writing a").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoStatus(ENOENT, "reading a"), absl::NotFoundError("reading a: No such file or directory"));
}

TEST(CheckDeathTest, FailureSaysWhereWhatAndWhy) {
  EXPECT_DEATH(SHOAL_CHECK_EQ(1 + 1, 3) << "sums", "status_test.cc.*check failed.*2 against 3 sums");
}

}  // namespace
}  // namespace shoal
