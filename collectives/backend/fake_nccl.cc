#include "collectives/backend/fake_nccl.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "collectives/backend/nccl_plan.h"
#include "collectives/engine/reduce.h"
#include "runtime/base/check.h"
#include "runtime/base/mutex.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Code = DeviceResult::Code;
using Kind = NcclCall::Kind;

// After which a wait for an operation is a hang.
constexpr std::chrono::seconds kHang(20);
// How often a communicator is busy when it is asked after a call.
constexpr int kBusyLooks = 2;

DeviceResult Say(Code code, std::string message) {
  static thread_local std::string kept;
  kept = std::move(message);
  return {code, kept.c_str()};
}

// One call as it waits for those of the other ranks.
struct Part {
  NcclCall call;
  int64_t number = 0;            // Among the communicator's collectives, or the messages of this pair and direction.
  std::vector<std::byte> input;  // As it was at the call.
  std::vector<std::byte> output;
  bool done = false;
};

// What a group of calls became on one rank.
struct Kernel {
  NcclComm* comm;
  std::vector<Part> parts;
  bool done = false;
};

struct Clique {
  int size = 0;
  std::vector<NcclComm*> members;
  int finalized = 0;
};

int64_t BytesOf(const NcclCall& call, int ranks) { return call.count * SizeOf(call.dtype) * ranks; }

}  // namespace

struct NcclComm {
  std::shared_ptr<Clique> clique;
  int rank = 0;
  std::deque<std::shared_ptr<Kernel>> kernels;  // Not done.
  int64_t collectives = 0;
  std::map<std::pair<bool, int>, int64_t> messages;  // By direction and peer.
  int busy = 0;
  bool finalizing = false;
  bool over = false;  // Aborted or destroyed.
};

struct FakeNccl::State {
  explicit State(FakeDevice& device) : device(device), inner(device.api()), outer(device.api()) {}

  FakeDevice& device;
  const DeviceApi inner;
  DeviceApi outer;
  NcclApi api = {};
  mutable Mutex mutex;
  CondVar changed;
  std::map<std::string, std::shared_ptr<Clique>> cliques;
  std::vector<std::unique_ptr<NcclComm>> comms;
  std::map<DeviceStream*, std::vector<std::shared_ptr<Kernel>>> streams;  // All that were put there.
  std::map<DeviceEvent*, std::pair<DeviceStream*, size_t>> events;        // How many were before.
  std::map<std::pair<std::string, int>, int> calls, failures;
  std::vector<std::string> faults;
  std::vector<void*> released, released_host;
  int ids = 0;

  DeviceResult Fault(std::string text) {
    faults.push_back(text);
    return Say(Code::kFailed, std::move(text));
  }
  // Counts a call, which may have been told to fail.
  DeviceResult Enter(std::string_view function, int rank) {
    const std::pair<std::string, int> key(function, rank);
    ++calls[key];
    const auto failure = failures.find(key);
    if (failure == failures.end() || --failure->second > 0) return {};
    failures.erase(failure);
    return Say(Code::kFailed, absl::StrCat("told to fail in ", AbslSv(function)));
  }
  DeviceResult Use(std::string_view function, NcclComm* comm) {
    if (comm == nullptr) return Fault(absl::StrCat(AbslSv(function), " without a communicator"));
    if (comm->over) return Fault(absl::StrCat(AbslSv(function), " after the end of the communicator"));
    const bool waits = function != "progress" && function != "abort";
    if (waits && comm->busy > 0) return Fault(absl::StrCat(AbslSv(function), " while the communicator is busy"));
    return Enter(function, comm->rank);
  }

  bool Passed(DeviceStream* stream, size_t count) {
    const auto& kernels = streams[stream];
    return std::all_of(kernels.begin(), kernels.begin() + static_cast<ptrdiff_t>(std::min(count, kernels.size())),
                       [](const auto& kernel) { return kernel->done; });
  }
  DeviceResult AwaitPassed(DeviceStream* stream, size_t count) {
    const auto end = std::chrono::steady_clock::now() + kHang;
    while (!Passed(stream, count)) {
      if (!changed.WaitUntil(&mutex, end) && !Passed(stream, count)) return Fault("a stream hangs in an operation");
    }
    return {};
  }

