#include "collectives/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "collectives/backend/mpi_group.h"
#include "collectives/engine/arguments.h"
#include "collectives/engine/executor.h"
#include "collectives/engine/group.h"
#include "collectives/engine/link_probe.h"
#include "collectives/engine/op.h"
#include "collectives/engine/planner.h"
#include "collectives/engine/routed_channel.h"
#include "collectives/engine/shm/host_group.h"
#include "collectives/engine/shm/shm_channel.h"
#include "collectives/engine/shm/tiny.h"
#include "collectives/engine/shm/tiny_call.h"
#include "collectives/engine/tcp/tcp_channel.h"
#include "collectives/engine/tuning.h"
#include "collectives/engine/world.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Scratch memory up to here is private.
constexpr int64_t kPrivateScratchBytes = 64 << 10;
// What a host is taken to have, in a group on several.
constexpr int64_t kCoresOfHosts = 8;

// Each rank of a group computes the same key without asking the others.
uint64_t GroupKey(uint64_t parent, const std::vector<int>& ranks, uint64_t number) {
  uint64_t hash = 0xcbf29ce484222325u ^ parent;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  };
  mix(number);
  for (int rank : ranks) mix(rank + 1);
  return hash | 1;  // Never 0.
}

// Of tuning.h.
class Tuned {
 public:
  virtual ~Tuned() = default;
  virtual std::vector<TuningRow> TuningRows() const = 0;
};

class Group final : public Communicator, public Tuned, private ExecutorHost {
 public:
  static absl::StatusOr<std::unique_ptr<Group>> Create(std::shared_ptr<World> world, std::shared_ptr<GroupLife> life,
                                                       CostModel model, int64_t deadline_ns);
  ~Group() override;

  int index() const override { return index_; }
  int size() const override { return size_; }
  Epoch epoch() const override { return world_->options().epoch; }

  absl::StatusOr<Tensor> Allocate(Shape shape, DType dtype) override;
  Work AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) override;
  Work ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                     const OpOptions& options) override;
  Work AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                 const OpOptions& options) override;
  Work AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                absl::Span<const int64_t> recv_counts, const OpOptions& options) override;
  Work Broadcast(const Tensor& in_out, int root, const OpOptions& options) override;
  Work Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) override;
  Work Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
              const OpOptions& options) override;
  Work Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
               const OpOptions& options) override;
  Work Barrier(const OpOptions& options) override;
  Work Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) override;
  Work Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) override;
  Work SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves,
                       const OpOptions& options) override;
  Work SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                           const OpOptions& options) override;
  absl::StatusOr<std::unique_ptr<Communicator>> Split(absl::Span<const int> members) override;
  std::vector<TuningRow> TuningRows() const override { return planner_.tuner().Rows(); }
  // Measures the links of a group on several hosts. Collective; only while no operation is pending.
  void Measure(absl::Time deadline);
  void Abort(const absl::Status& cause) override;
  absl::Status status() const override { return life_->status(); }
  void OnAbort(std::function<void(const absl::Status&)> callback) override {
    life_->AddCallback(this, std::move(callback));
  }

 private:
  Group(std::shared_ptr<World> world, std::shared_ptr<GroupLife> life, CostModel model);

  absl::StatusOr<std::unique_ptr<Channel>> OpenChannel(int64_t deadline_ns);
  std::unique_ptr<TinyGroup> NewTinyGroup(std::shared_ptr<HostGroup> group);
  void AttendTiny();
  bool MayBeTiny(const OpOptions& options) const {
    return tiny_ != nullptr && options.wire == WireFormat::kAsIs && options.algorithm.empty() && !life_->Ended() &&
           !world_->Leaving();
  }
  TinyCall NewTinyCall(const OpOptions& options, TinyOp* op) const { return {index_, size_, options.order, op}; }
  // ABORTED: nothing can be issued any more.
  absl::Status CheckOpen() const;
  Work IssueTiny(TinyOp* op, const OpOptions& options);
  Work Issue(Operation op, const OpOptions& options);
  Work IssueSparse(OpKind kind, absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                   const OpOptions& options);
  static void RunAlone(const Operation& op);

  // ExecutorHost.
  std::string Name(int member) override { return world_->RankName(life_->ranks()[member]); }
  std::string Names(const std::vector<int>& members) override;
  bool Left(int member) override { return world_->Left(life_->ranks()[member]); }
  absl::StatusOr<std::shared_ptr<const PreparedProgram>> Prepare(const Operation& op) override {
    return planner_.Find(op).program;
  }
  absl::StatusOr<std::byte*> Scratch(int64_t bytes) override;
  void Observe(const Operation&, int64_t ns) override { planner_.tuner().Observe(ns); }
  Operation* Prelude(const Operation&) override;
  std::string Elsewhere(const Operation& op) override;
  void PreludeEnded() override { planner_.tuner().ApplyExchange(observed_by_all_); }

  const std::shared_ptr<World> world_;  // Shared with the other groups of the epoch.
  const std::shared_ptr<GroupLife> life_;
  const int index_, size_;
  const Topology topology_;
  CostModel model_;
  Planner planner_;                     // Of whoever runs operations, as the scratch memory.
  uint64_t collectives_ = 0;            // Begun.
  std::vector<int64_t> observed_, observed_by_all_;
  Operation exchange_;                         // Of what was observed.
  std::shared_ptr<Segment> shared_scratch_;
  Tensor scratch_;
  std::shared_ptr<GroupExecutor> executor_;  // Null in a group of one. Shared with threads that await an operation.
  std::unique_ptr<TinyGroup> tiny_;     // Null in a group of one, and in one on several hosts.
  std::atomic<bool> tiny_attended_{false};

  Mutex mutex_;
  std::map<std::vector<int>, uint64_t> splits_ ABSL_GUARDED_BY(mutex_);  // How often, by members.
};

