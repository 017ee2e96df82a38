#include "launch/agent/agent_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace shoal {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;

using Values = std::map<std::string, std::string>;

absl::StatusOr<AgentOptions> Make(const Values& values, bool may_be_elastic = false) {
  return MakeAgentOptions({.values = values, .usable_cores = 6, .may_be_elastic = may_be_elastic});
}

TEST(MakeAgentOptions, DefaultsAreTorchruns) {
  const auto options = Make({});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->nproc_per_node, 1);
  EXPECT_EQ(options->nnodes, 1);
  EXPECT_EQ(options->node_rank, 0);
  EXPECT_EQ(options->rdzv_endpoint, "");  // One host needs no port.
  EXPECT_EQ(options->rdzv_id, "");
  EXPECT_THAT(options->warnings, IsEmpty());
}

TEST(MakeAgentOptions, SeveralHosts) {
  const auto options =
      Make({{"nproc-per-node", "2"}, {"nnodes", "3:3"}, {"node-rank", "2"}, {"max-restarts", "0"}});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->nproc_per_node, 2);
  EXPECT_EQ(options->nnodes, 3);
  EXPECT_EQ(options->node_rank, 2);
  EXPECT_EQ(options->rdzv_endpoint, "127.0.0.1:29500");
  EXPECT_EQ(options->rdzv_id, "none");
  EXPECT_THAT(options->warnings, IsEmpty());
}

TEST(MakeAgentOptions, Endpoint) {
  EXPECT_EQ(Make({{"nnodes", "2"}, {"rdzv-endpoint", "a"}})->rdzv_endpoint, "a:29500");
  EXPECT_EQ(Make({{"nnodes", "2"}, {"rdzv-endpoint", "a:1"}, {"master-port", "5"}})->rdzv_endpoint, "a:1");
  EXPECT_EQ(Make({{"nnodes", "2"}, {"rdzv-endpoint", "[::1]:9"}})->rdzv_endpoint, "[::1]:9");
  EXPECT_EQ(Make({{"nnodes", "2"}, {"master-addr", "b"}, {"master-port", "5"}})->rdzv_endpoint, "b:5");
  EXPECT_EQ(Make({{"nnodes", "2"}, {"master-addr", "::1"}})->rdzv_endpoint, "[::1]:29500");
  EXPECT_EQ(Make({{"rdzv-endpoint", "a:1"}})->rdzv_endpoint, "a:1");
  EXPECT_EQ(Make({{"standalone", "true"}})->rdzv_endpoint, "");
}

TEST(MakeAgentOptions, WordsForTheNumberOfRanks) {
  EXPECT_EQ(Make({{"nproc-per-node", "auto"}})->nproc_per_node, 6);
  EXPECT_EQ(Make({{"nproc-per-node", "cpu"}})->nproc_per_node, 6);
}

TEST(MakeAgentOptions, FlagsWithoutMeaningAreWarnedAbout) {
  EXPECT_THAT(Make({{"tee", "3"}})->warnings, Contains(HasSubstr("--tee")));
  EXPECT_THAT(Make({{"max-restarts", "2"}})->warnings, Contains(HasSubstr("--max-restarts")));
  EXPECT_THAT(Make({{"nnodes", "2"}, {"node-rank", "0"}, {"rdzv-backend", "c10d"}})->warnings,
              Contains(HasSubstr("static")));
}

TEST(MakeAgentOptions, ElasticJobs) {
  for (const char* backend : {"shoal", "c10d"}) {
    const auto options =
        Make({{"rdzv-backend", backend}, {"nnodes", "2:4"}, {"max-restarts", "3"}}, /*may_be_elastic=*/true);
    ASSERT_TRUE(options.ok()) << options.status();
    EXPECT_TRUE(options->elastic);
    EXPECT_EQ(options->nnodes, 2);
    EXPECT_EQ(options->nnodes_max, 4);
    EXPECT_EQ(options->max_restarts, 3);
    EXPECT_EQ(options->rdzv_endpoint, "127.0.0.1:29400");
    EXPECT_THAT(options->warnings, IsEmpty());
  }
  EXPECT_EQ(Make({{"rdzv-backend", "shoal"}}, true)->rdzv_endpoint, "");  // One host needs no port.
  EXPECT_FALSE(Make({{"rdzv-backend", "static"}}, true)->elastic);
  EXPECT_FALSE(Make({{"rdzv-backend", "shoal"}, {"max-restarts", "many"}}, true).ok());
}

