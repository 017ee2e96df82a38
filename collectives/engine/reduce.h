// The arithmetic of reductions. Vectorised for the instruction set of this machine; the result does not
// depend on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "runtime/tensor/dtype.h"

namespace shoal {

// outs[*][i] = ((sources[0][i] op sources[1][i]) op sources[2][i]) ..., bf16 and f16 in fp32 with one rounding at the end,
// integers modulo their range. kAverage: the sum, divided by `divisor` before that rounding; integers are truncated
// towards zero. A NaN in any source of a sum, product or average gives NaN; min and max give a NaN or a number. An out may
// be one of the sources; otherwise nothing overlaps. Single-threaded.
void Reduce(DType dtype, ReduceOp op, absl::Span<const std::byte* const> sources,
            absl::Span<std::byte* const> outs, int64_t elements, int divisor = 1);

// Every variant that runs on this machine, the plain one first: for tests that they agree.
using ReduceFunction = void (*)(DType, ReduceOp, absl::Span<const std::byte* const>,
                                absl::Span<std::byte* const>, int64_t, int);
std::vector<ReduceFunction> ReduceVariants();

// Copies `bytes` of a whole of `whole_bytes`, which do not overlap. A large whole is written past the caches: they would not
// keep it, and would first fetch every line that is written.
void CopyPiece(std::byte* to, const std::byte* from, int64_t bytes, int64_t whole_bytes);

}  // namespace shoal
