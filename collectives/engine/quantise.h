// The wire formats: how f32 elements travel in fewer bytes. Vectorised for the instruction set of this machine; the bits
// do not depend on it. Pure.
//
// bf16 is rounded to nearest, ties to even. int8 and fp8 (e4m3: 4 bits of exponent, 3 of mantissa, largest value 448) are
// cut into blocks of 256 elements, each with an f32 scale: its largest magnitude divided by 127 or 448. The error of an
// element is at most (M: the block's largest magnitude, x: the element)
//   bf16  |x| / 256
//   int8  M / 254
//   fp8   max(|x| / 16, M / 448 / 1024)
// and a few ulp. A block whose largest magnitude is below 2^-118 becomes zeros. A block with an infinity or a NaN becomes
// all NaN: an overflow is not hidden. Within a few ulp of the largest float a value may become infinite. bf16 keeps infinities and NaNs where they are.
//
// Layout: the scales of all blocks, then a byte per element; bf16: two bytes per element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "collectives/communicator.h"

namespace shoal {

constexpr int64_t kWireBlock = 256;

// Of `elements`; a multiple of 4 for kInt8 and kFp8.
int64_t WireBytes(WireFormat format, int64_t elements);
// kAsIs copies. `wire` has WireBytes(format, elements), aligned to 4.
void Quantise(WireFormat format, const float* in, int64_t elements, std::byte* wire);
// Elements [begin, begin + count) of a message of `elements`. `begin` is a multiple of kWireBlock.
void Dequantise(WireFormat format, const std::byte* wire, int64_t elements, int64_t begin, int64_t count, float* out);

// Every variant that runs on this machine, the plain one first: for tests that they agree.
struct WireCodec {
  void (*quantise)(WireFormat, const float*, int64_t, std::byte*);
  void (*dequantise)(WireFormat, const std::byte*, int64_t, int64_t, int64_t, float*);
};
std::vector<WireCodec> WireCodecs();

}  // namespace shoal
