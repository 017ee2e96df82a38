#include "parallel/planner/memory.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "parallel/placement/placement.h"

namespace shoal {
namespace {

constexpr int64_t kF32 = 4;
constexpr int64_t kQuantised = 2;  // Of a weight: its code, once by rows and once by columns; on the CPU what the code means.

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

// Rooms for copies (ExpertStore), and what a copy in one of them takes.
int64_t Rooms(const ModelShape& model, const StepLayout& layout) {
  const int64_t layers = std::count(model.moe.begin(), model.moe.end(), true);
  return layout.experts == ExpertPolicy::kKeep ? layers : std::min<int64_t>(std::max(layout.prefetch, 1) + 1, layers);
}
int64_t GradientBytesOfCopy(const ModelShape& model, const StepLayout& layout) {
  return layout.pinned() ? 0 : model.expert_elements() * kF32;
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
      partials_.push_back(layout.pinned() ? CountPartials(experts) : Partials());
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
  // Bytes of a layer's gradients in the pinned order: of experts without copies while those of one rank's rows are computed, of
  // those with copies until owners have added them, and of what arrives for owners to add.
  struct Partials {
    int64_t passing = 0, kept = 0, arrived = 0;
  };

  // Of a layer; none past the last and of dense ones.
  Partials PartialsOf(size_t layer) const {
    const int index = layer < model_.moe.size() ? out_.work.experts_of_layer[layer] : -1;
    return index < 0 ? Partials() : partials_[static_cast<size_t>(index)];
  }
  Partials CountPartials(const ExpertWork& experts) const {
    const ExpertPlacement& placement = experts.placement;
    const size_t ranks = static_cast<size_t>(ranks_);
    // Without loads every rank has rows for every expert.
    const std::vector<int64_t> rows =
        experts.rows.empty() ? std::vector<int64_t>(ranks * placement.size(), 1) : experts.rows;
    std::vector<int64_t> passing(ranks), kept(ranks), arrived(ranks);
    for (const ExpertCopies& copies : placement) passing[static_cast<size_t>(copies.owner)] += copies.holders.empty() ? 1 : 0;
    for (const auto& of_source : SplitTokens(layout_.dispatch, out_.topology, placement, rows)) {
      for (const DispatchShare& share : of_source) {
        const ExpertCopies& copies = placement[static_cast<size_t>(share.expert)];
        if (copies.holders.empty()) continue;
        ++kept[static_cast<size_t>(share.rank)];
        if (share.rank != copies.owner) ++arrived[static_cast<size_t>(copies.owner)];
      }
    }
    const int64_t bytes = Held(model_.expert_elements() * kF32);
    const auto most = [&](const std::vector<int64_t>& counts) { return bytes * *std::max_element(counts.begin(), counts.end()); };
    return {most(passing), most(kept), most(arrived)};
  }

  // Of memory that ranks of a host map: exact. A host's only rank keeps it with its other tensors.
  int64_t Shared(int64_t bytes) const { return out_.shape.intra ? bytes : Held(bytes); }
  int64_t master_bytes() const { return b_ == kF32 ? 0 : kF32; }

  void CountDense() {
    const std::vector<int64_t> elements = model_.BucketElements(), bytes = model_.BucketBytes();
    const BucketIndex buckets = out_.shape.buckets();
    const bool sharded = layout_.dense == DensePolicy::kSharded && ranks_ > 1;
    int64_t of_layers = 0, of_ends = 0;  // The largest.
    for (int bucket = 0; bucket < buckets.count(); ++bucket) {
      const int64_t count = elements[static_cast<size_t>(bucket)], owned = model_.OwnedElements(bucket, ranks_);
      const bool split = sharded && buckets.Shardable(bucket);
      use_.weights += Shared(split ? owned * b_ : bytes[static_cast<size_t>(bucket)]);
      use_.gradients += split ? Held(kF32 * owned) : Shared(kF32 * count);
      use_.optimizer += 2 * Held(owned * kF32) + Held(bucket == 0 ? 0 : owned * master_bytes());
      int64_t& largest = buckets.IsLayer(bucket) ? of_layers : of_ends;
      if (split) largest = std::max(largest, count);
    }
    const int64_t buffers = std::min(DenseBuffers(std::max(layout_.prefetch, 1), waves_), buckets.layers);
    use_.weights += buffers * Shared(of_layers * b_) + Shared(of_ends * b_);
    use_.gradients += buffers * Shared(of_layers * kF32) + Shared(of_ends * kF32);
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
    if (layout_.sparse && layout_.copies >= 0 && layers > 0) room = std::min(layout_.copies, model_.experts);
    // Owners are dealt so that over all layers ranks own nearly as many.
    const int64_t slots = std::min(owned, CeilDiv(layers * model_.experts, ranks_) + (layers > 0 ? 1 : 0));
    const int64_t expert = model_.expert_elements();
    use_.weights += Shared(slots * expert * b_);
    use_.gradients += Shared(slots * expert * kF32);
    use_.optimizer += 2 * Held(slots * expert * kF32) + Held(slots * expert * master_bytes());
    if (model_.fp8) CountQuantised(layers == 0 ? 0 : CeilDiv(owned, layers) + room, layers);
    use_.copies += Rooms(model_, layout_) * (Shared(room * expert * b_) + Shared(room * GradientBytesOfCopy(model_, layout_)));
  }

  // Of every layer where weights are kept, otherwise of one product at a time. `experts`: of a layer, on this rank.
  void CountQuantised(int64_t experts, int64_t moe_layers) {
    const int64_t up = 2 * model_.width * model_.expert_inner * kQuantised, down = up / 2;
    const int64_t of_experts = Held(experts * up) + Held(experts * down);
    use_.quantised += layout_.experts == ExpertPolicy::kKeep ? moe_layers * of_experts : Held(experts * up);
    int64_t kept = 0, largest = 0;  // Of dense matrices.
    for (const bool moe : model_.moe) {
      const int64_t inner = moe ? model_.shared_inner : model_.dense_inner;
      for (const int64_t rows : {model_.query_size + 2 * model_.kv_size, model_.query_size, 2 * inner, inner}) {
        const int64_t bytes = Held(rows * model_.width * kQuantised);
        kept += bytes;
        largest = std::max(largest, bytes);
      }
    }
    use_.quantised += layout_.dense == DensePolicy::kReplicated || ranks_ == 1 ? kept : largest;
  }

  // ---- Of one wave.

  struct Wave {
    int64_t tokens = 0;
    double share = 1;  // Of the rank's tokens.
  };
  // What a layer holds of a wave at different times.
  struct LayerBytes {
    int64_t input = 0;      // x.
    int64_t kept = 0;       // From the forward pass to the backward pass, beside x.
    int64_t home = 0;       // Of those, rows that came home: until they have been packed for the backward pass.
    int64_t working = 0;    // In the backward pass, beside what is kept and the gradient.
    int64_t remaining = 0;  // Of all of these, with x, when its experts are done and its attention is not.
  };

  std::vector<Wave> Waves() const {
    const int64_t sequences = tokens_ / model_.sequence_length;
    const int count = static_cast<int>(std::clamp<int64_t>(sequences, 1, waves_));
    std::vector<Wave> waves;
    for (int wave = 0; wave < count; ++wave) {
      const int64_t tokens = EvenPart(sequences, count, wave).count * model_.sequence_length;
      waves.push_back({tokens, tokens_ == 0 ? 1.0 / count : static_cast<double>(tokens) / static_cast<double>(tokens_)});
    }
    return waves;
  }

  int64_t Narrow(int64_t tokens) const { return Held(tokens * model_.width * b_); }
  int64_t Wide(int64_t tokens) const { return Held(tokens * model_.width * kF32); }

  int64_t AttentionKept(int64_t tokens) const {
    return Narrow(tokens) + Held(tokens * b_ * (model_.query_size + 2 * model_.kv_size)) + Held(tokens * b_ * model_.query_size) +
           Held(tokens * kF32) + Held(tokens * kF32 * model_.heads);
  }

  LayerBytes BytesOf(size_t layer, const Wave& wave) const {
    const int64_t tokens = wave.tokens;
    const int64_t normed = Wide(tokens) + Narrow(tokens) + Held(tokens * kF32);
    LayerBytes bytes{.input = Wide(tokens)};
    if (!model_.moe[layer]) {
      bytes.kept = AttentionKept(tokens) + normed + Held(tokens * 2 * b_ * model_.dense_inner);
      bytes.working = (b_ == kF32 ? 0 : Narrow(tokens)) + Narrow(tokens) + Held(tokens * b_ * model_.dense_inner);
      bytes.remaining = bytes.input + AttentionKept(tokens);
      return bytes;
    }
    const Rows& all = rows_[static_cast<size_t>(out_.work.experts_of_layer[layer])];
    const int64_t sent = Share(all.sent, wave), arrived = Share(all.arrived, wave);
    const int64_t routing = Held(tokens * kF32) + Held(tokens * kF32 * model_.experts) +
                            2 * Held(tokens * kF32 * model_.choices) + 2 * Held(sent * kF32);
    bytes.home = Narrow(sent);
    const int64_t travelled = Narrow(arrived) + Held(b_ * arrived * 2 * model_.expert_inner) + bytes.home;
    bytes.kept = AttentionKept(tokens) + normed + routing + travelled + Held(2 * b_ * tokens * model_.shared_inner);
    bytes.working = Held(sent * kF32) + Narrow(arrived) + Narrow(sent) + Held(b_ * arrived * model_.expert_inner);
    bytes.remaining = bytes.input + AttentionKept(tokens) + normed + routing + Narrow(sent);
    return bytes;
  }
  static int64_t Share(int64_t rows, const Wave& wave) { return std::llround(std::ceil(static_cast<double>(rows) * wave.share)); }

  // ---- Of all waves, at the times that may be the worst.

  void CountActivations() {
    const std::vector<Wave> waves = Waves();
    std::vector<std::vector<LayerBytes>> layers;
    for (size_t layer = 0; layer < model_.moe.size(); ++layer) {
      layers.emplace_back();
      for (const Wave& wave : waves) layers.back().push_back(BytesOf(layer, wave));
    }
    int64_t gradients = 0, inputs = 0, kept = 0;  // Of the layers up to the one at hand.
    for (const Wave& wave : waves) gradients += Wide(wave.tokens);
    int64_t peak = 0;
    const auto consider = [&](int64_t activations, int64_t working, int64_t partials) {
      if (activations + working + partials <= peak) return;
      peak = activations + working + partials;
      use_.activations = activations;
      use_.working = working;
      use_.partials = partials;
    };
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      int64_t here = 0;
      for (const LayerBytes& bytes : layers[layer]) {
        inputs += bytes.input;
        here += bytes.kept;
      }
      kept += here;
      const std::vector<LayerBytes>* above = layer + 1 < layers.size() && waves.size() > 1 ? &layers[layer + 1] : nullptr;
      const Partials own = PartialsOf(layer), travelling = PartialsOf(layer + 1);
      consider(inputs + (layout_.recompute ? here : kept), gradients + BackwardWorking(layers[layer], above),
               own.passing + own.kept + travelling.kept + travelling.arrived);
    }
    // The head, whose input is as wide as a layer's; the gradients of the waves before are there.
    consider(inputs + gradients + (layout_.recompute ? 0 : kept), gradients + HeadWorking(waves), 0);
    if (!out_.shape.dispatch) return;
    for (const Wave& wave : waves) CountBuffers(wave);
  }

