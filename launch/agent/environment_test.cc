#include "launch/agent/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <optional>

namespace shoal {
namespace {

using Vars = std::map<std::string, std::string>;
using testing::HasSubstr;

absl::StatusOr<std::optional<RankEnvironment>> Detect(const Vars& vars) {
  return DetectEnvironment([&vars](std::string_view name) -> std::optional<std::string> {
    const auto found = vars.find(std::string(name));
    if (found == vars.end()) return std::nullopt;
    return found->second;
  });
}

Vars Merge(Vars a, const Vars& b) {
  for (const auto& [name, value] : b) a[name] = value;
  return a;
}

const Vars kTorch = {{"RANK", "3"},
                     {"WORLD_SIZE", "8"},
                     {"LOCAL_RANK", "1"},
                     {"LOCAL_WORLD_SIZE", "2"},
                     {"GROUP_RANK", "1"},
                     {"GROUP_WORLD_SIZE", "4"},
                     {"MASTER_ADDR", "a"},
                     {"MASTER_PORT", "29500"},
                     {"TORCHELASTIC_RUN_ID", "night"}};
const Vars kTorchByHand = {{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}};
const Vars kMpi = {{"OMPI_COMM_WORLD_RANK", "2"},       {"OMPI_COMM_WORLD_SIZE", "4"},
                   {"OMPI_COMM_WORLD_LOCAL_RANK", "2"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                   {"PMIX_NAMESPACE", "771"},           {"PMIX_RANK", "2"}};
const Vars kHydra = {
    {"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}};
const Vars kSlurm = {{"SLURM_STEP_NUM_TASKS", "5"},
                     {"SLURM_PROCID", "4"},
                     {"SLURM_LOCALID", "0"},
                     {"SLURM_NODEID", "2"},
                     {"SLURM_STEP_TASKS_PER_NODE", "2(x2),1"},
                     {"SLURM_STEP_NODELIST", "n[07-09]"},
                     {"SLURM_JOB_ID", "12"},
                     {"SLURM_STEP_ID", "3"}};

struct Case {
  std::string name;
  Vars vars;
  RankEnvironment want;
};

class DetectsTest : public testing::TestWithParam<Case> {};

TEST_P(DetectsTest, Rank) {
  const auto found = Detect(GetParam().vars);
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_TRUE(found->has_value());
  const RankEnvironment& want = GetParam().want;
  EXPECT_EQ((*found)->source, want.source);
  EXPECT_EQ((*found)->rank, want.rank);
  EXPECT_EQ((*found)->world_size, want.world_size);
  EXPECT_EQ((*found)->local_rank, want.local_rank);
  EXPECT_EQ((*found)->local_world_size, want.local_world_size);
  EXPECT_EQ((*found)->node_rank, want.node_rank);
  EXPECT_EQ((*found)->nodes, want.nodes);
  EXPECT_EQ((*found)->master_host, want.master_host);
  EXPECT_EQ((*found)->master_port, want.master_port);
  EXPECT_EQ((*found)->job_id, want.job_id);
}

INSTANTIATE_TEST_SUITE_P(
    Sources, DetectsTest,
    testing::Values(
        Case{"Torchrun", kTorch, {3, 8, 1, 2, 1, 4, "torchrun", "a", 29500, "night"}},
        Case{"TorchrunStoreHoldsThePort",
             Merge(kTorch, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}}),
             {3, 8, 1, 2, 1, 4, "torchrun", "a", 29501, "night"}},
        Case{"TorchrunByHand",
             kTorchByHand,
             {1, 4, 1, 4, 0, 1, "torchrun", "unix:shoal-torchrun-none", 0, "none"}},
        Case{"TorchrunUnderSrunOnePerHost",
             Merge(kTorch, {{"SLURM_STEP_NUM_TASKS", "4"},
                            {"SLURM_PROCID", "1"},
                            {"SLURM_LOCALID", "0"},
                            {"SLURM_NODEID", "1"},
                            {"SLURM_STEP_TASKS_PER_NODE", "1(x4)"}}),
             {3, 8, 1, 2, 1, 4, "torchrun", "a", 29500, "night"}},
        Case{"OpenMpi", kMpi, {2, 4, 2, 4, 0, 1, "Open MPI", "unix:shoal-Open-MPI-771", 0, "771"}},
        Case{"OpenMpiAcrossHosts",
             Merge(kMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                          {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                          {"MASTER_ADDR", "h"},
                          {"MASTER_PORT", "4000"}}),
             {2, 4, 0, 2, 1, 2, "Open MPI", "h", 4000, "771"}},
        Case{"MpirunDaemonsUnderSlurm",
             Merge(kMpi, {{"SLURM_STEP_NUM_TASKS", "3"},
                          {"SLURM_PROCID", "0"},
                          {"SLURM_LOCALID", "0"},
                          {"SLURM_NODEID", "0"},
                          {"SLURM_STEP_TASKS_PER_NODE", "1(x3)"}}),
             {2, 4, 2, 4, 0, 1, "Open MPI", "unix:shoal-Open-MPI-771", 0, "771"}},
        Case{"Hydra",
             Merge(kHydra, {{"SHOAL_RUN_ID", "h1"}}),
             {1, 2, 1, 2, 0, 1, "PMI", "unix:shoal-PMI-h1", 0, "h1"}},
        Case{"Slurm", kSlurm, {4, 5, 0, 1, 2, 3, "Slurm", "n07", 20000 + (12 * 31 + 3) % 9000, "12.3"}},
        Case{"SlurmWithPmiPlugin",
             Merge(kSlurm, {{"PMI_RANK", "4"}, {"PMI_SIZE", "5"}, {"PMIX_RANK", "4"}}),
             {4, 5, 0, 1, 2, 3, "Slurm", "n07", 20000 + (12 * 31 + 3) % 9000, "12.3"}},
        Case{"SlurmOneHost",
             Merge(kSlurm,
                   {{"SLURM_STEP_TASKS_PER_NODE", "5"}, {"SLURM_NODEID", "0"}, {"SLURM_LOCALID", "4"}}),
             {4, 5, 4, 5, 0, 1, "Slurm", "unix:shoal-Slurm-12.3", 0, "12.3"}},
        Case{"SlurmMasterGiven",
             Merge(kSlurm, {{"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "99"}}),
             {4, 5, 0, 1, 2, 3, "Slurm", "10.0.0.1", 99, "12.3"}},
        Case{"ShoalWinsOverTorchrun",
             Merge(kTorch, {{"SHOAL_RANK", "7"}, {"SHOAL_WORLD_SIZE", "8"}, {"SHOAL_MASTER", "[::1]:77"}}),
             {7, 8, 7, 8, 0, 1, "SHOAL", "::1", 77, "none"}},
        Case{"OneRank",
             {{"SHOAL_RANK", "0"}, {"SHOAL_WORLD_SIZE", "1"}},
             {0, 1, 0, 1, 0, 1, "SHOAL", "", 0, "none"}}),
    [](const auto& info) { return info.param.name; });

TEST(DetectEnvironment, NothingLaunchedThisProcess) {
  const Vars batch_script = {{"SLURM_JOB_ID", "7"},
                             {"SLURM_PROCID", "0"},
                             {"SLURM_NTASKS", "4"},
                             {"SLURM_TASKS_PER_NODE", "4"},
                             {"MASTER_ADDR", "a"}};
  Vars one_task = kSlurm;
  one_task["SLURM_STEP_NUM_TASKS"] = "1";
  for (const Vars& vars : {Vars{}, batch_script, one_task}) {
    const auto found = Detect(vars);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_FALSE(found->has_value());
  }
}

struct ErrorCase {
  std::string name;
  Vars vars;
  std::vector<std::string> words;
};

class RefusesEnvironmentTest : public testing::TestWithParam<ErrorCase> {};

TEST_P(RefusesEnvironmentTest, NamingTheCause) {
  const auto found = Detect(GetParam().vars);
  ASSERT_FALSE(found.ok());
  for (const std::string& word : GetParam().words) {
    EXPECT_THAT(std::string(found.status().message()), HasSubstr(word));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Environments, RefusesEnvironmentTest,
    testing::Values(
        ErrorCase{
            "PartTorchrun", {{"RANK", "0"}, {"WORLD_SIZE", "2"}}, {"torchrun", "LOCAL_RANK is not set"}},
        ErrorCase{"WorldSizeAlone", {{"WORLD_SIZE", "2"}}, {"WORLD_SIZE=2", "RANK, LOCAL_RANK"}},
        ErrorCase{"PartShoal", {{"SHOAL_RANK", "0"}}, {"SHOAL_WORLD_SIZE"}},
        ErrorCase{"PartShoalLocal",
                  {{"SHOAL_RANK", "0"}, {"SHOAL_WORLD_SIZE", "2"}, {"SHOAL_LOCAL_RANK", "0"}},
                  {"SHOAL_LOCAL_WORLD_SIZE"}},
        ErrorCase{"PartOpenMpi", {{"OMPI_COMM_WORLD_RANK", "0"}}, {"Open MPI", "OMPI_COMM_WORLD_SIZE"}},
        ErrorCase{"HydraWithoutLocal", {{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}}, {"MPI_LOCALRANKID"}},
        ErrorCase{"NotANumber", Merge(kTorch, {{"RANK", "x3"}}), {"RANK=\"x3\""}},
        ErrorCase{"Negative", Merge(kTorch, {{"RANK", "-1"}}), {"RANK=\"-1\""}},
        ErrorCase{"RankBeyondWorld", Merge(kTorch, {{"RANK", "8"}}), {"rank 8 of a world of 8"}},
        ErrorCase{"LocalBeyondLocalWorld", Merge(kTorch, {{"LOCAL_RANK", "2"}}), {"local rank 2 of 2"}},
        ErrorCase{"EmptyWorld", Merge(kMpi, {{"OMPI_COMM_WORLD_SIZE", "0"}}), {"world size is 0"}},
        ErrorCase{"SecondHostByHand", Merge(kTorchByHand, {{"LOCAL_RANK", "0"}}), {"LOCAL_WORLD_SIZE"}},
        ErrorCase{"NodesAgainstLocalSize",
                  Merge(kTorch, {{"GROUP_WORLD_SIZE", "1"}, {"GROUP_RANK", "0"}}),
                  {"2 of 8 ranks on this host", "1 host"}},
        ErrorCase{"Disagreement",
                  Merge(kTorchByHand, {{"OMPI_COMM_WORLD_RANK", "1"},
                                       {"OMPI_COMM_WORLD_SIZE", "3"},
                                       {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                       {"OMPI_COMM_WORLD_LOCAL_SIZE", "3"}}),
                  {"torchrun says that the world size is 4", "Open MPI says 3"}},
        ErrorCase{"DisagreementWithSlurm",
                  Merge(kMpi, Merge(kSlurm, {{"SLURM_NODEID", "0"}})),
                  {"Open MPI", "Slurm says 5"}},
        ErrorCase{"OpenMpiHostsWithoutMaster",
                  Merge(kMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}}),
                  {"-x MASTER_ADDR=", "-x MASTER_PORT="}},
        ErrorCase{"MasterWithoutPort", Merge(kTorchByHand, {{"MASTER_ADDR", "a"}}), {"MASTER_PORT"}},
        ErrorCase{"NoPortAboveTheStore",
                  Merge(kTorch, {{"MASTER_PORT", "65535"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}}),
                  {"MASTER_PORT in 1 to 65534"}},
        ErrorCase{
            "ShoalMasterWithoutPort", Merge(kTorchByHand, {{"SHOAL_MASTER", "host"}}), {"SHOAL_MASTER"}},
        ErrorCase{"SlurmCountsDoNotAdd",
                  Merge(kSlurm, {{"SLURM_STEP_TASKS_PER_NODE", "2(x3)"}}),
                  {"SLURM_STEP_TASKS_PER_NODE=2(x3)", "SLURM_STEP_NUM_TASKS=5"}},
        ErrorCase{"SlurmListDamaged",
                  Merge(kSlurm, {{"SLURM_STEP_NODELIST", "n[1-"}}),
                  {"SLURM_STEP_NODELIST", "'[' without ']'"}},
        ErrorCase{"SlurmHalf", {{"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_PROCID", "0"}}, {"SLURM_LOCALID"}}),
    [](const auto& info) { return info.param.name; });

TEST(RankVariables, DetectIsTheInverse) {
  for (const RankEnvironment& rank : {RankEnvironment{3, 4, 3, 4, 0, 1, "SHOAL", "unix:shoal-x1", 0, "x1", "s3cret"},
                                      RankEnvironment{5, 6, 1, 2, 2, 3, "SHOAL", "fe80::2", 29500, "none"}}) {
    Vars vars;
    for (const auto& [name, value] : RankVariables(rank)) vars[name] = value;
    const auto found = Detect(vars);
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(**found, rank);
    for (auto it = vars.begin(); it != vars.end();) {
      it = it->first.rfind("SHOAL_", 0) == 0 && it->first != "SHOAL_MASTER" ? vars.erase(it) : std::next(it);
    }
    const auto by_torch_names = Detect(vars);
    ASSERT_TRUE(by_torch_names.ok()) << by_torch_names.status();
    EXPECT_EQ((*by_torch_names)->source, "torchrun");
    EXPECT_EQ((*by_torch_names)->rank, rank.rank);
    EXPECT_EQ((*by_torch_names)->nodes, rank.nodes);
    EXPECT_EQ((*by_torch_names)->job_id, rank.job_id);
  }
}

TEST(ElasticRankVariables, HaveNoNumberOfTheRank) {
  RankEnvironment rank;
  rank.local_rank = 1;
  rank.local_world_size = 2;
  rank.job_id = "night";
  std::map<std::string, std::string> variables;
  for (const auto& [name, value] : ElasticRankVariables(rank, "unix:x", 1, 3)) variables[name] = value;
  EXPECT_EQ(variables["SHOAL_COORDINATOR"], "unix:x");
  EXPECT_EQ(variables["SHOAL_RUN_ID"], "night");
  EXPECT_EQ(variables["TORCHELASTIC_RESTART_COUNT"], "1");
  const auto detected = DetectEnvironment([&](std::string_view name) -> std::optional<std::string> {
    const auto found = variables.find(std::string(name));
    if (found == variables.end()) return std::nullopt;
    return found->second;
  });
  EXPECT_TRUE(absl::IsFailedPrecondition(detected.status())) << detected.status();
}

TEST(ParseHostPort, Forms) {
  EXPECT_EQ(ParseHostPort("a", 5)->port, 5);
  EXPECT_EQ(ParseHostPort("a:7", 5)->port, 7);
  EXPECT_EQ(ParseHostPort("[::1]:7", 5)->host, "::1");
  EXPECT_EQ(ParseHostPort("[::1]", 5)->port, 5);
  for (const char* bad : {"", ":7", "a:", "a:0", "a:65536", "a:b", "::1", "[::1", "[::1]7"}) {
    EXPECT_FALSE(ParseHostPort(bad, 5).ok()) << bad;
  }
}

}  // namespace
}  // namespace shoal
