#include "launch/agent/slurm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace shoal {
namespace {

using testing::ElementsAre;

TEST(ExpandTasksPerNode, Forms) {
  EXPECT_THAT(*ExpandTasksPerNode("4"), ElementsAre(4));
  EXPECT_THAT(*ExpandTasksPerNode("2(x3),1"), ElementsAre(2, 2, 2, 1));
  EXPECT_THAT(*ExpandTasksPerNode("1,3(x2)"), ElementsAre(1, 3, 3));
  for (const char* bad : {"", ",", "2,", "x", "2(x", "2(x)", "2(3)", "2(x3", "-1", "1(x99999999)"}) {
    EXPECT_FALSE(ExpandTasksPerNode(bad).ok()) << bad;
  }
}

TEST(ExpandNodeList, Forms) {
  EXPECT_THAT(*ExpandNodeList("host"), ElementsAre("host"));
  EXPECT_THAT(*ExpandNodeList("a[1-2,08-10],login"), ElementsAre("a1", "a2", "a08", "a09", "a10", "login"));
  EXPECT_THAT(*ExpandNodeList("r[0-1]n[1,3]-ib"), ElementsAre("r0n1-ib", "r0n3-ib", "r1n1-ib", "r1n3-ib"));
  EXPECT_THAT(*ExpandNodeList("a-b,c.d"), ElementsAre("a-b", "c.d"));
  EXPECT_THAT(*ExpandNodeList("n[098-101]"), ElementsAre("n098", "n099", "n100", "n101"));
  EXPECT_THAT(*ExpandNodeList("n[4294967294-4294967295]"), ElementsAre("n4294967294", "n4294967295"));
}

TEST(ExpandNodeList, RefusesDamage) {
  for (const char* bad : {"", "a,", ",a", "a[", "a]", "a[]", "a[1", "a[1-]", "a[3-1]", "a[x]", "a[1,]",
                          "a[[1]]", "a[0-4294967295]", "a[1-9999]b[1-9999]", "a[-1]", "a[1-2-3]", "a[+1]"}) {
    EXPECT_FALSE(ExpandNodeList(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace shoal
