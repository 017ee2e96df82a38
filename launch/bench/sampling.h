// How every program of the comparison fills, checks and times an operation: one file for Shoal's own ranks
// and for the peers' programs (tests/bench/peers), so that all are measured alike. C11 and C++.
//
// A sample: all ranks meet in a barrier, then run the operation `inner` times back to back; its time is that
// of the slowest rank, divided by `inner`, which is chosen so that a sample takes at least 50 us (a clock
// read costs 20 to 40 ns). Samples are taken in blocks; rank 0 decides after each whether there is time for
// another. In operations with a root, the k-th call of a sample has root k modulo the ranks: were it always
// the same, a rank that only sends would run ahead, and a message's rate would pass for its latency.
//
// A program prints, on rank 0's standard output,
//   begin BYTES                                  before a size
//   result BYTES WRONG SAMPLE_US SAMPLE_US ...   after it; WRONG: elements, on all ranks, unlike expected
#pragma once

#include <stdint.h>
#include <time.h>

enum { kBenchMaxSamples = 400, kBenchBlock = 4, kBenchMaxInner = 256 };

static inline double BenchNowUs(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

struct BenchOperation {
  void* context;
  void (*run)(void* context, int call);  // `call`: its number in the sample.
  void (*barrier)(void* context);
  int (*agree)(void* context, int value);  // What rank 0 says, on all ranks.
};

static inline double BenchTime(const struct BenchOperation* operation, int inner) {
  operation->barrier(operation->context);
  const double begin = BenchNowUs();
  for (int i = 0; i < inner; ++i) operation->run(operation->context, i);
  return (BenchNowUs() - begin) / inner;
}

// Runs on all ranks alike for about `seconds`, at least one block; `samples_us` has room for
// kBenchMaxSamples. Returns their number, equal on all ranks; each rank has its own times.
static inline int BenchSample(const struct BenchOperation* operation, double seconds, double* samples_us) {
  BenchTime(operation, 2);
  double one = BenchTime(operation, 1);
  if (operation->agree(operation->context, one < 200)) one = BenchTime(operation, 16);
  int inner = one >= 50 ? 1 : (int)(50 / (one + 0.01)) + 1;
  if (inner > kBenchMaxInner) inner = kBenchMaxInner;
  inner = operation->agree(operation->context, inner);
  const double end = BenchNowUs() + seconds * 1e6;
  int count = 0;
  do {
    for (int i = 0; i < kBenchBlock; ++i) samples_us[count++] = BenchTime(operation, inner);
  } while (operation->agree(operation->context, count < kBenchMaxSamples && BenchNowUs() < end));
  return count;
}

// Element `i` of what rank `rank` puts in: small whole numbers, so that sums are exact in every type and
// order.
static inline double BenchInput(int rank, int64_t i) { return (double)(rank + 1) * (double)(1 + i % 7); }
