// The kernels of a training step as cases of a benchmark: operands of one size on any stream, one call, and what the call moves or
// computes by its contract.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::gpu_bench {

// Of a model's layer and a micro-batch of rows * seq tokens.
struct Sizes {
  int64_t rows, seq;
  int64_t width, inner, vocab;
  int experts, top_k;
  int heads, kv_heads, dim;
  int64_t loss_chunk;
  int64_t flat;  // Elements of the kernels that know no tokens: optimizer, conversions, copies.

  int64_t tokens() const { return rows * seq; }
  int64_t pairs() const { return tokens() * top_k; }
};
Sizes FineSizes();    // Width 2048, 64 experts top-8 of width 1024.
Sizes CoarseSizes();  // Width 4096, 8 experts top-2 of width 14336.
Sizes TinySizes();    // For comparisons with the CPU, and for the emulator.

// Operands live as long as `run`, which puts one call of the kernel on the stream. outputs: what the call writes.
struct Prepared {
  std::function<void()> run;
  std::vector<Tensor> outputs;
  int64_t bytes = 0;  // Each operand read once and each result written once.
  double flops = 0;   // Of products and attention; 0: the kernel is bound by memory.
};

struct Case {
  std::string name;
  std::string rate_of;  // The case whose rate this one is compared with: "copy", or a dense product of the same size. Empty: none.
  std::function<Prepared(const Sizes&, Stream&)> prepare;
};

// "copy" is first; a case that others are compared with comes before them. The names do not say the sizes.
std::vector<Case> MemoryCases();
std::vector<Case> ProductCases();
std::vector<Case> AttentionCases();

}  // namespace shoal::gpu_bench
