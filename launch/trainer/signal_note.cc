#include "launch/trainer/signal_note.h"

#include <signal.h>

#include <array>
#include <atomic>

#include "runtime/base/check.h"

namespace shoal {
namespace {

struct Slot {
  std::atomic<bool> came = false;
  bool once = false;
  struct sigaction before = {};
};
static_assert(std::atomic<bool>::is_always_lock_free);  // What a handler may touch.

std::array<Slot, NSIG> slots;

void Note(int number) {
  Slot& slot = slots[static_cast<size_t>(number)];
  slot.came = true;
  if (slot.once) sigaction(number, &slot.before, nullptr);
}

}  // namespace

SignalNote::SignalNote(int number, Again again) : number_(number) {
  SHOAL_CHECK(number > 0 && number < NSIG) << number;
  Slot& slot = slots[static_cast<size_t>(number)];
  slot.came = false;
  slot.once = again == Again::kAsBefore;
  sigaction(number, nullptr, &slot.before);
  struct sigaction note = {};
  note.sa_handler = Note;
  note.sa_flags = SA_RESTART;
  sigaction(number, &note, nullptr);
}

SignalNote::~SignalNote() { sigaction(number_, &slots[static_cast<size_t>(number_)].before, nullptr); }

bool SignalNote::Take() { return slots[static_cast<size_t>(number_)].came.exchange(false); }

}  // namespace shoal
