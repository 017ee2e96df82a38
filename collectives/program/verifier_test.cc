#include "collectives/program/verifier.h"

#include <functional>

#include "collectives/program/algorithms.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace shoal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

Region In(int64_t begin, int64_t count) { return {Buffer::kIn, -1, begin, count}; }
Region Out(int64_t begin, int64_t count) { return {Buffer::kOut, -1, begin, count}; }
Region Scratch(int64_t begin, int64_t count) { return {Buffer::kScratch, -1, begin, count}; }
Region View(int receive, int64_t count) { return {Buffer::kMessage, receive, 0, count}; }

// All-reduce of `elements` over ranks, which tests build or spoil.
struct Case {
  std::vector<Problem> problems;
  std::vector<Program> programs;

  explicit Case(int size, int64_t elements = 4, bool in_place = false) {
    for (int r = 0; r < size; ++r) {
      Problem& p = problems.emplace_back();
      p.kind = OpKind::kAllReduce;
      p.rank = r;
      p.size = size;
      p.elements = elements;
      p.in_place = in_place;
    }
    programs.resize(size);
  }
  std::string Message() const { return std::string(Verify(problems, programs).message()); }
};

// Rank 0 adds, rank 1 gets the result.
Case Star() {
  Case c(2);
  Program& p = c.programs[0];
  p.Receive(1, 0, {Buffer::kMessage, -1, 0, 4});
  p.Reduce({In(0, 4), View(0, 4)}, Out(0, 4), true, {0});
  p.Send(1, 0, Out(0, 4), {1});
  Program& q = c.programs[1];
  q.Send(0, 0, In(0, 4));
  q.Receive(0, 0, Out(0, 4));
  return c;
}

TEST(Verifier, AcceptsARightProgram) { EXPECT_EQ(Star().Message(), ""); }

TEST(Verifier, NamesTheRankAndInstructionOfAWrongChunk) {
  Case c = Star();
  c.programs[0].sources[0] = In(0, 2);
  c.programs[0].sources[1].count = 2;
  c.programs[0].instructions[1].region = Out(0, 2);
  EXPECT_THAT(c.Message(), HasSubstr("rank 0, instruction 2 (send out[0, 4) to 1 tag 0): reads out[0, 4), where nothing"));
  Case d(2);
  d.programs[0].Receive(1, 0, {Buffer::kMessage, -1, 0, 2});
  d.programs[0].Reduce({In(0, 2), View(0, 2)}, Out(0, 2), true, {0});
  d.programs[1].Send(0, 0, In(2, 2));
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 0, instruction 1"), HasSubstr("wrong chunk"),
                                 HasSubstr("element 0 of the input with element 2")));
}

TEST(Verifier, CatchesAResultInTheWrongPlace) {
  Case c = Star();
  c.programs[0].Reduce({Out(0, 2)}, Out(2, 2), false, {2});
  EXPECT_THAT(c.Message(), HasSubstr("rank 0, out[2] has element 0 of the input, not 2"));
}

TEST(Verifier, CatchesAMissingDependency) {
  Case c = Star();
  c.programs[0].instructions[2].dependencies_count = 0;  // Sends before the sum is there.
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 0, instruction 2 (send"), HasSubstr("nothing was written yet")));
  c.problems[0].in_place = true;  // Something is there already.
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 0, instruction 1"), HasSubstr("hazard"), HasSubstr("instruction 2 (send")));
  Case d = Star();
  d.programs[0].instructions[1].dependencies_count = 0;  // Adds before the message is there.
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 0, instruction 1"), HasSubstr("missing dependency")));
}

TEST(Verifier, CatchesTwoWritesInARace) {
  Case c = Star();
  c.programs[1].Reduce({In(0, 4)}, Out(0, 4), false);
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 1, instruction"), HasSubstr("in a race with the write of")));
}

TEST(Verifier, CatchesADeadlockOfSendsThatWaitForTheirReceivers) {
  Case c(2);
  for (int r = 0; r < 2; ++r) {
    Program& p = c.programs[r];
    p.Send(1 - r, 0, In(0, 4));
    p.Receive(1 - r, 0, Scratch(0, 4), {0});  // With eager sends that would do.
    p.Reduce({r == 0 ? In(0, 4) : Scratch(0, 4), r == 0 ? Scratch(0, 4) : In(0, 4)}, Out(0, 4), true, {1});
    p.scratch = 4;
  }
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("deadlock"), HasSubstr("rank 0, instruction 0 (send in[0, 4) to 1 tag 0)")));
  for (Program& p : c.programs) p.instructions[1].dependencies_count = 0;
  EXPECT_EQ(c.Message(), "");
}

