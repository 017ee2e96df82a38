#include "runtime/kernels/cross_entropy.h"

#include <cmath>

#include "runtime/kernels/cpu/dispatch.h"
#include "runtime/kernels/cpu/parallel.h"
#include "runtime/kernels/device_dispatch.h"

namespace shoal::kernels {
namespace {

void SetAct(const Tensor& tensor, int64_t index, float value) {
  if (tensor.dtype() == DType::kF32) {
    tensor.data<float>()[index] = value;
  } else {
    tensor.data<BFloat16>()[index] = BFloat16(value);
  }
}

}  // namespace

void CrossEntropy(const Tensor& logits, const Tensor& targets, float scale, const Tensor& loss,
                  const Tensor& dlogits, Stream& stream) {
  const int64_t C = logits.dim(0), V = logits.dim(1);
  SHOAL_CHECK(C == 0 || V > 0) << "no vocabulary";
  CheckTensor(logits, DType::kF32, {C, V}, "logits");
  CheckTensor(targets, DType::kI32, {C}, "targets");
  CheckTensor(loss, DType::kF32, {C}, "loss");
  const bool wanted = !dlogits.empty();
  const InnerAct act = wanted ? CheckAct(dlogits, {C, V}, "dlogits") : kInnerF32;
  if (Offloaded(stream, &DeviceKernels::cross_entropy, logits, targets, scale, loss, dlogits)) return;
  CheckIds(targets.span<int32_t>(), V, "targets");
  const InnerKernels& inner = Inner();
  ParallelFor(C, GrainOfRows(V), [&](int64_t begin, int64_t end) {
    const int64_t blocks = (V + kCrossEntropyBlock - 1) / kCrossEntropyBlock;
    const Tensor block_max = Empty({blocks}, DType::kF32);
    // f32 gradients hold the exponentials until the sum is known; bf16 would round them twice.
    const Tensor exps = wanted && act == kInnerBF16 ? Empty({V}, DType::kF32) : Tensor();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = row * V + targets.data<int32_t>()[row];
      const float target_logit =
          logits.data<float>()[target];  // Before dlogits, which may be logits, is written.
      CrossEntropyRow args = {.logits = logits.data<float>() + row * V,
                              .vocab = V,
                              .exps = nullptr,
                              .block_max = nullptr,
                              .dlogits = nullptr};
      if (wanted) {
        args.block_max = block_max.data<float>();
        args.dlogits = static_cast<char*>(dlogits.raw()) + row * V * SizeOf(dlogits.dtype());
        args.exps = act == kInnerBF16 ? exps.data<float>() : static_cast<float*>(args.dlogits);
      }
      float max = 0;
      double sum = 0;
      inner.cross_entropy_sum(args, &max, &sum);
      const double below_max = static_cast<double>(target_logit) - static_cast<double>(max);
      loss.data<float>()[row] = static_cast<float>(std::log(sum) - below_max);
      if (!wanted) continue;
      inner.cross_entropy_scale[act](args, max, static_cast<float>(static_cast<double>(scale) / sum));
      const double prob = std::exp(below_max) / sum;
      SetAct(dlogits, target, static_cast<float>(static_cast<double>(scale) * (prob - 1.0)));
    }
  });
}

}  // namespace shoal::kernels
