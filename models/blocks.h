// The fixed list of blocks of a model: the pieces in which parameters and their optimizer state are owned, moved and
// stored. Depends on the model alone, never on the ranks. Pure.
//
// One block holds all vectors, norms and router temperatures (kept in f32 and not decayed), one each expert; all other matrices
// are cut by rows into blocks of about 65 thousand elements. Blocks lie in the order of ParameterSpecs, so the parameters that one
// matrix product reads together (q, k, v; w1, w3) are contiguous.
#pragma once

#include <string>
#include <vector>

#include "models/parameters.h"

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
  int layer = -1;   // -1: norm vectors, embedding, head.
  int expert = -1;  // -1: not an expert.
  int64_t elements = 0;
  std::vector<BlockPart> parts;
};

std::vector<Block> MakeBlocks(const std::vector<ParameterSpec>& parameters);

}  // namespace shoal
