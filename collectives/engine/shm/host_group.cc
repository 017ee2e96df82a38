#include "collectives/engine/shm/host_group.h"

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>

#include "absl/strings/str_join.h"
#include "collectives/engine/shm/group_page.h"
#include "collectives/transport/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kNewsNs = 200'000'000;  // How long the control links have to tell what a peer's page tells.
// Whatever should have rung: look again after this.
constexpr int64_t kSleepNs = 50'000'000;
constexpr int kYields = 200;
// Between two moves of a rank to another core, which take some 50 us each.
constexpr int64_t kMoveNs = 10'000'000, kLeavePlacementNs = 100'000'000;
// A piece takes some 50 us. Ranks that share cores may be kept from it for some time slices.
constexpr int64_t kPatienceNs = 10'000'000;

void FutexWait(std::atomic<uint32_t>* word, uint32_t seen, int64_t ns) {
  const timespec timeout = {ns / 1'000'000'000, ns % 1'000'000'000};
  (void)syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void FutexWakeAll(std::atomic<uint32_t>* word) {
  (void)syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int Membarrier(int command) { return static_cast<int>(syscall(SYS_membarrier, command, 0, 0)); }

// Whether ranks must share cores. `on_host`: of the whole job. Ranks that a launcher bound to cores of their
// own have small sets; others have all cores in common.
bool Crowded(const std::vector<GroupPage*>& pages, const GroupPage& own, int on_host) {
  cpu_set_t all;
  CPU_ZERO(&all);
  for (const GroupPage* page : pages) CPU_OR(&all, &all, &page->cores);
  if (CPU_COUNT(&all) < static_cast<int>(pages.size())) return true;
  const int cores = CPU_COUNT(&own.cores);
  return cores > 1 && on_host > cores;
}

}  // namespace

HostGroup::HostGroup(std::shared_ptr<SharedMemory> memory, std::shared_ptr<GroupLife> life,
                     std::vector<int> members)
    : memory_(std::move(memory)),
      life_(std::move(life)),
      members_(std::move(members)),
      own_(SeatOf(life_->index())),
      segments_(members_.size()),
      pages_(members_.size(), nullptr) {}

absl::StatusOr<std::shared_ptr<HostGroup>> HostGroup::Create(std::shared_ptr<SharedMemory> memory,
                                                             std::shared_ptr<GroupLife> life,
                                                             std::vector<int> members, int64_t deadline_ns,
                                                             const std::function<bool(int member)>& left) {
  if (members.size() > kHostRanksMax) {
    return absl::ResourceExhaustedError(
        absl::StrCat(members.size(), " ranks on one host, ", kHostRanksMax, " at most"));
  }
  std::shared_ptr<HostGroup> group(new HostGroup(std::move(memory), std::move(life), std::move(members)));
  SHOAL_ASSIGN_OR_RETURN(
      std::shared_ptr<Segment> segment,
      group->memory_->NewGroupSegment(group->life_->key(), GroupLayout(group->seats()).bytes()),
      "memory of a group");
  auto* page = new (segment->base()) GroupPage;  // Of zeroed memory.
  page->seats = group->seats();
  CPU_ZERO(&page->cores);
  if (sched_getaffinity(0, sizeof page->cores, &page->cores) != 0) CPU_SET(0, &page->cores);
  page->registered = Membarrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED) == 0 ? 1 : 0;
  page->ready.store(1, std::memory_order_release);
  group->pages_[group->own_] = page;
  group->segments_[group->own_] = std::move(segment);
  SHOAL_RETURN_IF_ERROR(group->FindPeers(deadline_ns, left));
  group->sleepers_pay_ = std::all_of(group->pages_.begin(), group->pages_.end(),
                                     [](const GroupPage* other) { return other->registered != 0; });
  group->joined_ = true;
  group->life_->AddSleeper(group.get());
  group->crowded_ = Crowded(group->pages_, *page, group->memory_->RanksOnHost());
  return group;
}

HostGroup::~HostGroup() {
  if (joined_) life_->RemoveSleeper(this);
}

int HostGroup::SeatOf(int member) const {
  const auto found = std::lower_bound(members_.begin(), members_.end(), member);
  return found != members_.end() && *found == member ? static_cast<int>(found - members_.begin()) : -1;
}

bool HostGroup::FindPeer(int seat) {
  if (pages_[seat] != nullptr) return true;
  std::shared_ptr<const Segment> segment =
      memory_->FindPeerSegment(life_->ranks()[members_[seat]], SharedMemory::GroupSegmentId(life_->key()));
  if (segment == nullptr || segment->bytes() < GroupLayout(seats()).bytes()) return false;
  auto* page = reinterpret_cast<GroupPage*>(segment->base());
  if (page->ready.load(std::memory_order_acquire) == 0) return false;
  segments_[seat] = std::move(segment);
  pages_[seat] = page;
  return true;
}