  // Waves pass from the attention of the layer above to the departure of this layer's rows one after the other.
  static int64_t BackwardWorking(const std::vector<LayerBytes>& layer, const std::vector<LayerBytes>* above) {
    int64_t most = 0;
    for (size_t arrived = above == nullptr ? layer.size() : 0; arrived <= layer.size(); ++arrived) {
      int64_t bytes = 0;
      for (size_t wave = 0; wave < layer.size(); ++wave) {
        if (wave < arrived) bytes += layer[wave].working - (wave + 1 < arrived ? layer[wave].home : 0);
        if (wave >= arrived) bytes += (*above)[wave].remaining;
      }
      most = std::max(most, bytes);
    }
    return most;
  }

  int64_t HeadWorking(const std::vector<Wave>& waves) const {
    const Wave& largest = waves.front();
    const int64_t chunk = std::min(model_.loss_chunk, largest.tokens);
    const int64_t logits = Held(chunk * model_.vocab * kF32) + Held(b_ == kF32 ? 0 : chunk * model_.vocab * b_);
    return std::max(Narrow(largest.tokens) + logits, Wide(largest.tokens));
  }

  // Buffers have room for a quarter more rows than the first that they were made for.
  void CountBuffers(const Wave& wave) {
    int64_t sent = 0, arrived = 0;
    for (const Rows& rows : rows_) {
      sent = std::max(sent, Share(rows.sent, wave));
      arrived = std::max(arrived, Share(rows.arrived, wave));
    }
    for (int64_t rows : {sent, arrived}) {
      const int64_t bytes = rows * model_.width * b_;
      use_.buffers += Shared(bytes + bytes / 4);
    }
  }

