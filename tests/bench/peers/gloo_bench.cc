// Gloo in the comparison of `shoal bench collectives`.
//
//   gloo_bench RANKS OP ALGORITHM SECONDS BYTES...
//
// f32 sums, over TCP on loopback. Forks its ranks, which meet in a new folder under /tmp. Sampling and output
// are those of launch/bench/sampling.h. ALGORITHM: `default`, or one of the names in Prepare().
#include <gloo/allgather.h>
#include <gloo/allgather_ring.h>
#include <gloo/allreduce.h>
#include <gloo/allreduce_bcube.h>
#include <gloo/allreduce_halving_doubling.h>
#include <gloo/allreduce_ring.h>
#include <gloo/allreduce_ring_chunked.h>
#include <gloo/alltoall.h>
#include <gloo/barrier.h>
#include <gloo/broadcast.h>
#include <gloo/broadcast_one_to_all.h>
#include <gloo/gather.h>
#include <gloo/reduce.h>
#include <gloo/reduce_scatter.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/scatter.h>
#include <gloo/transport/tcp/device.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch/bench/sampling.h"

namespace {

using Context = std::shared_ptr<gloo::rendezvous::Context>;

struct Case {
  Context context;
  std::string op, algorithm;
  int rank = 0, size = 1;
  size_t part = 0, whole = 0;  // Elements: of a rank's part, and of all parts.
  float *in = nullptr, *out = nullptr;
  std::vector<std::function<void()>> runs;  // One for each root, or one.

