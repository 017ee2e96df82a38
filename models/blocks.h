// The fixed list of blocks of a model: the pieces in which parameters and their optimizer state are owned, moved and
// stored. Depends on the model alone, never on the ranks. Pure.
//
// One block holds all norm vectors (kept in f32 and not decayed); each layer has one for its dense matrices (attention
// projections, router, dense feed-forward) and one per expert; the embedding and an untied head are cut by rows into
// blocks of about a million elements. Within a block parts lie in the order of ParameterSpecs, so the parameters that one
// matrix product reads together (q, k, v; w1, w3) are contiguous.
#pragma once

#include <string>
#include <vector>

#include "models/parameters.h"
#include "parallel/placement/placement.h"

namespace shoal {

enum class BlockKind : uint8_t { kVectors, kDense, kExpert };

struct BlockPart {
  int parameter = 0;  // Index in ParameterSpecs.
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t offset = 0;  // Of the first row, in elements from the block's begin.
};

struct Block {
  std::string name;
  BlockKind kind = BlockKind::kDense;
  int expert = -1;
  int64_t elements = 0;
  std::vector<BlockPart> parts;
};

std::vector<Block> MakeBlocks(const std::vector<ParameterSpec>& parameters);
std::vector<BlockShape> ShapesOf(const std::vector<Block>& blocks);

}  // namespace shoal
