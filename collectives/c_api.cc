#include "collectives/c_api.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "collectives/communicator.h"
#include "collectives/engine/work_state.h"
#include "collectives/membership/coordinator.h"
#include "collectives/membership/coordinator_dialler.h"
#include "collectives/membership/membership.h"
#include "collectives/membership/state_sync.h"
#include "runtime/base/status.h"

struct shoal_group {
  std::unique_ptr<shoal::Communicator> communicator;
};
struct shoal_work {
  shoal::Work work;
};
struct shoal_memory {
  shoal::Tensor tensor;
};
struct shoal_member {
  std::unique_ptr<shoal::Membership> membership;
};
struct shoal_coordinator {
  std::unique_ptr<shoal::CoordinatorServer> server;
  std::string address;
};

namespace {

using shoal::DType;
using shoal::OpOptions;
using shoal::ReduceOp;
using shoal::Tensor;

// Of one tensor or part of one: more than any memory, and no sum or product of such numbers overflows.
constexpr int64_t kElementsMax = int64_t{1} << 44;

std::string& ErrorText() {
  thread_local std::string text;
  return text;
}

shoal_code Report(const absl::Status& status) {
  if (status.ok()) return SHOAL_OK;
  ErrorText() = std::string(status.message());
  return static_cast<shoal_code>(status.code());
}

absl::Duration Seconds(double seconds) {
  return seconds < 0 ? absl::InfiniteDuration() : absl::Seconds(seconds);
}

double Seconds(absl::Duration duration) {
  return duration == absl::InfiniteDuration() ? SHOAL_FOREVER : absl::ToDoubleSeconds(duration);
}

absl::Time After(double seconds) {
  return seconds < 0 ? absl::InfiniteFuture() : absl::Now() + absl::Seconds(seconds);
}

void SetText(const char* from, std::string* to) {
  if (from != nullptr) *to = from;
}

// The caller's options as this library knows them: fields that an older header did not have keep their defaults.
template <class T>
T Known(const T* given, void (*init)(T*)) {
  T options;
  init(&options);
  if (given != nullptr) std::memcpy(&options, given, std::min(given->struct_size, sizeof options));
  return options;
}

bool IsDType(shoal_dtype dtype) { return dtype >= SHOAL_F32 && dtype <= SHOAL_I64; }

// A number that is none stays one, so that the operation refuses it.
ReduceOp Reduction(shoal_op op) {
  return static_cast<ReduceOp>(op >= SHOAL_SUM && op <= SHOAL_AVERAGE ? static_cast<int>(op) : 0xff);
}

bool IsCount(int64_t count) { return count >= 0 && count <= kElementsMax; }

// Whether `data` can be an array of `count`.
bool IsArray(const void* data, int64_t count) { return count == 0 || (count > 0 && data != nullptr); }

Tensor Elements(const void* data, int64_t count, shoal_dtype dtype) {
  return Tensor(const_cast<void*>(data), {data == nullptr ? 0 : count}, static_cast<DType>(dtype));
}

absl::Span<const int64_t> Counts(const shoal_group* group, const int64_t* counts) {
  return {counts, counts == nullptr ? 0 : static_cast<size_t>(group->communicator->size())};
}

int64_t Sum(absl::Span<const int64_t> counts) {
  int64_t sum = 0;
  for (int64_t count : counts) sum += count;
  return sum;
}

// One call: its options translated, and what is wrong with it before the library looks at it.
class Call {
 public:
  Call(const shoal_op_options* given, shoal_dtype dtype, std::initializer_list<int64_t> counts)
      : options_(Known(given, &shoal_op_options_init)) {
    if (!IsDType(dtype)) wrong_ = absl::InvalidArgumentError(absl::StrCat("dtype ", static_cast<int>(dtype)));
    if (options_.wire < SHOAL_AS_IS || options_.wire > SHOAL_WIRE_FP8) {
      Refuse(absl::StrCat("wire format ", static_cast<int>(options_.wire)));
    }
    if (options_.order < SHOAL_FAST || options_.order > SHOAL_FIXED) {
      Refuse(absl::StrCat("order ", static_cast<int>(options_.order)));
    }
    for (int64_t count : counts) CheckCount(count);
    op_.deadline = After(options_.timeout);
    if (options_.label != nullptr) op_.label = options_.label;
    if (options_.algorithm != nullptr) op_.algorithm = options_.algorithm;
    op_.wire = static_cast<shoal::WireFormat>(options_.wire);
    op_.order = static_cast<shoal::Order>(options_.order);
  }