Topology TopologyOf(const World& world, const std::vector<int>& ranks) {
  Topology topology;
  for (int rank : ranks) {
    int host = 0;
    while (!world.OneHost({ranks[host], rank})) ++host;
    topology.host.push_back(host);
  }
  return topology;
}

// That of the members alone.
CostModel ModelOf(const CostModel& parent, const Topology& topology, absl::Span<const int> members) {
  CostModel model = parent;
  model.topology = topology;
  model.links.clear();
  for (int from : members) {
    for (int to : members) model.links.push_back(parent.links[from * parent.topology.host.size() + to]);
  }
  if (!parent.topology.order.empty()) model.topology.order = RingOrder(model.links, static_cast<int>(members.size()));
  return model;
}

Group::Group(std::shared_ptr<World> world, std::shared_ptr<GroupLife> life, CostModel model)
    : world_(std::move(world)),
      life_(std::move(life)),
      index_(life_->index()),
      size_(static_cast<int>(life_->ranks().size())),
      topology_(TopologyOf(*world_, life_->ranks())),
      model_(std::move(model)),
      planner_(index_, size_, topology_, model_) {}

absl::StatusOr<std::unique_ptr<Group>> Group::Create(std::shared_ptr<World> world, std::shared_ptr<GroupLife> life,
                                                     CostModel model, int64_t deadline_ns) {
  SHOAL_RETURN_IF_ERROR(life->status());
  std::unique_ptr<Group> group(new Group(std::move(world), std::move(life), std::move(model)));
  if (group->size_ > 1) {
    absl::StatusOr<std::unique_ptr<Channel>> channel = group->OpenChannel(deadline_ns);
    if (!channel.ok()) {
      // The others wait for this rank: they are told.
      const int rank = group->life_->ranks()[group->index_];
      if (absl::IsResourceExhausted(channel.status())) group->world_->deaths()->SetOwnLack();
      return group->life_->End(
          absl::StrCat(group->world_->RankName(rank), " cannot form a group: ", channel.status().message()));
    }
    ExecutorHost* const host = group.get();
    group->executor_ = std::make_shared<GroupExecutor>(*std::move(channel), group->life_, host);
  }
  return group;
}