// In place both reduce into what the other reads as a view.
TEST(Verifier, CatchesADeadlockOfViews) {
  Case c(2, 4, /*in_place=*/true);
  for (int r = 0; r < 2; ++r) {
    Program& p = c.programs[r];
    p.Send(1 - r, 0, In(0, 4));
    p.Receive(1 - r, 0, {Buffer::kMessage, -1, 0, 4});
    p.Reduce({r == 0 ? In(0, 4) : View(1, 4), r == 0 ? View(1, 4) : In(0, 4)}, Out(0, 4), true, {0, 1});
  }
  EXPECT_THAT(c.Message(), HasSubstr("deadlock"));
  // Without the wait it is a race.
  for (Program& p : c.programs) p.instructions[2].dependencies_begin += 1, p.instructions[2].dependencies_count = 1;
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("instruction 2"), HasSubstr("buffer hazard"), HasSubstr("(send in[0, 4)")));
}

// Both ranks lend each other a half of what they have, and get it back with the sum.
Case Lending() {
  Case c(2, 4, /*in_place=*/true);
  for (int r = 0; r < 2; ++r) {
    c.problems[r].lending = true;
    Program& p = c.programs[r];
    const Region own = Out(r * 2, 2), other = Out(2 - r * 2, 2);
    p.Send(1 - r, 0, other);
    p.Receive(1 - r, 0, {Buffer::kMessage, -1, 0, 2});
    p.Reduce({r == 0 ? own : View(1, 2), r == 0 ? View(1, 2) : own}, own, true, {1});
    p.instructions[0].lends = p.instructions[1].lends = p.instructions[2].returns = true;
  }
  return c;
}

TEST(Verifier, FollowsWhatIsLent) {
  EXPECT_EQ(Lending().Message(), "");
  Case c = Lending();  // What comes back may be used.
  c.programs[0].scratch = 2;
  c.programs[0].Reduce({Out(2, 2)}, Scratch(0, 2), false, {0});
  c.programs[0].Reduce({Scratch(0, 2)}, Out(2, 2), false, {3});
  EXPECT_EQ(c.Message(), "");
}

TEST(Verifier, CatchesWhoeverUsesWhatIsLent) {
  Case c = Lending();
  c.programs[0].scratch = 2;
  c.programs[0].Reduce({Out(2, 2)}, Scratch(0, 2), false);
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 0, instruction"), HasSubstr("(lend out[2, 4) to 1 tag 0)")));
  Case d = Lending();
  d.programs[1].Reduce({Out(2, 2)}, Out(0, 2), false, {2});  // Also to write to it.
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 1, instruction 3"), HasSubstr("(lend out[0, 2) to 0 tag 0)")));
  Case e = Lending();  // To two peers, or twice to one.
  e.programs[0].Send(1, 1, Out(2, 2));
  e.programs[1].scratch = 2;
  e.programs[1].Receive(0, 1, {Buffer::kMessage, -1, 0, 2});
  e.programs[1].Reduce({View(3, 2)}, Scratch(0, 2), false, {3});
  EXPECT_THAT(e.Message(), HasSubstr("(send out[2, 4) to 1 tag 1): missing dependency"));
  e.programs[0].instructions[3].lends = e.programs[1].instructions[3].lends = true;
  e.programs[1].instructions[4].returns = true;
  EXPECT_THAT(e.Message(), HasSubstr("(lend out[2, 4) to 1 tag 1): missing dependency: writes"));
}

