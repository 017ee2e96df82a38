// Splits a loop over the process's OpenMP team. Results of kernels must not depend on the number of threads,
// so bodies either write disjoint outputs or fill one partial sum per fixed block, which the caller adds in
// block order.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "runtime/device/cpu.h"

namespace shoal::kernels {

// A thread of its own must save more than the fork and join of a team costs (about 5 us): this many elements
// of a memory-bound loop take longer.
constexpr int64_t kElementsPerThreadMin = 16384;

// How many rows of `width` elements a thread must have to be worth its start.
inline int64_t GrainOfRows(int64_t width) {
  return std::max<int64_t>(1, kElementsPerThreadMin / std::max<int64_t>(1, width));
}

// Calls body(begin, end) on ranges that partition [0, count), one range per thread, at least `grain` long
// each (but for the last); body is called for no empty range. Blocks until all have returned.
template <class Body>
void ParallelFor(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  const int64_t workers = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, Threads());
  if (workers == 1) {
    body(int64_t{0}, count);
    return;
  }
  const auto work = [&](int64_t worker) {
    const int64_t begin = count * worker / workers, end = count * (worker + 1) / workers;
    if (begin < end) body(begin, end);
  };
#if defined(__SANITIZE_THREAD__)
  // libgomp is not instrumented: ThreadSanitizer would not see its barriers and report every kernel.
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < workers; ++worker)
    threads.emplace_back([&work, worker] { work(worker); });
  work(0);
  for (std::thread& thread : threads) thread.join();
#else
#pragma omp parallel for schedule(static, 1) num_threads(static_cast <int>(workers))
  for (int64_t worker = 0; worker < workers; ++worker) work(worker);
#endif
}

}  // namespace shoal::kernels
