#include "collectives/membership/state_sync.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "absl/strings/str_join.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;

struct Hash {
  uint64_t low = 0, high = 0;
  auto operator<=>(const Hash&) const = default;
};

Hash HashOf(const void* data, size_t bytes) {
  const XXH128_hash_t hash = XXH3_128bits(data, bytes);
  return {hash.low64, hash.high64};
}

// What a rank says about itself before anything else. Plain data: travels as bytes.
struct Claim {
  uint64_t revision;
  uint64_t role;
  Hash structure;  // Names, shapes, types.
  Hash content;
};

// Blocks of all tensors, in order. A tensor with no elements has none.
struct Block {
  int tensor;
  Tensor bytes;  // A view of kU8.
};

std::vector<Block> Cut(absl::Span<const NamedTensor> tensors) {
  std::vector<Block> blocks;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& tensor = tensors[t].tensor;
    for (int64_t begin = 0; begin < tensor.bytes(); begin += kBlockBytes) {
      const int64_t bytes = std::min(kBlockBytes, tensor.bytes() - begin);
      blocks.push_back({static_cast<int>(t), Tensor(static_cast<char*>(tensor.raw()) + begin, {bytes}, DType::kU8)});
    }
  }
  return blocks;
}

Hash HashStructure(absl::Span<const NamedTensor> tensors) {
  std::string text;
  for (const NamedTensor& named : tensors) {
    absl::StrAppend(&text, named.name.size(), ":", named.name, AbslSv(Name(named.tensor.dtype())),
                    ShapeString(named.tensor.shape()), ";");
  }
  return HashOf(text.data(), text.size());
}

OpOptions Options(const SyncOptions& options) {
  OpOptions op;
  op.deadline = options.deadline;
  op.label = "sync_state";
  return op;
}

// `count` values of every rank, in rank order.
template <class T>
absl::StatusOr<std::vector<T>> Exchange(Communicator& group, const T* own, int64_t count, const SyncOptions& options) {
  std::vector<T> all(count * group.size());
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  const std::vector<int64_t> counts(group.size(), bytes);
  const Tensor in(const_cast<T*>(own), {bytes}, DType::kU8);
  const Tensor out(all.data(), {bytes * group.size()}, DType::kU8);
  SHOAL_RETURN_IF_ERROR(group.AllGather(in, counts, out, Options(options)).Await());
  return all;
}

std::string Ranks(const std::vector<int>& ranks) {
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", absl::StrJoin(ranks, ", "));
}

// Which rank's content wins: a pure function of the claims, equal on all ranks.
absl::StatusOr<int> Elect(const std::vector<Claim>& claims) {
  std::vector<int> odd, senders;
  for (size_t rank = 0; rank < claims.size(); ++rank) {
    if (claims[rank].structure != claims[0].structure) odd.push_back(static_cast<int>(rank));
    if (claims[rank].role == static_cast<uint64_t>(SyncRole::kSendOnly)) senders.push_back(static_cast<int>(rank));
  }
  if (!odd.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("names, shapes or types of the tensors on ", Ranks(odd), " are not those on rank 0"));
  }
  for (int sender : senders) {
    if (claims[sender].content != claims[senders[0]].content) {
      return absl::FailedPreconditionError(
          absl::StrCat(Ranks(senders), " only send, and their contents differ"));
    }
  }
  if (!senders.empty()) return senders[0];
  std::map<Hash, int> holders;
  uint64_t newest = 0;
  bool any = false;
  for (const Claim& claim : claims) {
    if (claim.role == static_cast<uint64_t>(SyncRole::kReceiveOnly)) continue;
    newest = any ? std::max(newest, claim.revision) : claim.revision;
    any = true;
  }
  if (!any) return absl::FailedPreconditionError("all ranks only receive: nobody has the state");
  int best = -1;
  const auto may_win = [&](const Claim& claim) {
    return claim.role != static_cast<uint64_t>(SyncRole::kReceiveOnly) && claim.revision == newest;
  };
  for (const Claim& claim : claims) holders[claim.content] += may_win(claim) ? 1 : 0;
  for (size_t rank = 0; rank < claims.size(); ++rank) {
    if (!may_win(claims[rank])) continue;
    if (best < 0 || holders[claims[rank].content] > holders[claims[best].content]) best = static_cast<int>(rank);
  }
  return best;
}

