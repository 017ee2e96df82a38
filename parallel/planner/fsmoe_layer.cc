#include "parallel/planner/fsmoe_layer.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "parallel/schedule/simulate.h"

namespace shoal {
namespace {

// A nanosecond a unit.
FlatCosts UnitCosts(double interference) {
  CostTable costs;
  costs.interference = interference;
  for (const Op op : {Op::kAttention, Op::kDispatch, Op::kGather, Op::kExperts, Op::kReturn, Op::kReduce, Op::kCombine}) {
    for (const Phase phase : {Phase::kForward, Phase::kBackward}) {
      for (const Lane lane : {Lane::kCompute, Lane::kIntra, Lane::kInter}) costs.models[{op, phase, lane}] = {0, 1};
    }
  }
  return FlatCosts(costs);
}

class Builder {
 public:
  Builder(const FsmoeLayer& layer, const FsmoeSchedule& schedule, Phase phase)
      : layer_(layer), schedule_(schedule), phase_(phase) {}

  Graph Build() {
    const int chunks = schedule_.chunks;
    const Lane intra = schedule_.overlap_links ? Lane::kIntra : Lane::kInter;
    const bool backward = phase_ == Phase::kBackward;
    int ready = backward ? -1 : Add(Op::kAttention, Lane::kCompute, layer_.dense, {});
    std::vector<int> gathered, experts;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int there = Add(Op::kDispatch, Lane::kInter, layer_.all_to_all.OfChunk(chunks), {ready});
      gathered.push_back(Add(Op::kGather, intra, layer_.gather.OfChunk(chunks), {there}));
    }
    AddGradients(schedule_.beside_experts);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      experts.push_back(
          Add(Op::kExperts, Lane::kCompute, layer_.experts.OfChunk(chunks), {gathered[static_cast<size_t>(chunk)]}));
    }
    std::vector<int> back;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int scattered = Add(Op::kReduce, intra, layer_.scatter.OfChunk(chunks), {experts[static_cast<size_t>(chunk)]});
      back.push_back(Add(Op::kReturn, Lane::kInter, layer_.all_to_all.OfChunk(chunks), {scattered}));
    }
    const int combined = Add(Op::kCombine, Lane::kCompute, 0, {});
    for (int task : back) graph_.tasks[static_cast<size_t>(combined)].after.push_back(task);
    if (backward) {
      AddGradients(schedule_.beside_dense);
      const int dense = Add(Op::kAttention, Lane::kCompute, layer_.dense, {});
      const int sent = AddGradients(1 - schedule_.beside_experts - schedule_.beside_dense);
      if (sent >= 0) graph_.tasks[static_cast<size_t>(sent)].after.push_back(dense);
    }
    return std::move(graph_);
  }

 private:
  int Add(Op op, Lane lane, double ns, std::initializer_list<int> after) {
    Task task;
    task.op = op;
    task.phase = phase_;
    task.lane = lane;
    task.units = ns;
    for (int before : after) {
      if (before >= 0) task.after.push_back(before);
    }
    graph_.tasks.push_back(std::move(task));
    return static_cast<int>(graph_.tasks.size()) - 1;
  }
  int AddGradients(double share) {
    constexpr double kNothing = 1e-9;
    if (phase_ != Phase::kBackward || share < kNothing || layer_.gradients.whole == 0) return -1;
    return Add(Op::kReduce, Lane::kInter, layer_.gradients.fixed + share * layer_.gradients.whole, {});
  }

  const FsmoeLayer& layer_;
  const FsmoeSchedule& schedule_;
  const Phase phase_;
  Graph graph_;
};

}  // namespace

Graph FsmoeGraph(const FsmoeLayer& layer, const FsmoeSchedule& schedule, Phase phase) {
  return Builder(layer, schedule, phase).Build();
}

double FsmoeTime(const FsmoeLayer& layer, const FsmoeSchedule& schedule, Phase phase, double interference) {
  return SimulateAlike(FsmoeGraph(layer, schedule, phase), UnitCosts(interference), Record::kNo).step_ns;
}

}  // namespace shoal
