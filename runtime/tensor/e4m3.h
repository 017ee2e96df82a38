// The 8-bit floating-point numbers e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa, largest value 448, no infinity, NaN as 0x7f
// and 0xff (Micikevicius et al., 2022, arXiv 2209.05433). Branch-free, so that loops of them are vectorised, and inlined into whatever
// instruction set their caller is compiled for.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#define SHOAL_E4M3_INLINE inline __attribute__((always_inline))

namespace shoal {

constexpr float kE4m3Max = 448.0f;

// To nearest, ties to even; what is larger than 448 becomes 448. `value` is not a NaN.
SHOAL_E4M3_INLINE uint8_t ToE4m3(float value) {
  const uint32_t magnitude = std::bit_cast<uint32_t>(value) & 0x7fffffffu;
  // Normal numbers: to nearest, ties to even, at the third bit of the mantissa; then the exponent's other bias.
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Multiples of 2^-9: the unit of the last place at 2^14.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - std::bit_cast<uint32_t>(0x1p14f);
  const uint32_t code = magnitude < std::bit_cast<uint32_t>(0x1p-6f) ? subnormal : normal;
  const uint32_t sign = (std::bit_cast<uint32_t>(value) >> 24) & 0x80u;
  return static_cast<uint8_t>(sign | std::min(code, 0x7eu));
}

// `code` is not a NaN.
SHOAL_E4M3_INLINE float FromE4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float normal = std::bit_cast<float>((magnitude << 20) + (120u << 23));
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude < 8 ? subnormal : normal);
  return std::bit_cast<float>(bits | (static_cast<uint32_t>(code & 0x80u) << 24));
}

}  // namespace shoal
