// Chooses the algorithm and the pieces of operations: by the cost model, then by what is observed. Every function that
// decides depends only on what all ranks of the group know alike, in the same order: so all choose alike.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "collectives/engine/op.h"
#include "collectives/engine/tuning.h"
#include "collectives/program/algorithms.h"
#include "collectives/program/cost.h"
#include "runtime/base/mutex.h"

namespace shoal {

// What is assumed of links that were not measured: shared memory within a host, TCP across.
CostModel DefaultCostModel(const Topology& topology, int64_t cores_per_host);

// Which of some candidates is best. times_ns[c]: observed on the slowest rank, 0: never. The present one stays unless
// another is faster by a tenth. Requires that the present one was observed.
size_t BestObserved(absl::Span<const int64_t> times_ns, size_t present);

// Rows() is thread-safe; the rest belongs to whoever runs operations.
class Tuner {
 public:
  explicit Tuner(CostModel model) : model_(std::move(model)) {}

  struct Decision {
    const Algorithm* algorithm = nullptr;
    int64_t piece_bytes = 0;
  };
  // Of the next operation, whose problem it is.
  Decision Choose(const Operation& op, const Problem& problem);
  // The next operation is none of those.
  void Skip();
  // How long the operation that was chosen for last took here.
  void Observe(int64_t ns);

  // The links were measured. All that was chosen and observed is forgotten.
  void SetModel(CostModel model);

  // Ranks exchange what they observed: each gives kExchanged numbers, and gets those of all, rank by rank.
  static constexpr int kExchanged = 64;
  // Whether the group does so before the collective `number` (1, 2, ...): at powers of four from 64 on.
  static bool ExchangesBefore(uint64_t number);
  void FillExchange(absl::Span<int64_t> own);
  void ApplyExchange(absl::Span<const int64_t> all);

  std::vector<TuningRow> Rows() const;

 private:
  // What may be chosen from.
  enum class Allowed : uint8_t { kAll, kPrecise, kIndexOrder, kDirect };
  struct Candidate {
    Choice choice;  // `piece` in elements of 4 bytes.
    std::array<int64_t, 16> recent_ns = {};
    int64_t observed = 0;   // Operations.
    int64_t agreed_ns = 0;  // On the slowest rank, at the last exchange.
  };
  struct Class {
    OpKind kind = OpKind::kBarrier;
    Allowed allowed = Allowed::kAll;
    int log2_bytes = -1;  // -1: not all ranks know the size.
    std::vector<Candidate> candidates;  // The one that is expected to be best first.
    size_t present = 0;
    size_t trial = 0;
    int trials_left = 0;  // Operations for which `trial` is used instead.
    std::string why;
  };
  static Allowed AllowedFor(const Operation& op);
  static int LogBytes(const Operation& op, const Problem& problem);
  Class& ClassOf(const Operation& op, const Problem& problem) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FillClass(const Problem& problem, Class* found) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Adjust(Class* found) const;

  mutable Mutex mutex_;
  CostModel model_ ABSL_GUARDED_BY(mutex_);
  std::deque<Class> classes_ ABSL_GUARDED_BY(mutex_);  // In the order of first use, which is that of all ranks.
  Candidate* last_ ABSL_GUARDED_BY(mutex_) = nullptr;   // Chosen last; null: none of those.
};

}  // namespace shoal
