#include "collectives/engine/program_run.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "collectives/engine/quantise.h"
#include "collectives/engine/reduce.h"
#include "runtime/base/check.h"

namespace shoal {
namespace {

constexpr int64_t kLine = 64;
// Arithmetic between two looks at the channel: some 50 us.
constexpr int64_t kPieceBytes = 512 << 10;
// Elements that are decoded at a time when messages in a wire format are added up; stays in the first-level cache.
constexpr int64_t kDecoded = 4 * kWireBlock;

int64_t RoundUp(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

bool SameMemory(const Region& a, const Region& b) {
  return a.buffer == b.buffer && a.begin == b.begin && a.count == b.count;
}

// A set of instructions; gives back the lowest first.
class ReadySet {
 public:
  void Reset(size_t instructions) {
    words_.assign((instructions + 63) / 64, 0);
    first_ = words_.size();
  }
  void Add(int instruction) {
    const size_t word = instruction / 64;
    words_[word] |= uint64_t{1} << (instruction % 64);
    first_ = std::min(first_, word);
  }
  // -1: none.
  int TakeLowest() {
    for (; first_ < words_.size(); ++first_) {
      uint64_t& word = words_[first_];
      if (word == 0) continue;
      const int bit = std::countr_zero(word);
      word &= word - 1;
      return static_cast<int>(first_) * 64 + bit;
    }
    return -1;
  }

 private:
  std::vector<uint64_t> words_;
  size_t first_ = 0;  // All words before are empty.
};

}  // namespace

PreparedProgram::PreparedProgram(Program program, WireFormat wire) : program_(std::move(program)), wire_(wire) {
  const size_t count = program_.instructions.size();
  waits_.resize(count);
  readers_.resize(count);
  successors_begin_.resize(count + 1);
  successors_.resize(program_.dependencies.size());
  for (size_t i = 0; i < count; ++i) {
    const Instruction& instruction = program_.instructions[i];
    waits_[i] = instruction.dependencies_count;
    for (int32_t earlier : program_.DependenciesOf(instruction)) {
      SHOAL_CHECK(earlier >= 0 && static_cast<size_t>(earlier) < i) << "instruction " << i << " after " << earlier;
      ++successors_begin_[earlier + 1];
    }
    if (instruction.lends && instruction.code == OpCode::kReceive) ++borrows_;
    program_.ForViews(instruction, [this](int32_t receive, const Region&) { ++readers_[receive]; });
  }
  for (size_t i = 0; i < count; ++i) successors_begin_[i + 1] += successors_begin_[i];
  std::vector<int32_t> next(successors_begin_.begin(), successors_begin_.end() - 1);
  for (size_t i = 0; i < count; ++i) {
    for (int32_t earlier : program_.DependenciesOf(program_.instructions[i])) {
      successors_[next[earlier]++] = static_cast<int32_t>(i);
    }
  }
  if (wire_ != WireFormat::kAsIs) PlanWire();
}

void PreparedProgram::PlanWire() {
  const std::vector<Instruction>& all = program_.instructions;
  wire_place_.assign(all.size(), -1);
  encodes_.assign(all.size(), false);
  const auto place = [&](size_t i) {
    wire_place_[i] = wire_bytes_;
    wire_bytes_ += RoundUp(WireBytes(wire_, all[i].region.count));
  };
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].code != OpCode::kSend || all[i].region.count == 0) continue;
    SHOAL_CHECK(!all[i].lends) << "what is lent has no wire format";
    SHOAL_CHECK(all[i].region.buffer != Buffer::kMessage) << "a view cannot be sent on in a wire format";
    for (size_t j = 0; j < i; ++j) {
      if (all[j].code != OpCode::kReduce || !all[j].final || !SameMemory(all[j].region, all[i].region)) continue;
      if (wire_place_[j] < 0) place(j);
      wire_place_[i] = wire_place_[j];
    }
    if (wire_place_[i] >= 0) continue;
    place(i);
    encodes_[i] = true;
  }
}

int64_t PreparedProgram::ScratchBytes(DType dtype) const {
  return RoundUp(program_.scratch * SizeOf(dtype)) + wire_bytes_;
}

struct ProgramRun::State {
  std::shared_ptr<const PreparedProgram> prepared;
  Operands operands;
  Channel* channel = nullptr;
  MessageId id;
  uint64_t base_token = 0;
  int64_t element_bytes = 0;

