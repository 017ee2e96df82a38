#include "parallel/planner/cluster.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace shoal {
namespace {

using testing::HasSubstr;

constexpr char kDevice[] =
    "device: {bf16_tflops: 100, fp32_tflops: 10, efficiency: 0.5, memory_gbyte_per_s: 1000, memory_gib: 2}\n";

absl::StatusOr<Cluster> Load(const std::string& text) {
  const std::string path = testing::TempDir() + "/cluster.yaml";
  std::ofstream(path) << text;
  return LoadCluster(path);
}

TEST(LoadCluster, ConvertsUnits) {
  const auto cluster =
      Load(std::string("hosts: 2\ndevices_per_host: 4\n") + kDevice +
           "intra: {latency_us: 3, bandwidth_gbit_per_s: 800}\ninter: {latency_us: 20, bandwidth_gbit_per_s: 80,\n"
           "        compute_share: 0.2, message_us: 2.5}\n");
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  EXPECT_EQ(cluster->ranks(), 8);
  EXPECT_EQ(cluster->topology().HostOf(4), 1);
  EXPECT_DOUBLE_EQ(cluster->bf16_flops_per_ns, 50e3);
  EXPECT_DOUBLE_EQ(cluster->fp32_peak_flops_per_ns, 10e3);
  EXPECT_DOUBLE_EQ(cluster->memory_bytes_per_ns, 1000);
  EXPECT_EQ(cluster->memory_bytes, int64_t{2} << 30);
  EXPECT_DOUBLE_EQ(cluster->intra_bytes_per_ns, 100);
  EXPECT_DOUBLE_EQ(cluster->inter_bytes_per_ns, 10);
  EXPECT_DOUBLE_EQ(cluster->intra_latency_ns, 3000);
  EXPECT_DOUBLE_EQ(cluster->intra_message_ns, 1000);
  EXPECT_DOUBLE_EQ(cluster->inter_message_ns, 2500);
  EXPECT_DOUBLE_EQ(cluster->inter_compute_share, 0.2);
  EXPECT_DOUBLE_EQ(cluster->intra_compute_share, 0);
}

TEST(LoadCluster, NamesMistakes) {
  EXPECT_THAT(std::string(Load(std::string(kDevice) + "host: 3\n").status().message()),
              HasSubstr("cluster.yaml:2:1: host: unknown key"));
  EXPECT_THAT(std::string(Load("hosts: 2\n").status().message()), HasSubstr("device.bf16_tflops"));
  EXPECT_THAT(std::string(Load(std::string(kDevice) + "hosts: 16384\ndevices_per_host: 2\n").status().message()),
              HasSubstr("at most 16384 ranks"));
  EXPECT_THAT(std::string(LoadCluster("/no/such.yaml").status().message()), HasSubstr("/no/such.yaml"));
}

TEST(LoadCluster, TakesTheExamples) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(SHOAL_SOURCE_DIR "/configs/clusters")) {
    const auto cluster = LoadCluster(entry.path().string());
    EXPECT_TRUE(cluster.ok()) << cluster.status();
    ++files;
  }
  EXPECT_GE(files, 4);
}

}  // namespace
}  // namespace shoal
