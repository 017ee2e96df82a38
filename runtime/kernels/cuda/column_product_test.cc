#include "runtime/kernels/cuda/column_product.h"

#include <vector>

#include "gtest/gtest.h"
#include "runtime/kernels/matmul.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::cuda {
namespace {

// An element of op(matrix), read as such a library reads memory.
float At(const Tensor& memory, const ColumnMatrix& matrix, bool transpose, int64_t row, int64_t column) {
  if (transpose) std::swap(row, column);
  EXPECT_TRUE(row < matrix.rows && column < matrix.columns && matrix.rows <= matrix.leading);
  return memory.data<float>()[column * matrix.leading + row];
}

TEST(ColumnProduct, IsTheRowMajorProduct) {
  constexpr int64_t kM = 3, kN = 5, kK = 4;
  Stream stream;
  for (const bool transpose_a : {false, true}) {
    for (const bool transpose_b : {false, true}) {
      const Tensor a = Empty(transpose_a ? Shape{kK, kM} : Shape{kM, kK}, DType::kF32);
      const Tensor b = Empty(transpose_b ? Shape{kN, kK} : Shape{kK, kN}, DType::kF32);
      const Tensor c = Empty({kM, kN}, DType::kF32), want = Empty({kM, kN}, DType::kF32);
      for (int64_t i = 0; i < a.elements(); ++i) a.data<float>()[i] = static_cast<float>(i * i % 7);
      for (int64_t i = 0; i < b.elements(); ++i) b.data<float>()[i] = static_cast<float>(i * 3 % 11);
      const ColumnProduct product = ByColumns(kernels::ToDeviceTensor(a), transpose_a, kernels::ToDeviceTensor(b), transpose_b,
                                              kernels::ToDeviceTensor(c));
      ASSERT_EQ(product.m * product.n, c.elements());
      for (int64_t row = 0; row < product.m; ++row) {
        for (int64_t column = 0; column < product.n; ++column) {
          float sum = 0;
          for (int64_t k = 0; k < product.k; ++k) {
            sum += At(b, product.first, product.transpose_first, row, k) * At(a, product.second, product.transpose_second, k, column);
          }
          c.data<float>()[column * product.result.leading + row] = sum;
        }
      }
      const auto op = [](bool wanted) { return wanted ? kernels::Transpose::kYes : kernels::Transpose::kNo; };
      kernels::ref::MatMul(a, op(transpose_a), b, op(transpose_b), kernels::Accumulate::kOverwrite, want, stream);
      for (int64_t i = 0; i < c.elements(); ++i) EXPECT_EQ(c.data<float>()[i], want.data<float>()[i]) << transpose_a << transpose_b;
    }
  }
}

}  // namespace
}  // namespace shoal::cuda