  std::vector<std::byte> own_scratch;
  std::byte* wire_base = nullptr;
  std::vector<int32_t> waits;    // By instruction: unfinished ones that it depends on.
  std::vector<int32_t> readers;  // By receiving instruction: reads of its view to come.
  std::vector<const std::byte*> views;
  ReadySet posts;  // Messages.
  ReadySet work;   // Reductions, and sends that must be encoded and receives that must be decoded first.
  int working = -1;
  int64_t worked = 0;  // Elements of it.
  size_t left = 0;     // Instructions, and views that are to be given back.
  std::vector<const std::byte*> sources;
  std::vector<std::byte*> targets;

  const Program& program() const { return prepared->program(); }
  const Instruction& at(int i) const { return prepared->program().instructions[i]; }
  bool wired() const { return prepared->wire() != WireFormat::kAsIs; }
  bool encodes(int i) const { return wired() && prepared->encodes_[i]; }
  std::byte* wire(int i) const { return wire_base + prepared->wire_place_[i]; }
  int64_t MessageBytes(const Instruction& i) const {
    return wired() ? WireBytes(prepared->wire(), i.region.count) : i.region.count * element_bytes;
  }

  // Whether its bytes stay where they arrive until they have been read.
  bool viewed(const Instruction& i) const {
    return i.region.count > 0 && (i.region.buffer == Buffer::kMessage || wired());
  }
  MessageId IdOf(const Instruction& i) const { return {id.op, i.tag, id.signature}; }
  void MakeReady(int i);
  void End(int i);
  void DropView(int receive);
  std::byte* Locate(const Region& region) const;
  std::byte* LocateInChunks(const Region& region) const;
  void PostOne(int i);
  void PostAll();
  bool Work(int i);
  bool ReduceSome(int i);
  void ReducePiece(const Instruction& instruction, int64_t begin, int64_t count);
  bool ReduceAndReturnPiece(const Instruction& instruction, int64_t begin, int64_t count);
  void ReduceWirePiece(const Instruction& instruction, int64_t begin, int64_t count);
  int Divisor(const Instruction& instruction) const;
};

void ProgramRun::State::MakeReady(int i) {
  const bool is_work = at(i).code == OpCode::kReduce || encodes(i);
  (is_work ? work : posts).Add(i);
}

void ProgramRun::State::End(int i) {
  --left;
  for (int32_t s = prepared->successors_begin_[i]; s < prepared->successors_begin_[i + 1]; ++s) {
    const int32_t later = prepared->successors_[s];
    if (--waits[later] == 0) MakeReady(later);
  }
}

void ProgramRun::State::DropView(int receive) {
  if (!viewed(at(receive))) return;
  const std::byte* const view = std::exchange(views[receive], nullptr);
  if (at(receive).lends) {
    channel->GiveBack(at(receive).peer, IdOf(at(receive)), view);
  } else {
    channel->Release(at(receive).peer, IdOf(at(receive)), view);
  }
}

std::byte* ProgramRun::State::LocateInChunks(const Region& region) const {
  const std::vector<int64_t>& begins = operands.chunk_begins;
  // The last chunk that begins there: those before it are empty.
  const auto after = std::upper_bound(begins.begin(), begins.end() - 1, region.begin);
  const int64_t chunk = after - begins.begin() - 1;
  return operands.chunks[chunk] + (region.begin - begins[chunk]) * element_bytes;
}

std::byte* ProgramRun::State::Locate(const Region& region) const {
  if (region.count == 0) return nullptr;
  switch (region.buffer) {
    case Buffer::kIn:
      if (!operands.chunks.empty()) return LocateInChunks(region);
      return const_cast<std::byte*>(operands.in) + region.begin * element_bytes;
    case Buffer::kOut:
      if (!operands.chunks.empty()) return LocateInChunks(region);
      return operands.out + region.begin * element_bytes;
    case Buffer::kScratch:
      return operands.scratch + region.begin * element_bytes;
    case Buffer::kMessage:
      return const_cast<std::byte*>(views[region.receive]) + region.begin * element_bytes;
  }
  return nullptr;
}

