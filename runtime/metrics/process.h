// The process_* series (as every official Prometheus client library has them) and shoal_device_memory_bytes,
// read from the system when a scrape asks.
#pragma once

#include <cstdint>
#include <memory>

namespace prometheus {
class Collectable;
}

namespace shoal {

struct ProcessUsage {
  double cpu_seconds = 0;
  double start_time_seconds = 0;  // Unix time.
  int64_t virtual_bytes = 0, resident_bytes = 0, peak_resident_bytes = 0;
  int64_t open_fds = 0, max_fds = 0;
};

// Of this process, from /proc/self. Zeros for what cannot be read.
ProcessUsage ReadProcessUsage();

std::shared_ptr<prometheus::Collectable> NewProcessCollector();

}  // namespace shoal
