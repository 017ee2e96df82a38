// bf16 products by Advanced Matrix Extensions (Intel Xeon from Sapphire Rapids on). oneDNN 2.6 has them too,
// but generates code for each shape, for 0.3 ms, and does not reuse what it packs: this takes any shape at
// one speed. Raw pointers only. Included by a file compiled for AMX: declarations only.
#pragma once

#include <cstdint>

namespace shoal::kernels::cpu {

// c[m,n] (+)= op(a)[m,k] op(b)[k,n] as Gemm (gemm.h) has it; bf16 is passed as uint16_t.
struct AmxGemm {
  int64_t m, n, k;
  const uint16_t* a;
  const uint16_t* b;
  void* c;
  int64_t lda, ldb, ldc;
  bool transpose_a, transpose_b, accumulate, out_bf16;
};

// The processor has AMX for bf16 and the kernel lets this process use it (asks for it). Constant.
bool HasAmx();

// On the calling thread. m, n, k >= 1. Scratch: AmxScratchBytes(gemm), 64-byte aligned, not initialised.
int64_t AmxScratchBytes(const AmxGemm& gemm);
void AmxMultiply(const AmxGemm& gemm, void* scratch);

}  // namespace shoal::kernels::cpu
