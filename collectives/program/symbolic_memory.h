// What the verifier computes with: instead of a number an element holds who contributed to it, and how.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/program/program.h"

namespace shoal {

struct SymbolicValue {
  enum State : uint8_t {
    kUndefined,  // There is memory, nobody wrote to it.
    kAbsent,     // There is no memory.
    kDefined,
  };
  uint64_t expression = 0;       // A hash of the operations, in order.
  uint64_t sum_low = 0, sum_high = 0;  // Of the contributions, which are random 128-bit numbers: a multiset's fingerprint.
  int32_t element = -1;          // Which element of the input.
  State state = kUndefined;
  uint8_t finals = 0;

  bool operator==(const SymbolicValue&) const = default;
};

// Rank `rank`'s element `element` of its input.
SymbolicValue Contribution(int rank, int64_t element);
// Adds to the multiset; the expression is left alone.
void AddContribution(const SymbolicValue& value, SymbolicValue* sum);
// The expression of an instruction that combines `count` values, which are folded in one by one.
class Expression {
 public:
  void Fold(uint64_t expression);
  uint64_t Finish(bool final) const;

 private:
  uint64_t hash_ = 0;
  int terms_ = 0;
};

// One rank's memory. Elements of kIn are read only; where kIn and kOut are the same memory, they share its elements.
class SymbolicMemory {
 public:
  explicit SymbolicMemory(const Problem& problem, int64_t scratch);

  // Whether the elements exist. Not of kMessage.
  bool Exists(const Region& region) const;
  SymbolicValue* At(const Region& region) { return &values_[Begin(region)]; }
  const SymbolicValue* At(const Region& region) const { return &values_[Begin(region)]; }
  // Of the region's first element; equal for the same memory.
  int64_t Begin(const Region& region) const { return begin_[static_cast<int>(region.buffer)] + region.begin; }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }

 private:
  void Place(const Problem& problem, int64_t scratch);
  void Fill(const Problem& problem);

  int64_t begin_[3] = {0, 0, 0};  // By Buffer.
  int64_t count_[3] = {0, 0, 0};
  std::vector<SymbolicValue> values_;
};

// One element of kOut as it must be in the end.
struct Wanted {
  int64_t at = 0;       // In kOut.
  int64_t element = 0;  // Of the inputs.
  bool reduced = false;  // Otherwise a copy.
  int from = 0;                             // Not reduced: whose.
  const std::vector<int>* among = nullptr;  // Reduced: whose, ascending; null: everybody's.
};
// `members` keeps the lists that Wanted::among points to.
std::vector<Wanted> WantedOutput(const std::vector<Problem>& problems, int rank,
                                 std::vector<std::vector<int>>* members);

}  // namespace shoal
