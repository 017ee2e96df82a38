// AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101): bias-corrected moments, decoupled decay. Flat f32 tensors.
#pragma once

#include "runtime/device/stream.h"
#include "runtime/kernels/adamw_numbers.h"
#include "runtime/tensor/tensor.h"

namespace shoal::kernels {

struct AdamWStep {
  double learning_rate = 0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0;  // Of these parameters: 0 for vectors.
  int64_t update = 1;       // This update's number, from 1.
  float grad_scale = 1;     // Clipping: every gradient is multiplied by it first.
};

// What changes from update to update (AdamWNumber), f64 [kAdamWNumbers]: AdamW reads it in memory of its stream, so that work that was
// recorded can be done again for another update. Of a step that is to be applied, on the host; with a norm of 0.
Tensor AdamWNumbersOf(const AdamWStep& step);

// g = grad * grad_scale; master *= 1 - lr * decay; m, v as usual;
// master -= lr / (1 - beta1^n) * m / (sqrt(v) / sqrt(1 - beta2^n) + epsilon). All f32 [N], one pass. `copy` receives
// the new parameters in its own type (f32 or bf16); an empty tensor: no copy.
void AdamW(const AdamWStep& step, const Tensor& grad, const Tensor& master, const Tensor& m, const Tensor& v,
           const Tensor& copy, Stream& stream);
// The same with `numbers`, in memory of the stream, in place of what they stand for in the step.
void AdamW(const AdamWStep& step, const Tensor& numbers, const Tensor& grad, const Tensor& master, const Tensor& m,
           const Tensor& v, const Tensor& copy, Stream& stream);

// Clipping by the global norm: of `numbers`, kGradNorm is the root of the sum of squares_B (f64), in their order; kGradScale is
// clip / (norm + 1e-6) where clip > 0 and the norm is above it, else 1; kApply is 1 where the norm and all of losses_N (f64) are
// finite, else 0. The others stay.
void ClipGradients(const Tensor& squares, const Tensor& losses, double clip, const Tensor& numbers, Stream& stream);

// sum (f64 [1]) = sum of squares of an f32 tensor in f64, in an order that does not depend on the number of threads. NaN and
// infinity propagate.
void SumOfSquares(const Tensor& x, const Tensor& sum, Stream& stream);
double SumOfSquares(const Tensor& x, Stream& stream);  // Waits for the stream; 0 when that failed.

namespace ref {
void AdamW(const AdamWStep& step, const Tensor& grad, const Tensor& master, const Tensor& m, const Tensor& v,
           const Tensor& copy, Stream& stream);
double SumOfSquares(const Tensor& x, Stream& stream);
}  // namespace ref
}  // namespace shoal::kernels
