// Questions that one process asks another beside the messages it sends ("has this been read?", "is this
// wanted?"), numbered, and their answers, which may come in any order and never need room: one bit each in
// the answering process's memory.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "collectives/engine/shm/group_page.h"

namespace shoal {

enum class Answer : uint8_t { kTaken, kGo };

// The asking side.
class Questions {
 public:
  explicit Questions(const Answers* answers) : answers_(answers) {}

  // kRequestsMax are open.
  bool Full() const { return free_.empty() && used_ == kRequestsMax; }
  int open() const { return used_ - static_cast<int>(free_.size()); }

  // A number that is not in use. Not when Full().
  uint32_t Ask() {
    if (!free_.empty()) {
      const uint32_t number = free_.back();
      free_.pop_back();
      return number;
    }
    if (used_ % 64 == 0) seen_.push_back({0, 0});
    return static_cast<uint32_t>(used_++);
  }

  bool AnyAnswer() const {
    if (open() == 0) return false;
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (Load(i, Answer::kTaken) != seen_[i].taken || Load(i, Answer::kGo) != seen_[i].go) return true;
    }
    return false;
  }

  // Calls answered(number, answer) for each new answer; what the peer wrote before it is visible then. The
  // number is free again.
  template <class Answered>
  void Collect(const Answered& answered) {
    if (open() == 0) return;
    for (size_t i = 0; i < seen_.size(); ++i) {
      Take(i, Answer::kTaken, &seen_[i].taken, answered);
      Take(i, Answer::kGo, &seen_[i].go, answered);
    }
  }

 private:
  struct Seen {
    uint64_t taken, go;
  };

  uint64_t Load(size_t word, Answer answer) const {
    const Answers::Word& w = answers_->words[word];
    return (answer == Answer::kTaken ? w.taken : w.go).load(std::memory_order_acquire);
  }

  template <class Answered>
  void Take(size_t word, Answer answer, uint64_t* seen, const Answered& answered) {
    uint64_t changed = Load(word, answer) ^ *seen;
    *seen ^= changed;
    for (; changed != 0; changed &= changed - 1) {
      const uint32_t number = static_cast<uint32_t>(word * 64 + std::countr_zero(changed));
      answered(number, answer);
      free_.push_back(number);
    }
  }

  const Answers* const answers_;
  int used_ = 0;                // Numbers that were ever asked.
  std::vector<uint32_t> free_;  // Those of them that are not open.
  std::vector<Seen> seen_;
};

// The answering side.
class Replies {
 public:
  explicit Replies(Answers* answers) : answers_(answers) {}

  // `number`: as the peer wrote it, so it may be nonsense.
  void Say(Answer answer, uint32_t number) {
    Answers::Word& word = answers_->words[number % kRequestsMax / 64];
    std::atomic<uint64_t>& bits = answer == Answer::kTaken ? word.taken : word.go;
    bits.store(bits.load(std::memory_order_relaxed) ^ uint64_t{1} << number % 64, std::memory_order_release);
  }

 private:
  Answers* const answers_;
};

}  // namespace shoal
