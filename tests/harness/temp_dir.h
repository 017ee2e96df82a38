// A folder of one test, gone with it. Failures of the machine end the test process: a test without its folder
// has nothing to say. SHOAL_KEEP_TEMP=1 keeps the folders and prints their names.
#pragma once

#include <string>
#include <string_view>

namespace shoal::testing {

class TempDir {
 public:
  TempDir();   // A fresh folder under $TEST_TMPDIR, $TMPDIR or /tmp.
  ~TempDir();  // Removes it with all that is in it.
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  // The path of `name` in this folder; does not create it.
  std::string operator/(std::string_view name) const;

 private:
  std::string path_;
};

// The whole content of a file.
std::string ReadFile(const std::string& path);
// Replaces the file's content; makes the folders above it.
void WriteFile(const std::string& path, std::string_view content);

}  // namespace shoal::testing
