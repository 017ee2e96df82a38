#include "collectives/program/verifier.h"

#include <algorithm>
#include <deque>
#include <string>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "collectives/program/symbolic_memory.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr std::string_view kBufferNames[] = {"in", "out", "scratch", "message"};

std::string RegionText(const Region& region) {
  std::string text(kBufferNames[static_cast<int>(region.buffer)]);
  if (region.buffer == Buffer::kMessage) absl::StrAppend(&text, " of ", region.receive);
  return absl::StrCat(text, "[", region.begin, ", ", region.begin + region.count, ")");
}

// Runs all ranks' programs at once, in one order. That suffices: messages are matched by name, so an order decides
// nothing but when; and every two accesses that conflict are shown to have one order only.
//
// Instructions of all ranks are numbered through: rank r's are base_[r]...
class Run {
 public:
  Run(const std::vector<Problem>& problems, const std::vector<Program>& programs, ReduceOrder order)
      : problems_(problems), programs_(programs), order_(order) {}

  absl::Status Verify() {
    SHOAL_RETURN_IF_ERROR(CheckForm());
    SHOAL_RETURN_IF_ERROR(MatchMessages());
    SHOAL_RETURN_IF_ERROR(Execute());
    if (problems_[0].kind == OpKind::kBarrier) return CheckBarrier();
    return CheckOutputs();
  }

 private:
  int size() const { return static_cast<int>(programs_.size()); }
  const Instruction& At(int g) const { return programs_[rank_[g]].instructions[g - base_[rank_[g]]]; }
  const Program& ProgramOf(int g) const { return programs_[rank_[g]]; }
  std::string Text(int g) const;
  absl::Status Error(int g, std::string_view what) const {
    return absl::InternalError(absl::StrCat(Text(g), ": ", AbslSv(what)));
  }

  absl::Status CheckForm();
  absl::Status CheckInstruction(int g) const;
  absl::Status CheckView(int g, const Region& view) const;
  absl::Status CheckReduce(int g) const;
  absl::Status CheckLending(int g) const;
  bool Lent(int g, const Region& region) const {
    return region.buffer == Buffer::kMessage && At(base_[rank_[g]] + region.receive).lends;
  }
  absl::Status MatchMessages();

  absl::Status Execute();
  absl::Status Start(int g);
  absl::Status StartReduce(int g);
  absl::Status Transfer(int send, int receive);
  void End(int g);
  absl::Status Deadlock() const;

  struct Access;
  absl::Status Read(int g, const Region& region);
  absl::Status Write(int g, const Region& region);
  Access* AccessesOf(int g, const Region& region);
  bool Before(int earlier, int later);

  SymbolicValue* ValuesOf(int g, const Region& region);
  absl::Status Defined(int g, const Region& region, const SymbolicValue* values) const;

  absl::Status CheckBarrier() const;
  static absl::Status OutputError(int rank, const Wanted& wanted, std::string_view what) {
    return absl::InternalError(absl::StrCat("rank ", rank, ", out[", wanted.at, "] ", AbslSv(what)));
  }
  absl::Status CheckOutputs() const;
  absl::Status CheckReduced(int rank, const Wanted& wanted, const SymbolicValue& value, SymbolicValue* sum) const;
  std::string Difference(const SymbolicValue& value, const Wanted& wanted) const;

  const std::vector<Problem>& problems_;
  const std::vector<Program>& programs_;
  const ReduceOrder order_;
  std::vector<int> base_;
  std::vector<int32_t> rank_;
  std::vector<int32_t> match_;  // The other end of a message.
  std::vector<int32_t> views_left_;  // Of a receive of a view: instructions that are still to read it.
  std::vector<int32_t> waiting_;     // Dependencies that have not ended.
  std::vector<int32_t> dependents_begin_, dependents_;
  std::vector<int32_t> started_, ended_;  // When; 0: not yet.
  int32_t clock_ = 0;
  std::deque<int> ready_;
  std::vector<SymbolicMemory> memory_;

