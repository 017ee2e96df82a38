#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "parallel/planner/layout.h"
#include "parallel/planner/sweeps.h"
#include "parallel/schedule/scheduler.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int kDevices = 8;

struct Model {
  const char* name;
  int width, inner, choices, layers, heads, tokens;  // Tokens of a rank, one sequence.
};
constexpr Model kModels[] = {{"wide", 7168, 2048, 8, 12, 128, 4096},
                             {"fine", 2048, 1024, 8, 16, 16, 4096},
                             {"small", 2048, 1408, 2, 24, 16, 2048}};

// Hosts of 8 H100 with 400 Gbit/s each (configs/clusters/h100-8x.yaml), as many as one group of experts has.
Cluster ClusterOf(int ranks, double message_us) {
  Cluster cluster;
  cluster.hosts = ranks / kDevices;
  cluster.devices_per_host = kDevices;
  cluster.bf16_peak_flops_per_ns = 989e3;
  cluster.bf16_flops_per_ns = 0.6 * cluster.bf16_peak_flops_per_ns;
  cluster.fp32_flops_per_ns = cluster.fp32_peak_flops_per_ns = 67e3;
  cluster.memory_bytes_per_ns = 3350;
  cluster.task_ns = cluster.intra_latency_ns = 8e3;
  cluster.inter_latency_ns = 20e3;
  cluster.intra_bytes_per_ns = 450;
  cluster.inter_bytes_per_ns = 400;
  cluster.intra_message_ns = 200;
  cluster.inter_message_ns = message_us * 1e3;
  cluster.interference = 1.2;
  return cluster;
}

ModelShape ShapeOf(const Model& model, int ranks) {
  ModelShape shape;
  shape.vocab = 64;  // Layers alone.
  shape.width = shape.query_size = shape.kv_size = model.width;
  shape.heads = model.heads;
  shape.expert_inner = model.inner;
  shape.experts = std::max(256, ranks);
  shape.choices = model.choices;
  shape.moe.assign(static_cast<size_t>(model.layers), true);
  shape.compute_bytes = 2;
  shape.sequences = ranks;
  shape.sequence_length = model.tokens;
  return shape;
}

enum class Way : uint8_t { kDirect, kTwoLevel, kOncePerHost };

// Rows that pass through a rank of their own host, or of the other one, which passes them on: one message to each host, of which
// the other level hides nothing. Once per host: a token with several experts on a host is sent there once.
void TakeWay(Way way, const Cluster& cluster, int choices, CostTable* costs) {
  if (way == Way::kDirect) return;
  const double hosts = cluster.hosts;
  const double reached = hosts * (1 - std::pow(1 - 1 / hosts, choices));  // Hosts of a token's experts.
  const double sent = way == Way::kTwoLevel ? 1 : reached / choices;
  const double level_ns = cluster.task_ns + cluster.intra_latency_ns + (kDevices - 2) * cluster.intra_message_ns;
  for (const Op op : {Op::kDispatch, Op::kReturn}) {
    for (const Phase phase : {Phase::kForward, Phase::kBackward}) {
      CostModel& inter = costs->models[{op, phase, Lane::kInter}];
      inter.fixed_ns = cluster.task_ns + cluster.inter_latency_ns + (hosts - 2) * cluster.inter_message_ns + level_ns;
      inter.ns_per_unit = sent * inter.ns_per_unit + (kDevices - 1.0) / kDevices / cluster.intra_bytes_per_ns;
    }
  }
}

double StepNs(const Model& model, const Cluster& cluster, Way way) {
  LaidOut out = *LayOut(ShapeOf(model, cluster.ranks()), cluster, {.expert = cluster.ranks()}, {});
  TakeWay(way, cluster, model.choices, &out.costs);
  return ChooseSchedule(out.shape, out.costs, out.work, out.topology, {}).predicted_ns;
}

}  // namespace

std::string DispatchSweepReport() {
  std::string text =
      "What it would gain to send rows between hosts in two levels, by way of one rank of a host: speed-up of whole steps over rows\n"
      "that go directly. Groups of ranks on hosts of 8 H100, a token's experts anywhere in the group, even loads; us: what each\n"
      "further peer costs an exchange; once: a token with several experts on a host is sent there once.\n"
      "wide: width 7168, experts 2048, top 8; fine: 2048, 1024, top 8; small: 2048, 1408, top 2.\n\n";
  absl::StrAppend(&text, absl::StrFormat("%-6s %6s %12s %4s %11s %11s %6s\n", "model", "ranks", "message KiB", "us", "direct ms",
                                         "two levels", "once"));
  for (const Model& model : kModels) {
    for (const int ranks : {32, 64, 256, 512}) {
      const double kib = 2.0 * model.tokens * model.choices * model.width / ranks / 1024;
      for (const double us : {1.0, 3.0}) {
        const Cluster cluster = ClusterOf(ranks, us);
        const double direct = StepNs(model, cluster, Way::kDirect);
        absl::StrAppend(&text, absl::StrFormat("%-6s %6d %12.0f %4.0f %11.1f %11.2f %6.2f\n", model.name, ranks, kib, us,
                                               direct * 1e-6, direct / StepNs(model, cluster, Way::kTwoLevel),
                                               direct / StepNs(model, cluster, Way::kOncePerHost)));
      }
    }
  }
  return text;
}

}  // namespace shoal
