// libFuzzer's entry point: `fuzz_collectives TARGET [libFuzzer's options and corpus folders]`; without a
// target, their names.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "tests/fuzz/targets.h"

namespace {

const shoal::FuzzTarget* chosen = nullptr;

}  // namespace

// Takes the target's name off the command line and writes its seeds to the first corpus folder.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  for (const shoal::FuzzTarget& target : shoal::FuzzTargets()) {
    if (*argc > 1 && std::strcmp((*argv)[1], target.name) == 0) chosen = &target;
  }
  if (chosen == nullptr) {
    std::fprintf(stderr, "usage: %s TARGET [libFuzzer's arguments]; targets:", (*argv)[0]);
    for (const shoal::FuzzTarget& target : shoal::FuzzTargets()) std::fprintf(stderr, " %s", target.name);
    std::fprintf(stderr, "\n");
    std::exit(2);
  }
  (*argv)[1] = (*argv)[0];
  ++*argv;
  --*argc;
  for (int i = 1; i < *argc; ++i) {
    if ((*argv)[i][0] == '-') continue;
    int number = 0;
    for (const std::string& seed : chosen->seeds()) {
      std::ofstream((*argv)[i] + std::string("/seed") + std::to_string(number++), std::ios::binary) << seed;
    }
    break;
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  chosen->run({reinterpret_cast<const char*>(data), size});
  return 0;
}
