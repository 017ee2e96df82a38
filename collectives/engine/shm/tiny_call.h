// The calls of a communicator as tiny operations (engine/shm/tiny.h), without anything that costs time.
//
// Each function fills `op`, but for its number, deadline and label, and returns true; or false when the call is not tiny, or
// when its arguments are not right: the long way finds out which. What is tiny all ranks know alike. The group is on one
// host, the call asks for no algorithm and no wire format.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "collectives/communicator.h"
#include "collectives/engine/shm/tiny.h"

namespace shoal {

class TinyCall {
 public:
  // This rank, in a group of `size`.
  TinyCall(int index, int size, Order order, TinyOp* op) : index_(index), size_(size), order_(order), op_(op) {}

  bool AllReduce(const Tensor& in, const Tensor& out, ReduceOp reduce);
  bool ReduceScatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, ReduceOp reduce);
  bool AllGather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out);
  bool AllToAllEven(const Tensor& in, const Tensor& out);
  bool Broadcast(const Tensor& in_out, int root);
  bool Reduce(const Tensor& in, const Tensor& out, int root, ReduceOp reduce);
  bool Gather(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root);
  bool Scatter(const Tensor& in, absl::Span<const int64_t> counts, const Tensor& out, int root);
  bool Barrier();

 private:
  void SetIn(const Tensor& in);
  void SetOut(const Tensor& out);
  bool Sign(OpKind kind, DType dtype, ReduceOp reduce, int root, int64_t elements);
  bool Sign(OpKind kind, DType dtype, ReduceOp reduce, int root, absl::Span<const int64_t> counts);

  const int index_, size_;
  const Order order_;
  TinyOp* const op_;
};

}  // namespace shoal