  // By rank and element: who wrote it last, and who read it since, as a list in readers_.
  struct Access {
    int32_t writer = -1;
    int32_t readers = -1;
  };
  struct Reader {
    int32_t instruction;
    int32_t next;
  };
  std::vector<std::vector<Access>> accesses_;
  std::vector<std::vector<Access>> borrowed_;  // By receive that borrows: likewise, of its view.
  std::vector<Reader> readers_;

  std::vector<int32_t> seen_;  // In search seen_[g].
  int32_t search_ = 0;
  std::vector<SymbolicValue> result_;
  std::vector<Expression> expressions_;
};

std::string Run::Text(int g) const {
  const Instruction& i = At(g);
  std::string text = absl::StrCat("rank ", rank_[g], ", instruction ", g - base_[rank_[g]], " (");
  switch (i.code) {
    case OpCode::kSend:
      absl::StrAppend(&text, i.lends ? "lend " : "send ", RegionText(i.region), " to ", i.peer, " tag ", i.tag);
      break;
    case OpCode::kReceive:
      absl::StrAppend(&text, i.lends ? "borrow " : "receive ", RegionText(i.region), " from ", i.peer, " tag ", i.tag);
      break;
    case OpCode::kReduce:
      absl::StrAppend(&text, "reduce into ", RegionText(i.region));
      break;
  }
  return text + ")";
}

absl::Status Run::CheckForm() {
  if (problems_.empty() || problems_.size() != programs_.size()) {
    return absl::InternalError(absl::StrCat(problems_.size(), " problems, ", programs_.size(), " programs"));
  }
  for (int r = 0; r < size(); ++r) {
    base_.push_back(static_cast<int>(rank_.size()));
    rank_.resize(rank_.size() + programs_[r].instructions.size(), r);
    memory_.emplace_back(problems_[r], programs_[r].scratch);
    accesses_.emplace_back(memory_[r].size());
  }
  views_left_.resize(rank_.size());
  borrowed_.resize(rank_.size());
  for (int g = 0; g < static_cast<int>(rank_.size()); ++g) {
    for (int32_t d : ProgramOf(g).DependenciesOf(At(g))) {
      if (d < 0 || d >= g - base_[rank_[g]]) return Error(g, absl::StrCat("depends on ", d, ", which is no earlier one"));
    }
    SHOAL_RETURN_IF_ERROR(CheckInstruction(g));
  }
  return absl::OkStatus();
}

absl::Status Run::CheckInstruction(int g) const {
  const Instruction& i = At(g);
  const bool is_returned = i.code == OpCode::kReduce && i.returns;
  const bool view = (i.code == OpCode::kReceive || is_returned) && i.region.buffer == Buffer::kMessage;
  if (i.region.buffer == Buffer::kMessage && !view) return Error(g, "a message's memory can only be read by a reduce");
  if (i.region.count <= 0) return Error(g, "no elements");
  if (!view && !memory_[rank_[g]].Exists(i.region)) return Error(g, "out of range: no such memory");
  if (i.code != OpCode::kSend && i.region.buffer == Buffer::kIn) return Error(g, "writes to the input");
  SHOAL_RETURN_IF_ERROR(CheckLending(g));
  if (i.code == OpCode::kReduce) return CheckReduce(g);
  if (i.peer < 0 || i.peer >= size() || i.peer == rank_[g]) return Error(g, "no such peer");
  return absl::OkStatus();
}

