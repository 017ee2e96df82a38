#include "parallel/planner/cluster.h"

#include <cerrno>
#include <fstream>
#include <sstream>

#include "parallel/planner/cluster.pb.h"
#include "runtime/base/status.h"
#include "runtime/config/loader.h"

namespace shoal {
namespace {

constexpr double kTera = 1e12, kGiga = 1e9, kPerNs = 1e-9, kNsPerUs = 1e3, kBits = 8;

double BytesPerNs(const ClusterLink& link) { return link.bandwidth_gbit_per_s() * kGiga / kBits * kPerNs; }

}  // namespace

Topology Cluster::topology() const {
  Topology topology;
  for (int rank = 0; rank < ranks(); ++rank) topology.host_of_rank.push_back(rank / devices_per_host);
  return topology;
}

absl::StatusOr<Cluster> LoadCluster(const std::string& path) {
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  if (in) text << in.rdbuf();
  if (!in) return ErrnoStatus(errno != 0 ? errno : EIO, path);
  ClusterFile file;
  SHOAL_RETURN_IF_ERROR(LoadYaml(text.str(), path, &file, nullptr));
  SHOAL_RETURN_IF_ERROR(CheckRequired(file, path));
  const ClusterDevice& device = file.device();
  Cluster cluster;
  cluster.hosts = file.hosts();
  cluster.devices_per_host = file.devices_per_host();
  cluster.bf16_peak_flops_per_ns = device.bf16_tflops() * kTera * kPerNs;
  cluster.fp32_peak_flops_per_ns = device.fp32_tflops() * kTera * kPerNs;
  cluster.bf16_flops_per_ns = cluster.bf16_peak_flops_per_ns * device.efficiency();
  cluster.fp32_flops_per_ns = cluster.fp32_peak_flops_per_ns * device.efficiency();
  cluster.memory_bytes_per_ns = device.memory_gbyte_per_s() * kGiga * kPerNs;
  cluster.memory_bytes = static_cast<int64_t>(device.memory_gib() * (int64_t{1} << 30));
  cluster.task_ns = device.task_us() * kNsPerUs;
  cluster.intra_latency_ns = file.intra().latency_us() * kNsPerUs;
  cluster.intra_bytes_per_ns = BytesPerNs(file.intra());
  cluster.inter_latency_ns = file.inter().latency_us() * kNsPerUs;
  cluster.inter_bytes_per_ns = BytesPerNs(file.inter());
  cluster.intra_message_ns = file.intra().message_us() * kNsPerUs;
  cluster.inter_message_ns = file.inter().message_us() * kNsPerUs;
  cluster.intra_compute_share = file.intra().compute_share();
  cluster.inter_compute_share = file.inter().compute_share();
  cluster.interference = file.interference();
  if (cluster.ranks() > kRanksMax) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": hosts * devices_per_host is ", cluster.ranks(), "; at most ",
                                                   kRanksMax, " ranks can be simulated"));
  }
  return cluster;
}

}  // namespace shoal
