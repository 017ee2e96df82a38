#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gtest/gtest.h"
#include "runtime/device/device.h"

namespace shoal {
namespace {

absl::Status Load(const std::string& plugin) {
  setenv("SHOAL_DEVICE_PLUGIN", plugin.c_str(), 1);
  const absl::Status status = LoadDevice("cuda", 0).status();
  unsetenv("SHOAL_DEVICE_PLUGIN");
  return status;
}

bool Mentions(const absl::Status& status, const std::string& text) {
  return std::string(status.message()).find(text) != std::string::npos;
}

TEST(LoadDevice, NamesThePluginThatIsNotThere) {
  const absl::Status named = Load("/nowhere/libshoal_cuda.so");
  EXPECT_TRUE(absl::IsNotFound(named) && Mentions(named, "/nowhere/libshoal_cuda.so cannot be read")) << named;
  const absl::Status beside = LoadDevice("vulkan", 0).status();
  const std::string path = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "libshoal_vulkan.so";
  EXPECT_TRUE(absl::IsNotFound(beside) && Mentions(beside, "no plug-in for the device vulkan: " + path)) << beside;
}

TEST(LoadDevice, SaysWhyAFileIsNoPlugin) {
  const std::string path = testing::TempDir() + "/no_library." + std::to_string(getpid());
  std::ofstream(path) << "text";
  const absl::Status text = Load(path);
  EXPECT_TRUE(absl::IsUnavailable(text) && Mentions(text, "loading the plug-in: " + path)) << text;
  std::filesystem::remove(path);
  Dl_info libc = {};
  ASSERT_NE(dladdr(reinterpret_cast<void*>(&getpid), &libc), 0);
  if (std::string(libc.dli_fname).find("libc") == std::string::npos) GTEST_SKIP() << "libc is " << libc.dli_fname;
  const absl::Status other = Load(libc.dli_fname);
  EXPECT_TRUE(absl::IsFailedPrecondition(other) && Mentions(other, "does not export shoal_device_api")) << other;
}

}  // namespace
}  // namespace shoal