// Two rounds: find everybody, then wait until everybody has, because who is done with a group takes its
// memory away.
absl::Status HostGroup::FindPeers(int64_t deadline_ns, const std::function<bool(int member)>& left) {
  bool attached = false;
  for (int round = 0;; ++round) {
    std::vector<int> missing;
    int gone = -1;
    for (int seat = 0; seat < seats(); ++seat) {
      // Asked first: who left may have come before.
      const bool may_come = left == nullptr || seat == own_ || !left(members_[seat]);
      const bool here =
          FindPeer(seat) && (!attached || pages_[seat]->attached.load(std::memory_order_acquire) != 0);
      if (here) continue;
      missing.push_back(life_->ranks()[members_[seat]]);
      if (!may_come) gone = missing.back();
    }
    if (missing.empty() && attached) return absl::OkStatus();
    if (missing.empty()) {
      attached = true;
      pages_[own_]->attached.store(1, std::memory_order_release);
      continue;
    }
    if (life_->Ended()) return life_->status();
    if (gone >= 0) return absl::AbortedError(absl::StrCat("forming a group: rank ", gone, " left"));
    if (NowNs() >= deadline_ns) {
      return absl::DeadlineExceededError(
          absl::StrCat("forming a group: rank ", absl::StrJoin(missing, ", "), " had not arrived"));
    }
    if (round < kYields) {
      sched_yield();
    } else {
      memory_->AwaitAnnouncement();
    }
  }
}

void HostGroup::Fence(const std::string& cause) {
  GroupPage& own = page(own_);
  const size_t length = std::min(cause.size(), sizeof own.cause - 1);
  std::memcpy(own.cause, cause.data(), length);
  own.cause[length] = 0;
  own.ended.store(1, std::memory_order_seq_cst);
  // Also before what the owner writes to its buffers when it has them back (see CheckPeer).
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (int seat = 0; seat < seats(); ++seat) {
    if (seat != own_) RingIfAsleep(seat);
  }
  AwaitWriters();
}

absl::Status HostGroup::CheckAlive() {
  if (life_->Ended()) return life_->status();
  for (int seat = 0; seat < seats(); ++seat) {
    if (seat != own_) SHOAL_RETURN_IF_ERROR(CheckPeer(seat));
  }
  return absl::OkStatus();
}

absl::Status HostGroup::CheckPeer(int seat) {
  // What was loaded before counts as read before the owner ended, or is not trusted.
  std::atomic_thread_fence(std::memory_order_acquire);
  const GroupPage& peer = page(seat);
  if (__builtin_expect(peer.ended.load(std::memory_order_acquire) == 0, 1)) return absl::OkStatus();
  // The news is also on its way through the control links, which tell which groups end: a death leaves those without the
  // dead rank alone, End would take what was split from this one along. Only for want of them this is the cause.
  for (const int64_t until_ns = NowNs() + kNewsNs; !life_->Ended() && NowNs() < until_ns;) usleep(50);
  if (life_->Ended()) return life_->status();
  const std::string cause(peer.cause, strnlen(peer.cause, sizeof peer.cause));
  const absl::Status status = life_->End(
      cause.empty() ? absl::StrCat("rank ", life_->ranks()[members_[seat]], " ended the group") : cause);
  return status.ok() ? absl::AbortedError(cause) : status;
}

// ---- Lending.

bool HostGroup::Lend(const Loan& loan) {
  MutexLock lock(&loans_mutex_);
  if (fenced_) return false;
  loans_.push_back(loan);
  return true;
}

bool HostGroup::EndLoan(int seat, const std::byte* data) {
  MutexLock lock(&loans_mutex_);
  const auto loan = std::find_if(loans_.begin(), loans_.end(),
                                 [&](const Loan& one) { return one.seat == seat && one.data == data; });
  SHOAL_CHECK(loan != loans_.end()) << "nothing was lent there";
  const bool whole = loan->cuts == SharedMemory::Cuts() ||
                     !SharedMemory::WasCutOff(loan->data, loan->bytes, loan->cuts);
  *loan = loans_.back();
  loans_.pop_back();
  return whole;
}

bool HostGroup::AnyEnded() const {
  return std::any_of(pages_.begin(), pages_.end(),
                     [](const GroupPage* page) { return page->ended.load(std::memory_order_seq_cst) != 0; });
}

bool HostGroup::BeginWrite(int64_t begin, int64_t bytes) {
  GroupPage& own = page(own_);
  own.write_begin.store(begin, std::memory_order_relaxed);
  own.write_bytes.store(bytes, std::memory_order_relaxed);
  own.writing.store(1, std::memory_order_seq_cst);
  if (__builtin_expect(!AnyEnded(), 1)) return true;
  own.writing.store(0, std::memory_order_release);
  return false;
}

