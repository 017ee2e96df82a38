#include "launch/trainer/trace.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel/schedule/trace.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kQuestions = 16;
constexpr uint32_t kQuestionTag = 0x7ace, kAnswerTag = 0x7acf;
constexpr size_t kHostBytes = 64;
constexpr size_t kHeader = 1 + kHostBytes / 8;  // The clock, the host's name.

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

absl::Status Answer(Communicator& world, int rank, const std::function<int64_t()>& now_ns) {
  const Tensor question = Empty({1}, DType::kI64), answer = Empty({1}, DType::kI64);
  for (int i = 0; i < kQuestions; ++i) {
    SHOAL_RETURN_IF_ERROR(world.Receive(question, rank, kQuestionTag, {.label = "clock"}).Await());
    answer.data<int64_t>()[0] = now_ns();
    SHOAL_RETURN_IF_ERROR(world.Send(answer, rank, kAnswerTag, {.label = "clock"}).Await());
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> Ask(Communicator& world, const std::function<int64_t()>& now_ns) {
  const Tensor question = Empty({1}, DType::kI64), answer = Empty({1}, DType::kI64);
  int64_t offset = 0, quickest = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < kQuestions; ++i) {
    const int64_t begin = now_ns();
    SHOAL_RETURN_IF_ERROR(world.Send(question, 0, kQuestionTag, {.label = "clock"}).Await());
    SHOAL_RETURN_IF_ERROR(world.Receive(answer, 0, kAnswerTag, {.label = "clock"}).Await());
    const int64_t took = now_ns() - begin;
    if (took >= quickest) continue;
    quickest = took;
    offset = answer.data<int64_t>()[0] - (begin + took / 2);
  }
  return offset;
}

std::vector<int64_t> Pack(int64_t clock_ns, const StepRecord& measured, const StepRecord& predicted) {
  std::vector<int64_t> packed(kHeader, 0);
  packed[0] = clock_ns;
  char host[kHostBytes] = "";
  (void)gethostname(host, sizeof host - 1);
  std::memcpy(&packed[1], host, sizeof host);
  for (const StepRecord* record : {&measured, &predicted}) {
    packed.insert(packed.end(), {record->begin_ns, record->end_ns});
    for (const TaskRecord& task : record->tasks) {
      packed.insert(packed.end(), {task.begin_ns, task.end_ns, std::bit_cast<int64_t>(task.units)});
    }
  }
  return packed;
}

StepRecord UnpackRecord(const int64_t** at, size_t tasks) {
  StepRecord record{.begin_ns = (*at)[0], .end_ns = (*at)[1], .tasks = {}};
  *at += 2;
  for (size_t i = 0; i < tasks; ++i, *at += 3) record.tasks.push_back({(*at)[0], (*at)[1], std::bit_cast<double>((*at)[2])});
  return record;
}

RankTrace Unpack(int rank, const int64_t* at, size_t measured_tasks, size_t predicted_tasks) {
  RankTrace trace{.rank = rank, .host = {}, .clock_ns = at[0], .measured = {}, .predicted = {}};
  char host[kHostBytes];
  std::memcpy(host, at + 1, sizeof host);
  trace.host.assign(host, strnlen(host, sizeof host));
  at += kHeader;
  trace.measured = UnpackRecord(&at, measured_tasks);
  trace.predicted = UnpackRecord(&at, predicted_tasks);
  return trace;
}

}  // namespace

absl::StatusOr<int64_t> ClockOffset(Communicator& world, const std::function<int64_t()>& now_ns) {
  if (world.index() != 0) return Ask(world, now_ns);
  for (int rank = 1; rank < world.size(); ++rank) SHOAL_RETURN_IF_ERROR(Answer(world, rank, now_ns));
  return 0;
}

absl::StatusOr<std::string> GatherTrace(int64_t step, const Graph& graph, const StepRecord& measured, const StepRecord& predicted,
                                        Communicator& world) {
  SHOAL_CHECK_EQ(measured.tasks.size(), graph.tasks.size());
  SHOAL_ASSIGN_OR_RETURN(const int64_t clock_ns, ClockOffset(world, NowNs), "comparing clocks");
  const std::vector<int64_t> packed = Pack(clock_ns, measured, predicted);
  const int64_t count = static_cast<int64_t>(packed.size());
  const bool root = world.index() == 0;
  const Tensor own = Empty({count}, DType::kI64), all = Empty({root ? count * world.size() : 0}, DType::kI64);
  std::copy(packed.begin(), packed.end(), own.data<int64_t>());
  const std::vector<int64_t> counts(static_cast<size_t>(world.size()), count);
  SHOAL_RETURN_IF_ERROR(world.Gather(own, counts, all, 0, {.label = "trace"}).Await(), "gathering records");
  if (!root) return std::string();
  std::vector<RankTrace> traces;
  for (int rank = 0; rank < world.size(); ++rank) {
    traces.push_back(Unpack(rank, all.data<int64_t>() + rank * count, measured.tasks.size(), predicted.tasks.size()));
  }
  return TraceJson(graph, step, traces);
}

}  // namespace shoal
