// The last so many keys that were added, with a value each: what is remembered of things that are over, when peers can make
// there be any number of them. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>

#include "absl/container/flat_hash_map.h"

namespace shoal {

template <class Value>
class Recent {
 public:
  explicit Recent(size_t most) : most_(most) {}

  // Null: not known, or forgotten.
  const Value* Find(uint64_t key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? nullptr : &found->second;
  }
  // False: known already, and left as it is. Forgets the oldest when there are too many.
  bool Add(uint64_t key, Value value) {
    if (!values_.emplace(key, std::move(value)).second) return false;
    order_.push_back(key);
    if (order_.size() <= most_) return true;
    values_.erase(order_.front());
    order_.pop_front();
    return true;
  }

 private:
  const size_t most_;
  absl::flat_hash_map<uint64_t, Value> values_;
  std::deque<uint64_t> order_;
};

}  // namespace shoal