absl::Status Run::CheckLending(int g) const {
  const Instruction& i = At(g);
  if (i.lends && !problems_[rank_[g]].lending) return Error(g, "lends where nobody can");
  if (i.lends && i.code == OpCode::kSend && i.region.buffer == Buffer::kIn) return Error(g, "lends the input");
  if (i.lends && i.code == OpCode::kReceive && i.region.buffer != Buffer::kMessage) return Error(g, "borrows, but not as a view");
  if (i.lends && i.code == OpCode::kReceive) {
    const auto returns = [&](const Instruction& other) {
      bool any = false;
      ProgramOf(g).ForViews(other, [&](int32_t receive, const Region&) { any = any || base_[rank_[g]] + receive == g; });
      return other.returns && any;
    };
    const std::vector<Instruction>& all = ProgramOf(g).instructions;
    const int64_t count = std::count_if(all.begin(), all.end(), returns);
    if (count != 1) return Error(g, absl::StrCat("what it borrows is returned ", count, " times"));
  }
  return absl::OkStatus();
}

absl::Status Run::CheckView(int g, const Region& view) const {
  const int receive = base_[rank_[g]] + view.receive;
  const bool earlier = view.receive >= 0 && receive < g && At(receive).code == OpCode::kReceive;
  if (!earlier || At(receive).region.buffer != Buffer::kMessage) {
    return Error(g, absl::StrCat(RegionText(view), " is no view that was received before"));
  }
  const int64_t whole = At(receive).region.count;
  if (view.begin < 0 || view.begin + view.count > whole) return Error(g, absl::StrCat("out of range: ", RegionText(view)));
  const bool part = At(g).returns && At(receive).lends && view.count != whole;
  return part ? Error(g, absl::StrCat("returns only a part, ", RegionText(view))) : absl::OkStatus();
}

absl::Status Run::CheckReduce(int g) const {
  const Instruction& i = At(g);
  const SymbolicMemory& memory = memory_[rank_[g]];
  if (i.sources_count == 0) return Error(g, "no sources");
  const bool into_view = i.region.buffer == Buffer::kMessage;
  absl::Status views;
  ProgramOf(g).ForViews(i, [&](int32_t, const Region& view) { views.Update(CheckView(g, view)); });
  SHOAL_RETURN_IF_ERROR(views);
  if (into_view && !Lent(g, i.region)) return Error(g, "writes to a message that is not lent");
  for (const Region& source : ProgramOf(g).SourcesOf(i)) {
    if (source.count != i.region.count) return Error(g, absl::StrCat("source ", RegionText(source), " has another length"));
    if (source.buffer == Buffer::kMessage) continue;
    if (!memory.Exists(source)) return Error(g, absl::StrCat("out of range: source ", RegionText(source)));
    if (into_view) continue;
    const int64_t distance = memory.Begin(source) - memory.Begin(i.region);
    if (distance != 0 && std::abs(distance) < source.count) {
      return Error(g, absl::StrCat("its target overlaps its source ", RegionText(source), " in part"));
    }
  }
  return absl::OkStatus();
}

absl::Status Run::MatchMessages() {
  const int total = static_cast<int>(rank_.size());
  match_.assign(total, -1);
  std::unordered_map<uint64_t, int> sends;
  const auto key = [&](int from, int to, uint32_t tag) {
    return (static_cast<uint64_t>(from) * size() + to) << 32 | tag;
  };
  for (int g = 0; g < total; ++g) {
    const Instruction& i = At(g);
    if (i.code == OpCode::kSend && !sends.emplace(key(rank_[g], i.peer, i.tag), g).second) {
      return Error(g, "another send has this tag");
    }
  }
  for (int g = 0; g < total; ++g) {
    const Instruction& i = At(g);
    if (i.code != OpCode::kReceive) continue;
    const auto found = sends.find(key(i.peer, rank_[g], i.tag));
    if (found == sends.end()) return Error(g, "nobody sends this message");
    const int send = found->second;
    if (match_[send] >= 0) return Error(g, "another receive has this tag");
    if (At(send).lends != i.lends) return Error(g, absl::StrCat("lent on one side alone: ", Text(send)));
    if (At(send).region.count != i.region.count) return Error(g, absl::StrCat("its message is another length: ", Text(send)));
    match_[send] = g;
    match_[g] = send;
  }
  for (const auto& [unused, g] : sends) {
    if (match_[g] < 0) return Error(g, "nobody receives this message");
  }
  return absl::OkStatus();
}