  const ModelShape& model_;
  const StepLayout& layout_;
  const LaidOut& out_;
  const int waves_, ranks_;
  const int64_t b_;
  int64_t tokens_ = 0;
  std::vector<Rows> rows_;          // By entry of Workload::experts, of the rank with most.
  std::vector<Partials> partials_;  // Likewise.
  MemoryUse use_;
};

}  // namespace

MemoryUse PeakMemory(const ModelShape& model, const StepLayout& layout, const LaidOut& laid_out, int waves) {
  return MemoryCount(model, layout, laid_out, waves).Count();
}

int64_t CopyBytes(const ModelShape& model, const StepLayout& layout) {
  return Rooms(model, layout) * (model.expert_elements() * model.compute_bytes + GradientBytesOfCopy(model, layout));
}

std::string BytesText(int64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (value >= 1024.0 * 1024 * 1024) return absl::StrFormat("%.3g GiB", value / (1024.0 * 1024 * 1024));
  return absl::StrFormat("%.3g MiB", value / (1024.0 * 1024));
}

std::string MemoryUse::ToString() const {
  std::vector<std::pair<int64_t, const char*>> parts = {
      {weights, "weights"},         {gradients, "gradients"},     {optimizer, "optimizer state"}, {copies, "copies of experts"},
      {activations, "activations"}, {buffers, "buffers of rows"}, {working, "working memory"},
      {partials, "partial sums"},   {quantised, "quantised weights"}};
  std::stable_sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::string text = BytesText(total());
  for (size_t i = 0; i < parts.size() && parts[i].first > 0; ++i) {
    absl::StrAppend(&text, i == 0 ? ": " : ", ", parts[i].second, " ", BytesText(parts[i].first));
  }
  return text;
}

}  // namespace shoal
