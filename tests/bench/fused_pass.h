// The least that memory has to do: each element of some arrays is read once, and their sum written once.
#pragma once

#include <cstdint>

namespace shoal {

inline constexpr int kFusedMax = 8;  // Arrays on either side.

// The sum of the `from` arrays into each of the `to` arrays (which may be among them). `streaming`: past the
// caches, when the `to` arrays begin at cache lines.
struct FusedPass {
  const float* from[kFusedMax];
  float* to[kFusedMax];
  int from_count = 0, to_count = 0;
  int64_t elements = 0;
};
void RunFusedPass(const FusedPass& pass, bool streaming);

}  // namespace shoal
