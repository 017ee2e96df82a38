// One matrix product on raw pointers, by oneDNN: what MatMul and the grouped products are made of. Hides
// oneDNN's engine, streams, primitives and scratch memory, and the conversion path of processors without
// bf16.
#pragma once

#include <cstdint>

#include "runtime/tensor/dtype.h"

namespace shoal::kernels::cpu {

// The size that differs from call to call (tokens of an expert): no primitive is created for each of its
// values.
enum class Varying : uint8_t { kNothing, kM, kK };

// c[m,n] (+)= op(a)[m,k] op(b)[k,n], row-major; ld* is the distance in elements between stored rows. a and b
// are both f32 or both bf16; c is f32 or their type, and f32 when accumulating. Sums are f32.
struct Gemm {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const void* a = nullptr;
  const void* b = nullptr;
  void* c = nullptr;
  int64_t lda = 0;
  int64_t ldb = 0;
  int64_t ldc = 0;
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;
  DType in = DType::kF32;
  DType out = DType::kF32;
  Varying varying = Varying::kNothing;
};

// Runs on the OpenMP team; inside a task (tasks.h), on the calling thread alone. Thread-safe. Any size may be
// 0.
void RunGemm(const Gemm& gemm);

// How bf16 is multiplied: by AMX; by oneDNN with AVX512_BF16; or as f32, to which it is converted chunk by
// chunk. The best that the processor and SHOAL_ISA allow, or lower: SHOAL_BF16 = dot or convert. Constant for
// the life of the process.
enum class Bf16Path : uint8_t { kConvert, kDot, kAmx };
Bf16Path ActiveBf16Path();

// A block of memory of the calling thread, at least `bytes`, 64-byte aligned, kept for its next use of
// `slot`: large blocks must not be mapped anew for each product. Valid until the thread's next call with this
// slot.
enum class ScratchSlot : uint8_t { kOneDnn, kConvertA, kConvertB, kConvertC, kPacked, kAttention, kCount };
void* Scratch(ScratchSlot slot, int64_t bytes);

}  // namespace shoal::kernels::cpu
