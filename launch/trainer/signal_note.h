// A signal as a note that the program reads when it suits it, instead of its end. Hides handlers.
#pragma once

namespace shoal {

class SignalNote {
 public:
  // What the signal does once it was noted.
  enum class Again { kNoted, kAsBefore };  // kAsBefore: what it did before there was a note; mostly, it ends the process.

  // One at a time for each signal. System calls that it interrupts are gone on with where the kernel can (SA_RESTART).
  SignalNote(int number, Again again);
  ~SignalNote();  // The signal does again what it did before.
  SignalNote(const SignalNote&) = delete;
  SignalNote& operator=(const SignalNote&) = delete;

  // Whether the signal came since the last call. From any thread.
  bool Take();

 private:
  const int number_;
};

}  // namespace shoal
