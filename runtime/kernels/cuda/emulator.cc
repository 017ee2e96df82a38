#include "runtime/kernels/cuda/emulator.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "runtime/base/check.h"
#include "runtime/base/mutex.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace shoal::cuda::emulator {

thread_local Dim3 t_thread_index, t_block_index, t_block_dim, t_grid_dim;
thread_local unsigned char* t_dynamic_shared = nullptr;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kSlotBytes = 64;

// Registers that a function must keep lie on the fiber's stack while others run, so a switch is a change of stacks.
extern "C" void shoal_emulator_switch(void** save_stack, void* load_stack);
asm(R"(
  .text
  .globl shoal_emulator_switch
  .type shoal_emulator_switch, @function
shoal_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size shoal_emulator_switch, .-shoal_emulator_switch
)");

// Where the threads of `mask` of one warp, or all of a block, meet.
struct Meeting {
  unsigned arrived = 0;
  uint64_t rounds = 0;
};

struct Warp {
  alignas(16) unsigned char slots[kWarp * kSlotBytes];
  uint32_t arrived = 0, mask = 0;                          // Lanes at the meeting, and those it is for.
  uint64_t rounds = 0;
  uint32_t lanes = 0;                                      // That the warp has.
};

// In which order threads take turns: what a barrier that is not there should have kept apart goes well in one of them at most.
enum class Turns : uint8_t { kAscending, kDescending };

class Block {
 public:
  explicit Block(unsigned threads) : stacks_(threads), fibers_(threads), warps_((threads + kWarp - 1) / kWarp) {}

  void Run(const std::function<void()>& body, Turns turns);

  void SyncThreads() {
    const uint64_t round = meeting_.rounds;
    if (++meeting_.arrived == fibers_.size()) return Open();
    WaitWhile([&] { return meeting_.rounds == round; });
  }

  void SyncWarp(uint32_t mask) {
    Warp& warp = warps_[running_ / kWarp];
    const uint32_t lane = 1u << (running_ % kWarp);
    SHOAL_CHECK((mask & lane) != 0) << "lane " << running_ % kWarp << " is not in its mask";
    // Lanes of another mask have their meeting first or later; one at a time per warp.
    WaitWhile([&] { return warp.arrived != 0 && warp.mask != mask; });
    warp.mask = mask;
    warp.arrived |= lane;
    const uint64_t round = warp.rounds;
    if (Complete(warp)) return OpenWarp(warp);
    WaitWhile([&] { return warp.rounds == round; });
  }

  unsigned char* Slots() { return warps_[running_ / kWarp].slots; }
  unsigned lane() const { return running_ % kWarp; }

 private:
  struct Fiber {
    void* stack = nullptr;
    bool done = true;
  };

  static void Entry();
  void Start(unsigned thread);
  bool Complete(const Warp& warp) const { return (warp.mask & warp.lanes & ~warp.arrived) == 0; }
  void Open() {
    meeting_.arrived = 0;
    ++meeting_.rounds;
    progress_ = true;
  }
  void OpenWarp(Warp& warp) {
    warp.arrived = 0;
    ++warp.rounds;
    progress_ = true;
  }
  template <typename Waits> void WaitWhile(const Waits& waits) {
    while (waits()) Switch();
    progress_ = true;
  }
  // To the next thread that is not done.
  void Switch() {
    const unsigned from = running_;
    unsigned to = from;
    do {
      if (to == last_) {
        to = first_;
        SHOAL_CHECK(progress_) << "threads of a block wait for ever: a barrier or exchange that not all of them reach";
        progress_ = false;
      } else {
        to = first_ < last_ ? to + 1 : to - 1;
      }
    } while (fibers_[to].done);
    if (to == from) return;
    Resume(to);
    shoal_emulator_switch(&fibers_[from].stack, fibers_[to].stack);
  }
  void Resume(unsigned thread) {
    running_ = thread;
    t_thread_index = {thread, 0, 0};
  }
  void Finish();

  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Meeting meeting_;
  unsigned running_ = 0, alive_ = 0;
  unsigned first_ = 0, last_ = 0;  // Of a round of turns.
  bool progress_ = true;
  const std::function<void()>* body_ = nullptr;
  void* host_stack_ = nullptr;
};

thread_local Block* t_block = nullptr;

void Block::Entry() {
  Block& block = *t_block;
  (*block.body_)();
  block.Finish();
}

// A stack as shoal_emulator_switch leaves one: six registers and where to return to. Functions expect the stack 8 bytes off a multiple
// of 16 when they are entered.
void Block::Start(unsigned thread) {
  if (stacks_[thread] == nullptr) stacks_[thread] = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
  uintptr_t top = reinterpret_cast<uintptr_t>(stacks_[thread].get()) + kStackBytes;
  top &= ~uintptr_t{15};
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stacks_[thread].get(), kStackBytes);  // The functions of a thread before never returned.
#endif
  auto* stack = reinterpret_cast<void**>(top) - 8;
  std::fill(stack, stack + 8, nullptr);
  stack[6] = reinterpret_cast<void*>(&Block::Entry);
  fibers_[thread] = {stack, false};
}