void ProgramRun::State::PostOne(int i) {
  const Instruction& instruction = at(i);
  const int64_t bytes = MessageBytes(instruction);
  const uint64_t token = base_token + static_cast<uint64_t>(i);
  if (instruction.code == OpCode::kSend) {
    const std::byte* const data = wired() && instruction.region.count > 0 ? wire(i) : Locate(instruction.region);
    if (instruction.lends) {
      channel->Lend(instruction.peer, IdOf(instruction), const_cast<std::byte*>(data), bytes, token);
    } else {
      channel->Send(instruction.peer, IdOf(instruction), data, bytes, token);
    }
  } else if (instruction.lends) {
    channel->Borrow(instruction.peer, IdOf(instruction), bytes, token);
  } else if (viewed(instruction)) {
    channel->ReceiveView(instruction.peer, IdOf(instruction), bytes, token);
  } else {
    channel->Receive(instruction.peer, IdOf(instruction), Locate(instruction.region), bytes, token);
  }
}

void ProgramRun::State::PostAll() {
  for (int i = posts.TakeLowest(); i >= 0; i = posts.TakeLowest()) PostOne(i);
}

int ProgramRun::State::Divisor(const Instruction& instruction) const {
  return instruction.final && operands.reduce == ReduceOp::kAverage ? operands.group_size : 1;
}

void ProgramRun::State::ReducePiece(const Instruction& instruction, int64_t begin, int64_t count) {
  std::byte* const target = Locate(instruction.region) + begin * element_bytes;
  sources.clear();
  targets.assign(1, target);
  for (const Region& region : program().SourcesOf(instruction)) {
    std::byte* const source = Locate(region) + begin * element_bytes;
    sources.push_back(source);
    const bool lent = region.buffer == Buffer::kMessage && at(region.receive).lends;
    if (instruction.returns && lent) targets.push_back(source);
  }
  const int divisor = Divisor(instruction);
  if (sources.size() == 1 && divisor == 1) {
    if (sources[0] != target)
      CopyPiece(target, sources[0], count * element_bytes, instruction.region.count * element_bytes);
    return;
  }
  const ReduceOp op = operands.reduce == ReduceOp::kAverage && divisor == 1 ? ReduceOp::kSum : operands.reduce;
  Reduce(operands.dtype, op, sources, targets, count, divisor);
}

// False: the group is over.
bool ProgramRun::State::ReduceAndReturnPiece(const Instruction& instruction, int64_t begin, int64_t count) {
  if (!channel->BeginWrite(begin * element_bytes, count * element_bytes)) return false;
  ReducePiece(instruction, begin, count);
  return channel->EndWrite();
}

void ProgramRun::State::ReduceWirePiece(const Instruction& instruction, int64_t begin, int64_t count) {
  const absl::Span<const Region> from = program().SourcesOf(instruction);
  const int divisor = Divisor(instruction);
  const ReduceOp op = divisor == 1 ? ReduceOp::kSum : ReduceOp::kAverage;
  alignas(kLine) float total[kDecoded];
  alignas(kLine) float next[kDecoded];
  auto* const total_bytes = reinterpret_cast<std::byte*>(total);
  for (int64_t done = begin; done < begin + count; done += kDecoded) {
    const int64_t some = std::min(kDecoded, begin + count - done);
    const auto decode = [&](const Region& region, float* into) {
      const int64_t at_element = region.begin + done;
      if (region.buffer == Buffer::kMessage) {
        Dequantise(prepared->wire(), views[region.receive], at(region.receive).region.count, at_element, some, into);
      } else {
        std::memcpy(into, Locate(region) + done * element_bytes, some * sizeof(float));
      }
    };
    decode(from[0], total);
    for (size_t s = 1; s < from.size(); ++s) {
      decode(from[s], next);
      const bool last = s + 1 == from.size();
      Reduce(DType::kF32, last ? op : ReduceOp::kSum, {total_bytes, reinterpret_cast<std::byte*>(next)}, {total_bytes},
             some, last ? divisor : 1);
    }
    std::memcpy(Locate(instruction.region) + done * element_bytes, total, some * sizeof(float));
  }
}

