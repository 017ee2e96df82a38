#include "collectives/transport/death_watch.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <future>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

constexpr size_t kPageBytes = 4096;
// Nobody can make the page smaller under those who look at it.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr int64_t kLookEveryNs = 2'000'000;  // Without futex_waitv(2).

void WakeAll(Word* word, int flags) {
  (void)syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE | flags, INT_MAX, nullptr, nullptr, 0);
}

timespec After(int64_t ns) {
  timespec at = {};
  clock_gettime(CLOCK_MONOTONIC, &at);
  ns += at.tv_nsec;
  at.tv_sec += ns / 1'000'000'000;
  at.tv_nsec = ns % 1'000'000'000;
  return at;
}

}  // namespace

// A sign of life, own or a peer's, mapped. The word: 0: not held (any more); otherwise as the kernel has robust futexes:
// the holder's thread id, FUTEX_WAITERS when somebody waits, FUTEX_OWNER_DIED.
struct DeathWatch::Page {
  static absl::StatusOr<std::unique_ptr<Page>> Map(Fd fd) {
    void* base = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (base == MAP_FAILED) return ErrnoStatus(errno, "map a sign of life");
    return std::make_unique<Page>(static_cast<Word*>(base), std::move(fd));
  }
  Page(Word* at, Fd file) : word(at), fd(std::move(file)) {}
  ~Page() { munmap(word, kPageBytes); }

  Word* const word;
  Fd fd;  // Only of the own one: a mapping needs none.
};

struct DeathWatch::Watched {
  int peer;
  std::unique_ptr<Page> page;
};

struct DeathWatch::State {
  State(std::unique_ptr<Page> page, std::function<void(int)> callback)
      : own(std::move(page)), on_death(std::move(callback)) {}

  void Run(std::promise<void>* held);
  void Hold();
  bool Look(std::vector<futex_waitv>* waits);
  void Sleep(std::vector<futex_waitv>& waits);
  void Poke();

  const std::unique_ptr<Page> own;
  const std::function<void(int)> on_death;
  // The kernel reads these when the thread ends.
  robust_list_head robust = {};
  robust_list entry = {};

  Word changed{0};  // A futex: something is new for the thread.
  bool without_waitv = false;
  Mutex mutex;
  bool stop ABSL_GUARDED_BY(mutex) = false;
  int watched_ever ABSL_GUARDED_BY(mutex) = 0;
  std::vector<Watched> added ABSL_GUARDED_BY(mutex);
  std::vector<Watched> watched;  // The thread's own.
  std::thread thread;
};

void DeathWatch::State::Poke() {
  changed.fetch_add(1, std::memory_order_release);
  WakeAll(&changed, FUTEX_PRIVATE_FLAG);
}

// Takes the place of the C library's list of robust mutexes: this thread locks none.
void DeathWatch::State::Hold() {
  entry.next = &robust.list;
  robust.list.next = &entry;
  robust.futex_offset = reinterpret_cast<char*>(own->word) - reinterpret_cast<char*>(&entry);
  (void)syscall(SYS_set_robust_list, &robust, sizeof robust);
  own->word->store(static_cast<uint32_t>(syscall(SYS_gettid)), std::memory_order_release);
}

// Finds out who died or went, and makes the list of futexes to sleep on. False: stop.
bool DeathWatch::State::Look(std::vector<futex_waitv>* waits) {
  waits->assign(1, {changed.load(std::memory_order_acquire), reinterpret_cast<uintptr_t>(&changed),
                    FUTEX_32 | FUTEX_PRIVATE_FLAG, 0});
  {
    MutexLock lock(&mutex);
    if (stop) return false;
    for (Watched& one : added) watched.push_back(std::move(one));
    added.clear();
  }
  std::vector<int> died;
  std::erase_if(watched, [&](const Watched& one) {
    Word* word = one.page->word;
    uint32_t value = word->load(std::memory_order_acquire);
    // Unless it asks for it, a waiter is not woken.
    while ((value & FUTEX_TID_MASK) != 0 && (value & (FUTEX_OWNER_DIED | FUTEX_WAITERS)) == 0 &&
           !word->compare_exchange_weak(value, value | FUTEX_WAITERS)) {
    }
    if ((value & FUTEX_OWNER_DIED) != 0) {
      WakeAll(word, 0);  // The kernel has woken one.
      died.push_back(one.peer);
      return true;
    }
    if ((value & FUTEX_TID_MASK) == 0) return true;  // Released.
    waits->push_back({value | FUTEX_WAITERS, reinterpret_cast<uintptr_t>(word), FUTEX_32, 0});
    return false;
  });
  for (int peer : died) on_death(peer);
  return true;
}

