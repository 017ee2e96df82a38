#include "collectives/program/symbolic_memory.h"

#include <algorithm>
#include <numeric>

#include "runtime/base/check.h"

namespace shoal {
namespace {

uint64_t Mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int64_t Sum(const std::vector<int64_t>& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }
int64_t Before(const std::vector<int64_t>& counts, int i) {
  return std::accumulate(counts.begin(), counts.begin() + i, int64_t{0});
}

std::vector<int> MembersOf(const SparseMove& move) {
  std::vector<int> members = move.holders;
  members.insert(std::lower_bound(members.begin(), members.end(), move.owner), move.owner);
  return members;
}

}  // namespace

SymbolicValue Contribution(int rank, int64_t element) {
  SymbolicValue value;
  value.sum_low = Mix(Mix(static_cast<uint64_t>(rank) + 1) + static_cast<uint64_t>(element));
  value.sum_high = Mix(value.sum_low ^ 0x5851f42d4c957f2du);
  value.expression = Mix(value.sum_high);
  value.element = static_cast<int32_t>(element);
  value.state = SymbolicValue::kDefined;
  return value;
}

void AddContribution(const SymbolicValue& value, SymbolicValue* sum) {
  sum->sum_low += value.sum_low;
  sum->sum_high += value.sum_high + (sum->sum_low < value.sum_low ? 1 : 0);
}

void Expression::Fold(uint64_t expression) {
  // Not commutative: op(a, b) and op(b, a) differ.
  hash_ = terms_ == 0 ? expression : Mix(hash_ * 3 + Mix(expression));
  ++terms_;
}

uint64_t Expression::Finish(bool final) const {
  // An instruction rounds its result: (a op b) op c in one instruction and in two may differ in their bits.
  const uint64_t rounded = terms_ > 1 ? Mix(hash_ ^ 0xd6e8feb86659fd93u) : hash_;
  return final ? Mix(rounded ^ 0xa0761d6478bd642fu) : rounded;
}

SymbolicMemory::SymbolicMemory(const Problem& problem, int64_t scratch) {
  Place(problem, scratch);
  Fill(problem);
}

void SymbolicMemory::Place(const Problem& p, int64_t scratch) {
  int64_t in = 0, out = 0;
  int64_t in_at = 0, out_at = 0;  // In place: where they begin in the common memory.
  bool shared = p.in_place;
  const bool root = p.rank == p.root;
  switch (p.kind) {
    case OpKind::kAllReduce:
      in = out = p.elements;
      break;
    case OpKind::kReduce:
      in = p.elements;
      out = root ? p.elements : 0;
      break;
    case OpKind::kBroadcast:
      in = out = p.elements;
      shared = true;
      break;
    case OpKind::kReduceScatter:
      in = Sum(p.counts);
      out = p.counts[p.rank];
      out_at = Before(p.counts, p.rank);
      break;
    case OpKind::kAllGather:
    case OpKind::kGather:
      in = p.counts[p.rank];
      out = p.kind == OpKind::kAllGather || root ? Sum(p.counts) : 0;
      in_at = out > 0 ? Before(p.counts, p.rank) : 0;
      break;
    case OpKind::kScatter:
      in = root ? Sum(p.counts) : 0;
      out = p.counts[p.rank];
      out_at = root ? Before(p.counts, p.rank) : 0;
      shared = shared && root;
      break;
    case OpKind::kAllToAll:
      in = Sum(p.counts);
      out = Sum(p.recv_counts);
      break;
    case OpKind::kBarrier:
      break;
    case OpKind::kSend:
      in = p.elements;
      break;
    case OpKind::kReceive:
      out = p.elements;
      break;
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      in = out = Sum(p.counts);
      shared = true;
      break;
  }
  const int64_t first = shared ? std::max(in_at + in, out_at + out) : in + out;
  begin_[0] = shared ? in_at : 0;
  begin_[1] = shared ? out_at : in;
  begin_[2] = first;
  count_[0] = in;
  count_[1] = out;
  count_[2] = scratch;
  values_.resize(first + scratch);
}

void SymbolicMemory::Fill(const Problem& p) {
  SymbolicValue* const in = values_.data() + begin_[0];
  const bool gather = p.kind == OpKind::kSparseAllGather;
  if (!gather && p.kind != OpKind::kSparseReduceScatter) {
    if (p.kind == OpKind::kBroadcast && p.rank != p.root) return;
    for (int64_t e = 0; e < count_[0]; ++e) in[e] = Contribution(p.rank, e);
    return;
  }
  for (int64_t e = 0; e < count_[0]; ++e) in[e].state = SymbolicValue::kAbsent;
  for (const SparseMove& move : p.moves) {
    const bool owner = move.owner == p.rank;
    if (!owner && !std::binary_search(move.holders.begin(), move.holders.end(), p.rank)) continue;
    const int64_t begin = Before(p.counts, move.chunk);
    for (int64_t e = begin; e < begin + p.counts[move.chunk]; ++e) {
      in[e] = owner || !gather ? Contribution(p.rank, e) : SymbolicValue{};
    }
  }
}

bool SymbolicMemory::Exists(const Region& region) const {
  const int buffer = static_cast<int>(region.buffer);
  if (region.begin < 0 || region.count < 0 || region.begin + region.count > count_[buffer]) return false;
  return std::all_of(At(region), At(region) + region.count,
                     [](const SymbolicValue& v) { return v.state != SymbolicValue::kAbsent; });
}

std::vector<Wanted> WantedOutput(const std::vector<Problem>& problems, int rank,
                                 std::vector<std::vector<int>>* members) {
  const Problem& p = problems[rank];
  std::vector<Wanted> wanted;
  const auto reduced = [&](int64_t at, int64_t element, int64_t count) {
    for (int64_t k = 0; k < count; ++k) wanted.push_back({at + k, element + k, true, 0, nullptr});
  };
  const auto copied = [&](int64_t at, int from, int64_t element, int64_t count) {
    for (int64_t k = 0; k < count; ++k) wanted.push_back({at + k, element + k, false, from, nullptr});
  };
  switch (p.kind) {
    case OpKind::kAllReduce: reduced(0, 0, p.elements); break;
    case OpKind::kReduce: reduced(0, 0, rank == p.root ? p.elements : 0); break;
    case OpKind::kReduceScatter: reduced(0, Before(p.counts, rank), p.counts[rank]); break;
    case OpKind::kBroadcast: copied(0, p.root, 0, p.elements); break;
    case OpKind::kScatter: copied(0, p.root, Before(p.counts, rank), p.counts[rank]); break;
    case OpKind::kReceive: copied(0, p.root, 0, p.elements); break;
    case OpKind::kAllGather:
    case OpKind::kGather:
      if (p.kind == OpKind::kGather && rank != p.root) break;
      for (int r = 0; r < p.size; ++r) copied(Before(p.counts, r), r, 0, p.counts[r]);
      break;
    case OpKind::kAllToAll:
      for (int64_t r = 0, at = 0; r < p.size; at += p.recv_counts[r++]) {
        copied(at, static_cast<int>(r), Before(problems[r].counts, rank), p.recv_counts[r]);
      }
      break;
    case OpKind::kSparseAllGather:
    case OpKind::kSparseReduceScatter:
      members->reserve(p.moves.size());  // Their addresses stay.
      for (const SparseMove& move : p.moves) {
        const int64_t begin = Before(p.counts, move.chunk), count = p.counts[move.chunk];
        const std::vector<int>& all = members->emplace_back(MembersOf(move));
        if (!std::binary_search(all.begin(), all.end(), rank)) continue;
        if (p.kind == OpKind::kSparseAllGather || rank != move.owner) {
          copied(begin, p.kind == OpKind::kSparseAllGather ? move.owner : rank, begin, count);
          continue;
        }
        for (int64_t e = begin; e < begin + count; ++e) wanted.push_back({e, e, true, 0, &all});
      }
      break;
    case OpKind::kBarrier:
    case OpKind::kSend:
      break;
  }
  return wanted;
}

}  // namespace shoal
