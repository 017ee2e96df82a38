// Everything in collectives/ that reads bytes from the network, as functions of bytes. libFuzzer runs them
// one by one
// (-DSHOAL_FUZZ=ON, clang), mutation_test.cc all of them in every test run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace shoal {

struct FuzzTarget {
  const char* name;
  // Must return, whatever the bytes: CHECKs and sanitizers say what is wrong.
  void (*run)(std::string_view bytes);
  std::vector<std::string> (*seeds)();  // Valid inputs, to begin with.
};

const std::vector<FuzzTarget>& FuzzTargets();

}  // namespace shoal