  void Advance(Clique& clique);
  Part* Find(Clique& clique, int rank, const Part& like);
  bool RunPart(Clique& clique, int rank, Part& part);
  bool RunMessage(Clique& clique, int rank, Part& part);
};

namespace {

FakeNccl::State* g_state = nullptr;
thread_local int t_depth = 0;
thread_local std::vector<std::tuple<NcclCall, NcclComm*, DeviceStream*>> t_group;

bool IsMessage(Kind kind) { return kind == Kind::kSend || kind == Kind::kReceive; }

// Elements that a rank gives, and gets.
int64_t InputBytes(const NcclCall& call, int rank, int size) {
  if (call.kind == Kind::kReceive || (call.kind == Kind::kBroadcast && rank != call.peer)) return 0;
  return BytesOf(call, call.kind == Kind::kReduceScatter ? size : 1);
}
int64_t OutputBytes(const NcclCall& call, int rank, int size) {
  if (call.kind == Kind::kSend || (call.kind == Kind::kReduce && rank != call.peer)) return 0;
  return BytesOf(call, call.kind == Kind::kAllGather ? size : 1);
}

ReduceOp OpOf(NcclOp op) {
  switch (op) {
    case NcclOp::kSum: return ReduceOp::kSum;
    case NcclOp::kProduct: return ReduceOp::kProduct;
    case NcclOp::kMin: return ReduceOp::kMin;
    case NcclOp::kMax: return ReduceOp::kMax;
    case NcclOp::kAverage: return ReduceOp::kAverage;
  }
  return ReduceOp::kSum;
}

// What a rank of a collective gets.
void Compute(const std::vector<Part*>& parts, int rank) {
  Part& own = *parts[static_cast<size_t>(rank)];
  const NcclCall& call = own.call;
  if (own.output.empty()) return;
  const size_t bytes = static_cast<size_t>(BytesOf(call, 1));
  if (call.kind == Kind::kBroadcast) {
    own.output = parts[static_cast<size_t>(call.peer)]->input;
  } else if (call.kind == Kind::kAllGather) {
    for (size_t i = 0; i < parts.size(); ++i) std::memcpy(own.output.data() + i * bytes, parts[i]->input.data(), bytes);
  } else {
    const size_t begin = call.kind == Kind::kReduceScatter ? static_cast<size_t>(rank) * bytes : 0;
    std::vector<const std::byte*> from;
    for (const Part* part : parts) from.push_back(part->input.data() + begin);
    std::byte* const to = own.output.data();
    Reduce(call.dtype, OpOf(call.op), from, absl::MakeConstSpan(&to, 1), call.count, static_cast<int>(parts.size()));
  }
}

}  // namespace

// The part of the kernel at the head of a rank that belongs to this one.
Part* FakeNccl::State::Find(Clique& clique, int rank, const Part& like) {
  NcclComm* const comm = clique.members[static_cast<size_t>(rank)];
  if (comm == nullptr || comm->over || comm->kernels.empty()) return nullptr;
  for (Part& part : comm->kernels.front()->parts) {
    if (!IsMessage(part.call.kind) && part.number == like.number) return &part;
  }
  return nullptr;
}

bool FakeNccl::State::RunMessage(Clique& clique, int rank, Part& part) {
  NcclComm* const peer = clique.members[static_cast<size_t>(part.call.peer)];
  if (part.call.kind == Kind::kReceive || peer == nullptr || peer->over || peer->kernels.empty()) return false;
  for (Part& other : peer->kernels.front()->parts) {
    if (other.call.kind != Kind::kReceive || other.call.peer != rank || other.number != part.number) continue;
    if (other.call.count != part.call.count || other.call.dtype != part.call.dtype) Fault("a send and its receive differ in size");
    other.output = part.input;
    other.output.resize(static_cast<size_t>(BytesOf(other.call, 1)));
    return part.done = other.done = true;
  }
  return false;
}

// Ends what can end of a part at the head of `rank`.
bool FakeNccl::State::RunPart(Clique& clique, int rank, Part& part) {
  if (part.done) return false;
  if (IsMessage(part.call.kind)) return RunMessage(clique, rank, part);
  std::vector<Part*> parts;
  for (int other = 0; other < clique.size; ++other) {
    parts.push_back(Find(clique, other, part));
    if (parts.back() == nullptr) return false;
    const NcclCall &a = part.call, &b = parts.back()->call;
    if (std::tie(a.kind, a.count, a.dtype, a.op, a.peer) != std::tie(b.kind, b.count, b.dtype, b.op, b.peer)) return false;  // Hangs.
  }
  for (int other = 0; other < clique.size; ++other) Compute(parts, other);
  for (Part* other : parts) other->done = true;
  return true;
}

