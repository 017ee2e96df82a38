// For tests: a new empty folder, removed at the end of the test.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <string>

#include "runtime/base/check.h"
#include "runtime/files/file.h"

namespace shoal {

class TestFolder {
 public:
  TestFolder() {
    std::string name = JoinPath(::testing::TempDir(), "shoal-XXXXXX");
    SHOAL_CHECK(mkdtemp(name.data()) != nullptr) << name;
    path_ = name;
  }
  ~TestFolder() { EXPECT_TRUE(RemoveTree(path_).ok()) << path_; }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(std::string_view name) const { return JoinPath(path_, name); }

 private:
  std::string path_;
};

}  // namespace shoal
