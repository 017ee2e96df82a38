// Which NCCL calls an operation consists of. Decided by its arguments alone, so that all ranks make calls that fit.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "collectives/backend/nccl_api.h"
#include "collectives/engine/op.h"
#include "runtime/device/stream.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

struct NcclCall {
  enum class Kind : uint8_t { kAllReduce, kReduceScatter, kAllGather, kBroadcast, kReduce, kSend, kReceive };
  Kind kind;
  const void* from = nullptr;
  void* to = nullptr;
  int64_t count = 0;
  DType dtype = DType::kF32;
  NcclOp op = NcclOp::kSum;
  int peer = 0;  // Of a broadcast or reduction: the root.
};

// In this order on one stream; the calls as one group. It keeps the tensors that it names.
struct NcclPlan {
  struct Copied {
    Tensor from, to;
  };
  // owner += contributions, one after the other.
  struct Summed {
    Tensor owner;
    std::vector<Tensor> contributions;
  };
  std::vector<Copied> copies;  // What stays on this rank.
  std::vector<NcclCall> calls;
  std::vector<Summed> sums;
};

// INVALID_ARGUMENT: a collective whose arguments are right (engine/arguments.h), but that NCCL does not have.
absl::Status CheckForNccl(const Operation& op);

// Of a checked collective (not a barrier) that is rank `index`'s of `size`. Contributions to sums are memory of `stream`.
NcclPlan PlanNcclCalls(const Operation& op, int index, int size, Stream& stream);

// Puts a call on the stream.
DeviceResult Issue(const NcclCall& call, const NcclApi& api, NcclComm* comm, DeviceStream* stream);

}  // namespace shoal
