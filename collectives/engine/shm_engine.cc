#include "collectives/engine/shm_engine.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "collectives/engine/reduce.h"
#include "collectives/transport/clock.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// Fits the second-level cache of two ranks that share a core's one.
constexpr int64_t kStagingBytes = 512 << 10;
constexpr int64_t kLine = 64;

// Waiting, in three stages. A peer on another core answers within a few hundred nanoseconds; with more ranks
// than cores only yielding lets it run at all; a wake-up costs 25 us, so sleep only after a multiple of that.
constexpr int kSpins = 200;
constexpr int kSpinsCrowded = 10;
constexpr int64_t kYieldNs = 100'000;
constexpr int64_t kSleepNs = 10'000'000;  // Ends are also announced by a wake-up; this bounds a lost one.

void FutexWait(std::atomic<uint32_t>* word, uint32_t seen) {
  const timespec timeout = {0, kSleepNs};
  (void)syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  (void)syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

int CoreCount() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, bytes);
}

}  // namespace

ShmEngine::ShmEngine(World* world, std::vector<int> ranks, int index)
    : world_(world),
      ranks_(std::move(ranks)),
      index_(index),
      size_(static_cast<int>(ranks_.size())),
      spins_(world->RanksOnThisHost() <= CoreCount() ? kSpins : kSpinsCrowded),
      blocks_(size_, nullptr),
      sources_(size_) {}

absl::StatusOr<std::unique_ptr<Engine>> ShmEngine::Create(World* world, std::vector<int> ranks, int index,
                                                          uint64_t key, int64_t deadline_ns) {
  if (ranks.size() > kHostRanksMax) {
    return absl::ResourceExhaustedError(
        absl::StrCat(ranks.size(), " ranks on one host, ", kHostRanksMax, " at most"));
  }
  std::unique_ptr<ShmEngine> engine(new ShmEngine(world, std::move(ranks), index));
  SHOAL_ASSIGN_OR_RETURN(engine->blocks_[index], world->control_slots()->Claim(key));
  const absl::Status found = engine->FindPeers(key, deadline_ns);
  if (!found.ok()) return found;  // The epoch is over: the claimed block stays as it is.
  world->AddSleeper(engine.get());
  return std::unique_ptr<Engine>(std::move(engine));
}

ShmEngine::~ShmEngine() {
  world_->RemoveSleeper(this);
  if (std::find(blocks_.begin(), blocks_.end(), nullptr) != blocks_.end()) return;
  std::vector<ControlBlock*> peers = blocks_;
  peers.erase(peers.begin() + index_);
  world_->control_slots()->Retire(blocks_[index_], std::move(peers));
}

absl::Status ShmEngine::FindPeers(uint64_t key, int64_t deadline_ns) {
  for (int member = 0; member < size_; ++member) {
    for (int round = 0; blocks_[member] == nullptr; ++round) {
      // First: what a leaving rank did, it did before it said goodbye.
      const bool left = world_->Left(ranks_[member]);
      SHOAL_ASSIGN_OR_RETURN(
          std::byte * memory,
          world_->memory().FindPeer(ranks_[member], {SharedMemory::GroupSegmentId(World::kControlSegment), 0},
                                    sizeof(ControlPage)));
      if (memory != nullptr) {
        for (ControlBlock& block : reinterpret_cast<ControlPage*>(memory)->blocks) {
          if (block.key.load(std::memory_order_acquire) == key) blocks_[member] = &block;
        }
        if (blocks_[member] != nullptr) break;
      }
      if (world_->Ended()) return world_->status();
      if (left) return world_->End(absl::StrCat(world_->RankName(ranks_[member]), " left"));
      if (NowNs() >= deadline_ns) {
        return world_->End(absl::StrCat(
            "forming a group: deadline passed: ", world_->RankName(ranks_[member]), " had not arrived"));
      }
      if (round < kSpins) {
        sched_yield();
      } else {
        world_->memory().AwaitAnnouncement();
      }
    }
  }
  return absl::OkStatus();
}

