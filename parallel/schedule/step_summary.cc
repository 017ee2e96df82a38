#include "parallel/schedule/step_summary.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "runtime/base/check.h"

namespace shoal {
namespace {

struct Interval {
  int64_t begin, end;
};

// When any lane but the compute lane works: ascending, apart.
std::vector<Interval> OthersBusy(const Graph& graph, const StepRecord& record) {
  std::vector<Interval> all, merged;
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    if (graph.tasks[i].lane != Lane::kCompute) all.push_back({record.tasks[i].begin_ns, record.tasks[i].end_ns});
  }
  std::sort(all.begin(), all.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  for (const Interval& next : all) {
    if (!merged.empty() && next.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, next.end);
    } else {
      merged.push_back(next);
    }
  }
  return merged;
}

}  // namespace

StepSummary Summarise(const Graph& graph, const StepRecord& record) {
  SHOAL_CHECK_EQ(graph.tasks.size(), record.tasks.size());
  StepSummary summary;
  summary.step_ns = record.end_ns - record.begin_ns;
  const std::vector<Interval> others = OthersBusy(graph, record);
  size_t next = 0;  // The first of them that does not end before the gap; gaps ascend.
  const auto exposed = [&](int64_t begin, int64_t end) {
    while (next < others.size() && others[next].end <= begin) ++next;
    for (size_t i = next; i < others.size() && others[i].begin < end; ++i) {
      summary.exposed_ns += std::min(end, others[i].end) - std::max(begin, others[i].begin);
    }
  };
  int64_t idle_since = record.begin_ns, last = record.begin_ns;
  std::vector<size_t> compute;  // In the order in which they ran.
  for (size_t i = 0; i < graph.tasks.size(); ++i) {
    const TaskRecord& times = record.tasks[i];
    summary.busy_ns[static_cast<size_t>(graph.tasks[i].lane)] += times.end_ns - times.begin_ns;
    last = std::max(last, times.end_ns);
    if (graph.tasks[i].lane == Lane::kCompute) compute.push_back(i);
  }
  std::sort(compute.begin(), compute.end(), [&](size_t a, size_t b) {
    return std::pair(record.tasks[a].begin_ns, a) < std::pair(record.tasks[b].begin_ns, b);
  });
  for (size_t i : compute) {
    int64_t ready = idle_since;
    for (int before : graph.tasks[i].after) ready = std::max(ready, record.tasks[static_cast<size_t>(before)].end_ns);
    exposed(idle_since, ready);
    idle_since = record.tasks[i].end_ns;
  }
  exposed(idle_since, std::max(idle_since, last));
  summary.overhead_ns = summary.step_ns - summary.busy_ns[static_cast<size_t>(Lane::kCompute)] - summary.exposed_ns;
  return summary;
}

}  // namespace shoal
