// The fuzz targets without a fuzzer: valid inputs, and many seeded mutations of them.
#include <gtest/gtest.h>

#include <random>

#include "tests/fuzz/targets.h"

namespace shoal {
namespace {

constexpr int kMutations = 20'000;
constexpr size_t kBytesMax = 16 << 10;

class Mutator {
 public:
  Mutator(uint64_t seed, std::vector<std::string> inputs) : random_(seed), inputs_(std::move(inputs)) {}

  std::string Next() {
    std::string bytes = inputs_[Below(inputs_.size())];
    for (size_t times = 1 + Below(6); times > 0; --times) Mutate(&bytes);
    bytes.resize(std::min(bytes.size(), kBytesMax));
    return bytes;
  }

 private:
  size_t Below(size_t bound) { return bound == 0 ? 0 : random_() % bound; }

  void Mutate(std::string* bytes) {
    const size_t at = Below(bytes->size());
    switch (Below(7)) {
      case 0:
        if (!bytes->empty()) (*bytes)[at] ^= static_cast<char>(1 << Below(8));
        return;
      case 1:
        if (!bytes->empty()) (*bytes)[at] = static_cast<char>(random_());
        return;
      case 2:
        bytes->erase(at, 1 + Below(16));
        return;
      case 3:
        bytes->insert(at, bytes->substr(Below(bytes->size()), 1 + Below(64)));
        return;
      case 4: {
        const std::string& other = inputs_[Below(inputs_.size())];
        bytes->replace(at, std::string::npos, other.substr(Below(other.size())));
        return;
      }
      case 5:
        bytes->resize(at);
        return;
      default: {
        constexpr uint64_t kNumbers[] = {
            0, 1, 255, 4096, 65536, 0x7fffffff, 0xffffffff, 0x7fffffffffffffff, ~uint64_t{0}};
        const uint64_t number = kNumbers[Below(std::size(kNumbers))] + Below(3) - 1;
        bytes->replace(at, Below(2) == 0 ? 4 : 8, reinterpret_cast<const char*>(&number),
                       Below(2) == 0 ? 4 : 8);
        return;
      }
    }
  }

  std::mt19937_64 random_;
  const std::vector<std::string> inputs_;
};

class Mutations : public testing::TestWithParam<FuzzTarget> {};

TEST_P(Mutations, HarmNothing) {
  const FuzzTarget& target = GetParam();
  for (const std::string& seed : target.seeds()) target.run(seed);
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Mutator mutator(seed, target.seeds());
  for (int i = 0; i < kMutations; ++i) target.run(mutator.Next());
}

INSTANTIATE_TEST_SUITE_P(Targets, Mutations, testing::ValuesIn(FuzzTargets()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace shoal
