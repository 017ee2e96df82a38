// mma.h's words for the emulator: exchanges between the lanes of a warp, with the layouts of the instructions. Asynchronous copies of
// every second thread happen at once and those of the others when they are waited for, so that both a missing wait and an overwritten
// stage of a pipeline show as wrong results.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "runtime/kernels/cuda/launch.h"
#include "runtime/tensor/e4m3.h"

namespace shoal::cuda {

namespace emulator {
struct Copy {
  void* shared;
  const void* global;  // Null: zeros.
  void Do() const {
    if (global == nullptr) {
      std::memset(shared, 0, 16);
    } else {
      std::memcpy(shared, global, 16);
    }
  }
};
using CopyGroup = std::vector<Copy>;
// By thread of the block; the last group is open.
inline std::array<std::deque<CopyGroup>, 1024> g_copies;

inline std::deque<CopyGroup>& Copies() {
  std::deque<CopyGroup>& groups = g_copies[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline float Half(uint32_t pair, int high) { return __uint_as_float(high != 0 ? pair & 0xffff0000u : pair << 16); }
// A code is a number, or NaN.
inline float CodeToFloat(uint32_t code) { return (code & 0x7fu) == 0x7fu ? NAN : FromE4m3(static_cast<uint8_t>(code)); }
}  // namespace emulator

inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - emulator::t_dynamic_shared);
}

inline void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  uint32_t all[32][6];
  emulator::Gather(own, sizeof(own), all);
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = all[column * 4 + k % 8 / 2][4 + k / 8];
      c[i] += emulator::Half(left, k % 2) * emulator::Half(right, k % 2);
    }
  }
}

inline void MmaE4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  uint32_t all[32][6];
  emulator::Gather(own, sizeof(own), all);
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2] >> k % 4 * 8;
      const uint32_t right = all[column * 4 + k % 16 / 4][4 + k / 16] >> k % 4 * 8;
      c[i] += emulator::CodeToFloat(left & 0xff) * emulator::CodeToFloat(right & 0xff);
    }
  }
}

inline void LoadMatrices(uint32_t (&to)[4], const Bf16* row) {
  const Bf16* rows[32];
  emulator::Gather(&row, sizeof(row), rows);
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&to[i], rows[8 * i + g] + 2 * t, 4);
}
inline void LoadMatricesTransposed(uint32_t (&to)[4], const Bf16* row) {
  const Bf16* rows[32];
  emulator::Gather(&row, sizeof(row), rows);
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  for (int i = 0; i < 4; ++i) {
    to[i] = rows[8 * i + 2 * t][g].bits | static_cast<uint32_t>(rows[8 * i + 2 * t + 1][g].bits) << 16;
  }
}

inline void CopyAsync16(void* shared, const void* global, bool inside) {
  const emulator::Copy copy{shared, inside ? global : nullptr};
  if (threadIdx.x % 2 == 0) return copy.Do();
  emulator::Copies().back().push_back(copy);
}
inline void CommitCopies() { emulator::Copies().emplace_back(); }
template <int kNewest> void WaitCopies() {
  std::deque<emulator::CopyGroup>& groups = emulator::Copies();
  while (groups.size() > kNewest + 1) {
    for (const emulator::Copy& copy : groups.front()) copy.Do();
    groups.pop_front();
  }
}

inline void Prefetch(const void*) {}
inline uint32_t PackBf16(float low, float high) {
  return FromFloat<Bf16>(low).bits | static_cast<uint32_t>(FromFloat<Bf16>(high).bits) << 16;
}
inline float Exp2(float x) { return std::exp2(x); }

}  // namespace shoal::cuda
