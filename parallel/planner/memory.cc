#include "parallel/planner/memory.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace shoal {
namespace {

constexpr int64_t kF32 = 4;

// What HostMemory gives for a tensor: small ones as they are, others in whole pages.
constexpr int64_t kSmallBytes = 1 << 18, kPageBytes = 1 << 21;
int64_t Held(int64_t bytes) { return bytes < kSmallBytes ? bytes : (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most experts of a layer that one rank owns, and that it holds copies of.
struct ExpertCounts {
  int64_t owned = 0, copies = 0;
};
ExpertCounts CountExperts(const ExpertPlacement& placement, int ranks) {
  std::vector<int64_t> owned(static_cast<size_t>(ranks)), copies(owned.size());
  for (const ExpertCopies& expert : placement) {
    ++owned[static_cast<size_t>(expert.owner)];
    for (int holder : expert.holders) ++copies[static_cast<size_t>(holder)];
  }
  return {*std::max_element(owned.begin(), owned.end()), *std::max_element(copies.begin(), copies.end())};
}

class MemoryCount {
 public:
  MemoryCount(const ModelShape& model, const StepLayout& layout, const LaidOut& out, int waves)
      : model_(model), layout_(layout), out_(out), waves_(waves), ranks_(out.topology.ranks()), b_(model.compute_bytes) {
    for (int64_t tokens : out.work.tokens) tokens_ = std::max(tokens_, tokens);
    for (const ExpertWork& experts : out.work.experts) {
      double sent = 0, arrived = 0;
      for (const ExpertShare& share : ShareExperts(out.work, experts, out.topology)) {
        sent = std::max(sent, share.rows);
        arrived = std::max(arrived, share.arrived);
      }
      rows_.push_back({std::llround(std::ceil(sent)), std::llround(std::ceil(arrived))});
    }
  }

  MemoryUse Count() {
    CountDense();
    CountExperts();
    CountActivations();
    return use_;
  }

 private:
  struct Rows {
    int64_t sent = 0, arrived = 0;
  };

  int64_t master_bytes() const { return b_ == kF32 ? 0 : kF32; }

  void CountDense() {
    const std::vector<int64_t> elements = model_.BucketElements(), bytes = model_.BucketBytes();
    const BucketIndex buckets = out_.shape.buckets();
    const bool sharded = layout_.dense == DensePolicy::kSharded && ranks_ > 1;
    int64_t largest = 0;
    for (int bucket = 0; bucket < buckets.count(); ++bucket) {
      const int64_t count = elements[static_cast<size_t>(bucket)], owned = CeilDiv(count, ranks_);
      const bool layer = bucket >= 2 && bucket < 2 + buckets.layers;
      const bool split = sharded && layer;
      use_.weights += split ? owned * b_ : bytes[static_cast<size_t>(bucket)];
      use_.gradients += kF32 * (split ? owned : count);
      use_.optimizer += 2 * Held(owned * kF32) + Held(bucket == 0 ? 0 : owned * master_bytes());
      if (split) largest = std::max(largest, count);
    }
    const int64_t buffers = std::min(DenseBuffers(layout_.prefetch, waves_), buckets.layers);
    use_.weights += buffers * largest * b_;
    use_.gradients += buffers * largest * kF32;
  }

  void CountExperts() {
    int64_t owned = 0, room = 0, layers = 0;
    for (const int index : out_.work.experts_of_layer) {
      if (index < 0) continue;
      const ExpertCounts counts = shoal::CountExperts(out_.work.experts[static_cast<size_t>(index)].placement, ranks_);
      owned += counts.owned;
      room = std::max(room, counts.copies);
      ++layers;
    }
    // Owners are dealt so that over all layers ranks own nearly as many.
    const int64_t slots = std::min(owned, CeilDiv(layers * model_.experts, ranks_) + (layers > 0 ? 1 : 0));
    const int64_t expert = model_.expert_elements();
    use_.weights += slots * expert * b_;
    use_.gradients += slots * expert * kF32;
    use_.optimizer += 2 * Held(slots * expert * kF32) + Held(slots * expert * master_bytes());
    const int64_t rooms = layout_.experts == ExpertPolicy::kKeep ? layers : std::min<int64_t>(layout_.prefetch + 1, layers);
    use_.copies += rooms * room * expert * (b_ + kF32);
  }

  int64_t AttentionKept() const {
    return Held(tokens_ * b_ * model_.width) + Held(tokens_ * b_ * (model_.query_size + 2 * model_.kv_size)) +
           Held(tokens_ * b_ * model_.query_size) + Held(tokens_ * kF32) + Held(tokens_ * kF32 * model_.heads);
  }
  int64_t LayerKept(size_t layer) const {
    const int64_t normed = Held(tokens_ * model_.width * kF32) + Held(tokens_ * model_.width * b_) + Held(tokens_ * kF32);
    if (!model_.moe[layer]) return AttentionKept() + normed + Held(tokens_ * 2 * b_ * model_.dense_inner);
    const Rows& rows = rows_[static_cast<size_t>(out_.work.experts_of_layer[layer])];
    const int64_t routing = Held(tokens_ * kF32) + Held(tokens_ * kF32 * model_.experts) +
                            2 * Held(tokens_ * kF32 * model_.choices) + 2 * Held(rows.sent * kF32);
    const int64_t travelled = Held(b_ * rows.arrived * model_.width) + Held(b_ * rows.arrived * 2 * model_.expert_inner) +
                              Held(b_ * rows.sent * model_.width);
    return AttentionKept() + normed + routing + travelled + Held(2 * b_ * tokens_ * model_.shared_inner);
  }
  // Of a layer's backward pass, beside what it keeps: the gradient and those by rows, or by a dense layer's inner vectors.
  int64_t LayerWorking(size_t layer) const {
    const int64_t gradient = Held(tokens_ * model_.width * kF32);
    if (!model_.moe[layer]) {
      const int64_t narrow = b_ == kF32 ? 0 : Held(tokens_ * b_ * model_.width);
      return gradient + narrow + Held(tokens_ * b_ * model_.width) + Held(tokens_ * b_ * model_.dense_inner);
    }
    const Rows& rows = rows_[static_cast<size_t>(out_.work.experts_of_layer[layer])];
    return gradient + Held(rows.sent * kF32) + Held(b_ * rows.arrived * model_.width) + Held(b_ * rows.sent * model_.width) +
           Held(b_ * rows.arrived * model_.expert_inner);
  }

  void CountActivations() {
    int64_t largest = 0, kept = 0, working = 0;
    for (size_t layer = 0; layer < model_.moe.size(); ++layer) {
      const int64_t here = LayerKept(layer);
      largest = std::max(largest, here);
      kept += here;
      working = std::max(working, LayerWorking(layer));
    }
    const int64_t inputs = (model_.layers() + 1) * Held(tokens_ * model_.width * kF32);  // Of each layer, and of the head.
    use_.activations = inputs + (layout_.recompute ? largest : kept);
    const int64_t chunk = std::min(model_.loss_chunk, tokens_);
    const int64_t head = Held(tokens_ * model_.width * b_) + 2 * Held(tokens_ * model_.width * kF32) +
                         Held(chunk * model_.vocab * kF32) + Held(b_ == kF32 ? 0 : chunk * model_.vocab * b_);
    use_.working = std::max(head, working);
    if (!out_.shape.dispatch) return;
    int64_t most = 0;
    for (const Rows& rows : rows_) most = std::max({most, rows.sent, rows.arrived});
    use_.buffers = 2 * b_ * most * model_.width;
  }

  const ModelShape& model_;
  const StepLayout& layout_;
  const LaidOut& out_;
  const int waves_, ranks_;
  const int64_t b_;
  int64_t tokens_ = 0;
  std::vector<Rows> rows_;  // By entry of Workload::experts, of the rank with most.
  MemoryUse use_;
};

}  // namespace

MemoryUse PeakMemory(const ModelShape& model, const StepLayout& layout, const LaidOut& laid_out, int waves) {
  return MemoryCount(model, layout, laid_out, waves).Count();
}

std::string BytesText(int64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (value >= 1024.0 * 1024 * 1024) return absl::StrFormat("%.3g GiB", value / (1024.0 * 1024 * 1024));
  return absl::StrFormat("%.3g MiB", value / (1024.0 * 1024));
}

std::string MemoryUse::ToString() const {
  std::vector<std::pair<int64_t, const char*>> parts = {
      {weights, "weights"},         {gradients, "gradients"},     {optimizer, "optimizer state"}, {copies, "copies of experts"},
      {activations, "activations"}, {buffers, "buffers of rows"}, {working, "working memory"}};
  std::stable_sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::string text = BytesText(total());
  for (size_t i = 0; i < parts.size() && parts[i].first > 0; ++i) {
    absl::StrAppend(&text, i == 0 ? ": " : ", ", parts[i].second, " ", BytesText(parts[i].first));
  }
  return text;
}

}  // namespace shoal
