// A real Prometheus server (Debian package prometheus) as a child of a test, with its own data folder and
// port, and promtool.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tests/harness/subprocess.h"
#include "tests/harness/temp_dir.h"

namespace shoal::testing {

struct Sample {
  std::map<std::string, std::string> labels;
  double value = 0;
};

class PrometheusServer {
 public:
  // The package is there. Without it a test says so and skips.
  static bool Installed();
  // Scrapes `targets` ("127.0.0.1:9400") every 200 ms. Blocks until the server is ready or failed.
  static absl::StatusOr<std::unique_ptr<PrometheusServer>> Start(const std::vector<std::string>& targets);

  // Evaluates a PromQL expression now. INVALID_ARGUMENT: the server refuses it.
  absl::StatusOr<std::vector<Sample>> Query(std::string_view promql) const;
  // Asks until the answer is not empty. DEADLINE_EXCEEDED: it stayed empty; UNAVAILABLE: the server died.
  absl::StatusOr<std::vector<Sample>> WaitFor(std::string_view promql, absl::Duration timeout);
  int port() const { return port_; }

 private:
  PrometheusServer(std::unique_ptr<TempDir> folder, std::unique_ptr<Subprocess> process, int port);
  std::unique_ptr<TempDir> folder_;
  std::unique_ptr<Subprocess> process_;
  int port_;
};

// What `promtool check metrics` says to `text`: OK, or INVALID_ARGUMENT with its complaints (also mere
// style). The package must be there.
absl::Status CheckMetricsText(std::string_view text);

}  // namespace shoal::testing
