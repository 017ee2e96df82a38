#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "runtime/device/cuda/runtime.h"

namespace shoal::cuda {
namespace {

// What NVIDIA advises as workspace of matrix products on Hopper.
constexpr int64_t kBytesMin = int64_t{32} << 20;

struct OfStream {
  std::vector<void*> blocks;  // The last is the one in use.
  int64_t bytes = 0;          // Its size.
};

struct Scratches {
  std::mutex mutex;
  std::map<DeviceStream*, OfStream> by_stream;
};

Scratches& All() {
  static Scratches* const all = new Scratches;
  return *all;
}

}  // namespace

DeviceResult Scratch(DeviceStream* stream, int64_t bytes, void** memory) {
  Scratches& all = All();
  const std::lock_guard lock(all.mutex);
  OfStream& own = all.by_stream[stream];
  if (bytes > own.bytes || own.blocks.empty()) {
    // Twice as large each time, so that what was outgrown is never more than what is in use.
    const int64_t wanted = std::max({bytes, 2 * own.bytes, kBytesMin});
    void* block = nullptr;
    if (const DeviceResult got = Failed(cudaMalloc(&block, static_cast<size_t>(wanted))); got.code != DeviceResult::Code::kOk) {
      return got;
    }
    own.blocks.push_back(block);
    own.bytes = wanted;
  }
  *memory = own.blocks.back();
  return {};
}

void ForgetScratch(DeviceStream* stream) {
  Scratches& all = All();
  const std::lock_guard lock(all.mutex);
  const auto found = all.by_stream.find(stream);
  if (found == all.by_stream.end()) return;
  for (void* block : found->second.blocks) Failed(cudaFree(block));  // Waits for the stream's work.
  all.by_stream.erase(found);
}

}  // namespace shoal::cuda