TEST(Verifier, CatchesWhatIsNotReturnedOrNotLent) {
  Case c = Lending();
  c.programs[1].instructions[2].returns = false;
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 1, instruction 1 (borrow"), HasSubstr("returned 0 times")));
  Case d = Lending();
  d.programs[1].scratch = 2;
  d.programs[1].Reduce({View(1, 2)}, Scratch(0, 2), false, {1});
  d.programs[1].instructions[3].returns = true;
  EXPECT_THAT(d.Message(), HasSubstr("returned 2 times"));
  Case e = Lending();
  e.programs[0].instructions[0].lends = false;
  EXPECT_THAT(e.Message(), AllOf(HasSubstr("rank 1, instruction 1"), HasSubstr("on one side alone")));
  Case f = Lending();
  f.programs[0].instructions[0].region.buffer = Buffer::kIn;
  EXPECT_THAT(f.Message(), HasSubstr("lends the input"));
  Case g = Lending();
  g.problems[1].lending = false;
  EXPECT_THAT(g.Message(), AllOf(HasSubstr("rank 1"), HasSubstr("lends where nobody can")));
  Case h = Lending();
  h.programs[1].instructions[2].dependencies_count = 0;
  EXPECT_THAT(h.Message(), AllOf(HasSubstr("rank 1, instruction 2"), HasSubstr("missing dependency")));
  Case i = Lending();
  i.programs[1].sources[0].count = i.programs[1].sources[1].count = i.programs[1].instructions[2].region.count = 1;
  EXPECT_THAT(i.Message(), HasSubstr("returns only a part"));
  Case j = Lending();  // Read by another one that is not ordered before what returns it.
  j.programs[1].scratch = 2;
  j.programs[1].Reduce({View(1, 2)}, Scratch(0, 2), false, {1});
  EXPECT_THAT(j.Message(), AllOf(HasSubstr("rank 1, instruction 3"), HasSubstr("in a race")));
}

// Rank 1 writes a half of what rank 0 gets, which reads the other half.
Case LendingForACopy() {
  Case c(2);
  for (Problem& p : c.problems) p.kind = OpKind::kBroadcast, p.root = 1, p.lending = true;
  c.programs[0].Send(1, 0, Out(0, 2));
  c.programs[0].Receive(1, 0, Out(2, 2));
  c.programs[1].Receive(0, 0, {Buffer::kMessage, -1, 0, 2});
  c.programs[1].Send(0, 0, In(2, 2));
  c.programs[1].Copy(In(0, 2), View(0, 2), {0});
  c.programs[0].instructions[0].lends = c.programs[1].instructions[0].lends = true;
  c.programs[1].instructions[2].returns = true;
  return c;
}

TEST(Verifier, FollowsWhatIsCopiedToWhatIsLent) {
  EXPECT_EQ(LendingForACopy().Message(), "");
  Case c = LendingForACopy();
  c.programs[1].sources[0] = In(1, 2);
  EXPECT_THAT(c.Message(), HasSubstr("rank 0, out[0] is not element 0 of rank 1"));
  Case d = LendingForACopy();
  d.programs[1].instructions[2].dependencies_count = 0;
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 1, instruction 2"), HasSubstr("missing dependency")));
  Case e = LendingForACopy();
  e.programs[1].sources[0].count = e.programs[1].instructions[2].region.count = 1;
  EXPECT_THAT(e.Message(), HasSubstr("returns only a part"));
  Case f = LendingForACopy();  // Not memory that rank 0 has given away.
  f.programs[0].instructions[0].lends = f.programs[1].instructions[0].lends = false;
  EXPECT_THAT(f.Message(), AllOf(HasSubstr("rank 1, instruction 2"), HasSubstr("not lent")));
  Case g = LendingForACopy();
  g.programs[1].instructions[2].returns = false;
  EXPECT_THAT(g.Message(), AllOf(HasSubstr("rank 1, instruction 0 (borrow"), HasSubstr("returned 0 times")));
}

// That the receiver answered does not mean that the transport is through with the sender's memory.
TEST(Verifier, TakesNoAnswerForTheEndOfASend) {
  Case c = Star();
  for (Problem& p : c.problems) p.in_place = true;
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 1, instruction 1"), HasSubstr("buffer hazard")));
  c.programs[1].instructions.clear();
  c.programs[1].dependencies.clear();
  c.programs[1].Send(0, 0, In(0, 4));
  c.programs[1].Receive(0, 0, Out(0, 4), {0});
  EXPECT_EQ(c.Message(), "");
}

// An order that goes over another rank counts: the message cannot come before it was sent.
TEST(Verifier, FollowsOrderOverOtherRanks) {
  Case c(2, 1);
  c.problems[0].kind = c.problems[1].kind = OpKind::kBroadcast;
  Program& p = c.programs[0];
  p.Send(1, 0, In(0, 1));
  Program& q = c.programs[1];
  q.scratch = 2;
  q.Receive(0, 0, Scratch(0, 1));
  q.Send(0, 0, Scratch(0, 1), {0});
  q.Receive(0, 1, Scratch(1, 1));
  q.Reduce({Scratch(0, 1)}, Out(0, 1), false, {2});  // After 0, but only by way of rank 0.
  p.scratch = 1;
  p.Receive(1, 0, Scratch(0, 1));
  p.Send(1, 1, Scratch(0, 1), {1});
  EXPECT_EQ(c.Message(), "");
  p.instructions[2].dependencies_count = 0;
  p.instructions[2].region = In(0, 1);
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 1, instruction 3"), HasSubstr("missing dependency")));
}

TEST(Verifier, NamesAMissingContribution) {
  Case c = Star();
  c.programs[0].instructions[1].sources_count = 1;  // Its own alone.
  EXPECT_THAT(c.Message(), HasSubstr("rank 0, out[0] lacks the contribution of rank 1"));
}

TEST(Verifier, NamesADoubleContribution) {
  Case c = Star();
  c.programs[0].instructions.clear();
  c.programs[0].sources.clear();
  c.programs[0].dependencies.clear();
  c.programs[0].Receive(1, 0, {Buffer::kMessage, -1, 0, 4});
  c.programs[0].Reduce({In(0, 4), View(0, 4), View(0, 4)}, Out(0, 4), true, {0});
  c.programs[0].Send(1, 0, Out(0, 4), {1});
  EXPECT_THAT(c.Message(), HasSubstr("rank 0, out[0] has the contribution of rank 1 once too often"));
  c.programs[0].sources[1] = In(0, 4);
  c.programs[0].instructions[1].sources_count = 2;
  EXPECT_THAT(c.Message(), HasSubstr("rank 0 once too often and lacks that of rank 1"));
}

TEST(Verifier, CatchesAMissingAndADoubleFinal) {
  Case c = Star();
  c.programs[0].instructions[1].final = false;
  EXPECT_THAT(c.Message(), HasSubstr("rank 0, out[0] was never finished (missing final)"));
  Case d = Star();
  d.programs[1].Reduce({Out(0, 4)}, Out(0, 4), true, {1});
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 1, instruction 2"), HasSubstr("finished result")));
}

TEST(Verifier, CatchesUnmatchedMessages) {
  Case c = Star();
  c.programs[1].instructions[0].tag = 7;
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 0, instruction 0 (receive"), HasSubstr("nobody sends")));
  Case d = Star();
  d.programs[1].Send(0, 3, In(0, 1));
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 1, instruction 2 (send"), HasSubstr("nobody receives")));
  Case e = Star();
  e.programs[1].instructions[0].region.count = 3;
  EXPECT_THAT(e.Message(), AllOf(HasSubstr("rank 0, instruction 0"), HasSubstr("another length")));
  Case f = Star();
  f.programs[1].Send(0, 0, In(0, 4));
  EXPECT_THAT(f.Message(), AllOf(HasSubstr("rank 1, instruction 2"), HasSubstr("another send has this tag")));
}

TEST(Verifier, CatchesWhatIsOutOfRange) {
  const std::vector<std::function<void(Case&)>> faults = {
      [](Case& c) { c.programs[0].instructions[2].region.begin = 1; },
      [](Case& c) { c.programs[0].sources[0].begin = 1; },
      [](Case& c) { c.programs[0].sources[1].begin = -1; },
      [](Case& c) { c.programs[1].instructions[1].region = Scratch(0, 4); },
      [](Case& c) { c.programs[1].instructions[1].region.begin = -1; },
  };
  for (const auto& fault : faults) {
    Case c = Star();
    fault(c);
    EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank "), HasSubstr("instruction "), HasSubstr("out of range")));
  }
}

TEST(Verifier, CatchesWritesToTheInputAndBadForm) {
  Case c = Star();
  c.programs[1].instructions[1].region = In(0, 4);
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 1, instruction 1"), HasSubstr("writes to the input")));
  Case d = Star();
  d.programs[0].dependencies[0] = 1;
  EXPECT_THAT(d.Message(), AllOf(HasSubstr("rank 0, instruction 1"), HasSubstr("no earlier one")));
  Case e = Star();
  e.programs[0].instructions[2].peer = 0;
  EXPECT_THAT(e.Message(), AllOf(HasSubstr("rank 0, instruction 2"), HasSubstr("no such peer")));
  Case f = Star();
  f.programs[0].sources[1].receive = 1;
  EXPECT_THAT(f.Message(), AllOf(HasSubstr("rank 0, instruction 1"), HasSubstr("no view")));
}

// a + b on one rank and b + a on the other may differ in their bits.
TEST(Verifier, CatchesAnotherExpressionOnAnotherRank) {
  Case c(2);
  for (int r = 0; r < 2; ++r) {
    Program& p = c.programs[r];
    p.Send(1 - r, 0, In(0, 4));
    p.Receive(1 - r, 0, {Buffer::kMessage, -1, 0, 4});
    p.Reduce({In(0, 4), View(1, 4)}, Out(0, 4), true, {1});
  }
  EXPECT_THAT(c.Message(), HasSubstr("rank 1, out[0] was computed by another expression"));
  std::swap(c.programs[1].sources[0], c.programs[1].sources[1]);
  EXPECT_EQ(c.Message(), "");
}

TEST(Verifier, CatchesABarrierThatDoesNotWait) {
  Case c(3);
  for (int r = 0; r < 3; ++r) {
    c.problems[r].kind = OpKind::kBarrier;
    c.programs[r].scratch = 2;
    c.programs[r].Send((r + 1) % 3, 0, Scratch(0, 1));
    c.programs[r].Receive((r + 2) % 3, 0, Scratch(1, 1));
  }
  EXPECT_THAT(c.Message(), HasSubstr("rank 0 may leave the barrier before rank 1 has come"));
}

TEST(Verifier, KeepsSparseOperationsOffMemoryThatIsNotThere) {
  Case c(3);
  for (Problem& p : c.problems) {
    p.kind = OpKind::kSparseAllGather;
    p.counts = {2, 2};
    p.moves = {{.chunk = 1, .owner = 0, .holders = {2}}};
  }
  c.programs[0].Send(2, 0, In(2, 2));
  c.programs[2].Receive(0, 0, Out(2, 2));
  EXPECT_EQ(c.Message(), "");
  c.programs[0].instructions[0].peer = 1;
  c.programs[1] = std::move(c.programs[2]);
  c.programs[2] = {};
  EXPECT_THAT(c.Message(), AllOf(HasSubstr("rank 1, instruction 0"), HasSubstr("out of range")));
}

TEST(Verifier, TellsIndexOrder) {
  Case c = Star();
  EXPECT_TRUE(Verify(c.problems, c.programs, ReduceOrder::kIndex).ok());
  std::swap(c.programs[0].sources[0], c.programs[0].sources[1]);
  EXPECT_THAT(std::string(Verify(c.problems, c.programs, ReduceOrder::kIndex).message()), HasSubstr("index order"));
}

// Takes dependencies away one by one, from real programs: nearly all of them are needed.
TEST(Verifier, NoticesMostMissingDependenciesOfRealPrograms) {
  for (std::string_view name : {"direct", "fused", "ring", "recursive_doubling", "halving_doubling", "tree"}) {
    Case c(4, 70, /*in_place=*/true);
    for (Problem& p : c.problems) {
      p.piece = 9;
      p.lending = true;
      const absl::StatusOr<const Algorithm*> algorithm = FindAlgorithm(name, p);
      ASSERT_TRUE(algorithm.ok()) << algorithm.status();
      c.programs[p.rank] = (*algorithm)->make(p);
    }
    ASSERT_EQ(c.Message(), "");
    int noticed = 0, tried = 0;
    for (Instruction& i : c.programs[1].instructions) {
      if (i.dependencies_count == 0) continue;
      const Instruction whole = i;
      --i.dependencies_count;
      noticed += c.Message().empty() ? 0 : 1;
      ++tried;
      i = whole;
    }
    EXPECT_GT(noticed, tried * 8 / 10) << name << ": " << noticed << " of " << tried;
  }
}

}  // namespace
}  // namespace shoal
