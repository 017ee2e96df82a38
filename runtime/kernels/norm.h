// RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467): y = weight * x / sqrt(mean(x^2) + epsilon), in f32.
// T tokens, D width. "act" is f32 or bf16: the type of activations that feed matrix products.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

// sum_TD (f32) = x_TD (f32) + delta_TD (act), then y_TD (act) = RMSNorm(sum). rstd_T (f32) is kept for the backward pass.
// `delta` may be an empty tensor: then sum is not written and x is normalised. sum may be x itself.
void RmsNorm(const Tensor& x, const Tensor& delta, const Tensor& weight, float epsilon, const Tensor& sum,
             const Tensor& y, const Tensor& rstd, Stream& stream);

// dx_TD (f32) += gradient by x; dweight_D (f32) += gradient by the weight, summed over tokens in a fixed order that
// does not depend on the number of threads. dy_TD is act or f32; x is what was normalised.
void RmsNormBackward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                     const Tensor& dweight, Stream& stream);

namespace ref {
void RmsNorm(const Tensor& x, const Tensor& delta, const Tensor& weight, float epsilon, const Tensor& sum,
             const Tensor& y, const Tensor& rstd, Stream& stream);
void RmsNormBackward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                     const Tensor& dweight, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