void Block::Finish() {
  Fiber& fiber = fibers_[running_];
  fiber.done = true;
  progress_ = true;
  if (--alive_ == 0) {
    shoal_emulator_switch(&fiber.stack, host_stack_);
  } else {
    Switch();
  }
  std::abort();  // Nobody returns to a thread that is done.
}

void Block::Run(const std::function<void()>& body, Turns turns) {
  body_ = &body;
  alive_ = static_cast<unsigned>(fibers_.size());
  first_ = 0, last_ = alive_ - 1;
  if (turns == Turns::kDescending) std::swap(first_, last_);
  meeting_ = {};
  progress_ = true;
  for (unsigned warp = 0; warp < warps_.size(); ++warp) {
    const unsigned lanes = std::min(kWarp, alive_ - warp * kWarp);
    warps_[warp].arrived = 0;
    warps_[warp].lanes = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  }
  for (unsigned thread = 0; thread < fibers_.size(); ++thread) Start(thread);
  t_block = this;
  Resume(first_);
  shoal_emulator_switch(&host_stack_, fibers_[first_].stack);
  t_block = nullptr;
}

std::mutex g_one_at_a_time;
int64_t g_launches = 0;  // Guarded by it.

Block& Current() {
  SHOAL_CHECK(t_block != nullptr) << "outside of a kernel";
  return *t_block;
}

}  // namespace

void Run(Dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  SHOAL_CHECK(threads >= 1 && threads <= 1024) << threads << " threads in a block";
  SHOAL_CHECK(shared_bytes <= 227 * 1024) << shared_bytes << " bytes of shared memory";
  const std::lock_guard lock(g_one_at_a_time);
  ++g_launches;
  Block block(threads);
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t{1024}); }
  };
  const std::unique_ptr<unsigned char[], Free> shared(new (std::align_val_t{1024}) unsigned char[shared_bytes + 1]);
  t_dynamic_shared = shared.get();
  t_block_dim = {threads, 1, 1};
  t_grid_dim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        t_block_index = {x, y, z};
        std::memset(shared.get(), 0xff, shared_bytes);  // NaN: what nobody wrote.
        // In the next launch of the same grid the other way round.
        block.Run(body, (static_cast<uint64_t>(g_launches) + x + y + z) % 2 == 0 ? Turns::kAscending : Turns::kDescending);
      }
    }
  }
}

int64_t Launches() {
  const std::lock_guard lock(g_one_at_a_time);
  return g_launches;
}

void* Scratch(int64_t bytes) {
  thread_local std::vector<unsigned char> memory;
  memory.assign(static_cast<size_t>(bytes) + 256, 0xff);
  void* aligned = memory.data();
  size_t space = memory.size();
  return std::align(256, static_cast<size_t>(bytes), aligned, space);
}

void SyncThreads() { Current().SyncThreads(); }
void SyncWarp(uint32_t mask) { Current().SyncWarp(mask); }

// Each of these waits twice: before the values of others are read, and before they are overwritten.
void Exchange(uint32_t mask, const void* own, int source, void* result, size_t bytes) {
  Block& block = Current();
  unsigned char* slots = block.Slots();
  std::memcpy(slots + block.lane() * kSlotBytes, own, bytes);
  block.SyncWarp(mask);
  const bool there = source >= 0 && source < static_cast<int>(kWarp) && ((mask >> source) & 1u) != 0;
  std::memcpy(result, slots + (there ? static_cast<size_t>(source) : block.lane()) * kSlotBytes, bytes);
  block.SyncWarp(mask);
}

void Gather(const void* own, size_t bytes, void* all) {
  SHOAL_CHECK(bytes <= kSlotBytes) << bytes;
  Block& block = Current();
  unsigned char* slots = block.Slots();
  std::memcpy(slots + block.lane() * kSlotBytes, own, bytes);
  block.SyncWarp(~0u);
  for (size_t lane = 0; lane < kWarp; ++lane) {
    std::memcpy(static_cast<unsigned char*>(all) + lane * bytes, slots + lane * kSlotBytes, bytes);
  }
  block.SyncWarp(~0u);
}

uint32_t Ballot(uint32_t mask, bool predicate) {
  Block& block = Current();
  unsigned char* slots = block.Slots();
  slots[block.lane() * kSlotBytes] = predicate ? 1 : 0;
  block.SyncWarp(mask);
  uint32_t result = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (((mask >> lane) & 1u) != 0 && slots[lane * kSlotBytes] != 0) result |= 1u << lane;
  }
  block.SyncWarp(mask);
  return result;
}

}  // namespace shoal::cuda::emulator
