// How the tokens of a tally (router.h) are cut into blocks, for the kernels that fill it and those that read it.
#pragma once

#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {

struct TokenRange {
  int64_t begin, end;
};

// Part `part` of `parts`: even, the first ones one longer.
__device__ __forceinline__ TokenRange EvenTokens(int64_t tokens, int parts, int part) {
  const int64_t base = tokens / parts, extra = tokens % parts;
  const int64_t begin = part * base + (part < extra ? part : extra);
  return {begin, begin + base + (part < extra ? 1 : 0)};
}

// Of block `block` of `blocks`, as many of which belong to each of the pieces.
__device__ __forceinline__ TokenRange TokensOfBlock(int64_t tokens, int pieces, int blocks, int block) {
  const int each = blocks / pieces;
  const TokenRange piece = EvenTokens(tokens, pieces, block / each);
  const TokenRange own = EvenTokens(piece.end - piece.begin, each, block % each);
  return {piece.begin + own.begin, piece.begin + own.end};
}

}  // namespace shoal::cuda
