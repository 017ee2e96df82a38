// Which task a lane takes next: in list order, or, where Graph::waves_apart, of the next tasks of all waves the first of the list
// that may begin. For the executor and for simulations of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "parallel/schedule/graph.h"

namespace shoal {

// The tasks of one lane. Borrows the graph for life. Not changed by its cursors, of which it may have many.
class LaneOrder {
 public:
  LaneOrder() = default;
  LaneOrder(const Graph& graph, Lane lane);

  static constexpr int kNone = -1;
  // How far one run has come. `done` says by task what has ended.
  class Cursor {
   public:
    Cursor() = default;
    explicit Cursor(const LaneOrder& order) : order_(&order), places_(order.tracks_.size()) {}
    // Takes the task that begins now; kNone: none may yet, or all have been taken.
    int Take(const std::vector<uint8_t>& done);
    // After Take has returned kNone: whether it may return a task once this one has ended.
    bool Awaits(int task) const;
    bool AllTaken() const;

   private:
    struct Place {
      size_t next = 0;    // In the track.
      size_t waited = 0;  // In `after` of that task: those before it have ended.
    };
    const LaneOrder* order_ = nullptr;
    absl::InlinedVector<Place, 1> places_;  // By track.
  };

 private:
  const Graph* graph_ = nullptr;
  // Each in list order: one, or those of each wave and those of none.
  absl::InlinedVector<std::vector<int>, 1> tracks_;
};

}  // namespace shoal