absl::Status Run::Execute() {
  const int total = static_cast<int>(rank_.size());
  waiting_.assign(total, 0);
  started_.assign(total, 0);
  ended_.assign(total, 0);
  seen_.assign(total, 0);
  dependents_begin_.assign(total + 1, 0);
  const auto each_dependency = [&](auto&& visit) {
    for (int g = 0; g < total; ++g) {
      for (int32_t d : ProgramOf(g).DependenciesOf(At(g))) visit(g, base_[rank_[g]] + d);
    }
  };
  each_dependency([&](int g, int d) { ++waiting_[g], ++dependents_begin_[d + 1]; });
  for (int g = 0; g < total; ++g) dependents_begin_[g + 1] += dependents_begin_[g];
  dependents_.resize(dependents_begin_[total]);
  std::vector<int32_t> next(dependents_begin_.begin(), dependents_begin_.end() - 1);
  each_dependency([&](int g, int d) { dependents_[next[d]++] = g; });
  for (int g = 0; g < total; ++g) {
    const Instruction& i = At(g);
    ProgramOf(g).ForViews(i, [&](int32_t receive, const Region&) { ++views_left_[base_[rank_[g]] + receive]; });
    if (waiting_[g] == 0) ready_.push_back(g);
  }
  while (!ready_.empty()) {
    const int g = ready_.front();
    ready_.pop_front();
    SHOAL_RETURN_IF_ERROR(Start(g));
  }
  return std::find(ended_.begin(), ended_.end(), 0) == ended_.end() ? absl::OkStatus() : Deadlock();
}

absl::Status Run::Deadlock() const {
  std::vector<std::string> waits;
  for (int g = 0; g < static_cast<int>(rank_.size()) && waits.size() < 6; ++g) {
    if (started_[g] && !ended_[g]) waits.push_back(Text(g));
  }
  return absl::InternalError(absl::StrCat("deadlock: these wait for ever: ", absl::StrJoin(waits, "; ")));
}

absl::Status Run::Start(int g) {
  const Instruction& i = At(g);
  started_[g] = ++clock_;
  if (i.code == OpCode::kReduce) return StartReduce(g);
  if (i.code == OpCode::kSend) {
    // As long as it is lent nobody else may use it, as when it is written.
    SHOAL_RETURN_IF_ERROR(i.lends ? Write(g, i.region) : Read(g, i.region));
    return started_[match_[g]] ? Transfer(g, match_[g]) : absl::OkStatus();
  }
  if (i.region.buffer != Buffer::kMessage) SHOAL_RETURN_IF_ERROR(Write(g, i.region));
  return started_[match_[g]] ? Transfer(match_[g], g) : absl::OkStatus();
}

// Both ends are posted. A send ends as late as it may: when the message was taken, or the view given back.
absl::Status Run::Transfer(int send, int receive) {
  const Region& from = At(send).region;
  const Region& into = At(receive).region;
  if (into.buffer == Buffer::kMessage) {
    if (At(receive).lends) borrowed_[receive].resize(into.count);
    End(receive);
    if (views_left_[receive] == 0) End(send);
    return absl::OkStatus();
  }
  const SymbolicValue* const values = memory_[rank_[send]].At(from);
  SHOAL_RETURN_IF_ERROR(Defined(send, from, values));
  std::copy(values, values + from.count, memory_[rank_[receive]].At(into));
  End(receive);
  End(send);
  return absl::OkStatus();
}

void Run::End(int g) {
  ended_[g] = ++clock_;
  for (int d = dependents_begin_[g]; d < dependents_begin_[g + 1]; ++d) {
    if (--waiting_[dependents_[d]] == 0) ready_.push_back(dependents_[d]);
  }
}

