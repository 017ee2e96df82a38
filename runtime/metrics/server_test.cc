#include "runtime/metrics/server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <thread>

#include "runtime/metrics/process.h"
#include "tests/harness/http.h"
#include "tests/harness/prometheus.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::unique_ptr<MetricsServer> NewServer(int port = 0) {
  auto server = MetricsServer::Create("127.0.0.1", port);
  EXPECT_TRUE(server.ok()) << server.status();
  return std::move(server).value();
}

std::string Scrape(const MetricsServer& server) {
  const auto response = testing::HttpGet("127.0.0.1", server.port(), "/metrics");
  EXPECT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->status, 200);
  return response->body;
}

TEST(MetricsServer, SeriesExistBeforeTheFirstEvent) {
  const auto server = NewServer();
  const std::string text = Scrape(*server);
  for (const char* line : {
           "# TYPE shoal_train_steps_total counter\n",
           "shoal_train_steps_total{outcome=\"committed\"} 0\n",
           "shoal_train_phase_seconds_total{phase=\"grad_sync\"} 0\n",
           "shoal_train_loss{objective=\"lm\"} Nan\n",
           "shoal_job_state{state=\"init\"} 1\n",
           "shoal_job_state{state=\"train\"} 0\n",
           "shoal_train_step_duration_seconds_bucket{le=\"0.05\"} 0\n",
           "shoal_comm_errors_total{kind=\"peer_lost\"} 0\n",
           "shoal_checkpoint_failures_total{reason=\"disk_full\",tier=\"local\"} 0\n",
           "process_open_fds ",
           "shoal_device_memory_bytes{kind=\"peak\"} ",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, HasSubstr("shoal_build_info{"));
}

TEST(MetricsServer, ShowsWhatHandlesWereGiven) {
  const auto server = NewServer();
  const Metrics& metrics = server->metrics();
  metrics.steps_committed.Add();
  metrics.tokens.Add(4096);
  metrics.tokens.Add(-5);  // A counter never falls.
  metrics.loss_lm.Set(1.25);
  metrics.step_duration.Observe(0.15);
  metrics.AddPhase("forward", 0.5);
  metrics.AddPhase("unheard of", 0.25);
  metrics.SetState(JobState::kTrain);
  server->Layers({1, 3})[1].load_max.Set(1.5);
  server->Comm("ep", "all_to_all", "shm").bytes.Add(100);
  const std::string text = Scrape(*server);
  EXPECT_THAT(text, HasSubstr("shoal_train_steps_total{outcome=\"committed\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("shoal_train_tokens_total 4096\n"));
  EXPECT_THAT(text, HasSubstr("shoal_train_loss{objective=\"lm\"} 1.25\n"));
  EXPECT_THAT(text, HasSubstr("shoal_train_step_duration_seconds_bucket{le=\"0.1\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("shoal_train_step_duration_seconds_bucket{le=\"0.2\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("shoal_train_phase_seconds_total{phase=\"forward\"} 0.5\n"));
  EXPECT_THAT(text, HasSubstr("shoal_train_phase_seconds_total{phase=\"other\"} 0.25\n"));
  EXPECT_THAT(text, HasSubstr("shoal_job_state{state=\"init\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("shoal_job_state{state=\"train\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("shoal_moe_expert_load_ratio{layer=\"3\",stat=\"max\"} 1.5\n"));
  EXPECT_THAT(text,
              HasSubstr("shoal_comm_bytes_total{group=\"ep\",op=\"all_to_all\",transport=\"shm\"} 100\n"));
}

TEST(MetricsServer, AskingAgainForASeriesKeepsItsValue) {
  const auto server = NewServer();
  server->Layers({0})[0].idle_experts.Set(0);
  server->CommOldestPending("ep").Set(7);
  EXPECT_EQ(server->Layers({0})[0].idle_experts.value(), 0);
  EXPECT_EQ(server->CommOldestPending("ep").value(), 7);
}

TEST(MetricsServer, InfoHasOneSeriesWithTheNewestLabels) {
  const auto server = NewServer();
  server->SetRank({.rank = 3, .local_rank = 1});
  server->SetRank({.rank = 2, .local_rank = 1});
  server->SetJob(
      {.run_id = "runs/a \"b\"\n", .model = "m", .precision = "bf16", .config_hash = "1", .layout = "dp2"});
  const std::string text = Scrape(*server);
  EXPECT_THAT(text, HasSubstr("rank=\"2\""));
  EXPECT_THAT(text, Not(HasSubstr("rank=\"3\"")));
  EXPECT_THAT(text, HasSubstr("run_id=\"runs/a \\\"b\\\"\\n\"} 1\n"));
}

TEST(MetricsServer, PortInUseIsAlreadyExistsAndNamesPortAndKey) {
  const auto first = NewServer();
  const auto second = MetricsServer::Create("127.0.0.1", first->port());
  ASSERT_TRUE(absl::IsAlreadyExists(second.status())) << second.status();
  const std::string message(second.status().message());
  EXPECT_THAT(message, HasSubstr("127.0.0.1:" + std::to_string(first->port())));
  EXPECT_THAT(message, HasSubstr("telemetry.metrics_port"));
}

TEST(MetricsServer, BadAddressIsInvalidArgumentAndNamesTheKey) {
  for (const char* address : {"not an address", "203.0.113.7"}) {
    const auto server = MetricsServer::Create(address, 0);
    ASSERT_TRUE(absl::IsInvalidArgument(server.status())) << server.status();
    EXPECT_THAT(std::string(server.status().message()), HasSubstr("telemetry.metrics_address"));
  }
}

TEST(MetricsServer, WithoutPortCountsAndListensNowhere) {
  const auto server = NewServer(MetricsServer::kNoPort);
  server->metrics().tokens.Add(5);
  EXPECT_EQ(server->port(), MetricsServer::kNoPort);
  EXPECT_EQ(server->url(), "");
  EXPECT_THAT(server->Text(), HasSubstr("shoal_train_tokens_total 5\n"));
}

TEST(MetricsServer, UrlIsTheOneToScrape) {
  const auto server = NewServer();
  EXPECT_EQ(server->url(), "http://127.0.0.1:" + std::to_string(server->port()) + "/metrics");
  const auto elsewhere = testing::HttpGet("127.0.0.1", server->port(), "/nothing");
  ASSERT_TRUE(elsewhere.ok()) << elsewhere.status();
  EXPECT_EQ(elsewhere->status, 404);
}

TEST(MetricsServer, ManyThreadsWriteWhileManyScrape) {
  const auto server = NewServer();
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 1000; ++n) {
        server->metrics().tokens.Add();
        server->metrics().step_duration.Observe(0.2);
        server->SetRank({.rank = n % 2});
      }
    });
    threads.emplace_back([&] {
      for (int n = 0; n < 10; ++n) Scrape(*server);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(Scrape(*server), HasSubstr("shoal_train_tokens_total 3000\n"));
}

TEST(Metrics, WithoutAServerDoesNothing) {
  const Metrics metrics;
  metrics.SetState(JobState::kTrain);
  metrics.AddPhase("data", 1);
  metrics.tokens.Add();
  metrics.step_duration.Observe(1);
  EXPECT_EQ(metrics.tokens.value(), 0);
}

TEST(MetricsServer, PromtoolHasNoComplaint) {
  if (!testing::PrometheusServer::Installed()) GTEST_SKIP() << "needs the Debian package prometheus";
  const auto server = NewServer();
  server->SetRank({});
  server->SetJob({.run_id = "a", .model = "m", .precision = "fp32", .config_hash = "1", .layout = "dp2"});
  server->Layers({0, 1});
  server->Comm("world", "all_reduce", "shm");
  const absl::Status status = testing::CheckMetricsText(Scrape(*server));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_FALSE(testing::CheckMetricsText("1 is no name\n").ok());
}

TEST(MetricsServer, IsScrapedByARealPrometheus) {
  if (!testing::PrometheusServer::Installed()) GTEST_SKIP() << "needs the Debian package prometheus";
  const auto server = NewServer();
  server->SetRank({.rank = 1});
  server->metrics().tokens.Add(12345);
  const auto prometheus = testing::PrometheusServer::Start({"127.0.0.1:" + std::to_string(server->port())});
  ASSERT_TRUE(prometheus.ok()) << prometheus.status();
  const auto tokens =
      (*prometheus)
          ->WaitFor("shoal_train_tokens_total * on(instance) group_left(rank) shoal_rank_info",
                    absl::Seconds(60));
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  ASSERT_EQ(tokens->size(), 1u);
  EXPECT_EQ(tokens->at(0).value, 12345);
  EXPECT_EQ(tokens->at(0).labels.at("rank"), "1");
  EXPECT_FALSE((*prometheus)->Query("this is not PromQL").ok());
}

TEST(ProcessUsage, IsThatOfThisProcess) {
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const ProcessUsage before = ReadProcessUsage();
  EXPECT_GT(before.resident_bytes, 1 << 20);
  EXPECT_GE(before.peak_resident_bytes, before.resident_bytes / 2);
  EXPECT_GT(before.virtual_bytes, before.resident_bytes);
  EXPECT_LE(before.start_time_seconds, now + 2);  // Boot time is in whole seconds.
  EXPECT_GT(before.start_time_seconds, now - 3600);
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_EQ(before.max_fds, static_cast<int64_t>(limit.rlim_cur));
  const int extra = dup(STDERR_FILENO);
  EXPECT_EQ(ReadProcessUsage().open_fds, before.open_fds + 1);
  close(extra);
  EXPECT_GE(ReadProcessUsage().cpu_seconds, before.cpu_seconds);
}

}  // namespace
}  // namespace shoal
