// The plug-in as it was built, on machines with and without a GPU.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "collectives/backend/nccl_api.h"
#include "gtest/gtest.h"
#include "runtime/device/device.h"
#include "runtime/kernels/device_kernels.h"

namespace shoal {
namespace {

// Of this build, or the one that is to be loaded.
const char* Plugin() {
  const char* const named = std::getenv("SHOAL_DEVICE_PLUGIN");
  return named != nullptr ? named : SHOAL_CUDA_PLUGIN;
}

const DeviceApi* Table() {
  void* const library = dlopen(Plugin(), RTLD_NOW | RTLD_LOCAL);
  EXPECT_NE(library, nullptr) << dlerror();
  if (library == nullptr) return nullptr;
  const auto entry = reinterpret_cast<const DeviceApi* (*)()>(dlsym(library, kDeviceApiSymbol));
  return entry == nullptr ? nullptr : entry();
}

// The pointers of a table of functions that are null, by their place.
template <class Functions> std::vector<size_t> Missing(const Functions& table, size_t first_byte) {
  std::vector<size_t> missing;
  for (size_t at = first_byte; at < sizeof(table); at += sizeof(void*)) {
    void* function = nullptr;
    std::memcpy(&function, reinterpret_cast<const char*>(&table) + at, sizeof(function));
    if (function == nullptr) missing.push_back((at - first_byte) / sizeof(void*));
  }
  return missing;
}

TEST(CudaPlugin, OffersEveryFunctionAndKernel) {
  const DeviceApi* const api = Table();
  ASSERT_NE(api, nullptr);
  EXPECT_EQ(api->version, kDeviceApiVersion);
  EXPECT_STREQ(api->name, "cuda");
  EXPECT_EQ(Missing(*api, offsetof(DeviceApi, count)), std::vector<size_t>());
  EXPECT_EQ(Missing(*api->kernels, 0), std::vector<size_t>());
}

TEST(CudaPlugin, OffersNcclOrSaysWhatIsMissing) {
  void* const library = dlopen(Plugin(), RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(library, nullptr) << dlerror();
  const auto entry = reinterpret_cast<DeviceResult (*)(const NcclApi**)>(dlsym(library, kNcclApiSymbol));
  if (entry == nullptr) GTEST_SKIP() << "built without NCCL's header";
  const NcclApi* api = nullptr;
  const DeviceResult loaded = entry(&api);
  if (loaded.code != DeviceResult::Code::kOk) {
    EXPECT_EQ(loaded.code, DeviceResult::Code::kUnavailable);
    EXPECT_NE(std::string(loaded.message).find("libnccl.so.2"), std::string::npos) << loaded.message;
    return;
  }
  EXPECT_EQ(api->version, kNcclApiVersion);
  EXPECT_GE(api->library_version, 21900);
  EXPECT_EQ(Missing(*api, offsetof(NcclApi, unique_id)), std::vector<size_t>());
}

// With SHOAL_TEST_DEVICE=cuda there is one.
TEST(CudaPlugin, OpensADeviceOrSaysWhatIsMissing) {
  setenv("SHOAL_DEVICE_PLUGIN", Plugin(), 0);
  const absl::StatusOr<Device*> device = LoadDevice("cuda", 0);
  if (device.ok()) {
    EXPECT_GT((*device)->properties().memory_bytes, 0);
    EXPECT_TRUE(absl::IsUnavailable(LoadDevice("cuda", 1000).status()));
    return;
  }
  ASSERT_EQ(std::getenv("SHOAL_TEST_DEVICE"), nullptr) << device.status();
  EXPECT_TRUE(absl::IsUnavailable(device.status())) << device.status();
  const std::string text(device.status().message());
  EXPECT_TRUE(text.starts_with("cuda: looking for devices: ")) << text;
  EXPECT_TRUE(text.find("no NVIDIA driver") != std::string::npos || text.find("the NVIDIA driver") != std::string::npos ||
              text.find("libcublasLt") != std::string::npos)
      << text;
}

}  // namespace
}  // namespace shoal
