#include "parallel/schedule/trace.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Json = nlohmann::json;

// Exact, unlike a double.
std::string Microseconds(int64_t ns) {
  return absl::StrFormat("%s%d.%03d", ns < 0 ? "-" : "", std::abs(ns) / 1000, std::abs(ns) % 1000);
}

std::string Quoted(const std::string& text) { return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace); }

class Writer {
 public:
  Writer(const Graph& graph, int64_t step) : graph_(graph), step_(step) {}

  // `sort`: the place of the process among all.
  void NameProcess(int pid, int sort, const std::string& name, const std::array<bool, kLanes>& lanes) {
    Add(absl::StrFormat(R"({"ph":"M","pid":%d,"name":"process_name","args":{"name":%s}})", pid, Quoted(name)));
    Add(absl::StrFormat(R"({"ph":"M","pid":%d,"name":"process_sort_index","args":{"sort_index":%d}})", pid, sort));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!lanes[static_cast<size_t>(lane)]) continue;
      Add(absl::StrFormat(R"({"ph":"M","pid":%d,"tid":%d,"name":"thread_name","args":{"name":"%s"}})", pid, lane,
                          AbslSv(Name(static_cast<Lane>(lane)))));
      Add(absl::StrFormat(R"({"ph":"M","pid":%d,"tid":%d,"name":"thread_sort_index","args":{"sort_index":%d}})", pid, lane, lane));
    }
  }

  // `predicted` may be null.
  void AddTasks(int pid, int64_t clock_ns, const StepRecord& record, const StepRecord* predicted) {
    SHOAL_CHECK_EQ(record.tasks.size(), graph_.tasks.size());
    for (size_t i = 0; i < graph_.tasks.size(); ++i) {
      const Task& task = graph_.tasks[i];
      const TaskRecord& times = record.tasks[i];
      std::string more;
      if (predicted != nullptr) {
        const TaskRecord& guess = predicted->tasks[i];
        more = absl::StrCat(",\"predicted_us\":", Microseconds(guess.end_ns - guess.begin_ns));
      }
      Add(absl::StrFormat(
          R"({"ph":"X","pid":%d,"tid":%d,"ts":%s,"dur":%s,"name":%s,"cat":"%s","args":{"key":"%s","units":%.17g,"step":%d%s}})", pid,
          static_cast<int>(task.lane), Microseconds(times.begin_ns + clock_ns), Microseconds(times.end_ns - times.begin_ns),
          Quoted(Name(task)), AbslSv(Name(task.op)), Name(KeyOf(task)), times.units, step_, more));
    }
  }

  std::string Take() && { return text_ + "\n]}\n"; }

 private:
  void Add(const std::string& event) {
    absl::StrAppend(&text_, first_ ? "\n" : ",\n", event);
    first_ = false;
  }

  const Graph& graph_;
  const int64_t step_;
  bool first_ = true;
  std::string text_ = "{\"traceEvents\":[";
};

}  // namespace

std::string TraceJson(const Graph& graph, int64_t step, absl::Span<const RankTrace> ranks) {
  std::array<bool, kLanes> lanes{};
  for (const Task& task : graph.tasks) lanes[static_cast<size_t>(task.lane)] = true;
  int rank_count = 0;
  for (const RankTrace& trace : ranks) rank_count = std::max(rank_count, trace.rank + 1);
  Writer writer(graph, step);
  for (const RankTrace& trace : ranks) {
    const std::string name = absl::StrCat("rank ", trace.rank, trace.host.empty() ? "" : absl::StrCat(" on ", trace.host));
    const bool has_prediction = !trace.predicted.tasks.empty();
    writer.NameProcess(trace.rank, 2 * trace.rank, name, lanes);
    writer.AddTasks(trace.rank, trace.clock_ns, trace.measured, has_prediction ? &trace.predicted : nullptr);
    if (!has_prediction) continue;
    const int pid = rank_count + trace.rank;
    writer.NameProcess(pid, 2 * trace.rank + 1, absl::StrCat("rank ", trace.rank, ", predicted"), lanes);
    const int64_t begin = trace.measured.begin_ns + trace.clock_ns - trace.predicted.begin_ns;
    writer.AddTasks(pid, begin, trace.predicted, nullptr);
  }
  return std::move(writer).Take();
}

absl::StatusOr<std::string> JoinTraces(absl::Span<const std::string> traces) {
  std::string joined = "{\"traceEvents\":[";
  bool first = true;
  for (const std::string& text : traces) {
    // Events are copied as text: their times have more digits than a double may keep.
    const size_t begin = text.find('['), end = text.rfind(']');
    if (!Json::accept(text) || begin == std::string::npos || end == std::string::npos) {
      return absl::InvalidArgumentError("not a trace");
    }
    const absl::string_view events = absl::StripAsciiWhitespace(absl::string_view(text).substr(begin + 1, end - begin - 1));
    if (events.empty()) continue;
    absl::StrAppend(&joined, first ? "\n" : ",\n", events);
    first = false;
  }
  return joined + "\n]}\n";
}

}  // namespace shoal
