// Peak memory of a rank, from what training keeps. Tensors of 256 KiB and more of one rank occupy whole pages of 2 MiB
// (runtime/device/memory.h); those that ranks of a host share (weights, gradients, copies, buffers) do not. With
// several waves each has tensors of its own.
//
// With T tokens of a part, D width, F an expert's inner width, E experts, K choices, S rows of the rank's tokens, R rows of its
// experts, b bytes of a compute element (4 in fp32, 2 in bf16), q and kv the widths of queries and keys:
//   weights      dense: b each, replicated; sharded b/ranks and buffers, DenseBuffers of a layer and one of embedding or head. Owned
//                experts: b each.
//   gradients    as weights, 4 bytes each.
//   optimizer    of owned elements two moments of 4 bytes, and master weights of 4 where b is 2.
//   copies       of experts that others own, b + 4 each: of all layers, or prefetch + 1 rooms when they are rematerialised. In the
//                pinned order copies have no gradients (b each), but partials:
//   partials     of a layer's backward pass, 4 each: of every expert with copies for every rank whose rows are computed here, and, at
//                owners, for all other ranks with rows; of one rank's rows for all other experts here. Those of the layer above
//                are still on their way; where links are slow, those of more layers, which is not counted.
//   activations  of a layer: x 4TD; attention bT(D + 2q + 2kv) + 4T(1 + heads); experts 4TD + bTD + 4T(2 + E + 2K) + 8S +
//                b(RD + 2RF + SD); shared 2bTF'; dense 4TD + bTD + 4T + 2bTF. With recompute x of every layer, the rest of one.
//   quantised    in fp8, 2 for each weight of layers and experts that are here; where they are not kept, of the largest product.
//   buffers      two for rows on their way where rows travel, b SD and b RD, each with room for a quarter more.
//   working      of the head 4TD and the larger of bTD + logits of a chunk and 4TD; of a layer's backward pass
//                4TD + 4S + b(RD + SD + RF), and what waves that are behind have of the layer above.
// Activations, working and partials are those of the worst moment: the head, or the backward pass of some layer.
#pragma once

#include <cstdint>
#include <string>

#include "parallel/planner/layout.h"

namespace shoal {

struct MemoryUse {
  int64_t weights = 0, gradients = 0, optimizer = 0, copies = 0, activations = 0, buffers = 0, working = 0, partials = 0;
  int64_t quantised = 0;
  int64_t total() const {
    return weights + gradients + optimizer + copies + activations + buffers + working + partials + quantised;
  }
  std::string ToString() const;  // "3.2 GiB: activations 2.0, weights 0.6, ..." by size.
};

// Of the rank that needs most. `waves`: the most that a schedule may have (Schedule::waves).
MemoryUse PeakMemory(const ModelShape& model, const StepLayout& layout, const LaidOut& laid_out, int waves);

// Of a copy in each layer, as they are kept.
int64_t CopyBytes(const ModelShape& model, const StepLayout& layout);

// "1.5 GiB", "20 MiB".
std::string BytesText(int64_t bytes);

}  // namespace shoal
