#include "collectives/program/program.h"

namespace shoal {
namespace {

Instruction* Append(Program* program, OpCode code, absl::Span<const int> after) {
  Instruction& instruction = program->instructions.emplace_back();
  instruction.code = code;
  instruction.dependencies_begin = static_cast<int32_t>(program->dependencies.size());
  instruction.dependencies_count = static_cast<int32_t>(after.size());
  program->dependencies.insert(program->dependencies.end(), after.begin(), after.end());
  return &instruction;
}

}  // namespace

std::string_view OpKindName(OpKind kind) {
  switch (kind) {
    case OpKind::kAllReduce: return "all_reduce";
    case OpKind::kReduceScatter: return "reduce_scatter";
    case OpKind::kAllGather: return "all_gather";
    case OpKind::kAllToAll: return "all_to_all";
    case OpKind::kBroadcast: return "broadcast";
    case OpKind::kReduce: return "reduce";
    case OpKind::kGather: return "gather";
    case OpKind::kScatter: return "scatter";
    case OpKind::kBarrier: return "barrier";
    case OpKind::kSend: return "send";
    case OpKind::kReceive: return "receive";
    case OpKind::kSparseAllGather: return "sparse_all_gather";
    case OpKind::kSparseReduceScatter: return "sparse_reduce_scatter";
  }
  return "unknown operation";
}

int Program::Send(int peer, uint32_t tag, Region region, absl::Span<const int> after) {
  Instruction* const instruction = Append(this, OpCode::kSend, after);
  instruction->peer = peer;
  instruction->tag = tag;
  instruction->region = region;
  return static_cast<int>(instructions.size()) - 1;
}

int Program::Receive(int peer, uint32_t tag, Region region, absl::Span<const int> after) {
  Instruction* const instruction = Append(this, OpCode::kReceive, after);
  instruction->peer = peer;
  instruction->tag = tag;
  instruction->region = region;
  return static_cast<int>(instructions.size()) - 1;
}

int Program::Reduce(absl::Span<const Region> from, Region target, bool final, absl::Span<const int> after) {
  Instruction* const instruction = Append(this, OpCode::kReduce, after);
  instruction->region = target;
  instruction->final = final;
  instruction->sources_begin = static_cast<int32_t>(sources.size());
  instruction->sources_count = static_cast<int32_t>(from.size());
  sources.insert(sources.end(), from.begin(), from.end());
  return static_cast<int>(instructions.size()) - 1;
}

int Program::Copy(Region source, Region target, absl::Span<const int> after) {
  return Reduce({&source, 1}, target, /*final=*/false, after);
}

}  // namespace shoal
