// Which bucket of dense parameters (parallel/schedule/step_graph.h) a block lies in.
#pragma once

#include "absl/strings/match.h"
#include "models/blocks.h"
#include "parallel/schedule/step_graph.h"

namespace shoal {

// Of a block that is no expert.
inline int BucketOf(const Block& block, const BucketIndex& buckets) {
  if (block.kind == BlockKind::kVectors) return BucketIndex::kVectors;
  if (block.layer >= 0) return buckets.OfLayer(block.layer);
  return absl::StartsWith(block.name, "model.embed_tokens.") ? BucketIndex::kEmbedding : buckets.OfHead();
}

}  // namespace shoal
