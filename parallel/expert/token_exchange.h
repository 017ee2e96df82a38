// Rows of tokens on their way to the ranks of their experts and back: the all-to-all of expert parallelism (Lepikhin et al., 2020,
// "GShard", arXiv 2006.16668), chunk by chunk, with a lane for the ranks of this host and one for all others. Where and how many
// rows there are says a DispatchPlan. S rows of this rank's tokens, R rows of its experts.
//
// Calls block; those of one lane are made by all ranks in the same order, from one thread per lane. ABORTED: the group is over.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "collectives/communicator.h"
#include "parallel/expert/dispatch_plan.h"
#include "parallel/schedule/graph.h"

namespace shoal {

class TokenExchange {
 public:
  // Borrows both for life. `inter` has all ranks; null on one host. `intra` has those of this host in ascending order, on one host
  // all; null where a host has only one.
  // `streams` of the device whose memory has the rows, for each lane's own copies: kIntra's, kInter's; null: the CPU's.
  using Streams = std::array<std::unique_ptr<Stream>, 2>;
  TokenExchange(Communicator* inter, Communicator* intra, const Topology& topology, int rank, Streams streams = {});

  // A buffer for rows about to travel: peers read it in place. Valid until the next call with the same `use` and `wave`; on one
  // rank it is fresh memory.
  enum class Use : uint8_t { kDispatch = 0, kReturn = 1 };
  absl::StatusOr<Tensor> SendBuffer(Use use, int wave, int64_t rows, int64_t width, DType dtype);

  enum class Way : uint8_t { kThere, kBack };  // [S, D] -> [R, D], or [R, D] -> [S, D].
  struct Chunk {
    DispatchPlan::Direction direction = DispatchPlan::Direction::kForward;
    int index = 0;
    Way way = Way::kThere;
  };
  // Moves a chunk's rows that travel on `lane` (kIntra or kInter). Returns the bytes sent or received, the larger.
  absl::StatusOr<int64_t> Travel(const DispatchPlan& plan, const Chunk& chunk, Lane lane, const Tensor& from, const Tensor& to);
  // Copies those that stay on this rank, in the order of `stream`. Returns their bytes. Local.
  int64_t Stay(const DispatchPlan& plan, const Chunk& chunk, const Tensor& from, const Tensor& to, Stream& stream) const;

 private:
  struct LaneState {
    Communicator* group = nullptr;
    std::vector<int> members;  // Ranks by index in the group.
    Tensor staged_out, staged_in;  // Rows of chunks that are not contiguous.
    std::unique_ptr<Stream> stream;
  };
  // Rows of `runs` in the order of members, contiguous: a view of `rows`, or a copy in `staging`.
  Tensor Collect(LaneState* lane, const std::vector<DispatchPlan::Run>& runs, const Tensor& rows);

  Communicator* any_ = nullptr;  // For memory; null on one rank.
  std::array<LaneState, 2> lanes_;  // kIntra, kInter.
  std::vector<std::array<Tensor, 2>> buffers_;  // By wave and Use: raw bytes in communicator memory.
};

}  // namespace shoal
