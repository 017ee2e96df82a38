#include "launch/trainer/emulated_device.h"

namespace shoal {
namespace {

// Operations of a unit of a task; 0: it takes as long as it takes.
double FlopsPerUnit(const Task& task, const ModelConfig& model, int64_t seq) {
  const double width = static_cast<double>(model.hidden_size), head = static_cast<double>(model.head_dim);
  const double query = static_cast<double>(model.num_attention_heads) * head;
  const double key = static_cast<double>(model.num_key_value_heads) * head;
  const double passes = task.phase == Phase::kBackward ? 2 : 1;
  switch (task.op) {
    case Op::kAttention:  // A token attends to half of its sequence.
      return passes * (4 * width * (query + key) + 2 * query * static_cast<double>(seq));
    case Op::kExperts:  // Backward: by the input alone.
    case Op::kExpertsWeight:
      return 6 * width * static_cast<double>(model.intermediate_size);
    case Op::kDense:
      return passes * 6 * width * static_cast<double>(model.dense_intermediate_size);
    case Op::kShared:
      return passes * 6 * width * static_cast<double>(model.shared_intermediate_size);
    case Op::kRoute:
      return passes * 2 * width * static_cast<double>(model.num_local_experts);
    case Op::kHead:  // Its gradients are made in the forward pass.
      return task.phase == Phase::kForward ? 6 * width * static_cast<double>(model.vocab_size) : 0;
    default:
      return 0;
  }
}

}  // namespace

RankModel::Pace PaceOf(const EmulatedDevice& device, const ModelConfig& model, int64_t seq) {
  return [device, model, seq](const Task& task, double units) -> int64_t {
    const double flops = FlopsPerUnit(task, model, seq) * units;
    return flops == 0 ? 0 : static_cast<int64_t>(device.task_us * 1e3 + flops / device.gflops);
  };
}

}  // namespace shoal