absl::Status Run::StartReduce(int g) {
  const Instruction& i = At(g);
  const absl::Span<const Region> sources = ProgramOf(g).SourcesOf(i);
  absl::Status views;
  ProgramOf(g).ForViews(i, [&](int32_t receive, const Region& view) {
    if (Before(base_[rank_[g]] + receive, g)) return;
    views.Update(Error(g, absl::StrCat("missing dependency: uses ", RegionText(view), " before it was received")));
  });
  SHOAL_RETURN_IF_ERROR(views);
  for (const Region& source : sources) {
    if (Lent(g, source)) {
      SHOAL_RETURN_IF_ERROR(i.returns ? Write(g, source) : Read(g, source));
    } else if (source.buffer != Buffer::kMessage) {
      SHOAL_RETURN_IF_ERROR(Read(g, source));
    }
  }
  SHOAL_RETURN_IF_ERROR(Write(g, i.region));
  result_.assign(i.region.count, SymbolicValue{});
  expressions_.assign(i.region.count, Expression{});
  for (const Region& source : sources) {
    const SymbolicValue* const values = ValuesOf(g, source);
    SHOAL_RETURN_IF_ERROR(Defined(g, source, values));
    for (int64_t e = 0; e < i.region.count; ++e) {
      SymbolicValue& result = result_[e];
      if (&source != sources.begin() && result.element != values[e].element) {
        return Error(g, absl::StrCat("wrong chunk: combines element ", result.element, " of the input with element ",
                                     values[e].element, " (", RegionText(source), ")"));
      }
      if (values[e].finals > 0 && (sources.size() > 1 || i.final)) {
        return Error(g, absl::StrCat("combines a finished result (", RegionText(source), ")"));
      }
      result.element = values[e].element;
      result.finals = values[e].finals;
      AddContribution(values[e], &result);
      expressions_[e].Fold(values[e].expression);
    }
  }
  for (int64_t e = 0; e < i.region.count; ++e) {
    result_[e].expression = expressions_[e].Finish(i.final);
    result_[e].finals += i.final ? 1 : 0;
    result_[e].state = SymbolicValue::kDefined;
  }
  std::copy(result_.begin(), result_.end(), ValuesOf(g, i.region));
  for (const Region& source : sources) {
    if (i.returns && Lent(g, source)) std::copy(result_.begin(), result_.end(), ValuesOf(g, source));
  }
  End(g);
  ProgramOf(g).ForViews(i, [&](int32_t receive, const Region&) {
    const int view = base_[rank_[g]] + receive;
    if (--views_left_[view] == 0) End(match_[view]);
  });
  return absl::OkStatus();
}

SymbolicValue* Run::ValuesOf(int g, const Region& region) {
  if (region.buffer != Buffer::kMessage) return memory_[rank_[g]].At(region);
  const int send = match_[base_[rank_[g]] + region.receive];
  return memory_[rank_[send]].At(At(send).region) + region.begin;
}

absl::Status Run::Defined(int g, const Region& region, const SymbolicValue* values) const {
  if (problems_[rank_[g]].kind == OpKind::kBarrier) return absl::OkStatus();  // Values mean nothing.
  for (int64_t e = 0; e < region.count; ++e) {
    if (values[e].state != SymbolicValue::kDefined) {
      return Error(g, absl::StrCat("reads ", RegionText(region), ", where nothing was written yet at ", region.begin + e));
    }
  }
  return absl::OkStatus();
}

Run::Access* Run::AccessesOf(int g, const Region& region) {
  if (region.buffer == Buffer::kMessage) return &borrowed_[base_[rank_[g]] + region.receive][region.begin];
  return &accesses_[rank_[g]][memory_[rank_[g]].Begin(region)];
}

