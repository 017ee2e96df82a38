#include "collectives/engine/op.h"

#include "runtime/base/status.h"

namespace shoal {

const char* KindName(OpKind kind) {
  switch (kind) {
    case OpKind::kAllReduce:
      return "all_reduce";
    case OpKind::kReduceScatter:
      return "reduce_scatter";
    case OpKind::kAllGather:
      return "all_gather";
    case OpKind::kAllToAll:
      return "all_to_all";
    case OpKind::kBroadcast:
      return "broadcast";
    case OpKind::kReduce:
      return "reduce";
    case OpKind::kGather:
      return "gather";
    case OpKind::kScatter:
      return "scatter";
    case OpKind::kBarrier:
      return "barrier";
    case OpKind::kSend:
      return "send";
    case OpKind::kReceive:
      return "receive";
    case OpKind::kSparseAllGather:
      return "sparse_all_gather";
    case OpKind::kSparseReduceScatter:
      return "sparse_reduce_scatter";
  }
  return "unknown operation";
}

std::string OpName(OpKind kind, std::string_view label, uint64_t seq) {
  if (label.empty()) return absl::StrCat(KindName(kind), " #", seq);
  return absl::StrCat(KindName(kind), " \"", AbslSv(label), "\" #", seq);
}

uint32_t Signature(const Op& op) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  mix(static_cast<uint64_t>(op.kind));
  mix(static_cast<uint64_t>(op.in.dtype()));
  mix(static_cast<uint64_t>(op.reduce));
  mix(op.root);
  // The counts of an all_to_all differ from rank to rank.
  if (op.kind == OpKind::kAllReduce || op.kind == OpKind::kBroadcast) mix(op.in.elements());
  if (op.kind != OpKind::kAllToAll) {
    for (int64_t count : op.counts) mix(count);
  }
  return static_cast<uint32_t>(hash);
}

std::vector<int64_t> Displacements(const std::vector<int64_t>& counts) {
  std::vector<int64_t> result(counts.size() + 1, 0);
  for (size_t i = 0; i < counts.size(); ++i) result[i + 1] = result[i] + counts[i];
  return result;
}

}  // namespace shoal
