// The inner loops of the kernels, each compiled four times (plain, AVX2, AVX-512, AVX-512 with bf16
// conversions) and reached through a table of function pointers. Raw pointers only, rows contiguous; the
// kernels around them check shapes, split the work over threads and allocate. bf16 is passed as uint16_t;
// `act` pointers are float or bf16 as the table's index says. Included by files compiled for AVX-512:
// declarations only.
#pragma once

#include <cstdint>

namespace shoal::kernels {

// Index of the tables by element type.
enum InnerAct : int { kInnerF32 = 0, kInnerBF16 = 1 };

struct RmsNormArgs {
  const float* x;
  const void* delta;  // Null: none, and sum is not written.
  const float* weight;
  float epsilon;
  float* sum;
  void* y;
  float* rstd;
  int64_t width;
};

struct RmsNormBackwardArgs {
  const void* dy;
  const float* x;
  const float* weight;
  const float* rstd;
  float* dx;
  int64_t width;
};

struct RopeArgs {
  void* x;
  const float* cos;
  const float* sin;
  float sin_sign;  // -1: backward.
  int64_t width;   // Of a row of x.
  int64_t seq;
  int heads;
  int half;  // Half a head.
};

struct SoftmaxArgs {
  const float* logits;
  float* probs;
  float* max;  // Per row.
  float* sum;  // Per row: of e^(logit - max).
  int64_t width;
};

struct SoftmaxBackwardArgs {
  const float* probs;
  const float* dprob;  // Per column, or null.
  float* dlogits;
  int64_t width;
};

struct CombineArgs {
  const float* residual;  // Null: 0.
  const void* y;
  const int32_t* offset;  // Of a token's first pair.
  const int32_t* slot;    // Of each pair.
  const float* weight;    // Of each pair. Null: 1.
  void* out;
  int64_t width;
};

struct CombineBackwardArgs {
  const float* dout;
  const void* y;
  const int32_t* offset;
  const int32_t* slot;
  const float* weight;
  void* dy;
  float* dweight;
  int64_t width;
};

struct CrossEntropyRow {
  const float* logits;
  int64_t vocab;
  float* exps;       // [vocab] scratch, which may be `logits` or the f32 dlogits; null with dlogits null.
  float* block_max;  // One per kCrossEntropyBlock logits; the maximum up to and with that block.
  void* dlogits;     // Null: none wanted.
};
// Logits of a block: its exponentials are still in L1 when they are summed.
constexpr int64_t kCrossEntropyBlock = 4096;

struct AdamWCoefficients {
  float grad_scale;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float decay;       // Learning rate * weight decay.
  float step_size;   // Learning rate / (1 - beta1^n).
  float root_scale;  // 1 / sqrt(1 - beta2^n).
  float epsilon;
};

// Functions with `begin` and `end` work on these rows of their arguments.
struct InnerKernels {
  void (*rms_norm[2])(const RmsNormArgs& args, int64_t begin, int64_t end);
  // dweight[width] receives the sum over these rows alone.
  void (*rms_norm_backward[2])(const RmsNormBackwardArgs& args, float* dweight, int64_t begin, int64_t end);
  void (*rope[2])(const RopeArgs& args, int64_t begin, int64_t end);
  // gate_up[rows, 2 width] -> h[rows, width].
  void (*swiglu[2])(const void* gate_up, void* h, int64_t width, int64_t begin, int64_t end);
  void (*swiglu_backward[2])(const void* dh, const void* gate_up, void* dgate_up, void* h, int64_t width,
                             int64_t begin, int64_t end);
  void (*softmax)(const SoftmaxArgs& args, int64_t begin, int64_t end);
  // One row: dlogits = probs * (dprob + shift).
  void (*softmax_backward)(const SoftmaxBackwardArgs& args, float shift, int64_t row);
  void (*sigmoid)(const float* x, float* y, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  // sums[width] (f64) += each row.
  void (*sum_rows)(const float* values, double* sums, int64_t width, int64_t begin, int64_t end);
  // [type of y][type of out].
  void (*combine[2][2])(const CombineArgs& args, int64_t begin, int64_t end);
  void (*combine_backward[2])(const CombineBackwardArgs& args, int64_t begin, int64_t end);
  // The maximum and the sum of e^(logit - max); fills exps and block_max unless null.
  void (*cross_entropy_sum)(const CrossEntropyRow& row, float* max, double* sum);
  // dlogits = exps * scale * e^(block_max - max).
  void (*cross_entropy_scale[2])(const CrossEntropyRow& row, float max, float scale);
  // [type of copy]; copy may be null.
  void (*adamw[2])(const AdamWCoefficients& c, const float* grad, float* master, float* m, float* v,
                   void* copy, int64_t n);
  double (*sum_of_squares)(const float* x, int64_t n);
  void (*add_to[2])(const void* x, float* sum, int64_t n);
  void (*to_bf16)(const float* from, uint16_t* to, int64_t n);
  void (*to_f32)(const uint16_t* from, float* to, int64_t n);
  // fp8.h. The largest magnitude of n bf16, as bits: a NaN is larger than an infinity, and that than all else.
  uint32_t (*largest_bf16)(const uint16_t* x, int64_t n);
  // What n bf16 mean once they are e4m3 with this scale, a power of two that brings all of them to at most 448.
  void (*round_e4m3)(const uint16_t* from, float scale, uint16_t* to, int64_t n);
};

extern const InnerKernels kInnerPlain;
extern const InnerKernels kInnerAvx2;
extern const InnerKernels kInnerAvx512;
extern const InnerKernels kInnerAvx512Bf16;

}  // namespace shoal::kernels