absl::Status Run::Read(int g, const Region& region) {
  Access* const accesses = AccessesOf(g, region);
  int32_t shown = -1;               // Neighbours mostly have one history.
  int32_t list = -2, longer = -1;
  for (int64_t e = 0; e < region.count; ++e) {
    Access& access = accesses[e];
    if (access.writer >= 0 && access.writer != shown) {
      if (!Before(access.writer, g)) {
        return Error(g, absl::StrCat("missing dependency: reads ", RegionText(region), " in a race with the write of ",
                                     Text(access.writer)));
      }
      shown = access.writer;
    }
    if (access.readers != list) {
      list = access.readers;
      longer = static_cast<int32_t>(readers_.size());
      readers_.push_back({g, list});
    }
    access.readers = longer;
  }
  return absl::OkStatus();
}

absl::Status Run::Write(int g, const Region& region) {
  Access* const accesses = AccessesOf(g, region);
  int32_t shown = -1, list = -1;
  for (int64_t e = 0; e < region.count; ++e) {
    Access& access = accesses[e];
    if (access.writer >= 0 && access.writer != shown) {
      if (!Before(access.writer, g)) {
        return Error(g, absl::StrCat("missing dependency: writes ", RegionText(region), " in a race with the write of ",
                                     Text(access.writer)));
      }
      shown = access.writer;
    }
    if (access.readers != list) {
      list = access.readers;
      for (int32_t r = list; r >= 0; r = readers_[r].next) {
        const int reader = readers_[r].instruction;
        if (reader != g && !Before(reader, g)) {
          return Error(g, absl::StrCat("buffer hazard: writes ", RegionText(region), ", which may still be read by ",
                                       Text(reader)));
        }
      }
    }
    access = {g, -1};
  }
  return absl::OkStatus();
}

// Whether `earlier` has ended whenever `later` starts: a way back from the start of `later` by dependencies, and from the
// end of a receive to the start of its send. That a send has ended says nothing of its receiver.
bool Run::Before(int earlier, int later) {
  const int32_t ended = ended_[earlier];
  if (ended == 0) return false;
  ++search_;
  std::vector<int> open = {later};
  while (!open.empty()) {
    const int g = open.back();
    open.pop_back();
    for (int32_t local : ProgramOf(g).DependenciesOf(At(g))) {
      const int d = base_[rank_[g]] + local;
      if (d == earlier) return true;
      if (started_[d] > ended && seen_[d] != search_) {
        seen_[d] = search_;
        open.push_back(d);
      }
      if (At(d).code != OpCode::kReceive) continue;
      const int send = match_[d];
      if (started_[send] > ended && seen_[send] != search_) {
        seen_[send] = search_;
        open.push_back(send);
      }
    }
  }
  return false;
}

absl::Status Run::CheckBarrier() const {
  std::vector<int32_t> seen(rank_.size(), -1);
  for (int r = 0; r < size(); ++r) {
    std::vector<bool> begun(size());
    begun[r] = true;
    std::vector<int> open;
    const auto reach = [&](int g) {
      if (seen[g] == r) return;
      seen[g] = r;
      begun[rank_[g]] = true;
      open.push_back(g);
    };
    const auto end = [&](int g) {
      reach(g);
      if (At(g).code == OpCode::kReceive) reach(match_[g]);
    };
    for (size_t i = 0; i < programs_[r].instructions.size(); ++i) end(base_[r] + static_cast<int>(i));
    while (!open.empty()) {
      const int g = open.back();
      open.pop_back();
      for (int32_t d : ProgramOf(g).DependenciesOf(At(g))) end(base_[rank_[g]] + d);
    }
    const auto missing = std::find(begun.begin(), begun.end(), false);
    if (missing != begun.end()) {
      return absl::InternalError(absl::StrCat("rank ", r, " may leave the barrier before rank ", missing - begun.begin(),
                                              " has come"));
    }
  }
  return absl::OkStatus();
}

