#include "collectives/engine/op.h"

#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int kHashBits = 28;

uint32_t SignatureOf(OpKind kind, uint64_t hash) {
  return static_cast<uint32_t>(kind) << kHashBits | static_cast<uint32_t>(hash & ((1u << kHashBits) - 1));
}

}  // namespace

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
  if (op.kind == OpKind::kSend || op.kind == OpKind::kReceive) return SignatureOf(OpKind::kSend, 0);
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  const bool sparse = op.kind == OpKind::kSparseAllGather || op.kind == OpKind::kSparseReduceScatter;
  // Of sparse operations each rank knows only the chunks that it holds.
  mix((sparse ? 0 : static_cast<uint64_t>(op.dtype)) | static_cast<uint64_t>(op.reduce) << 8 |
      static_cast<uint64_t>(op.wire) << 16 | static_cast<uint64_t>(op.order) << 24 |
      static_cast<uint64_t>(op.even) << 32);
  mix(op.root);
  for (char letter : op.algorithm) mix(letter);
  const bool elements_count =
      op.kind == OpKind::kAllReduce || op.kind == OpKind::kBroadcast || op.kind == OpKind::kReduce;
  if (elements_count) mix(op.in.elements());
  // The counts of an all_to_all differ from rank to rank.
  if (!sparse && (op.kind != OpKind::kAllToAll || op.even)) {
    for (int64_t count : op.counts) mix(count);
  }
  for (const SparseMove& move : op.moves) {
    mix(move.chunk);
    mix(move.owner);
    for (int holder : move.holders) mix(holder + 1);
  }
  return SignatureOf(op.kind, hash);
}

const char* KindNameOf(uint32_t signature) { return KindName(static_cast<OpKind>(signature >> kHashBits)); }

std::vector<int64_t> Displacements(const std::vector<int64_t>& counts) {
  std::vector<int64_t> result(counts.size() + 1, 0);
  for (size_t i = 0; i < counts.size(); ++i) result[i + 1] = result[i] + counts[i];
  return result;
}

}  // namespace shoal
