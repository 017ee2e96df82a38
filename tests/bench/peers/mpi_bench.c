/* One MPI library in the comparison of `shoal bench collectives`; built once with each library's compiler
 * wrapper.
 *
 *   mpirun ... mpi_bench OP default|warm SECONDS IN_PLACE BYTES...
 *
 * f32 sums. Sampling and output are those of launch/bench/sampling.h. `warm` puts the buffers on 2 MiB pages
 * (the caller sets the allocator's variables); otherwise they come as malloc gives them. IN_PLACE (0 or 1)
 * concerns all_reduce. */
#define _GNU_SOURCE
#define OMPI_SKIP_MPICXX
#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "launch/bench/sampling.h"

enum Op {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kAllToAll,
  kBroadcast,
  kReduce,
  kGather,
  kScatter,
  kBarrier,
  kPingPong,
  kOps
};
static const char* const kNames[kOps] = {"all_reduce", "reduce_scatter", "all_gather", "all_to_all",
                                         "broadcast",  "reduce",         "gather",     "scatter",
                                         "barrier",    "pingpong"};

struct Case {
  enum Op op;
  int rank, size, in_place;
  int part, whole; /* Elements: of a rank's part, and of all parts. */
  float *in, *out;
};

static void Run(void* context, int call) {
  const struct Case* c = context;
  const int root = call % c->size;
  const MPI_Comm all = MPI_COMM_WORLD;
  switch (c->op) {
    case kAllReduce:
      MPI_Allreduce(c->in_place ? MPI_IN_PLACE : c->in, c->out, c->whole, MPI_FLOAT, MPI_SUM, all);
      break;
    case kReduceScatter:
      MPI_Reduce_scatter_block(c->in, c->out, c->part, MPI_FLOAT, MPI_SUM, all);
      break;
    case kAllGather:
      MPI_Allgather(c->in, c->part, MPI_FLOAT, c->out, c->part, MPI_FLOAT, all);
      break;
    case kAllToAll:
      MPI_Alltoall(c->in, c->part, MPI_FLOAT, c->out, c->part, MPI_FLOAT, all);
      break;
    case kBroadcast:
      MPI_Bcast(c->in, c->whole, MPI_FLOAT, root, all);
      break;
    case kReduce:
      MPI_Reduce(c->in, c->out, c->whole, MPI_FLOAT, MPI_SUM, root, all);
      break;
    case kGather:
      MPI_Gather(c->in, c->part, MPI_FLOAT, c->out, c->part, MPI_FLOAT, root, all);
      break;
    case kScatter:
      MPI_Scatter(c->in, c->part, MPI_FLOAT, c->out, c->part, MPI_FLOAT, root, all);
      break;
    case kBarrier:
      MPI_Barrier(all);
      break;
    case kPingPong:
      if (c->rank == 0) MPI_Send(c->in, c->whole, MPI_FLOAT, 1, 7, all);
      if (c->rank == 0) MPI_Recv(c->out, c->whole, MPI_FLOAT, 1, 7, all, MPI_STATUS_IGNORE);
      if (c->rank == 1) MPI_Recv(c->out, c->whole, MPI_FLOAT, 0, 7, all, MPI_STATUS_IGNORE);
      if (c->rank == 1) MPI_Send(c->out, c->whole, MPI_FLOAT, 0, 7, all);
      break;
    case kOps:
      break;
  }
}

static void Barrier(void* context) {
  (void)context;
  MPI_Barrier(MPI_COMM_WORLD);
}

static int Agree(void* context, int value) {
  (void)context;
  MPI_Bcast(&value, 1, MPI_INT, 0, MPI_COMM_WORLD);
  return value;
}

static void Fill(const struct Case* c) {
  const int gives_part = c->op == kAllGather || c->op == kGather;
  for (int i = 0; i < c->whole; ++i) c->out[i] = -1;
  for (int i = 0; i < (gives_part ? c->part : c->whole); ++i) c->in[i] = (float)BenchInput(c->rank, i);
  if (c->op == kAllReduce && c->in_place) memcpy(c->out, c->in, sizeof(float) * (size_t)c->whole);
}

