// What a training step takes from the host and what its update hangs on, at fixed places in memory of the step's stream, so that a step
// that was recorded can be done again with other values: the tokens, sums of squares of gradients by block, losses, and what AdamW
// reads (AdamWNumber). On a device they have twins in pinned memory of the host; on the CPU they are their own.
//
// Not thread-safe: calls follow each other. All but the constructor allocate nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/device/stream.h"
#include "runtime/kernels/optimizer.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

class StepBuffers {
 public:
  // Of `parts` parts with `rows` sequences of `seq` tokens of this rank, each cut into `waves`. Borrows `stream` for life, which shows if
  // there was too little memory.
  StepBuffers(int64_t blocks, int parts, int waves, int64_t rows, int64_t seq, Stream& stream);
  // As the arguments of the constructor.
  bool Fits(const std::vector<Tensor>& parts, int waves) const;

  // Before a step, while nothing uses them: the tokens of its parts, [rows, seq + 1] (i32) each, and its update, not clipped.
  void Put(const std::vector<Tensor>& parts, const kernels::AdamWStep& update);

  Tensor tokens(int part) const;  // As Decoder::IdsAndTargets.
  Tensor losses(int part) const;  // f64 [waves]
  Tensor squares() const;         // f64 [blocks]
  const Tensor& numbers() const { return numbers_; }

  // Put on the stream: clipping by this rank's sums alone.
  void Clip(double clip);
  // Put on the stream: the sums, on their way to the host.
  void FetchSums();

  // When those have been waited for. [blocks + 1] (f64): squares, and the sum of all losses, of this rank. Valid until the next step.
  Tensor HostSums();
  // Clipping by such sums of all ranks, for AdamW after SendNumbers. Returns the norm. Then, where it must not be applied, Skip.
  double ClipOnHost(const Tensor& sums, double clip);
  void Skip() { host_numbers_.data<double>()[kernels::kApply] = 0; }
  // Puts on the stream what ClipOnHost made.
  void SendNumbers() { Send(host_numbers_, numbers_); }

 private:
  void Send(const Tensor& host, const Tensor& to);

  const int64_t blocks_;
  const int parts_, waves_;
  const int64_t rows_, seq_;
  Stream* stream_;
  Tensor tokens_, host_tokens_;    // [parts, 2, rows, seq]
  Tensor sums_, host_sums_;        // [blocks + parts * waves]
  Tensor numbers_, host_numbers_;  // [kAdamWNumbers]
};

}  // namespace shoal
