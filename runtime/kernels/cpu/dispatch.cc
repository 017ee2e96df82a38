#include "runtime/kernels/cpu/dispatch.h"

#include <algorithm>

#include "runtime/device/cpu.h"

namespace shoal::kernels {
namespace {

InnerLevel& CurrentLevel() {
  static InnerLevel level = BestInnerLevel();
  return level;
}

void CheckShape(const Tensor& tensor, std::initializer_list<int64_t> shape, std::string_view name) {
  SHOAL_CHECK(std::equal(shape.begin(), shape.end(), tensor.shape().begin(), tensor.shape().end()))
      << name << " is " << ShapeString(tensor.shape()) << ", want " << ShapeString(Shape(shape));
}

}  // namespace

InnerLevel BestInnerLevel() {
  switch (ActiveIsa()) {
    case Isa::kAvx512:
      return HasBf16Dot() ? InnerLevel::kAvx512Bf16 : InnerLevel::kAvx512;
    case Isa::kAvx2:
      return InnerLevel::kAvx2;
    case Isa::kPlain:
      break;
  }
  return InnerLevel::kPlain;
}

const InnerKernels& Inner() {
  switch (CurrentLevel()) {
    case InnerLevel::kAvx512Bf16:
      return kInnerAvx512Bf16;
    case InnerLevel::kAvx512:
      return kInnerAvx512;
    case InnerLevel::kAvx2:
      return kInnerAvx2;
    case InnerLevel::kPlain:
      break;
  }
  return kInnerPlain;
}

void SetInnerLevelForTest(InnerLevel level) {
  SHOAL_CHECK(level <= BestInnerLevel()) << "this processor, or SHOAL_ISA, offers less";
  CurrentLevel() = level;
}

void CheckTensor(const Tensor& tensor, DType dtype, std::initializer_list<int64_t> shape,
                 std::string_view name) {
  SHOAL_CHECK(tensor.dtype() == dtype) << name << " is " << Name(tensor.dtype()) << ", want " << Name(dtype);
  CheckShape(tensor, shape, name);
}

InnerAct CheckAct(const Tensor& tensor, std::initializer_list<int64_t> shape, std::string_view name) {
  SHOAL_CHECK(tensor.dtype() == DType::kF32 || tensor.dtype() == DType::kBF16)
      << name << " is " << Name(tensor.dtype()) << ", want f32 or bf16";
  CheckShape(tensor, shape, name);
  return tensor.dtype() == DType::kF32 ? kInnerF32 : kInnerBF16;
}

void CheckIds(absl::Span<const int32_t> ids, int64_t limit, std::string_view name) {
  for (size_t i = 0; i < ids.size(); ++i) {
    SHOAL_CHECK(ids[i] >= 0 && ids[i] < limit)
        << name << "[" << i << "] is " << ids[i] << ", want [0, " << limit << ")";
  }
}

}  // namespace shoal::kernels