  // Runs `issue`, unless something is wrong.
  template <class Issue>
  shoal_work* Run(Issue issue) const {
    if (wrong_.ok()) return new shoal_work{issue(op_)};
    return new shoal_work{shoal::EndedWork(wrong_)};
  }
  void CheckCount(int64_t count) {
    if (!IsCount(count)) Refuse(absl::StrCat("count ", count));
  }
  bool refused() const { return !wrong_.ok(); }
  void Refuse(const std::string& why) { wrong_ = absl::InvalidArgumentError(why); }

 private:
  const shoal_op_options options_;
  OpOptions op_;
  absl::Status wrong_;
};

// Of a v-operation: one count per rank.
absl::Span<const int64_t> CheckedCounts(Call* call, const shoal_group* group, const int64_t* counts) {
  if (counts == nullptr) call->Refuse("no counts");
  const absl::Span<const int64_t> checked = Counts(group, counts);
  for (int64_t count : checked) call->CheckCount(count);
  return checked;
}

struct Sparse {
  std::vector<Tensor> chunks;
  std::vector<shoal::SparseMove> moves;
};

// Empty when something is wrong.
Sparse SparseArguments(Call* call, void* const* chunks, const int64_t* counts, int32_t chunks_count, shoal_dtype dtype,
                       const shoal_sparse_move* moves, int32_t moves_count) {
  if (!IsArray(chunks, chunks_count) || !IsArray(counts, chunks_count) || !IsArray(moves, moves_count)) {
    call->Refuse(absl::StrCat("arrays of ", chunks_count, " chunks and ", moves_count, " moves"));
    return {};
  }
  Sparse sparse;
  for (int32_t c = 0; c < chunks_count; ++c) {
    call->CheckCount(counts[c]);
    if (call->refused()) return {};
    sparse.chunks.push_back(Elements(chunks[c], counts[c], dtype));
  }
  for (int32_t m = 0; m < moves_count; ++m) {
    const shoal_sparse_move& move = moves[m];
    if (!IsArray(move.holders, move.holders_count)) {
      call->Refuse(absl::StrCat("move ", m, ": an array of ", move.holders_count, " holders"));
      return {};
    }
    sparse.moves.push_back(
        {move.chunk, move.owner, std::vector<int>(move.holders, move.holders + move.holders_count)});
  }
  return sparse;
}

}  // namespace

int32_t shoal_api_version(void) { return SHOAL_API_VERSION; }
const char* shoal_error(void) { return ErrorText().c_str(); }

// ---- Connecting.

void shoal_world_options_init(shoal_world_options* options) {
  const shoal::WorldOptions defaults;
  *options = {};
  options->struct_size = sizeof *options;
  options->size = defaults.size;
  options->connect_timeout = Seconds(defaults.connect_timeout);
  options->timeout = Seconds(defaults.timeout);
  options->heartbeat_timeout = Seconds(defaults.heartbeat_timeout);
}

shoal_code shoal_connect(const shoal_world_options* given, shoal_group** group) {
  const shoal_world_options options = Known(given, &shoal_world_options_init);
  shoal::WorldOptions world;
  world.rank = options.rank;
  world.size = options.size;
  SetText(options.master_host, &world.master_host);
  world.master_port = options.master_port;
  SetText(options.job_id, &world.job_id);
  SetText(options.secret, &world.secret);
  SetText(options.transport, &world.transport);
  SetText(options.interface_name, &world.interface);
  world.flows = options.flows;
  world.connect_timeout = Seconds(options.connect_timeout);
  world.timeout = Seconds(options.timeout);
  world.heartbeat_timeout = Seconds(options.heartbeat_timeout);
  absl::StatusOr<std::unique_ptr<shoal::Communicator>> connected = shoal::ConnectWorld(world);
  if (!connected.ok()) return Report(connected.status());
  *group = new shoal_group{*std::move(connected)};
  return SHOAL_OK;
}

void shoal_member_options_init(shoal_member_options* options) {
  const shoal::MembershipOptions defaults;
  *options = {};
  options->struct_size = sizeof *options;
  options->wanted_rank = defaults.wanted_rank;
  options->coordinator_timeout = Seconds(defaults.coordinator_timeout);
  options->heartbeat_interval = Seconds(defaults.heartbeat_interval);
  options->timeout = Seconds(defaults.world.timeout);
  options->heartbeat_timeout = 1.0;
}