absl::StatusOr<std::unique_ptr<Channel>> Group::OpenChannel(int64_t deadline_ns) {
  std::vector<int> members;
  std::vector<bool> on_host(size_);
  for (int member = 0; member < size_; ++member) {
    on_host[member] = topology_.host[member] == topology_.host[index_];
    if (on_host[member]) members.push_back(member);
  }
  std::unique_ptr<Channel> host, network;
  if (members.size() > 1) {
    SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<HostGroup> group,
                           HostGroup::Create(world_->shared_memory(), life_, members, deadline_ns,
                                             [this](int member) { return Left(member); }));
    if (static_cast<int>(members.size()) == size_) tiny_ = NewTinyGroup(group);
    host = std::make_unique<ShmChannel>(std::move(group));
  }
  if (static_cast<int>(members.size()) < size_) network = std::make_unique<TcpChannel>(world_->data_mesh(), life_.get());
  if (network == nullptr) return host;
  if (host == nullptr) return network;
  return std::unique_ptr<Channel>(
      std::make_unique<RoutedChannel>(std::move(on_host), std::move(host), std::move(network)));
}

Group::~Group() {
  SHOAL_CHECK(!life_->InCallbackOf(this)) << "a communicator is destroyed by its own OnAbort callback";
  life_->RemoveCallbacks(this);
  if (executor_ == nullptr) return;
  const bool idle = executor_->Idle() && (tiny_ == nullptr || tiny_->Idle());
  if (!idle) Abort(absl::CancelledError("closed with operations pending"));
  executor_->Close();
}

std::unique_ptr<TinyGroup> Group::NewTinyGroup(std::shared_ptr<HostGroup> group) {
  TinyGroup::Hooks hooks;
  hooks.name = [this](int member) { return Name(member); };
  hooks.names = [this](const std::vector<int>& members) { return Names(members); };
  hooks.left = [this](int member) { return Left(member); };
  hooks.attend = [this] { AttendTiny(); };
  return std::make_unique<TinyGroup>(std::move(group), absl::ToInt64Nanoseconds(world_->options().timeout),
                                     std::move(hooks));
}

void Group::AttendTiny() {
  if (tiny_attended_.exchange(true)) return;
  executor_->Attend([this] {
    if (tiny_->Poll()) return true;
    tiny_attended_.store(false);
    // What came since then, and took it to be attended.
    return tiny_->Poll() && !tiny_attended_.exchange(true);
  });
}

std::string Group::Names(const std::vector<int>& members) {
  std::vector<int> ranks;
  for (int member : members) ranks.push_back(life_->ranks()[member]);
  return world_->RankNames(ranks);
}

// Small pieces never leave the process in place; large ones are read by peers where they are.
absl::StatusOr<std::byte*> Group::Scratch(int64_t bytes) {
  if (bytes <= kPrivateScratchBytes || world_->RanksOnThisHost() == 1) {
    if (scratch_.bytes() < bytes) scratch_ = Empty({std::max(bytes * 3 / 2, kPrivateScratchBytes)}, DType::kU8);
    return static_cast<std::byte*>(scratch_.raw());
  }
  if (shared_scratch_ == nullptr || shared_scratch_->bytes() < bytes) {
    shared_scratch_.reset();
    SHOAL_ASSIGN_OR_RETURN(shared_scratch_, world_->memory().NewSegment(bytes * 3 / 2), "scratch memory");
  }
  return shared_scratch_->base();
}

Operation* Group::Prelude(const Operation&) {
  if (!Tuner::ExchangesBefore(++collectives_)) return nullptr;
  observed_.resize(Tuner::kExchanged);
  observed_by_all_.resize(Tuner::kExchanged * size_);
  planner_.tuner().FillExchange(absl::MakeSpan(observed_));
  exchange_ = Operation();
  exchange_.kind = OpKind::kAllGather;
  exchange_.dtype = DType::kI64;
  exchange_.in = Tensor(observed_.data(), {Tuner::kExchanged}, DType::kI64);
  exchange_.out = Tensor(observed_by_all_.data(), {Tuner::kExchanged * size_}, DType::kI64);
  exchange_.counts.assign(size_, Tuner::kExchanged);
  exchange_.algorithm = "direct";
  exchange_.label = "tuning";
  return &exchange_;
}

