// Which compilation of the inner loops runs, and the checks that kernels make of their arguments.
#pragma once

#include <initializer_list>
#include <string_view>

#include "runtime/kernels/cpu/inner.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// The compilations, by what they ask of the processor.
enum class InnerLevel : int { kPlain, kAvx2, kAvx512, kAvx512Bf16 };
// The best that ActiveIsa() and HasBf16Dot() allow.
InnerLevel BestInnerLevel();

// The table for the best level, or for the one that a test has set.
const InnerKernels& Inner();

// For tests: later calls use `level`, which must not be above BestInnerLevel(). Not while a kernel runs.
void SetInnerLevelForTest(InnerLevel level);

// CHECKs that `tensor` has this type and shape.
void CheckTensor(const Tensor& tensor, DType dtype, std::initializer_list<int64_t> shape,
                 std::string_view name);
// The same for activations, f32 or bf16. Returns which.
InnerAct CheckAct(const Tensor& tensor, std::initializer_list<int64_t> shape, std::string_view name);
// CHECKs that every id is in [0, limit).
void CheckIds(absl::Span<const int32_t> ids, int64_t limit, std::string_view name);

}  // namespace shoal::kernels