shoal_code shoal_join(const shoal_member_options* given, shoal_member** member) {
  const shoal_member_options options = Known(given, &shoal_member_options_init);
  shoal::MembershipOptions join;
  if (options.coordinators == nullptr) {
    absl::StatusOr<shoal::MembershipOptions> told = shoal::MembershipOptionsFromEnvironment();
    if (!told.ok()) return Report(told.status());
    join = *std::move(told);
  } else {
    join.coordinators = shoal::SplitCoordinators(options.coordinators);
  }
  join.wanted_rank = options.wanted_rank;
  join.coordinator_timeout = Seconds(options.coordinator_timeout);
  join.heartbeat_interval = Seconds(options.heartbeat_interval);
  SetText(options.job_id, &join.world.job_id);
  SetText(options.secret, &join.world.secret);
  SetText(options.transport, &join.world.transport);
  SetText(options.interface_name, &join.world.interface);
  join.world.flows = options.flows;
  join.world.timeout = Seconds(options.timeout);
  join.world.heartbeat_timeout = Seconds(options.heartbeat_timeout);
  absl::StatusOr<std::unique_ptr<shoal::Membership>> joined = shoal::Membership::Join(join);
  if (!joined.ok()) return Report(joined.status());
  *member = new shoal_member{*std::move(joined)};
  return SHOAL_OK;
}

shoal_code shoal_next_epoch(shoal_member* member, double timeout, shoal_group** group) {
  absl::StatusOr<std::unique_ptr<shoal::Communicator>> next = member->membership->NextEpoch(After(timeout));
  if (!next.ok()) return Report(next.status());
  *group = new shoal_group{*std::move(next)};
  return SHOAL_OK;
}

int32_t shoal_joiners_waiting(const shoal_member* member) { return member->membership->JoinersWaiting(); }
void shoal_leave(shoal_member* member) { delete member; }

void shoal_coordinator_options_init(shoal_coordinator_options* options) {
  const shoal::CoordinatorOptions defaults;
  *options = {};
  options->struct_size = sizeof *options;
  options->size_min = defaults.size_min;
  options->size_max = defaults.size_max;
  options->heartbeat_timeout = Seconds(defaults.heartbeat_timeout);
}

shoal_code shoal_coordinator_start(const shoal_coordinator_options* given, shoal_coordinator** coordinator) {
  const shoal_coordinator_options options = Known(given, &shoal_coordinator_options_init);
  shoal::CoordinatorServerOptions server;
  SetText(options.listen, &server.listen);
  SetText(options.job_id, &server.job_id);
  SetText(options.secret, &server.secret);
  server.core.size_min = options.size_min;
  server.core.size_max = options.size_max;
  server.core.heartbeat_timeout = Seconds(options.heartbeat_timeout);
  absl::StatusOr<std::unique_ptr<shoal::CoordinatorServer>> started = shoal::CoordinatorServer::Start(server);
  if (!started.ok()) return Report(started.status());
  std::string address = (*started)->address();
  *coordinator = new shoal_coordinator{*std::move(started), std::move(address)};
  return SHOAL_OK;
}

const char* shoal_coordinator_address(const shoal_coordinator* coordinator) { return coordinator->address.c_str(); }
void shoal_coordinator_stop(shoal_coordinator* coordinator) { delete coordinator; }

// ---- Groups.

int32_t shoal_group_index(const shoal_group* group) { return group->communicator->index(); }
int32_t shoal_group_size(const shoal_group* group) { return group->communicator->size(); }
uint64_t shoal_group_epoch(const shoal_group* group) { return static_cast<uint64_t>(group->communicator->epoch()); }
shoal_code shoal_group_status(const shoal_group* group) { return Report(group->communicator->status()); }

shoal_code shoal_split(shoal_group* group, const int32_t* members, int32_t count, shoal_group** part) {
  if (!IsArray(members, count)) {
    return Report(absl::InvalidArgumentError(absl::StrCat("an array of ", count, " members")));
  }
  const std::vector<int> indices(members, members + count);
  absl::StatusOr<std::unique_ptr<shoal::Communicator>> split = group->communicator->Split(indices);
  if (!split.ok()) return Report(split.status());
  *part = new shoal_group{*std::move(split)};
  return SHOAL_OK;
}

void shoal_abort(shoal_group* group, const char* cause) {
  group->communicator->Abort(absl::CancelledError(cause == nullptr ? "no cause given" : cause));
}

void shoal_group_free(shoal_group* group) { delete group; }

