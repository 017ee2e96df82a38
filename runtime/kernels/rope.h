// Rotary position embedding (Su et al., 2021, arXiv 2104.09864), half-split layout: element i of a head pairs with
// i + dim/2; the angle is position * theta^(-2i/dim).
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// cos and sin, each [seq, dim/2] f32; angles are computed in f32, as in Hugging Face's Mixtral.
struct RopeTable {
  Tensor cos;
  Tensor sin;
};
RopeTable MakeRopeTable(int64_t seq, int dim, double theta);
RopeTable MakeRopeTable(int64_t seq, int dim, double theta, Stream& stream);  // In memory of the stream.

enum class RopeDirection : uint8_t { kForward, kBackward };  // Backward rotates by the negative angle.

// Rotates in place the first `heads` heads of each row of x[T, width] (f32 or bf16); row t has position t % seq, seq being
// the table's.
void Rope(const Tensor& x, int heads, int dim, const RopeTable& table, RopeDirection direction, Stream& stream);

namespace ref {
void Rope(const Tensor& x, int heads, int dim, const RopeTable& table, RopeDirection direction, Stream& stream);
}
}  // namespace shoal::kernels