// A rank whose arguments are small enough issues a tiny operation, which those that run in the executor never see.
std::string Group::Elsewhere(const Operation& op) {
  const std::optional<TinyGroup::Ahead> ahead = tiny_ == nullptr ? std::nullopt : tiny_->PeerAhead(op.seq);
  if (!ahead.has_value()) return "";
  return absl::StrCat(Name(index_), " is in ", OpName(op), ", ", Name(ahead->member), " in ",
                      KindNameOf(ahead->signature), " #", ahead->seq, ": not the same operation, or with other arguments");
}

void Group::Measure(absl::Time deadline) {
  absl::StatusOr<CostModel> measured = ProbeLinks(*this, model_, deadline);
  if (!measured.ok()) return;  // The group is over: its next operation says so.
  model_ = *std::move(measured);
  planner_.SetModel(model_);
}

absl::StatusOr<Tensor> Group::Allocate(Shape shape, DType dtype) {
  const int64_t bytes = ElementCount(shape) * SizeOf(dtype);
  SHOAL_RETURN_IF_ERROR(status());
  if (world_->RanksOnThisHost() == 1) {
    // Nobody to share it with: private memory gets large pages more easily.
    SHOAL_RETURN_IF_ERROR(CheckMemoryAvailable(bytes), "allocate ", bytes, " bytes");
    return Zeros(std::move(shape), dtype);
  }
  absl::StatusOr<std::shared_ptr<void>> memory = world_->memory().Allocate(bytes);
  SHOAL_RETURN_IF_ERROR(status());
  SHOAL_RETURN_IF_ERROR(memory.status(), "allocate ", bytes, " bytes");
  void* base = memory->get();
  return Tensor(base, std::move(shape), dtype, *std::move(memory));
}

// ---- Operations.

Work Group::Issue(Operation op, const OpOptions& options) {
  op.wire = options.wire;
  op.order = options.order;
  op.algorithm = std::string(options.algorithm);
  op.label = std::string(options.label);
  absl::Status refused = CheckArguments(op, index_, size_);
  if (refused.ok()) refused = CheckAlgorithm(op, index_, size_, topology_);
  if (refused.ok()) refused = CheckOpen();
  if (!refused.ok()) {
    std::string name(OpKindName(op.kind));
    if (!op.label.empty()) absl::StrAppend(&name, " \"", op.label, "\"");
    return EndedWork(Annotate(refused, name));
  }
  if (executor_ == nullptr) {
    RunAlone(op);
    return Work();
  }
  op.in_place = IsInPlace(op, index_);
  const absl::Time deadline =
      options.deadline == absl::InfiniteFuture() ? absl::Now() + world_->options().timeout : options.deadline;
  op.deadline_ns = SteadyDeadlineNs(deadline);
  return executor_->Push(std::move(op));
}

Work Group::IssueTiny(TinyOp* op, const OpOptions& options) {
  if (options.deadline != absl::InfiniteFuture()) op->deadline_ns = SteadyDeadlineNs(options.deadline);
  op->label = options.label;
  op->seq = executor_->NextSeq();
  return tiny_->Issue(*op);
}

// In a group of one every result is the input.
void Group::RunAlone(const Operation& op) {
  const bool to_out = op.out.bytes() > 0 && op.in.bytes() == op.out.bytes();
  if (to_out && op.out.raw() != op.in.raw()) std::memcpy(op.out.raw(), op.in.raw(), op.out.bytes());
}

Work Group::AllReduce(const Tensor& in, const Tensor& out, ReduceOp op, const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).AllReduce(in, out, op)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kAllReduce;
  request.reduce = op;
  request.dtype = in.dtype();
  request.in = in;
  request.out = out;
  return Issue(std::move(request), options);
}