shoal_code shoal_allocate(shoal_group* group, size_t bytes, shoal_memory** memory) {
  if (bytes > static_cast<size_t>(kElementsMax)) {
    return Report(absl::ResourceExhaustedError(absl::StrCat("allocate ", bytes, " bytes: no machine has so many")));
  }
  absl::StatusOr<Tensor> tensor = group->communicator->Allocate({static_cast<int64_t>(bytes)}, DType::kU8);
  if (!tensor.ok()) return Report(tensor.status());
  *memory = new shoal_memory{*std::move(tensor)};
  return SHOAL_OK;
}

void* shoal_memory_data(const shoal_memory* memory) { return memory->tensor.raw(); }
void shoal_memory_free(shoal_memory* memory) { delete memory; }

// ---- Operations.

void shoal_op_options_init(shoal_op_options* options) {
  *options = {};
  options->struct_size = sizeof *options;
  options->timeout = SHOAL_FOREVER;
}

shoal_code shoal_await(shoal_work* work, double seconds) {
  const absl::Status status = work->work.Await(After(seconds));
  if (!absl::IsDeadlineExceeded(status) || work->work.Done()) {
    const absl::Status ended = work->work.Await();
    delete work;
    return Report(ended);
  }
  return Report(status);
}

int shoal_done(const shoal_work* work) { return work->work.Done() ? 1 : 0; }
void shoal_work_drop(shoal_work* work) { delete work; }

shoal_work* shoal_all_reduce(shoal_group* group, const void* in, void* out, int64_t count, shoal_dtype dtype, shoal_op op,
                             const shoal_op_options* options) {
  return Call(options, dtype, {count}).Run([&](const OpOptions& o) {
    return group->communicator->AllReduce(Elements(in, count, dtype), Elements(out, count, dtype),
                                          Reduction(op), o);
  });
}

shoal_work* shoal_reduce_scatter(shoal_group* group, const void* in, const int64_t* counts, void* out, shoal_dtype dtype,
                                 shoal_op op, const shoal_op_options* options) {
  Call call(options, dtype, {});
  const auto all = CheckedCounts(&call, group, counts);
  return call.Run([&](const OpOptions& o) {
    return group->communicator->ReduceScatter(Elements(in, Sum(all), dtype), all,
                                              Elements(out, all[group->communicator->index()], dtype),
                                              Reduction(op), o);
  });
}

shoal_work* shoal_all_gather(shoal_group* group, const void* in, const int64_t* counts, void* out, shoal_dtype dtype,
                             const shoal_op_options* options) {
  Call call(options, dtype, {});
  const auto all = CheckedCounts(&call, group, counts);
  return call.Run([&](const OpOptions& o) {
    return group->communicator->AllGather(Elements(in, all[group->communicator->index()], dtype), all,
                                          Elements(out, Sum(all), dtype), o);
  });
}

shoal_work* shoal_all_to_all(shoal_group* group, const void* in, void* out, int64_t count, shoal_dtype dtype,
                             const shoal_op_options* options) {
  return Call(options, dtype, {count}).Run([&](const OpOptions& o) {
    const int64_t total = count * group->communicator->size();
    return group->communicator->AllToAll(Elements(in, total, dtype), {}, Elements(out, total, dtype), {}, o);
  });
}

shoal_work* shoal_all_to_allv(shoal_group* group, const void* in, const int64_t* send_counts, void* out,
                              const int64_t* recv_counts, shoal_dtype dtype, const shoal_op_options* options) {
  Call call(options, dtype, {});
  const auto sent = CheckedCounts(&call, group, send_counts);
  const auto received = CheckedCounts(&call, group, recv_counts);
  return call.Run([&](const OpOptions& o) {
    return group->communicator->AllToAll(Elements(in, Sum(sent), dtype), sent, Elements(out, Sum(received), dtype),
                                         received, o);
  });
}

shoal_work* shoal_broadcast(shoal_group* group, void* in_out, int64_t count, shoal_dtype dtype, int32_t root,
                            const shoal_op_options* options) {
  return Call(options, dtype, {count}).Run([&](const OpOptions& o) {
    return group->communicator->Broadcast(Elements(in_out, count, dtype), root, o);
  });
}

shoal_work* shoal_reduce(shoal_group* group, const void* in, void* out, int64_t count, shoal_dtype dtype, int32_t root,
                         shoal_op op, const shoal_op_options* options) {
  return Call(options, dtype, {count}).Run([&](const OpOptions& o) {
    return group->communicator->Reduce(Elements(in, count, dtype), Elements(out, count, dtype), root,
                                       Reduction(op), o);
  });
}

