#include "parallel/planner/model_shape.h"

#include <algorithm>

#include "parallel/placement/placement.h"

namespace shoal {

std::vector<int64_t> ModelShape::BucketElements() const {
  std::vector<int64_t> elements = {(2 * layers() + 1) * width, vocab * width};
  for (const bool experts_here : moe) {
    elements.push_back(AttentionElements() +
                       (experts_here ? experts * width + 3 * width * shared_inner : 3 * width * dense_inner));
  }
  if (!tied_head) elements.push_back(vocab * width);
  return elements;
}

std::vector<int64_t> ModelShape::BucketBytes() const {
  std::vector<int64_t> bytes = BucketElements();
  for (size_t bucket = 0; bucket < bytes.size(); ++bucket) bytes[bucket] *= bucket == 0 ? 4 : compute_bytes;
  return bytes;
}

int64_t ModelShape::OwnedElements(int bucket, int ranks) const {
  if (blocks.empty()) return (BucketElements()[static_cast<size_t>(bucket)] + ranks - 1) / ranks;
  const std::vector<int64_t>& sizes = blocks[static_cast<size_t>(bucket)];
  const std::vector<int> owner = ContiguousPartition(sizes, ranks);
  std::vector<int64_t> owned(static_cast<size_t>(ranks));
  for (size_t i = 0; i < sizes.size(); ++i) owned[static_cast<size_t>(owner[i])] += sizes[i];
  return *std::max_element(owned.begin(), owned.end());
}

double ModelShape::TrainFlopsPerToken() const {
  const double moe_layers = static_cast<double>(std::count(moe.begin(), moe.end(), true));
  const double dense_layers = layers() - moe_layers;
  const double weights =
      layers() * static_cast<double>(AttentionElements()) +
      moe_layers * static_cast<double>(choices * expert_elements() + experts * width + 3 * width * shared_inner) +
      dense_layers * static_cast<double>(3 * width * dense_inner) + static_cast<double>(vocab * width);
  return 6 * weights + 6.0 * layers() * static_cast<double>(query_size * sequence_length);
}

}  // namespace shoal