bool HostGroup::EndWrite() {
  page(own_).writing.store(0, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_acquire);  // As in CheckPeer.
  return !AnyEnded();
}

// All threads of a process that died have been told to stop, but one may run until its core is interrupted: for any
// time on a virtual core that the host has put aside. This interrupts all cores that run such threads and waits until
// they have been, and no thread goes back from there to its program when it is to stop. False: the kernel cannot do it.
bool HostGroup::StopDying(int seat) const {
  return page(seat).registered != 0 && Membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED) == 0;
}

// False: it still writes, or may.
bool HostGroup::AwaitWriter(int seat, int64_t until_ns) const {
  for (int round = 0; page(seat).writing.load(std::memory_order_seq_cst) != 0; ++round) {
    if (life_->ProcessDied(members_[seat])) return StopDying(seat);
    if (NowNs() >= until_ns) return false;
    if (round < kYields) {
      sched_yield();
    } else {
      usleep(20);
    }
  }
  return true;
}

void HostGroup::AwaitWriters() {
  MutexLock lock(&loans_mutex_);
  fenced_ = true;
  const int64_t until_ns = NowNs() + kPatienceNs;
  std::vector<bool> through(members_.size());
  for (const Loan& loan : loans_) {
    if (through[loan.seat]) continue;
    through[loan.seat] = AwaitWriter(loan.seat, until_ns);
    if (through[loan.seat]) continue;
    // The piece does not change while it is written. The numbers are a peer's: they may be nonsense.
    const GroupPage& peer = page(loan.seat);
    const int64_t begin = std::clamp<int64_t>(peer.write_begin.load(std::memory_order_relaxed), 0, loan.bytes);
    const int64_t bytes =
        std::clamp<int64_t>(peer.write_bytes.load(std::memory_order_relaxed), 0, loan.bytes - begin);
    if (bytes > 0) SharedMemory::CutOff(loan.data + begin, bytes);
  }
}

// ---- Sharing cores.

bool HostGroup::IsHere(int seat) const {
  return page(seat).core.load(std::memory_order_relaxed) == sched_getcpu() + 1;
}

void HostGroup::LeavePlacement(int64_t now_ns) {
  place_ns_.store(now_ns + kLeavePlacementNs, std::memory_order_relaxed);
}

void HostGroup::WaitsHere(int64_t now_ns) {
  GroupPage& own = page(own_);
  const int here = sched_getcpu();
  if (here < 0 || here >= CPU_SETSIZE) return;
  if (own.core.load(std::memory_order_relaxed) != here + 1) own.core.store(here + 1, std::memory_order_relaxed);
  if (now_ns < place_ns_.load(std::memory_order_relaxed)) return;
  place_ns_.store(now_ns + kMoveNs, std::memory_order_relaxed);
  std::array<int, CPU_SETSIZE> ranks{};  // By core.
  for (int seat = 0; seat < seats(); ++seat) {
    const int core = page(seat).core.load(std::memory_order_relaxed) - 1;
    if (core < 0 || core >= CPU_SETSIZE) continue;
    if (core == here && seat < own_) return;  // One at a time.
    ++ranks[core];
  }
  cpu_set_t allowed, emptiest;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int least = ranks[here];
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &allowed)) least = std::min(least, ranks[core]);
  }
  if (ranks[here] - least < 2) return;
  CPU_ZERO(&emptiest);
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &allowed) && ranks[core] == least) CPU_SET(core, &emptiest);
  }
  if (sched_setaffinity(0, sizeof emptiest, &emptiest) != 0) return;
  own.core.store(sched_getcpu() + 1, std::memory_order_relaxed);
  (void)sched_setaffinity(0, sizeof allowed, &allowed);
}

// ---- Sleeping.

uint32_t HostGroup::PrepareSleep() {
  GroupPage& own = page(own_);
  own.asleep.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_pay_) (void)Membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED);
  return own.doorbell.load(std::memory_order_seq_cst);
}

void HostGroup::Sleep(uint32_t seen, int64_t until_ns) {
  const int64_t left = std::min(until_ns - NowNs(), kSleepNs);
  if (left > 0) FutexWait(&page(own_).doorbell, seen, left);
  CancelSleep();
}

void HostGroup::CancelSleep() { page(own_).asleep.fetch_sub(1, std::memory_order_relaxed); }

uint32_t HostGroup::Sleepers() const { return page(own_).asleep.load(std::memory_order_acquire); }

void HostGroup::RingOwn() {
  OrderBeforeRing();
  RingIfAsleep(own_);
}

void HostGroup::RingIfAsleep(int seat) {
  GroupPage& peer = page(seat);
  if (__builtin_expect(peer.asleep.load(std::memory_order_seq_cst) == 0, 1)) return;
  peer.doorbell.fetch_add(1, std::memory_order_seq_cst);
  FutexWakeAll(&peer.doorbell);
}

}  // namespace shoal