void FakeNccl::State::Advance(Clique& clique) {
  for (bool moved = true; moved;) {
    moved = false;
    for (NcclComm* comm : clique.members) {
      if (comm == nullptr || comm->over || comm->kernels.empty()) continue;
      Kernel& head = *comm->kernels.front();
      for (Part& part : head.parts) moved = RunPart(clique, comm->rank, part) || moved;
      if (!std::all_of(head.parts.begin(), head.parts.end(), [](const Part& part) { return part.done; })) continue;
      head.done = moved = true;
      comm->kernels.pop_front();
    }
  }
  changed.NotifyAll();
}

#define SHOAL_FAKE_STATE               \
  FakeNccl::State& state = *g_state;   \
  MutexLock lock(&state.mutex)

namespace {

DeviceResult UniqueId(NcclId* id) {
  SHOAL_FAKE_STATE;
  if (const DeviceResult told = state.Enter("unique_id", 0); told.code != Code::kOk) return told;
  *id = {};
  const std::string name = absl::StrCat("clique ", ++state.ids);
  std::memcpy(id->bytes, name.data(), name.size());
  return {};
}

DeviceResult Connect(const NcclId* id, int32_t rank, int32_t size, NcclComm** comm) {
  SHOAL_FAKE_STATE;
  if (const DeviceResult told = state.Enter("connect", rank); told.code != Code::kOk) return told;
  std::shared_ptr<Clique>& clique = state.cliques[id->bytes];
  if (clique == nullptr) clique = std::make_shared<Clique>(Clique{.size = size, .members = std::vector<NcclComm*>(static_cast<size_t>(size))});
  NcclComm*& member = clique->members[static_cast<size_t>(rank)];
  if (clique->size != size || member != nullptr) return state.Fault("two ranks of one number, or groups of two sizes, with one id");
  state.comms.push_back(std::make_unique<NcclComm>());
  member = *comm = state.comms.back().get();
  member->clique = clique;
  member->rank = rank;
  member->busy = kBusyLooks;
  return {Code::kNotReady, ""};
}

DeviceResult Progress(NcclComm* comm) {
  SHOAL_FAKE_STATE;
  if (const DeviceResult told = state.Use("progress", comm); told.code != Code::kOk) return told;
  const Clique& clique = *comm->clique;
  if (std::count(clique.members.begin(), clique.members.end(), nullptr) > 0) return {Code::kNotReady, ""};
  if (comm->finalizing && clique.finalized < clique.size) return {Code::kNotReady, ""};
  if (comm->busy > 0 && --comm->busy > 0) return {Code::kNotReady, ""};
  return {};
}

DeviceResult Finalize(NcclComm* comm) {
  SHOAL_FAKE_STATE;
  if (const DeviceResult told = state.Use("finalize", comm); told.code != Code::kOk) return told;
  if (!comm->kernels.empty()) return state.Fault("finalize with operations under way");
  comm->finalizing = true;
  ++comm->clique->finalized;
  return {Code::kNotReady, ""};
}

DeviceResult Destroy(NcclComm* comm) {
  SHOAL_FAKE_STATE;
  if (const DeviceResult told = state.Use("destroy", comm); told.code != Code::kOk) return told;
  if (!comm->finalizing || comm->clique->finalized < comm->clique->size) state.Fault("destroy before finalize is done");
  comm->over = true;
  return {};
}

DeviceResult Abort(NcclComm* comm) {
  SHOAL_FAKE_STATE;
  const DeviceResult told = state.Use("abort", comm);
  if (comm == nullptr || comm->over) return told;
  comm->over = true;
  for (const auto& kernel : comm->kernels) kernel->done = true;
  comm->kernels.clear();
  state.changed.NotifyAll();
  return told;
}

DeviceResult GroupStart() {
  ++t_depth;
  return {};
}

// Writes results, when all has come.
void Submit(FakeNccl::State& state, const std::shared_ptr<Kernel>& kernel, DeviceStream* stream) {
  state.device.Submit(stream, [kernel, at = &state]() -> DeviceResult {
    const MutexLock lock(&at->mutex);
    if (!kernel->done) return at->Fault("a stream went on before its operation had ended");
    for (const Part& part : kernel->parts) {
      if (part.done && !part.output.empty()) std::memcpy(part.call.to, part.output.data(), part.output.size());
    }
    return {};
  });
}

Part PartOf(NcclComm* comm, const NcclCall& call) {
  const int size = comm->clique->size;
  Part part = {.call = call};
  part.number = IsMessage(call.kind) ? ++comm->messages[{call.kind == Kind::kSend, call.peer}] : ++comm->collectives;
  const auto* from = static_cast<const std::byte*>(call.from);
  part.input.assign(from, from + InputBytes(call, comm->rank, size));
  part.output.resize(static_cast<size_t>(OutputBytes(call, comm->rank, size)));
  return part;
}

DeviceResult GroupEnd() {
  if (t_depth == 0) {
    SHOAL_FAKE_STATE;
    return state.Fault("a group ends that has not begun");
  }
  if (--t_depth > 0) return {};
  const auto group = std::exchange(t_group, {});
  if (group.empty()) return {};
  const auto kernel = std::make_shared<Kernel>();
  DeviceStream* const stream = std::get<2>(group.front());
  {
    SHOAL_FAKE_STATE;
    kernel->comm = std::get<1>(group.front());
    if (const DeviceResult told = state.Use("group_end", kernel->comm); told.code != Code::kOk) return told;
    for (const auto& [call, comm, where] : group) {
      if (comm != kernel->comm || where != stream) return state.Fault("a group over two communicators or streams");
      kernel->parts.push_back(PartOf(comm, call));
    }
    state.streams[stream].push_back(kernel);
  }
  Submit(*g_state, kernel, stream);
  SHOAL_FAKE_STATE;
  kernel->comm->kernels.push_back(kernel);
  kernel->comm->busy = kBusyLooks;
  state.Advance(*kernel->comm->clique);
  return {Code::kNotReady, ""};
}

DeviceResult Call(std::string_view name, const NcclCall& call, NcclComm* comm, DeviceStream* stream) {
  SHOAL_FAKE_STATE;
  if (const DeviceResult told = state.Use(name, comm); told.code != Code::kOk) return told;
  if (t_depth == 0) return state.Fault(absl::StrCat(AbslSv(name), " outside of a group"));
  if (call.count <= 0) return state.Fault(absl::StrCat(AbslSv(name), " of nothing"));
  if (call.peer < 0 || call.peer >= comm->clique->size) return state.Fault(absl::StrCat(AbslSv(name), ": no rank ", call.peer));
  t_group.emplace_back(call, comm, stream);
  return {};
}

DeviceResult AllReduce(const void* from, void* to, int64_t count, DType dtype, NcclOp op, NcclComm* comm, DeviceStream* stream) {
  return Call("all_reduce", {Kind::kAllReduce, from, to, count, dtype, op, 0}, comm, stream);
}
DeviceResult ReduceScatter(const void* from, void* to, int64_t count, DType dtype, NcclOp op, NcclComm* comm, DeviceStream* stream) {
  return Call("reduce_scatter", {Kind::kReduceScatter, from, to, count, dtype, op, 0}, comm, stream);
}
DeviceResult AllGather(const void* from, void* to, int64_t count, DType dtype, NcclComm* comm, DeviceStream* stream) {
  return Call("all_gather", {Kind::kAllGather, from, to, count, dtype, NcclOp::kSum, 0}, comm, stream);
}
DeviceResult Broadcast(const void* from, void* to, int64_t count, DType dtype, int32_t root, NcclComm* comm, DeviceStream* stream) {
  return Call("broadcast", {Kind::kBroadcast, from, to, count, dtype, NcclOp::kSum, root}, comm, stream);
}
DeviceResult ReduceTo(const void* from, void* to, int64_t count, DType dtype, NcclOp op, int32_t root, NcclComm* comm,
                      DeviceStream* stream) {
  return Call("reduce", {Kind::kReduce, from, to, count, dtype, op, root}, comm, stream);
}
DeviceResult Send(const void* from, int64_t count, DType dtype, int32_t peer, NcclComm* comm, DeviceStream* stream) {
  return Call("send", {Kind::kSend, from, nullptr, count, dtype, NcclOp::kSum, peer}, comm, stream);
}
DeviceResult Receive(void* to, int64_t count, DType dtype, int32_t peer, NcclComm* comm, DeviceStream* stream) {
  return Call("receive", {Kind::kReceive, nullptr, to, count, dtype, NcclOp::kSum, peer}, comm, stream);
}

// ---- The device's functions that wait.

DeviceResult Record(DeviceEvent* event, DeviceStream* stream) {
  {
    SHOAL_FAKE_STATE;
    state.events[event] = {stream, state.streams[stream].size()};
  }
  return g_state->inner.record(event, stream);
}

DeviceResult QueryEvent(DeviceEvent* event) {
  {
    SHOAL_FAKE_STATE;
    const auto [stream, count] = state.events[event];
    if (!state.Passed(stream, count)) return {Code::kNotReady, ""};
  }
  return g_state->inner.query_event(event);
}

DeviceResult WaitEvent(DeviceEvent* event) {
  {
    SHOAL_FAKE_STATE;
    const auto [stream, count] = state.events[event];
    if (const DeviceResult waited = state.AwaitPassed(stream, count); waited.code != Code::kOk) return waited;
  }
  return g_state->inner.wait_event(event);
}

DeviceResult WaitStream(DeviceStream* stream) {
  {
    SHOAL_FAKE_STATE;
    if (const DeviceResult waited = state.AwaitPassed(stream, SIZE_MAX); waited.code != Code::kOk) return waited;
  }
  return g_state->inner.wait_stream(stream);
}

// The fake device would finish the work of all ranks' streams first: memory is given back at the end.
DeviceResult Release(void* memory) {
  SHOAL_FAKE_STATE;
  state.released.push_back(memory);
  return {};
}
DeviceResult ReleaseHost(void* memory) {
  SHOAL_FAKE_STATE;
  state.released_host.push_back(memory);
  return {};
}

}  // namespace