// For every block that somebody lacks: who gives it to whom. Sources take turns by bytes.
std::vector<SparseMove> Plan(const std::vector<Hash>& hashes, const std::vector<Block>& blocks, int winner, int size) {
  const size_t count = blocks.size();
  std::vector<int64_t> sent(size, 0);
  std::vector<SparseMove> moves;
  for (size_t b = 0; b < count; ++b) {
    const Hash& wanted = hashes[winner * count + b];
    SparseMove move;
    move.chunk = static_cast<int>(b);
    move.owner = winner;
    for (int rank = 0; rank < size; ++rank) {
      if (hashes[rank * count + b] != wanted) {
        move.holders.push_back(rank);
      } else if (sent[rank] < sent[move.owner]) {
        move.owner = rank;
      }
    }
    if (move.holders.empty()) continue;
    sent[move.owner] += blocks[b].bytes.bytes();
    moves.push_back(std::move(move));
  }
  return moves;
}

// Whether all ranks found in order what they received; otherwise which did not.
absl::Status AgreeThatAllIsWell(Communicator& group, bool well, const SyncOptions& options) {
  const uint8_t own = well ? 1 : 0;
  SHOAL_ASSIGN_OR_RETURN(const std::vector<uint8_t> all, Exchange(group, &own, 1, options));
  std::vector<int> damaged;
  for (int rank = 0; rank < group.size(); ++rank) {
    if (all[rank] == 0) damaged.push_back(rank);
  }
  if (damaged.empty()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("what ", Ranks(damaged), " received does not have the hash that was agreed on: the state was written to ",
                   "meanwhile, or memory is damaged"));
}

}  // namespace

absl::StatusOr<SyncReport> SyncState(Communicator& group, absl::Span<const NamedTensor> tensors, uint64_t revision,
                                     const SyncOptions& options) {
  const std::vector<Block> blocks = Cut(tensors);
  std::vector<Hash> own;
  for (const Block& block : blocks) own.push_back(HashOf(block.bytes.raw(), block.bytes.bytes()));
  const Claim claim = {revision, static_cast<uint64_t>(options.role), HashStructure(tensors),
                       HashOf(own.data(), own.size() * sizeof(Hash))};
  SHOAL_ASSIGN_OR_RETURN(const std::vector<Claim> claims, Exchange(group, &claim, 1, options), "sync_state");
  SHOAL_ASSIGN_OR_RETURN(const int winner, Elect(claims), "sync_state");
  SyncReport report;
  report.revision = claims[winner].revision;
  const bool equal = std::all_of(claims.begin(), claims.end(),
                                 [&](const Claim& other) { return other.content == claims[winner].content; });
  if (equal) return report;

  SHOAL_ASSIGN_OR_RETURN(const std::vector<Hash> hashes, Exchange(group, own.data(), own.size(), options),
                         "sync_state");
  const std::vector<SparseMove> moves = Plan(hashes, blocks, winner, group.size());
  std::vector<Tensor> chunks(blocks.size());
  std::vector<int> received;
  for (const SparseMove& move : moves) {
    const bool receives = std::binary_search(move.holders.begin(), move.holders.end(), group.index());
    if (!receives && move.owner != group.index()) continue;
    chunks[move.chunk] = blocks[move.chunk].bytes;
    (receives ? report.bytes_received : report.bytes_sent) += blocks[move.chunk].bytes.bytes();
    if (receives) received.push_back(move.chunk);
  }
  const OpOptions op = Options(options);
  SHOAL_RETURN_IF_ERROR(group.SparseAllGather(chunks, moves, op).Await(), "sync_state");
  bool well = true;
  for (int b : received) {
    const Hash hash = HashOf(blocks[b].bytes.raw(), blocks[b].bytes.bytes());
    well = well && hash == hashes[winner * blocks.size() + b];
    const std::string& name = tensors[blocks[b].tensor].name;
    if (report.changed.empty() || report.changed.back() != name) report.changed.push_back(name);
  }
  SHOAL_RETURN_IF_ERROR(AgreeThatAllIsWell(group, well, options), "sync_state");
  return report;
}

}  // namespace shoal
