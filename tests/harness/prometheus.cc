#include "tests/harness/prometheus.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"
#include "tests/harness/http.h"

namespace shoal::testing {
namespace {

// Free now; somebody may take it before Prometheus does, so callers try again.
int ProbablyFreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  SHOAL_CHECK_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  socklen_t size = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  close(fd);
  return ntohs(address.sin_port);
}

}  // namespace

bool PrometheusServer::Installed() {
  return !FindCommand("prometheus").empty() && !FindCommand("promtool").empty();
}

absl::StatusOr<std::unique_ptr<PrometheusServer>> PrometheusServer::Start(
    const std::vector<std::string>& targets) {
  auto folder = std::make_unique<TempDir>();
  WriteFile(*folder / "prometheus.yml",
            absl::StrCat("global: {scrape_interval: 200ms, scrape_timeout: 200ms}\nscrape_configs:\n",
                         "- job_name: shoal\n  static_configs:\n  - targets: ['",
                         absl::StrJoin(targets, "', '"), "']\n"));
  constexpr int kAttempts = 5;
  absl::Status last;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const int port = ProbablyFreePort();
    SubprocessOptions options;
    options.args = {"prometheus", "--config.file=" + *folder / "prometheus.yml",
                    "--storage.tsdb.path=" + *folder / "data",
                    absl::StrCat("--web.listen-address=127.0.0.1:", port)};
    options.env["GOMAXPROCS"] = "1";
    SHOAL_ASSIGN_OR_RETURN(std::unique_ptr<Subprocess> process, Subprocess::Start(options));
    last = process->WaitForOutput("Server is ready to receive web requests", absl::Seconds(60));
    if (last.ok()) {
      return std::unique_ptr<PrometheusServer>(
          new PrometheusServer(std::move(folder), std::move(process), port));
    }
    if (!absl::StrContains(process->err(), "address already in use")) break;
  }
  return last;
}

PrometheusServer::PrometheusServer(std::unique_ptr<TempDir> folder, std::unique_ptr<Subprocess> process,
                                   int port)
    : folder_(std::move(folder)), process_(std::move(process)), port_(port) {}

absl::StatusOr<std::vector<Sample>> PrometheusServer::Query(std::string_view promql) const {
  const std::string target = "/api/v1/query?query=" + UrlEncode(promql);
  SHOAL_ASSIGN_OR_RETURN(const HttpResponse response, HttpGet("127.0.0.1", port_, target));
  const nlohmann::json answer = nlohmann::json::parse(response.body, nullptr, /*allow_exceptions=*/false);
  if (answer.is_discarded() || answer.value("status", "") != "success") {
    return absl::InvalidArgumentError(absl::StrCat(AbslSv(promql), ": ", response.body));
  }
  std::vector<Sample> samples;
  for (const nlohmann::json& result : answer["data"]["result"]) {
    Sample sample;
    sample.labels = result["metric"].get<std::map<std::string, std::string>>();
    sample.value = std::strtod(result["value"][1].get<std::string>().c_str(), nullptr);
    samples.push_back(std::move(sample));
  }
  return samples;
}

absl::StatusOr<std::vector<Sample>> PrometheusServer::WaitFor(std::string_view promql,
                                                              absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (true) {
    SHOAL_ASSIGN_OR_RETURN(std::vector<Sample> samples, Query(promql));
    if (!samples.empty()) return samples;
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("no sample of ", AbslSv(promql), " within ", absl::FormatDuration(timeout)));
    }
    // The pause between two questions, which also notices a server that died.
    const absl::StatusOr<ProcessResult> ended = process_->Wait(absl::Milliseconds(100));
    if (ended.ok()) return absl::UnavailableError("prometheus ended: " + ended->ToString());
  }
}

absl::Status CheckMetricsText(std::string_view text) {
  const TempDir folder;
  WriteFile(folder / "metrics.txt", text);
  SubprocessOptions options;
  options.args = {"sh", "-c", "promtool check metrics < metrics.txt"};
  options.cwd = folder.path();
  SHOAL_ASSIGN_OR_RETURN(const ProcessResult result, RunProcess(options, absl::Seconds(60)));
  if (result.ok() && result.out.empty() && result.err.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError("promtool check metrics: " + result.ToString());
}

}  // namespace shoal::testing