void DeathWatch::State::Sleep(std::vector<futex_waitv>& waits) {
  if (!without_waitv) {
    const long result = syscall(SYS_futex_waitv, waits.data(), waits.size(), 0, nullptr, CLOCK_MONOTONIC);
    without_waitv = result < 0 && errno == ENOSYS;
    if (!without_waitv) return;
  }
  timespec until = After(kLookEveryNs);
  (void)syscall(SYS_futex, reinterpret_cast<uint32_t*>(&changed),
                FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, static_cast<uint32_t>(waits[0].val),
                waits.size() > 1 ? &until : nullptr, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void DeathWatch::State::Run(std::promise<void>* held) {
  Hold();
  held->set_value();
  for (std::vector<futex_waitv> waits; Look(&waits);) Sleep(waits);
  robust.list.next = &robust.list;
}

DeathWatch::DeathWatch(std::unique_ptr<State> state) : state_(std::move(state)) {}

absl::StatusOr<std::unique_ptr<DeathWatch>> DeathWatch::Create(std::function<void(int)> on_death) {
  Fd fd(memfd_create("shoal-sign", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return ErrnoStatus(errno, "create a sign of life");
  if (ftruncate(fd.get(), kPageBytes) != 0 || fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    return ErrnoStatus(errno, "size a sign of life");
  }
  // A page that cannot be made is an error here, not a signal at the first write.
  if (const int error = posix_fallocate(fd.get(), 0, kPageBytes); error != 0) {
    return ErrnoStatus(error, "memory for a sign of life");
  }
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Page> page, Page::Map(std::move(fd)));
  auto state = std::make_unique<State>(std::move(page), std::move(on_death));
  std::promise<void> held;
  state->thread = std::thread([raw = state.get(), &held] { raw->Run(&held); });
  held.get_future().wait();
  return std::unique_ptr<DeathWatch>(new DeathWatch(std::move(state)));
}

DeathWatch::~DeathWatch() {
  Release();
  {
    MutexLock lock(&state_->mutex);
    state_->stop = true;
  }
  state_->Poke();
  state_->thread.join();
}

absl::StatusOr<Fd> DeathWatch::Sign() const {
  Fd fd(fcntl(state_->own->fd.get(), F_DUPFD_CLOEXEC, 0));
  if (!fd.valid()) return ErrnoStatus(errno, "duplicate a sign of life");
  return fd;
}

absl::Status DeathWatch::Watch(int peer, Fd sign) {
  struct stat about = {};
  const int seals = fcntl(sign.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(sign.get(), &about) != 0 ||
      about.st_size < static_cast<off_t>(kPageBytes)) {
    return absl::InvalidArgumentError("the descriptor is not a sign of life");
  }
  SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Page> mapped, Page::Map(std::move(sign)));
  mapped->fd.Reset();
  {
    MutexLock lock(&state_->mutex);
    if (++state_->watched_ever > kWatchedMax) return absl::OkStatus();
    state_->added.push_back({peer, std::move(mapped)});
  }
  state_->Poke();
  return absl::OkStatus();
}

void DeathWatch::Release() {
  state_->own->word->store(0, std::memory_order_release);
  WakeAll(state_->own->word, 0);
}

}  // namespace shoal
