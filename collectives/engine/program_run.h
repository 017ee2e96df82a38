// Runs one rank's program of one operation over a channel: a state machine without threads or clocks, so that the
// simulation (tests/sim) runs the same code as the engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "collectives/communicator.h"
#include "collectives/program/program.h"
#include "collectives/transport/channel.h"

namespace shoal {

// A program with what its runs need to know about it, worked out once. Immutable.
class PreparedProgram {
 public:
  // `wire` other than kAsIs: messages travel in that format. Only for f32 programs of an algorithm in index order
  // (Algorithm::index_order); a reduction whose target is sent is rounded to what its receivers will read.
  explicit PreparedProgram(Program program, WireFormat wire = WireFormat::kAsIs);

  const Program& program() const { return program_; }
  WireFormat wire() const { return wire_; }
  // Bytes of scratch memory that a run needs, 64-byte aligned.
  int64_t ScratchBytes(DType dtype) const;

 private:
  friend class ProgramRun;
  void PlanWire();

  Program program_;
  WireFormat wire_;
  std::vector<int32_t> waits_;             // By instruction: how many it depends on.
  std::vector<int32_t> successors_begin_;  // By instruction, and one more for the end.
  std::vector<int32_t> successors_;
  std::vector<int32_t> readers_;  // By receiving instruction: how often others name its view.
  // By sending instruction and by reduction: where its bytes in the wire format lie, after the program's own scratch;
  // -1: nowhere.
  std::vector<int64_t> wire_place_;
  std::vector<bool> encodes_;  // By sending instruction: whether it writes them itself, or a reduction has before.
  int64_t wire_bytes_ = 0;
  size_t borrows_ = 0;  // Instructions.
};

// Where a program's buffers lie.
struct Operands {
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  std::byte* scratch = nullptr;  // ScratchBytes; null: the run allocates it.
  DType dtype = DType::kF32;
  ReduceOp reduce = ReduceOp::kSum;
  int group_size = 1;  // kAverage divides by it.
  // Sparse operations: where each chunk lies, and its first element in kIn and kOut (one more for the end). Else empty.
  std::vector<std::byte*> chunks;
  std::vector<int64_t> chunk_begins;
};

// Reusable: Start may be called again once Done(), and allocates nothing when the program is no longer than earlier ones.
class ProgramRun {
 public:
  ProgramRun();  // Done.
  ~ProgramRun();
  ProgramRun(ProgramRun&&) noexcept;
  ProgramRun& operator=(ProgramRun&&) noexcept;

  // Borrows the channel and the operands' memory until Done() or until the channel reported an error. `id`: the
  // operation and its signature, in every message; tags come from the program. Tokens are base_token + instruction.
  void Start(std::shared_ptr<const PreparedProgram> program, Operands operands, Channel* channel, MessageId id,
             uint64_t base_token);

  // Starts what can start; runs at most one piece of arithmetic before it returns, so that peers are served in between.
  // Returns true when it did something.
  bool Step();
  // Posts the messages that can be posted, without any arithmetic.
  void Post();
  // An event of the channel with one of this run's tokens.
  void OnEvent(const Channel::Event& event);
  // All instructions have ended. What was read from views counts only if the channel's next Poll returns OK.
  bool Done() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace shoal