Work Group::ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp op,
                          const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).ReduceScatter(in, counts, out, op)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kReduceScatter;
  request.reduce = op;
  request.dtype = in.dtype();
  request.in = in;
  request.out = out;
  request.counts.assign(counts.begin(), counts.end());
  return Issue(std::move(request), options);
}

Work Group::AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out,
                      const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).AllGather(in, counts, out)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kAllGather;
  request.dtype = out.dtype();
  request.in = in;
  request.out = out;
  request.counts.assign(counts.begin(), counts.end());
  return Issue(std::move(request), options);
}

Work Group::AllToAll(const Tensor& in, absl::Span<const int64_t> send_counts, const Tensor& out,
                     absl::Span<const int64_t> recv_counts, const OpOptions& options) {
  const bool even = send_counts.empty() && recv_counts.empty();
  TinyOp tiny;
  if (even && MayBeTiny(options) && NewTinyCall(options, &tiny).AllToAllEven(in, out)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kAllToAll;
  request.dtype = in.dtype();
  request.in = in;
  request.out = out;
  request.even = even;
  if (request.even) {
    request.counts.assign(size_, in.elements() / size_);
    request.recv_counts = request.counts;
  } else {
    request.counts.assign(send_counts.begin(), send_counts.end());
    request.recv_counts.assign(recv_counts.begin(), recv_counts.end());
  }
  return Issue(std::move(request), options);
}

Work Group::Broadcast(const Tensor& in_out, int root, const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).Broadcast(in_out, root)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kBroadcast;
  request.root = root;
  request.dtype = in_out.dtype();
  request.in = request.out = in_out;
  return Issue(std::move(request), options);
}

Work Group::Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp op, const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).Reduce(in, out, root, op)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kReduce;
  request.root = root;
  request.reduce = op;
  request.dtype = in.dtype();
  request.in = in;
  if (root == index_) request.out = out;
  return Issue(std::move(request), options);
}

Work Group::Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                   const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).Gather(in, counts, out, root)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kGather;
  request.root = root;
  request.dtype = in.dtype();
  request.in = in;
  if (root == index_) request.out = out;
  request.counts.assign(counts.begin(), counts.end());
  return Issue(std::move(request), options);
}

Work Group::Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root,
                    const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).Scatter(in, counts, out, root)) return IssueTiny(&tiny, options);
  Operation request;
  request.kind = OpKind::kScatter;
  request.root = root;
  request.dtype = out.dtype();
  if (root == index_) request.in = in;
  request.out = out;
  request.counts.assign(counts.begin(), counts.end());
  return Issue(std::move(request), options);
}

Work Group::Barrier(const OpOptions& options) {
  TinyOp tiny;
  if (MayBeTiny(options) && NewTinyCall(options, &tiny).Barrier()) return IssueTiny(&tiny, options);
  return Issue(Operation(), options);
}

Work Group::Send(const Tensor& in, int to, uint32_t tag, const OpOptions& options) {
  Operation request;
  request.kind = OpKind::kSend;
  request.root = to;
  request.tag = tag;
  request.in = in;
  return Issue(std::move(request), options);
}

Work Group::Receive(const Tensor& out, int from, uint32_t tag, const OpOptions& options) {
  Operation request;
  request.kind = OpKind::kReceive;
  request.root = from;
  request.tag = tag;
  request.out = out;
  return Issue(std::move(request), options);
}

Work Group::IssueSparse(OpKind kind, absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                        const OpOptions& options) {
  Operation request;
  request.kind = kind;
  request.reduce = op;
  request.chunks.assign(chunks.begin(), chunks.end());
  request.moves.assign(moves.begin(), moves.end());
  for (const Tensor& chunk : chunks) {
    if (!chunk.empty()) request.dtype = chunk.dtype();
    request.counts.push_back(chunk.elements());
  }
  return Issue(std::move(request), options);
}

