#include "runtime/device/cpu.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "runtime/base/log.h"

namespace shoal {
namespace {

Isa DetectIsa() {
  Isa best = Isa::kPlain;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
  const char* limit = std::getenv("SHOAL_ISA");
  if (limit == nullptr) return best;
  const std::string_view wanted = limit;
  for (Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (wanted == Name(isa)) return std::min(best, isa);
  }
  SHOAL_LOG(kWarning) << "SHOAL_ISA=" << wanted << " is none of plain, avx2, avx512: ignored";
  return best;
}

// Cores' worth of time per wall time that a control group grants, rounded up; 0: no limit is set.
int QuotaCores() {
  long long quota = -1;
  long long period = 0;
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  if (!(v2 >> quota >> period)) {
    quota = -1;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

}  // namespace

std::string_view Name(Isa isa) {
  switch (isa) {
    case Isa::kPlain: return "plain";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "unknown";
}

Isa ActiveIsa() {
  static const Isa isa = DetectIsa();
  return isa;
}

bool HasBf16Dot() {
  static const bool has = ActiveIsa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return has;
}

void SetThreads(int threads) { omp_set_num_threads(std::max(threads, 1)); }
int Threads() { return omp_get_max_threads(); }

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  if (const int quota = QuotaCores(); quota > 0) cores = std::min(cores, quota);
  return std::max(1, cores);
}

}  // namespace shoal
