// Independent pieces of work of uneven size, taken one by one by the threads of the process's OpenMP team.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "runtime/device/cpu.h"

namespace shoal::kernels::cpu {

// Calls task(i) for each i of [0, count), in that order of starting, each once; blocks until all have
// returned. Products inside a task run on its thread alone.
template <class Task>
void RunTasks(int64_t count, const Task& task) {
  const int workers = static_cast<int>(std::min<int64_t>(count, Threads()));
  std::atomic<int64_t> next = 0;
  const auto work = [&] {
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);  // Of this thread: oneDNN asks for it when it fixes a product's partition.
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
    omp_set_num_threads(threads);
  };
  if (workers <= 1) return work();
#if defined(__SANITIZE_THREAD__)
  // libgomp is not instrumented: ThreadSanitizer would not see its barriers and report every kernel.
  std::vector<std::thread> threads;
  for (int worker = 1; worker < workers; ++worker) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
#else
#pragma omp parallel num_threads(workers)
  work();
#endif
}

}  // namespace shoal::kernels::cpu
