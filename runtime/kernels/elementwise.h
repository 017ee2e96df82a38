// Element-wise helpers on flat data, and counter-based random numbers.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

void Convert(const Tensor& from, const Tensor& to, Stream& stream);  // f32 <-> bf16 (nearest even), or a plain copy.
void AddTo(const Tensor& x, const Tensor& sum, Stream& stream);      // sum (f32) += x (f32 or bf16).

// Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): element i of the stream of `key` is
// a pure function of (key, i), whatever computes it.
struct RandomKey {
  uint64_t seed = 0;
  uint64_t stream = 0;  // See MakeStream.
};
// A stream number for an operation: (step, slice, layer, op) as DESIGN's numerics ask, hashed.
uint64_t MakeStream(uint64_t step, uint64_t slice, uint64_t layer, uint64_t op);
uint64_t RandomBits(RandomKey key, uint64_t index);
// x (f32) [i] = mean + stddev * normal(key, first_index + i), by Box-Muller in f64.
void FillNormal(RandomKey key, uint64_t first_index, double mean, double stddev, const Tensor& x, Stream& stream);

namespace ref {
void Convert(const Tensor& from, const Tensor& to, Stream& stream);
void AddTo(const Tensor& x, const Tensor& sum, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
