#include "tests/harness/temp_dir.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include "runtime/base/check.h"

namespace shoal::testing {

TempDir::TempDir() {
  const char* base = std::getenv("TEST_TMPDIR");
  if (base == nullptr) base = std::getenv("TMPDIR");
  if (base == nullptr) base = "/tmp";
  path_ = std::string(base) + "/shoal_test_XXXXXX";
  SHOAL_CHECK(mkdtemp(path_.data()) != nullptr) << path_;
}

TempDir::~TempDir() {
  if (std::getenv("SHOAL_KEEP_TEMP") != nullptr) {
    std::cerr << "kept " << path_ << "\n";
    return;
  }
  std::error_code ignored;  // What cannot be removed is the system's to clean.
  std::filesystem::remove_all(path_, ignored);
}

std::string TempDir::operator/(std::string_view name) const { return path_ + "/" + std::string(name); }

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  SHOAL_CHECK(file.good()) << "cannot open " << path;
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

void WriteFile(const std::string& path, std::string_view content) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (!folder.empty()) std::filesystem::create_directories(folder);
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  file.flush();
  SHOAL_CHECK(file.good()) << "cannot write " << path;
}

}  // namespace shoal::testing
