#include "collectives/engine/op.h"

#include "runtime/base/status.h"

namespace shoal {

std::string OpName(OpKind kind, std::string_view label, uint64_t seq) {
  if (label.empty()) return absl::StrCat(AbslSv(OpKindName(kind)), " #", seq);
  return absl::StrCat(AbslSv(OpKindName(kind)), " \"", AbslSv(label), "\" #", seq);
}

uint32_t Signature(const Operation& op) {
  if (op.kind == OpKind::kSend || op.kind == OpKind::kReceive) {
    return SignatureHash(OpKind::kSend, DType::kU8, ReduceOp::kSum, Order::kFast, /*root=*/0).Signature();
  }
  const bool sparse = op.kind == OpKind::kSparseAllGather || op.kind == OpKind::kSparseReduceScatter;
  // Of sparse operations each rank knows only the chunks that it holds.
  SignatureHash hash(op.kind, sparse ? DType::kF32 : op.dtype, op.reduce, op.order, op.root, op.wire, op.even);
  for (char letter : op.algorithm) hash.Mix(letter);
  const bool elements_count =
      op.kind == OpKind::kAllReduce || op.kind == OpKind::kBroadcast || op.kind == OpKind::kReduce;
  if (elements_count) hash.Mix(op.in.elements());
  // The counts of an all_to_all differ from rank to rank.
  if (!sparse && (op.kind != OpKind::kAllToAll || op.even)) hash.MixAll(op.counts);
  for (const SparseMove& move : op.moves) {
    hash.Mix(move.chunk);
    hash.Mix(move.owner);
    for (int holder : move.holders) hash.Mix(holder + 1);
  }
  return hash.Signature();
}

std::string KindNameOf(uint32_t signature) { return std::string(OpKindName(SignatureHash::KindOf(signature))); }

std::vector<int64_t> Displacements(const std::vector<int64_t>& counts) {
  std::vector<int64_t> result(counts.size() + 1, 0);
  for (size_t i = 0; i < counts.size(); ++i) result[i + 1] = result[i] + counts[i];
  return result;
}

}  // namespace shoal
