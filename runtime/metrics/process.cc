#include "runtime/metrics/process.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"
#include "runtime/device/memory.h"

namespace shoal {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

double BootTimeSeconds() {
  std::ifstream stat("/proc/stat");
  std::string line;
  while (std::getline(stat, line)) {
    if (line.rfind("btime ", 0) == 0) return std::stod(line.substr(6));
  }
  return 0;
}

MetricFamily Family(const char* name, const char* help, MetricType type, double value) {
  MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  ClientMetric metric;
  if (type == MetricType::Counter) metric.counter.value = value;
  if (type == MetricType::Gauge) metric.gauge.value = value;
  family.metric.push_back(metric);
  return family;
}

MetricFamily DeviceMemory() {
  const HostMemoryStats stats = HostMemory::Get().stats();
  const double total =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  MetricFamily family;
  family.name = "shoal_device_memory_bytes";
  family.help = "Tensor memory by kind; total is all memory of the device (of the host in CPU builds).";
  family.type = MetricType::Gauge;
  const std::pair<const char*, double> kinds[] = {{"allocated", static_cast<double>(stats.in_use_bytes)},
                                                  {"reserved", static_cast<double>(stats.reserved_bytes)},
                                                  {"peak", static_cast<double>(stats.peak_bytes)},
                                                  {"total", total}};
  for (const auto& [kind, bytes] : kinds) {
    ClientMetric metric;
    metric.label = {{"kind", kind}};
    metric.gauge.value = bytes;
    family.metric.push_back(metric);
  }
  return family;
}

class ProcessCollector : public prometheus::Collectable {
 public:
  std::vector<MetricFamily> Collect() const override {
    const ProcessUsage usage = ReadProcessUsage();
    const auto gauge = [](const char* name, const char* help, double value) {
      return Family(name, help, MetricType::Gauge, value);
    };
    return {
        Family("process_cpu_seconds_total", "User and system CPU time spent in seconds.", MetricType::Counter,
               usage.cpu_seconds),
        gauge("process_start_time_seconds", "Start time of the process since the Unix epoch in seconds.",
              usage.start_time_seconds),
        gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", usage.virtual_bytes),
        gauge("process_resident_memory_bytes", "Resident memory size in bytes.", usage.resident_bytes),
        gauge("process_open_fds", "Number of open file descriptors.", usage.open_fds),
        gauge("process_max_fds", "Maximum number of open file descriptors.", usage.max_fds),
        DeviceMemory(),
    };
  }
};

}  // namespace

ProcessUsage ReadProcessUsage() {
  ProcessUsage usage;
  rusage spent{};
  getrusage(RUSAGE_SELF, &spent);
  usage.cpu_seconds = static_cast<double>(spent.ru_utime.tv_sec + spent.ru_stime.tv_sec) +
                      static_cast<double>(spent.ru_utime.tv_usec + spent.ru_stime.tv_usec) * 1e-6;
  usage.peak_resident_bytes = int64_t{spent.ru_maxrss} * 1024;

  // Field 22 is the start in clock ticks after boot; the name in field 2 may hold spaces and ends with the
  // last ')'.
  const std::string stat = FirstLine("/proc/self/stat");
  std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
  std::string field;
  for (int i = 3; i <= 22; ++i) fields >> field;
  const double ticks = fields ? std::stod(field) : 0;
  usage.start_time_seconds = BootTimeSeconds() + ticks / static_cast<double>(sysconf(_SC_CLK_TCK));

  std::istringstream pages(FirstLine("/proc/self/statm"));
  int64_t virtual_pages = 0, resident_pages = 0;
  pages >> virtual_pages >> resident_pages;
  usage.virtual_bytes = virtual_pages * sysconf(_SC_PAGESIZE);
  usage.resident_bytes = resident_pages * sysconf(_SC_PAGESIZE);

  std::error_code ignored;  // Without /proc the count stays 0.
  const std::filesystem::directory_iterator open("/proc/self/fd", ignored);
  usage.open_fds = ignored ? 0 : std::distance(begin(open), end(open)) - 1;  // Not the one that lists them.
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) usage.max_fds = static_cast<int64_t>(limit.rlim_cur);
  return usage;
}

std::shared_ptr<prometheus::Collectable> NewProcessCollector() {
  return std::make_shared<ProcessCollector>();
}

}  // namespace shoal