static double Expected(const struct Case* c, int i) {
  const double sum = c->size * (c->size + 1) / 2;
  switch (c->op) {
    case kAllReduce:
    case kReduce:
      return sum * BenchInput(0, i);
    case kReduceScatter:
      return sum * BenchInput(0, (int64_t)c->rank * c->part + i);
    case kAllGather:
    case kGather:
      return BenchInput(i / c->part, i % c->part);
    case kAllToAll:
      return BenchInput(i / c->part, (int64_t)c->rank * c->part + i % c->part);
    case kScatter:
      return BenchInput(0, (int64_t)c->rank * c->part + i);
    default:
      return BenchInput(0, i);
  }
}

/* Wrong elements on all ranks. */
static long Verify(struct Case* c) {
  Fill(c);
  Run(c, 0);
  const int rooted = c->op == kReduce || c->op == kGather;
  int checked = c->op == kReduceScatter || c->op == kScatter ? c->part : c->whole;
  if ((rooted && c->rank != 0) || c->op == kBarrier || (c->op == kPingPong && c->rank > 1)) checked = 0;
  const float* out = c->op == kBroadcast ? c->in : c->out;
  long wrong = 0, total = 0;
  for (int i = 0; i < checked; ++i) wrong += out[i] != (float)Expected(c, i);
  MPI_Allreduce(&wrong, &total, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
  /* So that thousands of sums in place stay finite. */
  memset(c->in, 0, sizeof(float) * (size_t)c->whole);
  memset(c->out, 0, sizeof(float) * (size_t)c->whole);
  return total;
}

static float* Buffer(size_t bytes, int large_pages) {
  void* memory = NULL;
  const size_t page = 2 << 20, rounded = (bytes + page - 1) / page * page;
  if (!large_pages) return malloc(bytes);
  if (posix_memalign(&memory, page, rounded) != 0) return NULL;
  madvise(memory, rounded, MADV_HUGEPAGE);
  return memory;
}

int main(int argc, char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL); /* Nothing is left when the launcher is killed. */
  MPI_Init(&argc, &argv);
  struct Case c = {.op = kOps};
  MPI_Comm_rank(MPI_COMM_WORLD, &c.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &c.size);
  for (int op = 0; argc > 5 && op < kOps; ++op)
    if (strcmp(argv[1], kNames[op]) == 0) c.op = (enum Op)op;
  if (c.op == kOps) {
    fprintf(stderr, "usage: mpi_bench OP default|warm SECONDS IN_PLACE BYTES...\n");
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  const int warm = strcmp(argv[2], "warm") == 0;
  const double seconds = atof(argv[3]);
  c.in_place = atoi(argv[4]);
  size_t most = 0;
  for (int i = 5; i < argc; ++i)
    if ((size_t)atoll(argv[i]) > most) most = (size_t)atoll(argv[i]);
  most += sizeof(float) * (size_t)c.size;
  c.in = Buffer(most, warm);
  c.out = Buffer(most, warm);
  if (c.in == NULL || c.out == NULL) MPI_Abort(MPI_COMM_WORLD, 3);
  for (int i = 5; i < argc; ++i) {
    const long bytes = atol(argv[i]);
    const long part = bytes / (long)sizeof(float) / c.size;
    c.part = part > 0 ? (int)part : 1;
    c.whole = c.part * c.size;
    if (c.rank == 0) printf("begin %ld\n", bytes);
    if (c.rank == 0) fflush(stdout);
    const long wrong = Verify(&c);
    const struct BenchOperation operation = {&c, Run, Barrier, Agree};
    double samples[kBenchMaxSamples], slowest[kBenchMaxSamples];
    const int count = BenchSample(&operation, seconds, samples);
    MPI_Reduce(samples, slowest, count, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (c.rank != 0) continue;
    printf("result %ld %ld", bytes, wrong);
    for (int s = 0; s < count; ++s) printf(" %.4f", c.op == kPingPong ? slowest[s] / 2 : slowest[s]);
    printf("\n");
    fflush(stdout);
  }
  MPI_Finalize();
  return 0;
}
