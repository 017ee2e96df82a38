// Runs one rank's program of one operation over a channel: a state machine without threads or clocks, so that the
// simulation (tests/sim) runs the same code as the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "collectives/communicator.h"
#include "collectives/program/program.h"
#include "collectives/transport/channel.h"

namespace shoal {

// Where a program's buffers lie.
struct Operands {
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  DType dtype = DType::kF32;
  ReduceOp reduce = ReduceOp::kSum;
  WireFormat wire = WireFormat::kAsIs;
  int group_size = 1;  // kAverage divides by it.
  // Sparse operations: where each chunk lies. Otherwise empty.
  std::vector<std::byte*> chunks;
};

class ProgramRun {
 public:
  // Borrows the channel and the operands' memory until Done() or until the channel reported an error. `op` distinguishes
  // operations of the group. Tokens are base_token + instruction index.
  ProgramRun(std::shared_ptr<const Program> program, Operands operands, Channel* channel, uint64_t op,
             uint64_t base_token);
  ~ProgramRun();

  // Starts what can start; runs at most one piece of arithmetic before it returns, so that peers are served in between.
  // Returns true when it did something.
  bool Step();
  // An event of the channel with one of this run's tokens.
  void OnEvent(const Channel::Event& event);
  bool Done() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace shoal