  void Run(int call) { runs[call % runs.size()](); }
};

void Sum(void* c, const void* a, const void* b, size_t n) { gloo::sum<float>(c, a, b, n); }

template <class Algorithm, class... Args>
std::function<void()> Object(Args&&... args) {
  auto algorithm = std::make_shared<Algorithm>(std::forward<Args>(args)...);
  return [algorithm] { algorithm->run(); };
}

// In place, in `out`.
std::function<void()> PrepareAllReduce(const Case& c) {
  const std::vector<float*> data = {c.out};
  const int count = static_cast<int>(c.whole);
  if (c.algorithm == "c_ring") return Object<gloo::AllreduceRing<float>>(c.context, data, count);
  if (c.algorithm == "c_ring_chunked")
    return Object<gloo::AllreduceRingChunked<float>>(c.context, data, count);
  if (c.algorithm == "c_hd") return Object<gloo::AllreduceHalvingDoubling<float>>(c.context, data, count);
  if (c.algorithm == "c_bcube") return Object<gloo::AllreduceBcube<float>>(c.context, data, count);
  auto options = std::make_shared<gloo::AllreduceOptions>(c.context);
  options->setOutput(c.out, c.whole);
  options->setReduceFunction(Sum);
  options->setAlgorithm(c.algorithm == "bcube" ? gloo::AllreduceOptions::Algorithm::BCUBE
                                               : gloo::AllreduceOptions::Algorithm::RING);
  return [options] { gloo::allreduce(*options); };
}

std::function<void()> PreparePingPong(const Case& c) {
  if (c.rank > 1) return [] {};
  std::shared_ptr<gloo::transport::UnboundBuffer> in = c.context->createUnboundBuffer(c.in, c.whole * 4);
  std::shared_ptr<gloo::transport::UnboundBuffer> out = c.context->createUnboundBuffer(c.out, c.whole * 4);
  if (c.rank == 0)
    return [in, out] {
      in->send(1, 7);
      out->recv(1, 7);
      in->waitSend();
      out->waitRecv();
    };
  return [in, out] {
    out->recv(0, 7);
    out->waitRecv();
    out->send(0, 7);
    out->waitSend();
  };
}

// Options hold the buffers' registrations, so they are made once, as a careful user would.
std::function<void()> Prepare(const Case& c, int root) {
  if (c.op == "all_reduce") return PrepareAllReduce(c);
  if (c.op == "pingpong") return PreparePingPong(c);
  if (c.op == "reduce_scatter") {  // In place: the rank's part ends at the front of the buffer.
    return Object<gloo::ReduceScatterHalvingDoubling<float>>(
        c.context, std::vector<float*>{c.out}, int(c.whole), std::vector<int>(c.size, int(c.part)));
  }
  if (c.op == "all_gather") {
    if (c.algorithm == "c_ring")
      return Object<gloo::AllgatherRing<float>>(c.context, std::vector<const float*>{c.in}, c.out,
                                                int(c.part));
    auto options = std::make_shared<gloo::AllgatherOptions>(c.context);
    options->setInput(c.in, c.part);
    options->setOutput(c.out, c.whole);
    return [options] { gloo::allgather(*options); };
  }
  if (c.op == "all_to_all") {
    auto options = std::make_shared<gloo::AlltoallOptions>(c.context);
    options->setInput(c.in, c.whole);
    options->setOutput(c.out, c.whole);
    return [options] { gloo::alltoall(*options); };
  }
  if (c.op == "broadcast") {
    if (c.algorithm == "c_one_to_all")
      return Object<gloo::BroadcastOneToAll<float>>(c.context, std::vector<float*>{c.in}, c.whole, root);
    auto options = std::make_shared<gloo::BroadcastOptions>(c.context);
    options->setOutput(c.in, c.whole);
    options->setRoot(root);
    return [options] { gloo::broadcast(*options); };
  }
  if (c.op == "reduce") {
    auto options = std::make_shared<gloo::ReduceOptions>(c.context);
    options->setInput(c.in, c.whole);
    options->setOutput(c.out, c.whole);
    options->setRoot(root);
    options->setReduceFunction(Sum);
    return [options] { gloo::reduce(*options); };
  }
  if (c.op == "gather") {
    auto options = std::make_shared<gloo::GatherOptions>(c.context);
    options->setInput(c.in, c.part);
    if (c.rank == root) options->setOutput(c.out, c.whole);
    options->setRoot(root);
    return [options] { gloo::gather(*options); };
  }
  if (c.op == "scatter") {
    auto options = std::make_shared<gloo::ScatterOptions>(c.context);
    std::vector<float*> parts;
    for (int r = 0; r < c.size; ++r) parts.push_back(c.in + r * c.part);
    if (c.rank == root) options->setInputs(parts, c.part);
    options->setOutput(c.out, c.part);
    options->setRoot(root);
    return [options] { gloo::scatter(*options); };
  }
  if (c.op == "barrier") {
    auto options = std::make_shared<gloo::BarrierOptions>(c.context);
    return [options] { gloo::barrier(*options); };
  }
  throw std::invalid_argument("no operation " + c.op);
}

double Expected(const Case& c, size_t i) {
  const double sum = c.size * (c.size + 1) / 2;
  const int64_t offset = c.rank * c.part;
  if (c.op == "all_reduce" || c.op == "reduce") return sum * BenchInput(0, i);
  if (c.op == "reduce_scatter") return sum * BenchInput(0, offset + i);
  if (c.op == "all_gather" || c.op == "gather") return BenchInput(i / c.part, i % c.part);
  if (c.op == "all_to_all") return BenchInput(i / c.part, offset + i % c.part);
  if (c.op == "scatter") return BenchInput(0, offset + i);
  return BenchInput(0, i);
}

void Barrier(Case& c) {
  gloo::BarrierOptions options(c.context);
  options.setTag(1001);
  gloo::barrier(options);
}

int64_t CountWrong(Case& c) {
  const bool gives_part = c.op == "all_gather" || c.op == "gather";
  std::fill_n(c.out, c.whole, -1.0f);
  for (size_t i = 0; i < (gives_part ? c.part : c.whole); ++i)
    c.in[i] = static_cast<float>(BenchInput(c.rank, i));
  if (c.op == "all_reduce" || c.op == "reduce_scatter") std::copy_n(c.in, c.whole, c.out);
  Barrier(c);  // Some algorithms write into a peer's buffer whenever they are ready.
  c.Run(0);
  const bool rooted = c.op == "reduce" || c.op == "gather";
  size_t checked = c.op == "reduce_scatter" || c.op == "scatter" ? c.part : c.whole;
  if ((rooted && c.rank != 0) || c.op == "barrier" || (c.op == "pingpong" && c.rank > 1)) checked = 0;
  const float* result = c.op == "broadcast" ? c.in : c.out;
  int64_t wrong = 0;
  for (size_t i = 0; i < checked; ++i) wrong += result[i] != static_cast<float>(Expected(c, i));
  return wrong;
}

int Agree(Case& c, int value) {
  gloo::BroadcastOptions options(c.context);
  options.setOutput(&value, 1);
  options.setRoot(0);
  options.setTag(1002);
  gloo::broadcast(options);
  return value;
}

template <class T>
void Gather(Case& c, T* mine, size_t count, std::vector<T>* all) {
  all->resize(count * c.size);
  gloo::AllgatherOptions options(c.context);
  options.setInput(mine, count);
  options.setOutput(all->data(), all->size());
  options.setTag(1003);
  gloo::allgather(options);
}

void Measure(Case& c, long bytes, double seconds) {
  c.part = std::max<size_t>(bytes / sizeof(float) / c.size, 1);
  c.whole = c.part * c.size;
  if (c.rank == 0) printf("begin %ld\n", bytes);
  fflush(stdout);
  c.runs.clear();
  const bool rooted = c.op == "broadcast" || c.op == "reduce" || c.op == "gather" || c.op == "scatter";
  for (int root = 0; root < (rooted ? c.size : 1); ++root) c.runs.push_back(Prepare(c, root));
  int64_t wrong = CountWrong(c);
  std::vector<int64_t> all_wrong;
  Gather(c, &wrong, 1, &all_wrong);
  // So that thousands of sums in place stay finite.
  std::fill_n(c.in, c.whole, 0.0f);
  std::fill_n(c.out, c.whole, 0.0f);
  const BenchOperation operation = {&c, [](void* p, int call) { static_cast<Case*>(p)->Run(call); },
                                    [](void* p) { Barrier(*static_cast<Case*>(p)); },
                                    [](void* p, int value) { return Agree(*static_cast<Case*>(p), value); }};
  double samples[kBenchMaxSamples];
  const int count = BenchSample(&operation, seconds, samples);
  std::vector<double> all_samples;
  Gather(c, samples, count, &all_samples);
  if (c.rank != 0) return;
  wrong = 0;
  for (int64_t rank_wrong : all_wrong) wrong += rank_wrong;
  printf("result %ld %lld", bytes, static_cast<long long>(wrong));
  for (int i = 0; i < count; ++i) {
    double slowest = 0;
    for (int r = 0; r < c.size; ++r) slowest = std::max(slowest, all_samples[r * count + i]);
    printf(" %.4f", c.op == "pingpong" ? slowest / 2 : slowest);
  }
  printf("\n");
  fflush(stdout);
}

int RunRank(int rank, char** argv, int sizes, const std::string& folder) {
  try {
    Case c;
    c.rank = rank;
    c.size = atoi(argv[1]);
    c.op = argv[2];
    c.algorithm = argv[3];
    gloo::transport::tcp::attr address("127.0.0.1");
    std::shared_ptr<gloo::transport::Device> device = gloo::transport::tcp::CreateDevice(address);
    gloo::rendezvous::FileStore store(folder);
    c.context = std::make_shared<gloo::rendezvous::Context>(rank, c.size);
    c.context->connectFullMesh(store, device);
    Barrier(c);
    if (rank == 0) std::filesystem::remove_all(folder);  // Whatever happens from here on, nothing is left.
    long most = 0;
    for (int i = 0; i < sizes; ++i) most = std::max(most, atol(argv[5 + i]));
    std::vector<float> in(most / sizeof(float) + c.size), out(in.size());
    c.in = in.data();
    c.out = out.data();
    for (int i = 0; i < sizes; ++i) Measure(c, atol(argv[5 + i]), atof(argv[4]));
    Barrier(c);
    fflush(stdout);
    _exit(0);  // Without Gloo's tear-down, which another rank's end can make throw.
  } catch (const std::exception& error) {
    fprintf(stderr, "gloo_bench rank %d: %s\n", rank, error.what());
    _exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    fprintf(stderr, "usage: gloo_bench RANKS OP ALGORITHM SECONDS BYTES...\n");
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  char folder[] = "/tmp/gloo_bench.XXXXXX";
  if (mkdtemp(folder) == nullptr) {
    perror("gloo_bench: mkdtemp");
    return 1;
  }
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < atoi(argv[1]); ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      return RunRank(rank, argv, argc - 5, folder);
    }
    ranks.push_back(pid);
  }
  bool failed = false;
  for (size_t ended = 0; ended < ranks.size(); ++ended) {
    int status = 0;
    if (waitpid(-1, &status, 0) < 0 || status == 0) continue;
    failed = true;  // The others would wait for it.
    for (pid_t pid : ranks) kill(pid, SIGKILL);
  }
  std::filesystem::remove_all(folder);
  return failed ? 1 : 0;
}