Work Group::SparseAllGather(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves,
                            const OpOptions& options) {
  return IssueSparse(OpKind::kSparseAllGather, chunks, moves, ReduceOp::kSum, options);
}

Work Group::SparseReduceScatter(absl::Span<const Tensor> chunks, absl::Span<const SparseMove> moves, ReduceOp op,
                                const OpOptions& options) {
  return IssueSparse(OpKind::kSparseReduceScatter, chunks, moves, op, options);
}

// ---- Groups.

absl::StatusOr<std::unique_ptr<Communicator>> Group::Split(absl::Span<const int> members) {
  std::vector<int> ranks;
  int index = -1;
  for (size_t i = 0; i < members.size(); ++i) {
    const bool ascending = i == 0 || members[i] > members[i - 1];
    if (!ascending || members[i] < 0 || members[i] >= size()) {
      return absl::InvalidArgumentError(absl::StrCat("member ", members[i], " of a group of ", size(),
                                                     ": not in the group, or not ascending"));
    }
    if (members[i] == index_) index = static_cast<int>(i);
    ranks.push_back(life_->ranks()[members[i]]);
  }
  if (index < 0) return absl::InvalidArgumentError("this process is not among the members");
  SHOAL_RETURN_IF_ERROR(CheckOpen());
  uint64_t number = 0;
  {
    MutexLock lock(&mutex_);
    number = ++splits_[ranks];
  }
  const uint64_t key = GroupKey(life_->key(), ranks, number);
  const int64_t deadline_ns = SteadyDeadlineNs(absl::Now() + world_->options().timeout);
  CostModel model = ModelOf(model_, TopologyOf(*world_, ranks), members);
  return Create(world_, world_->NewGroup(key, std::move(ranks), index, life_.get()), std::move(model), deadline_ns);
}

absl::Status Group::CheckOpen() const {
  SHOAL_RETURN_IF_ERROR(status());
  return world_->CheckPresent();
}

void Group::Abort(const absl::Status& cause) {
  (void)life_->End(absl::StrCat("rank ", life_->ranks()[index_], " aborted: ", cause.message()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(const WorldOptions& options) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " of ", options.size));
  }
  if (options.transport == "mpi") return ConnectMpi(options);
  if (options.transport != "auto" && options.transport != "tcp") {
    return absl::InvalidArgumentError(absl::StrCat("transport '", options.transport, "', want auto, tcp or mpi"));
  }
  const absl::Time deadline = absl::Now() + options.connect_timeout;
  SHOAL_ASSIGN_OR_RETURN(std::shared_ptr<World> world, World::Connect(options));
  return NewWorldGroup(std::move(world), deadline);
}

std::vector<TuningRow> Tuning(const Communicator& group) {
  const auto* const tuned = dynamic_cast<const Tuned*>(&group);
  return tuned == nullptr || group.size() == 1 ? std::vector<TuningRow>() : tuned->TuningRows();
}

absl::StatusOr<std::unique_ptr<Communicator>> NewWorldGroup(std::shared_ptr<World> world, absl::Time deadline) {
  const WorldOptions& options = world->options();
  std::vector<int> ranks(options.size);
  std::iota(ranks.begin(), ranks.end(), 0);
  const uint64_t key = GroupKey(/*parent=*/0, ranks, static_cast<uint64_t>(options.epoch));
  const bool one_host = world->OneHost(ranks);
  // Equal on all ranks: other hosts' cores are not known.
  CostModel model = DefaultCostModel(TopologyOf(*world, ranks), one_host ? sysconf(_SC_NPROCESSORS_ONLN) : kCoresOfHosts);
  std::shared_ptr<GroupLife> life = world->NewGroup(key, std::move(ranks), options.rank, /*parent=*/nullptr);
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Group> group, Group::Create(std::move(world), std::move(life), std::move(model),
                                                                     SteadyDeadlineNs(deadline)));
  if (!one_host) group->Measure(deadline);
  return std::unique_ptr<Communicator>(std::move(group));
}

}  // namespace shoal