absl::Status Run::CheckOutputs() const {
  // By element of the inputs: what is wanted, and the expression of the first rank that has it.
  std::vector<SymbolicValue> sums;
  std::vector<uint64_t> expressions;
  for (int r = 0; r < size(); ++r) {
    std::vector<std::vector<int>> members;
    for (const Wanted& wanted : WantedOutput(problems_, r, &members)) {
      const SymbolicValue& value = *memory_[r].At({Buffer::kOut, -1, wanted.at, 1});
      if (value.state != SymbolicValue::kDefined) return OutputError(r, wanted, "was not written");
      if (!wanted.reduced) {
        if (value == Contribution(wanted.from, wanted.element)) continue;
        return OutputError(r, wanted, absl::StrCat("is not element ", wanted.element, " of rank ", wanted.from));
      }
      if (wanted.element >= static_cast<int64_t>(sums.size())) {
        sums.resize(wanted.element + 1);
        expressions.resize(wanted.element + 1);
      }
      const bool first = sums[wanted.element].state != SymbolicValue::kDefined;
      SHOAL_RETURN_IF_ERROR(CheckReduced(r, wanted, value, &sums[wanted.element]));
      if (first) expressions[wanted.element] = value.expression;
      if (expressions[wanted.element] != value.expression) {
        return OutputError(r, wanted, "was computed by another expression than on other ranks");
      }
    }
  }
  return absl::OkStatus();
}

// `sum` is the wanted multiset, computed when it is undefined.
absl::Status Run::CheckReduced(int rank, const Wanted& wanted, const SymbolicValue& value, SymbolicValue* sum) const {
  if (sum->state != SymbolicValue::kDefined) {
    Expression in_order;
    const int count = wanted.among ? static_cast<int>(wanted.among->size()) : size();
    for (int k = 0; k < count; ++k) {
      const SymbolicValue term = Contribution(wanted.among ? (*wanted.among)[k] : k, wanted.element);
      AddContribution(term, sum);
      in_order.Fold(term.expression);
    }
    sum->expression = in_order.Finish(/*final=*/true);
    sum->element = static_cast<int32_t>(wanted.element);
    sum->state = SymbolicValue::kDefined;
  }
  if (value.element != sum->element) {
    return OutputError(rank, wanted, absl::StrCat("has element ", value.element, " of the input, not ", sum->element));
  }
  if (value.sum_low != sum->sum_low || value.sum_high != sum->sum_high) {
    return OutputError(rank, wanted, Difference(value, wanted));
  }
  if (value.finals == 0) return OutputError(rank, wanted, "was never finished (missing final)");
  if (order_ == ReduceOrder::kIndex && value.expression != sum->expression) {
    return OutputError(rank, wanted, "was not reduced in index order by one instruction");
  }
  return absl::OkStatus();
}

std::string Run::Difference(const SymbolicValue& value, const Wanted& wanted) const {
  std::vector<int> all;
  for (int r = 0; r < size(); ++r) all.push_back(r);
  const std::vector<int>& members = wanted.among ? *wanted.among : all;
  const auto plus = [&](SymbolicValue v, int r) {
    AddContribution(Contribution(r, wanted.element), &v);
    return std::pair(v.sum_low, v.sum_high);
  };
  SymbolicValue right;
  for (int r : members) AddContribution(Contribution(r, wanted.element), &right);
  for (int r : members) {
    if (plus(value, r) == std::pair(right.sum_low, right.sum_high)) return absl::StrCat("lacks the contribution of rank ", r);
  }
  for (int r : all) {
    if (plus(right, r) == std::pair(value.sum_low, value.sum_high)) {
      return absl::StrCat("has the contribution of rank ", r, " once too often (double contribution)");
    }
    for (int missing : members) {
      if (plus(right, r) == plus(value, missing)) {
        return absl::StrCat("has the contribution of rank ", r, " once too often and lacks that of rank ", missing);
      }
    }
  }
  return "has the wrong contributions";
}

}  // namespace

absl::Status Verify(const std::vector<Problem>& problems, const std::vector<Program>& programs, ReduceOrder order) {
  return Run(problems, programs, order).Verify();
}

}  // namespace shoal
