// Defects that were reproduced in PCCL, where no other test has them: false success after repeated failures,
// and processes that start together.

#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "collectives/communicator.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

class Pccl : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Pccl, ::testing::Values("auto", "tcp"),
                         [](const auto& info) { return info.param; });

// Elements of a sum of ones that are not the group's size.
int64_t CountWrong(Communicator& group, const Tensor& in, const Tensor& out, absl::Status* status) {
  std::fill_n(in.data<float>(), in.elements(), 1.0f);
  std::fill_n(out.data<float>(), out.elements(), 0.0f);
  *status = group.AllReduce(in, out, ReduceOp::kSum, {}).Await();
  if (!status->ok()) return 0;
  const auto wrong = [&group](float value) { return value != static_cast<float>(group.size()); };
  return std::count_if(out.data<float>(), out.data<float>() + out.elements(), wrong) +
         std::count_if(in.data<float>(), in.data<float>() + in.elements(),
                       [](float value) { return value != 1; });
}

// There an operation that failed kept its place; once none was left, every retry said success and reduced
// nothing.
TEST_P(Pccl, NoRetryAfterManyFailuresIsAFalseSuccess) {
  RankProcesses ranks(RankOptions(0, 5, GetParam(), UniqueRendezvous()), [](Communicator& world,
                                                                            const RankProcesses::Say& say) {
    std::vector<std::unique_ptr<Communicator>> groups;  // Of the first 5, 4, 3 and 2 ranks.
    for (std::vector<int> members = {0, 1, 2, 3, 4}; members.size() > 1; members.pop_back()) {
      if (world.index() < static_cast<int>(members.size())) groups.push_back(*world.Split(members));
    }
    const Tensor in = *world.Allocate({200'000}, DType::kF32);
    const Tensor out = *world.Allocate({200'000}, DType::kF32);
    for (const auto& group : groups) {
      absl::Status status;
      int64_t wrong = 0;
      for (int done = 0; status.ok() && wrong == 0; ++done) {
        wrong = CountWrong(*group, in, out, &status);
        if (done == 10) say(absl::StrCat("sums of ", group->size()));
      }
      if (wrong > 0) say(absl::StrCat(wrong, " wrong elements"));
      for (int retry = 0; retry < 20; ++retry) {
        (void)CountWrong(*group, in, out, &status);
        if (status.ok()) say("an operation of a group that is over succeeded");
      }
    }
  });
  for (int alive = 5; alive > 1; --alive) {
    for (int rank = 0; rank < alive; ++rank) ASSERT_EQ(ranks.Line(rank), absl::StrCat("sums of ", alive));
    ranks.Signal(alive - 1, SIGKILL);
  }
}

// There two processes in sixty launches bound the same port, and one tried for ever.
TEST_P(Pccl, ProcessesThatStartTogetherAlwaysMeet) {
  for (int launch = 0; launch < 40; ++launch) {
    RankProcesses ranks(RankOptions(0, 4, GetParam(), UniqueRendezvous()),
                        [](Communicator& world, const RankProcesses::Say& say) {
                          say(world.Barrier({}).Await().ToString());
                        });
    for (int rank = 0; rank < 4; ++rank) ASSERT_EQ(ranks.Line(rank), "OK") << "launch " << launch;
  }
}

}  // namespace
}  // namespace shoal