// ---- Meeting.

bool ShmEngine::Reached(int member) const {
  const uint32_t arrived = blocks_[member]->arrived.load(std::memory_order_acquire);
  return static_cast<int32_t>(arrived - phase_) >= 0;
}

absl::Status ShmEngine::Meet() {
  ++phase_;
  ControlBlock& own = *blocks_[index_];
  // Both this pair and its mirror in WaitFor must be sequentially consistent: either we see the sleeper or it
  // sees us.
  own.arrived.store(phase_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) FutexWakeAll(&own.arrived);
  for (int member = 0; member < size_; ++member) {
    if (!Reached(member)) SHOAL_RETURN_IF_ERROR(WaitFor(member));
  }
  return absl::OkStatus();
}

absl::Status ShmEngine::WaitFor(int member) {
  for (int i = 0; i < spins_; ++i) {
    if (Reached(member)) return absl::OkStatus();
    Pause();
  }
  for (const int64_t end_ns = NowNs() + kYieldNs; NowNs() < end_ns && !world_->Ended();) {
    if (Reached(member)) return absl::OkStatus();
    sched_yield();
  }
  ControlBlock& block = *blocks_[member];
  while (!Reached(member)) {
    SHOAL_RETURN_IF_ERROR(CheckEpoch(member));
    block.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = block.arrived.load(std::memory_order_seq_cst);
    if (static_cast<int32_t>(seen - phase_) < 0) FutexWait(&block.arrived, seen);
    block.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
  return absl::OkStatus();
}

absl::Status ShmEngine::CheckEpoch(int member) const {
  if (world_->Ended()) return world_->status();
  // What a leaving rank did, it did before it said goodbye: look again.
  if (world_->Left(ranks_[member]) && !Reached(member)) {
    return world_->End(absl::StrCat(world_->RankName(ranks_[member]), " left"));
  }
  if (NowNs() >= deadline_ns_->load(std::memory_order_relaxed)) return world_->End(DeadlineCause());
  return absl::OkStatus();
}

std::string ShmEngine::DeadlineCause() const {
  std::vector<int> missing;
  for (int member = 0; member < size_; ++member) {
    if (!Reached(member)) missing.push_back(ranks_[member]);
  }
  return absl::StrCat(OpName(*op_), ": deadline passed: ", world_->RankNames(missing), " had not arrived");
}

void ShmEngine::Wake() {
  for (ControlBlock* block : blocks_) FutexWakeAll(&block->arrived);
}

// ---- Posting.

absl::Status ShmEngine::PostOp() {
  const Op& op = *op_;
  Post& post = blocks_[index_]->posts[op.seq % 2];
  post.seq = op.seq;
  post.signature = Signature(op);
  post.kind = static_cast<uint8_t>(op.kind);
  std::memset(post.label, 0, kLabelBytes);
  std::memcpy(post.label, op.label.data(), std::min(op.label.size(), kLabelBytes - 1));
  const bool is_read = op.kind != OpKind::kBroadcast || op.root == index_;
  post.bytes = is_read ? op.in.bytes() : 0;
  if (op.kind == OpKind::kAllToAll) {
    const std::vector<int64_t> begins = Displacements(op.counts);
    for (int member = 0; member <= size_; ++member)
      post.displacements[member] = begins[member] * SizeOf(op.in.dtype());
  }
  if (post.bytes <= kInlineBytes) {
    post.where = Where::kInline;
    Copy(blocks_[index_]->payloads[op.seq % 2], static_cast<const std::byte*>(op.in.raw()), post.bytes);
    return absl::OkStatus();
  }
  SharedMemory::Place place = world_->memory().Locate(op.in.raw(), post.bytes);
  post.where = Where::kDirect;
  if (place.segment == 0) {
    post.where = Where::kStaged;
    if (staging_ == nullptr) {
      absl::StatusOr<std::shared_ptr<Segment>> staging = world_->memory().NewSegment(kStagingBytes);
      if (!staging.ok()) {
        return world_->End(absl::StrCat(world_->RankName(ranks_[index_]), ": ", OpName(op), ": ",
                                        staging.status().message()));
      }
      staging_ = *std::move(staging);
    }
    place = {staging_->id(), 0};
  }
  post.segment = place.segment;
  post.offset = place.offset;
  return absl::OkStatus();
}

absl::Status ShmEngine::ResolveSource(int member) {
  const Post& post = blocks_[member]->posts[op_->seq % 2];
  if (post.seq != op_->seq || post.signature != Signature(*op_)) {
    const std::string theirs = OpName(static_cast<OpKind>(post.kind), post.label, post.seq);
    return world_->End(absl::StrCat(world_->RankName(ranks_[index_]), " is in ", OpName(*op_), ", ",
                                    world_->RankName(ranks_[member]), " in ", theirs,
                                    ": not the same operation, or with other arguments"));
  }
  Source& source = sources_[member];
  source = {nullptr, post.bytes, post.where, &post};
  if (post.where == Where::kInline) {
    source.base = blocks_[member]->payloads[op_->seq % 2];
    return absl::OkStatus();
  }
  if (member == index_) {
    source.base = post.where == Where::kStaged ? staging_->base() : static_cast<std::byte*>(op_->in.raw());
    return absl::OkStatus();
  }
  const int64_t bytes = post.where == Where::kStaged ? kStagingBytes : post.bytes;
  while (true) {
    absl::StatusOr<std::byte*> base =
        world_->memory().FindPeer(ranks_[member], {post.segment, post.offset}, bytes);
    if (!base.ok()) return world_->End(std::string(base.status().message()));
    source.base = *base;
    if (source.base != nullptr) return absl::OkStatus();
    // On its way: it was announced before it was used.
    if (world_->Ended()) return world_->status();
    if (NowNs() >= deadline_ns_->load(std::memory_order_relaxed)) return world_->End(DeadlineCause());
    world_->memory().AwaitAnnouncement();
  }
}

absl::Status ShmEngine::ReadPosts() {
  for (int member = 0; member < size_; ++member) SHOAL_RETURN_IF_ERROR(ResolveSource(member));
  return absl::OkStatus();
}

bool ShmEngine::AllInline() const {
  return std::all_of(sources_.begin(), sources_.end(),
                     [](const Source& s) { return s.where == Where::kInline; });
}

bool ShmEngine::AnyStaged() const {
  return std::any_of(sources_.begin(), sources_.end(),
                     [](const Source& s) { return s.where == Where::kStaged; });
}

absl::Status ShmEngine::Run(const Op& op, const std::atomic<int64_t>& deadline_ns) {
  op_ = &op;
  deadline_ns_ = &deadline_ns;
  if (world_->Ended()) return world_->status();
  SHOAL_RETURN_IF_ERROR(PostOp());
  SHOAL_RETURN_IF_ERROR(Meet());
  SHOAL_RETURN_IF_ERROR(ReadPosts());
  switch (op.kind) {
    case OpKind::kBarrier:
      return absl::OkStatus();
    case OpKind::kAllReduce:
      return AllReduce();
    case OpKind::kReduceScatter:
      return ReduceScatter();
    case OpKind::kAllGather:
    case OpKind::kAllToAll:
    case OpKind::kBroadcast: {
      const std::vector<Pull> pulls = Pulls();
      for (int member = 0; member < size_; ++member) {
        const bool fits =
            op.kind != OpKind::kAllToAll ||
            sources_[member].post->displacements[index_ + 1] - pulls[member].begin == pulls[member].bytes;
        if (!fits) {
          return world_->End(absl::StrCat(
              OpName(op), ": ", world_->RankName(ranks_[member]), " sends ",
              sources_[member].post->displacements[index_ + 1] - pulls[member].begin, " bytes to ",
              world_->RankName(ranks_[index_]), ", which expects ", pulls[member].bytes));
        }
      }
      return AnyStaged() ? PullStaged(pulls) : PullAll(pulls);
    }
    default:
      break;
  }
  return absl::InternalError("unknown operation");
}

// ---- Reductions.

// This rank's share of equal windows: the reduction of all of them, into all of them.
void ShmEngine::ReduceShare(absl::Span<std::byte* const> windows, int64_t elements) const {
  const int64_t unit = kLine / SizeOf(op_->in.dtype());
  const int64_t units = (elements + unit - 1) / unit;
  const int64_t begin = std::min(units * index_ / size_ * unit, elements);
  const int64_t end = std::min(units * (index_ + 1) / size_ * unit, elements);
  std::vector<std::byte*> shares(windows.begin(), windows.end());
  for (std::byte*& share : shares) share += begin * SizeOf(op_->in.dtype());
  const std::vector<const std::byte*> inputs(shares.begin(), shares.end());
  Reduce(op_->in.dtype(), op_->reduce, inputs, shares, end - begin);
}

absl::Status ShmEngine::AllReduce() {
  auto* data = static_cast<std::byte*>(op_->out.raw());
  std::vector<std::byte*> windows;
  for (const Source& source : sources_) windows.push_back(source.base);
  if (AllInline()) {
    const std::vector<const std::byte*> inputs(windows.begin(), windows.end());
    Reduce(op_->in.dtype(), op_->reduce, inputs, {data}, op_->in.elements());
    return absl::OkStatus();
  }
  if (AnyStaged()) return AllReduceStaged();
  ReduceShare(windows, op_->in.elements());
  return Meet();
}

absl::Status ShmEngine::AllReduceStaged() {
  auto* data = static_cast<std::byte*>(op_->out.raw());
  const int64_t element_bytes = SizeOf(op_->in.dtype());
  const int64_t chunk = kStagingBytes / element_bytes;
  const bool staged = sources_[index_].where == Where::kStaged;
  std::vector<std::byte*> windows(size_);
  for (int64_t begin = 0; begin < op_->in.elements(); begin += chunk) {
    const int64_t elements = std::min(chunk, op_->in.elements() - begin);
    std::byte* const piece = data + begin * element_bytes;
    if (staged) Copy(staging_->base(), piece, elements * element_bytes);
    SHOAL_RETURN_IF_ERROR(Meet());
    for (int member = 0; member < size_; ++member) {
      const Source& source = sources_[member];
      windows[member] = source.where == Where::kStaged ? source.base : source.base + begin * element_bytes;
    }
    ReduceShare(windows, elements);
    SHOAL_RETURN_IF_ERROR(Meet());
    if (staged) Copy(piece, staging_->base(), elements * element_bytes);
  }
  return absl::OkStatus();
}

absl::Status ShmEngine::ReduceScatter() {
  const std::vector<int64_t> begins = Displacements(op_->counts);
  if (AnyStaged()) return ReduceScatterStaged(begins);
  std::vector<const std::byte*> inputs;
  for (const Source& source : sources_)
    inputs.push_back(source.base + begins[index_] * SizeOf(op_->in.dtype()));
  // In place, the own part of the input is the output: nobody else reads it.
  Reduce(op_->in.dtype(), op_->reduce, inputs, {static_cast<std::byte*>(op_->out.raw())},
         op_->counts[index_]);
  return AllInline() ? absl::OkStatus() : Meet();
}

absl::Status ShmEngine::ReduceScatterStaged(const std::vector<int64_t>& begins) {
  const int64_t element_bytes = SizeOf(op_->in.dtype());
  const auto* in = static_cast<const std::byte*>(op_->in.raw());
  auto* out = static_cast<std::byte*>(op_->out.raw());
  // Two halves in turn: whoever meets the others for chunk k has read chunk k - 1. Each half has a piece for
  // every rank.
  const int64_t piece_bytes = kStagingBytes / 2 / size_ / kLine * kLine;
  const int64_t piece = piece_bytes / element_bytes;
  const int64_t longest = *std::max_element(op_->counts.begin(), op_->counts.end());
  std::vector<const std::byte*> inputs(size_);
  const auto left = [&](int member, int64_t done) {
    return std::clamp<int64_t>(op_->counts[member] - done, 0, piece);
  };
  for (int64_t done = 0, k = 0; done < longest; done += piece, ++k) {
    const int64_t half = k % 2 * size_ * piece_bytes;
    for (int member = 0; member < size_ && sources_[index_].where == Where::kStaged; ++member) {
      Copy(staging_->base() + half + member * piece_bytes, in + (begins[member] + done) * element_bytes,
           left(member, done) * element_bytes);
    }
    SHOAL_RETURN_IF_ERROR(Meet());
    for (int member = 0; member < size_; ++member) {
      const Source& source = sources_[member];
      inputs[member] = source.where == Where::kStaged ? source.base + half + index_ * piece_bytes
                                                      : source.base + (begins[index_] + done) * element_bytes;
    }
    if (left(index_, done) > 0) {
      Reduce(op_->in.dtype(), op_->reduce, inputs, {out + done * element_bytes}, left(index_, done));
    }
  }
  return Meet();
}

// ---- Copies.

std::vector<ShmEngine::Pull> ShmEngine::Pulls() const {
  const int64_t element_bytes = SizeOf(op_->in.dtype());
  auto* out = static_cast<std::byte*>(op_->out.raw());
  std::vector<Pull> pulls(size_);
  if (op_->kind == OpKind::kBroadcast) {
    pulls[op_->root] = {0, op_->in.bytes(), out};
    return pulls;
  }
  const bool to_each = op_->kind == OpKind::kAllToAll;
  const std::vector<int64_t> begins = Displacements(to_each ? op_->recv_counts : op_->counts);
  for (int member = 0; member < size_; ++member) {
    pulls[member] = {to_each ? sources_[member].post->displacements[index_] : 0,
                     (begins[member + 1] - begins[member]) * element_bytes,
                     out + begins[member] * element_bytes};
  }
  return pulls;
}

absl::Status ShmEngine::PullAll(const std::vector<Pull>& pulls) {
  const auto* own = static_cast<const std::byte*>(op_->in.raw());
  // Each rank begins with another peer, so that not all read the same memory at the same time.
  for (int step = 0; step < size_; ++step) {
    const int member = (index_ + step) % size_;
    const Pull& pull = pulls[member];
    Copy(pull.target, (member == index_ ? own : sources_[member].base) + pull.begin, pull.bytes);
  }
  return AllInline() ? absl::OkStatus() : Meet();
}

absl::Status ShmEngine::PullStaged(const std::vector<Pull>& pulls) {
  const auto* own = static_cast<const std::byte*>(op_->in.raw());
  constexpr int64_t kHalf = kStagingBytes / 2;
  int64_t longest = 0;
  for (const Source& source : sources_) {
    if (source.where == Where::kStaged) longest = std::max(longest, source.bytes);
  }
  for (int64_t done = 0, k = 0; done < longest; done += kHalf, ++k) {
    if (sources_[index_].where == Where::kStaged) {
      Copy(staging_->base() + k % 2 * kHalf, own + done,
           std::clamp<int64_t>(sources_[index_].bytes - done, 0, kHalf));
    }
    SHOAL_RETURN_IF_ERROR(Meet());
    for (int step = 0; step < size_; ++step) {
      const int member = (index_ + step) % size_;
      const Pull& pull = pulls[member];
      const Source& source = sources_[member];
      if (member == index_ || source.where != Where::kStaged) {
        if (k == 0) Copy(pull.target, (member == index_ ? own : source.base) + pull.begin, pull.bytes);
        continue;
      }
      const int64_t begin = std::max(pull.begin, done);
      const int64_t end = std::min(pull.begin + pull.bytes, done + kHalf);
      if (begin < end) {
        Copy(pull.target + (begin - pull.begin), source.base + k % 2 * kHalf + (begin - done), end - begin);
      }
    }
  }
  return Meet();
}

}  // namespace shoal
