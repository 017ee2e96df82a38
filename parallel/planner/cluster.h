// A cluster that is only described, from its YAML file.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "parallel/placement/topology.h"

namespace shoal {

constexpr int kRanksMax = 16384;

// SI units; a link's rate is in bytes per nanosecond and direction.
struct Cluster {
  int hosts = 1, devices_per_host = 1;
  double bf16_flops_per_ns = 0, fp32_flops_per_ns = 0;  // That large matrix products reach.
  double bf16_peak_flops_per_ns = 0, fp32_peak_flops_per_ns = 0;
  double memory_bytes_per_ns = 0;
  int64_t memory_bytes = 0;
  double task_ns = 0;
  double intra_latency_ns = 0, intra_bytes_per_ns = 0;  // Of one device.
  double inter_latency_ns = 0, inter_bytes_per_ns = 0;  // Of one host.
  double intra_message_ns = 0, inter_message_ns = 0;        // Of each further peer in an exchange of rows.
  double intra_compute_share = 0, inter_compute_share = 0;  // Of a device, while the link is busy.
  double interference = 1;

  int ranks() const { return hosts * devices_per_host; }
  Topology topology() const;
};

// Reads cluster.proto's keys, strictly (runtime/config/loader.h). NOT_FOUND, or INVALID_ARGUMENT with file, line and key of every
// mistake.
absl::StatusOr<Cluster> LoadCluster(const std::string& path);

}  // namespace shoal