// True when the reduction has ended.
bool ProgramRun::State::ReduceSome(int i) {
  const Instruction& instruction = at(i);
  const int64_t left_over = instruction.region.count - worked;
  const int64_t inputs = std::max<int64_t>(instruction.sources_count, 1);
  const int64_t piece =
      std::max(kPieceBytes / inputs / element_bytes / kDecoded * kDecoded, kDecoded);
  const int64_t count = std::min(left_over, piece);
  if (instruction.returns) {
    if (!ReduceAndReturnPiece(instruction, worked, count)) return false;
  } else if (count > 0) {
    (wired() ? ReduceWirePiece(instruction, worked, count) : ReducePiece(instruction, worked, count));
  }
  worked += count;
  if (worked < instruction.region.count) return false;
  if (wired() && prepared->wire_place_[i] >= 0) {
    // What the others will read of it is what this rank keeps.
    auto* const result = reinterpret_cast<float*>(Locate(instruction.region));
    Quantise(prepared->wire(), result, worked, wire(i));
    Dequantise(prepared->wire(), wire(i), worked, 0, worked, result);
  }
  program().ForViews(instruction, [this](int32_t receive, const Region&) {
    if (--readers[receive] == 0) DropView(receive);
  });
  return true;
}

// True when it has ended.
bool ProgramRun::State::Work(int i) {
  const Instruction& instruction = at(i);
  if (instruction.code == OpCode::kReduce) {
    if (!ReduceSome(i)) return false;
    End(i);
    return true;
  }
  if (instruction.code == OpCode::kSend) {
    Quantise(prepared->wire(), reinterpret_cast<const float*>(Locate(instruction.region)), instruction.region.count,
             wire(i));
    PostOne(i);
    return true;
  }
  Dequantise(prepared->wire(), views[i], instruction.region.count, 0, instruction.region.count,
             reinterpret_cast<float*>(Locate(instruction.region)));
  DropView(i);
  End(i);
  return true;
}

ProgramRun::ProgramRun() : state_(std::make_unique<State>()) {}
ProgramRun::~ProgramRun() = default;
ProgramRun::ProgramRun(ProgramRun&&) noexcept = default;
ProgramRun& ProgramRun::operator=(ProgramRun&&) noexcept = default;

void ProgramRun::Start(std::shared_ptr<const PreparedProgram> program, Operands operands, Channel* channel,
                       MessageId id, uint64_t base_token) {
  State& state = *state_;
  const size_t count = program->program().instructions.size();
  state.prepared = std::move(program);
  state.operands = std::move(operands);
  state.channel = channel;
  state.id = id;
  state.base_token = base_token;
  state.element_bytes = SizeOf(state.operands.dtype);
  const int64_t scratch_bytes = state.prepared->ScratchBytes(state.operands.dtype);
  if (state.operands.scratch == nullptr && scratch_bytes > 0) {
    state.own_scratch.resize(scratch_bytes);
    state.operands.scratch = state.own_scratch.data();
  }
  state.wire_base = state.operands.scratch + scratch_bytes - state.prepared->wire_bytes_;
  state.waits = state.prepared->waits_;
  state.readers = state.prepared->readers_;
  state.views.assign(count, nullptr);
  state.posts.Reset(count);
  state.work.Reset(count);
  state.working = -1;
  state.worked = 0;
  SHOAL_CHECK(state.prepared->borrows_ == 0 || channel->Lends());
  state.left = count + state.prepared->borrows_;
  for (size_t i = 0; i < count; ++i) {
    if (state.waits[i] == 0) state.MakeReady(static_cast<int>(i));
  }
}

void ProgramRun::Post() { state_->PostAll(); }

bool ProgramRun::Step() {
  State& state = *state_;
  bool did = false;
  for (int i = state.posts.TakeLowest(); i >= 0; i = state.posts.TakeLowest()) {
    state.PostOne(i);
    did = true;
  }
  if (state.working < 0) {
    state.working = state.work.TakeLowest();
    state.worked = 0;
  }
  if (state.working < 0) return did;
  if (state.Work(state.working)) {
    state.working = -1;
    state.PostAll();
  }
  return true;
}

void ProgramRun::OnEvent(const Channel::Event& event) {
  State& state = *state_;
  const int i = static_cast<int>(event.token - state.base_token);
  const Instruction& instruction = state.at(i);
  if (instruction.code == OpCode::kReceive) {
    if (instruction.lends && event.view == nullptr) {  // It has been given back.
      --state.left;
      return;
    }
    if (state.viewed(instruction)) {
      state.views[i] = event.view;
      if (instruction.region.buffer != Buffer::kMessage) return state.work.Add(i);
      if (state.readers[i] == 0) state.DropView(i);
    }
  }
  state.End(i);
}

bool ProgramRun::Done() const { return state_->left == 0; }

}  // namespace shoal