FakeNccl::FakeNccl(FakeDevice& device) : state_(std::make_unique<State>(device)) {
  SHOAL_CHECK(g_state == nullptr) << "two at a time";
  g_state = state_.get();
  state_->outer.record = &Record;
  state_->outer.query_event = &QueryEvent;
  state_->outer.wait_event = &WaitEvent;
  state_->outer.wait_stream = &WaitStream;
  state_->outer.release = &Release;
  state_->outer.release_host = &ReleaseHost;
  state_->api = {.version = kNcclApiVersion,
                 .library_version = 1,
                 .unique_id = &UniqueId,
                 .connect = &Connect,
                 .progress = &Progress,
                 .finalize = &Finalize,
                 .destroy = &Destroy,
                 .abort = &Abort,
                 .group_start = &GroupStart,
                 .group_end = &GroupEnd,
                 .all_reduce = &AllReduce,
                 .reduce_scatter = &ReduceScatter,
                 .all_gather = &AllGather,
                 .broadcast = &Broadcast,
                 .reduce = &ReduceTo,
                 .send = &Send,
                 .receive = &Receive};
}

FakeNccl::~FakeNccl() {
  for (void* memory : state_->released) state_->inner.release(memory);
  for (void* memory : state_->released_host) state_->inner.release_host(memory);
  g_state = nullptr;
}

const NcclApi& FakeNccl::api() const { return state_->api; }
const DeviceApi& FakeNccl::device_api() const { return state_->outer; }

void FakeNccl::FailCall(std::string_view function, int rank, int nth) {
  const MutexLock lock(&state_->mutex);
  state_->failures[{std::string(function), rank}] = nth;
}

int FakeNccl::Calls(std::string_view function, int rank) const {
  const MutexLock lock(&state_->mutex);
  const auto found = state_->calls.find({std::string(function), rank});
  return found == state_->calls.end() ? 0 : found->second;
}

std::vector<std::string> FakeNccl::Faults() const {
  const MutexLock lock(&state_->mutex);
  std::vector<std::string> faults = state_->faults;
  for (const auto& comm : state_->comms) {
    if (!comm->over) faults.push_back(absl::StrCat("rank ", comm->rank, " has not ended a communicator"));
  }
  return faults;
}

}  // namespace shoal