TEST(MakeAgentOptions, ElasticJobsWithEtcd) {
  const auto options = Make({{"rdzv-backend", "etcd"}, {"rdzv-endpoint", "a,b:7"}, {"rdzv-id", "night"}}, true);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_THAT(options->etcd, testing::ElementsAre("a:2379", "b:7"));
  EXPECT_EQ(options->rdzv_endpoint, "");
  EXPECT_EQ(options->rdzv_id, "night");
  EXPECT_THAT(std::string(Make({{"rdzv-backend", "etcd"}, {"rdzv-endpoint", "a"}}, true).status().message()),
              HasSubstr("--rdzv-id"));
  EXPECT_THAT(std::string(Make({{"rdzv-backend", "etcd"}, {"rdzv-id", "night"}}, true).status().message()),
              HasSubstr("--rdzv-endpoint"));
  EXPECT_THAT(std::string(Make({{"nnodes", "1:2"}}, true).status().message()), HasSubstr("--rdzv-backend=shoal"));
}

struct ErrorCase {
  Values values;
  std::vector<std::string> words;
};

class RefusesFlagsTest : public testing::TestWithParam<ErrorCase> {};

TEST_P(RefusesFlagsTest, NamingTheFlag) {
  const auto options = Make(GetParam().values);
  ASSERT_FALSE(options.ok());
  for (const std::string& word : GetParam().words) {
    EXPECT_THAT(std::string(options.status().message()), HasSubstr(word));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Flags, RefusesFlagsTest,
    testing::Values(ErrorCase{{{"nproc-per-node", "0"}}, {"--nproc-per-node=0", "auto"}},
                    ErrorCase{{{"nproc-per-node", "many"}}, {"--nproc-per-node=many"}},
                    ErrorCase{{{"nproc-per-node", "gpu"}}, {"--nproc-per-node=gpu", "CPU"}},
                    ErrorCase{{{"nnodes", "1:2"}}, {"--nnodes=1:2", "fixed number of ranks"}},
                    ErrorCase{{{"rdzv-backend", "shoal"}}, {"--rdzv-backend=shoal", "fixed number of ranks"}},
                    ErrorCase{{{"nnodes", "2:1"}}, {"--nnodes=1"}},
                    ErrorCase{{{"nnodes", "0"}}, {"--nnodes=0"}},
                    ErrorCase{{{"nnodes", "2:"}}, {"--nnodes="}},
                    ErrorCase{{{"nnodes", "2"}, {"node-rank", "2"}}, {"--node-rank=2", "--nnodes=2"}},
                    ErrorCase{{{"node-rank", "-1"}}, {"--node-rank=-1"}},
                    ErrorCase{{{"nnodes", "60000"}, {"nproc-per-node", "60000"}}, {"--nproc-per-node=60000"}},
                    ErrorCase{{{"rdzv-backend", "etcd"}}, {"--rdzv-backend=etcd", "static is supported"}},
                    ErrorCase{{{"nnodes", "2"}, {"rdzv-backend", "c10d"}}, {"--node-rank"}},
                    ErrorCase{{{"nnodes", "2"}, {"rdzv-endpoint", "a:b"}}, {"--rdzv-endpoint", "a:b"}},
                    ErrorCase{{{"master-port", "70000"}}, {"--master-port=70000"}},
                    ErrorCase{{{"nnodes", "2"}, {"standalone", "true"}}, {"--standalone", "--nnodes=2"}}));

}  // namespace
}  // namespace shoal
