// A collective algorithm is a function from a problem to a program: for one rank a list of send, receive and reduce
// instructions with dependencies. Pure values: the engine runs them (engine/program_run.h), the verifier checks them
// (program/verifier.h), the cost model predicts them (program/cost.h).
//
// Meaning. An instruction may begin when all that it depends on have ended. Instructions that do not depend on each
// other run in any order; the engine prefers the lower index. Offsets and counts are in elements.
//   kSend     posts `region` (kIn, kOut or kScratch) to `peer` as the message (this rank, peer, tag). Ends when the memory
//             may be written again, which may need the peer to have received it (rendezvous).
//   kReceive  takes the message (peer, this rank, tag) of `region.count` elements. `region` names where it goes; or its
//             buffer is kMessage: it stays where the transport has it (on shared memory, in the sender's buffer) as a
//             *view*, which later instructions name as Region{kMessage, begin, count, receive = index}. The view is given
//             back when the last instruction that reads it has ended.
//   kReduce   region = sources[0] op sources[1] op ..., in that order; one source: a copy. `final` on the instruction that
//             completes a reduction (averages divide there). The target may be one of the sources.
// Lending (`lends`, on both ends of a message): until the send ends, the peer alone uses the region, and it may write there.
// The receive is of a view; one kReduce that `returns` has the whole view among its sources, and writes its result there as
// well, or has it as its target. So the sender's region holds that result when its send ends. Only where Problem::lending.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"
#include "collectives/communicator.h"

namespace shoal {

enum class OpKind : uint8_t {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kAllToAll,
  kBroadcast,
  kReduce,
  kGather,
  kScatter,
  kBarrier,
  kSend,
  kReceive,
  kSparseAllGather,
  kSparseReduceScatter,
};

// As in Communicator, in snake case: "all_reduce".
std::string_view OpKindName(OpKind kind);

enum class Buffer : uint8_t { kIn, kOut, kScratch, kMessage };

struct Region {
  Buffer buffer = Buffer::kIn;
  int32_t receive = -1;  // Of kMessage: the index of the instruction that received it.
  int64_t begin = 0;
  int64_t count = 0;
};

enum class OpCode : uint8_t { kSend, kReceive, kReduce };

struct Instruction {
  OpCode code = OpCode::kReduce;
  bool final = false;
  bool lends = false;    // Of kSend and kReceive.
  bool returns = false;  // Of kReduce: the result goes to all lent views among its sources, too, or to one as its target.
  int32_t peer = -1;  // Index in the group.
  uint32_t tag = 0;   // Unique among the messages of the program from this sender to this receiver.
  Region region;
  // Parts of Program::sources and Program::dependencies.
  int32_t sources_begin = 0, sources_count = 0;
  int32_t dependencies_begin = 0, dependencies_count = 0;
};

// What one rank does. Scratch is `scratch` elements, of the reduction's type.
struct Program {
  std::vector<Instruction> instructions;
  std::vector<Region> sources;
  std::vector<int32_t> dependencies;  // Indices of earlier instructions.
  int64_t scratch = 0;

  absl::Span<const Region> SourcesOf(const Instruction& i) const {
    return absl::MakeSpan(sources).subspan(i.sources_begin, i.sources_count);
  }
  // Calls each(receive, region) for the views that an instruction reads or writes.
  template <class Each>
  void ForViews(const Instruction& i, Each each) const {
    if (i.code != OpCode::kReduce) return;
    for (const Region& source : SourcesOf(i)) {
      if (source.buffer == Buffer::kMessage) each(source.receive, source);
    }
    if (i.region.buffer == Buffer::kMessage) each(i.region.receive, i.region);
  }
  absl::Span<const int32_t> DependenciesOf(const Instruction& i) const {
    return absl::MakeSpan(dependencies).subspan(i.dependencies_begin, i.dependencies_count);
  }

  // Append and return the index. `after`: indices of instructions.
  int Send(int peer, uint32_t tag, Region region, absl::Span<const int> after = {});
  int Receive(int peer, uint32_t tag, Region region, absl::Span<const int> after = {});
  int Reduce(absl::Span<const Region> from, Region target, bool final, absl::Span<const int> after = {});
  int Copy(Region source, Region target, absl::Span<const int> after = {});
};

// Which ranks share a host, and in which order rings and trees go. Equal on all ranks.
struct Topology {
  std::vector<int> host;   // By index in the group: a number, equal for ranks of one host.
  std::vector<int> order;  // A permutation of the group; empty: by index.
};

// One operation as one rank sees it. In: all_reduce, reduce, broadcast (root): `elements`. Out likewise. reduce_scatter: in
// has sum(counts), out counts[rank]; all_gather, gather: in counts[rank], out sum(counts); scatter: the reverse. all_to_all: in
// has sum(counts), out sum(recv_counts). Broadcast: root reads kIn, others write kOut (they are one tensor). Sparse: kIn and kOut
// are both this rank's chunks laid end to end in chunk order, chunk c at ChunkBegin(c), whether it holds them or not.
struct Problem {
  OpKind kind = OpKind::kBarrier;
  int rank = 0;
  int size = 1;
  int root = 0;  // Of kSend and kReceive: the other side.
  int64_t elements = 0;
  std::vector<int64_t> counts;
  std::vector<int64_t> recv_counts;
  bool even = false;              // Of an all_to_all: every rank has these counts.
  bool lending = false;           // All ranks can lend each other memory (Channel::Lends).
  bool in_place = false;          // kIn and kOut share memory (see Communicator).
  std::vector<SparseMove> moves;  // `counts` are then the chunks' sizes.
  int64_t piece = 0;              // Longer regions are cut into pieces of so many elements, to overlap; 0: never.
  const Topology* topology = nullptr;  // Null: one host, order by index.
};

}  // namespace shoal