shoal_work* shoal_gather(shoal_group* group, const void* in, const int64_t* counts, void* out, shoal_dtype dtype,
                         int32_t root, const shoal_op_options* options) {
  Call call(options, dtype, {});
  const auto all = CheckedCounts(&call, group, counts);
  return call.Run([&](const OpOptions& o) {
    return group->communicator->Gather(Elements(in, all[group->communicator->index()], dtype), all,
                                       Elements(out, Sum(all), dtype), root, o);
  });
}

shoal_work* shoal_scatter(shoal_group* group, const void* in, const int64_t* counts, void* out, shoal_dtype dtype,
                          int32_t root, const shoal_op_options* options) {
  Call call(options, dtype, {});
  const auto all = CheckedCounts(&call, group, counts);
  return call.Run([&](const OpOptions& o) {
    return group->communicator->Scatter(Elements(in, Sum(all), dtype), all,
                                        Elements(out, all[group->communicator->index()], dtype), root, o);
  });
}

shoal_work* shoal_barrier(shoal_group* group, const shoal_op_options* options) {
  return Call(options, SHOAL_U8, {}).Run([&](const OpOptions& o) { return group->communicator->Barrier(o); });
}

shoal_work* shoal_send(shoal_group* group, const void* in, int64_t count, shoal_dtype dtype, int32_t to, uint32_t tag,
                       const shoal_op_options* options) {
  return Call(options, dtype, {count}).Run([&](const OpOptions& o) {
    return group->communicator->Send(Elements(in, count, dtype), to, tag, o);
  });
}

shoal_work* shoal_receive(shoal_group* group, void* out, int64_t count, shoal_dtype dtype, int32_t from, uint32_t tag,
                          const shoal_op_options* options) {
  return Call(options, dtype, {count}).Run([&](const OpOptions& o) {
    return group->communicator->Receive(Elements(out, count, dtype), from, tag, o);
  });
}

shoal_work* shoal_sparse_all_gather(shoal_group* group, void* const* chunks, const int64_t* counts, int32_t chunks_count,
                                    shoal_dtype dtype, const shoal_sparse_move* moves, int32_t moves_count,
                                    const shoal_op_options* options) {
  Call call(options, dtype, {});
  const Sparse sparse = SparseArguments(&call, chunks, counts, chunks_count, dtype, moves, moves_count);
  return call.Run(
      [&](const OpOptions& o) { return group->communicator->SparseAllGather(sparse.chunks, sparse.moves, o); });
}

shoal_work* shoal_sparse_reduce_scatter(shoal_group* group, void* const* chunks, const int64_t* counts,
                                        int32_t chunks_count, shoal_dtype dtype, const shoal_sparse_move* moves,
                                        int32_t moves_count, shoal_op op, const shoal_op_options* options) {
  Call call(options, dtype, {});
  const Sparse sparse = SparseArguments(&call, chunks, counts, chunks_count, dtype, moves, moves_count);
  return call.Run([&](const OpOptions& o) {
    return group->communicator->SparseReduceScatter(sparse.chunks, sparse.moves, Reduction(op), o);
  });
}

// ---- State.

shoal_code shoal_sync_state(shoal_group* group, const shoal_state* states, int32_t states_count, shoal_role role,
                            double timeout, uint64_t* revision) {
  const auto refuse = [](const std::string& why) { return Report(absl::InvalidArgumentError(why)); };
  if (!IsArray(states, states_count)) return refuse(absl::StrCat("an array of ", states_count, " states"));
  if (role < SHOAL_EITHER || role > SHOAL_SEND_ONLY) return refuse(absl::StrCat("role ", static_cast<int>(role)));
  if (revision == nullptr) return refuse("no revision");
  std::vector<shoal::NamedTensor> tensors;
  for (const shoal_state& state : absl::MakeSpan(states, states_count)) {
    if (state.name == nullptr) return refuse("a state without a name");
    if (!IsDType(state.dtype)) return refuse(absl::StrCat(state.name, ": dtype ", static_cast<int>(state.dtype)));
    if (!IsCount(state.count) || !IsArray(state.data, state.count)) {
      return refuse(absl::StrCat(state.name, ": an array of ", state.count));
    }
    tensors.push_back({state.name, Elements(state.data, state.count, state.dtype)});
  }
  shoal::SyncOptions options;
  options.role = static_cast<shoal::SyncRole>(role);
  options.deadline = After(timeout);
  const absl::StatusOr<shoal::SyncReport> report =
      shoal::SyncState(*group->communicator, tensors, *revision, options);
  if (report.ok()) *revision = report->revision;
  return Report(report.status());
}
