// What the machine allows for a collective, measured as sampling.h says: the bound that `shoal bench
// collectives --limits` compares with. Usage: bench_limits [--huge-pages] shm|tcp OP RANKS SECONDS BYTES...
//
//   shm   Ranks are processes, all memory is mapped by all. The fastest of: each byte is read once and
//   written once by the
//         fused passes that the result takes, shared out evenly, and one barrier; and, for small sizes, each
//         rank publishes its input behind a flag in the same cache line and computes its own result. Nothing
//         is ever copied twice, and no rank waits to begin.
//   tcp   As many bytes as the operation must send per rank go around a ring of plain sockets in one message,
//   both
//         directions at once. Nothing is reduced.
//
// Sums of f32. --huge-pages: 2 MiB pages, which must be reserved (vm.nr_hugepages); otherwise memory comes as
// the collectives get theirs.
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "collectives/transport/clock.h"
#include "collectives/transport/segment.h"
#include "collectives/transport/socket.h"
#include "launch/bench/own_ranks.h"
#include "launch/bench/sampling.h"
#include "runtime/base/check.h"
#include "tests/bench/fused_pass.h"

namespace shoal {
namespace {

constexpr int kRanksMax = kFusedMax;
constexpr int64_t kPublishBytes = 4096;  // Beyond it nobody would copy his input first.
constexpr int kSlots = 16;               // See Publish().
constexpr int kSpins = 100'000;
static_assert(kSlots > kRanksMax);

struct alignas(128) Flag {
  std::atomic<uint64_t> value;
};
struct alignas(128) Slot {
  std::atomic<uint64_t> serial;
  float input[kPublishBytes / sizeof(float)];
};
// All zero at the start.
struct Shared {
  Flag met[kRanksMax];
  Slot slots[kRanksMax][kSlots];
  std::atomic<int> agreed[2];
  std::atomic<int64_t> wrong;
  double samples_us[kRanksMax][kBenchMaxSamples];
};

// Where something lies: in the `in` or `out` buffer of a rank.
struct Place {
  int rank = 0;
  bool out = false;
  int64_t offset = 0;
};
// One thing that the operation computes: the sum of `from`, wherever it is needed.
struct Piece {
  std::vector<Place> from, to;
  int64_t elements = 0;
};

std::vector<Place> OnAll(int ranks, bool out, int64_t offset) {
  std::vector<Place> places;
  for (int rank = 0; rank < ranks; ++rank) places.push_back({rank, out, offset});
  return places;
}

// All that an operation does, on all ranks; empty: it only synchronises, or is not known here. In the order
// of who does it.
std::vector<Piece> PiecesOf(std::string_view op, int ranks, int root, int64_t part) {
  const int64_t whole = part * ranks;
  if (op == "all_reduce") return {{OnAll(ranks, true, 0), OnAll(ranks, true, 0), whole}};
  if (op == "reduce") return {{OnAll(ranks, false, 0), {{root, true, 0}}, whole}};
  if (op == "broadcast") {
    std::vector<Place> to = OnAll(ranks, false, 0);
    to.erase(to.begin() + root);
    return {{{{root, false, 0}}, std::move(to), whole}};
  }
  std::vector<Piece> pieces;
  for (int rank = 0; rank < ranks; ++rank) {
    const int64_t at = rank * part;
    if (op == "reduce_scatter") pieces.push_back({OnAll(ranks, false, at), {{rank, true, 0}}, part});
    if (op == "all_gather") pieces.push_back({{{rank, false, 0}}, OnAll(ranks, true, at), part});
    if (op == "gather") pieces.push_back({{{rank, false, 0}}, {{root, true, at}}, part});
    if (op == "scatter") pieces.push_back({{{root, false, at}}, {{rank, true, 0}}, part});
    for (int from = 0; op == "all_to_all" && from < ranks; ++from)
      pieces.push_back({{{from, false, at}}, {{rank, true, from * part}}, part});
  }
  return pieces;
}

// Bytes that a rank sends around the ring; 0: not known.
int64_t RingBytes(std::string_view op, int ranks, int rank, int root, int64_t whole_bytes) {
  const int64_t others = whole_bytes / ranks * (ranks - 1);
  if (op == "all_reduce") return 2 * others;
  if (op == "reduce_scatter" || op == "all_gather" || op == "all_to_all") return others;
  // A pipeline from the root to the rank before it, or the other way round.
  if (op == "broadcast") return (rank + 1) % ranks == root ? 0 : whole_bytes;
  if (op == "reduce") return rank == root ? 0 : whole_bytes;
  return op == "barrier" ? 1 : 0;
}

struct Buffers {
  float* in;
  float* out;
};

enum class Way { kPublish, kPass, kStream, kRing };

// One rank.
class Rank {
 public:
  Rank(int index, const BenchCase& bench, Shared& shared, const std::vector<Buffers>& buffers, Fd next,
       Fd previous)
      : index_(index),
        ranks_(bench.ranks),
        bench_(bench),
        shared_(shared),
        buffers_(buffers),
        next_(std::move(next)),
        previous_(std::move(previous)),
        crowded_(bench.ranks > static_cast<int>(std::thread::hardware_concurrency())) {}

  void Measure(int64_t bytes) {
    part_ = bench_.op == "barrier" ? 0 : std::max<int64_t>(bytes / 4 / ranks_, 1);
    Prepare();
    Say("begin %lld\n", bytes);
    if (index_ == 0) shared_.wrong = 0;
    Way best = bench_.transport == "tcp" ? Way::kRing : Way::kPass;
    double best_us = 0;
    for (const Way way : Ways()) {
      Verify(way);
      const double us = TimeOf(way);
      if (best_us == 0 || us < best_us) best = way, best_us = us;
    }
    way_ = static_cast<Way>(AgreeOn(static_cast<int>(best)));
    const BenchOperation operation = {this, Run, Meet, Agree};
    const int samples = BenchSample(&operation, bench_.seconds, shared_.samples_us[index_]);
    Meet(this);
    if (index_ == 0) Print(bytes, samples);
    Meet(this);
  }

 private:
  std::vector<Way> Ways() const {
    if (bench_.transport == "tcp") return {Way::kRing};
    if (part_ == 0) return {Way::kPublish};
    if (InputElements() * 4 > kPublishBytes) return {Way::kPass, Way::kStream};
    return {Way::kPublish, Way::kPass, Way::kStream};
  }

  int64_t InputElements() const {
    return bench_.op == "all_gather" || bench_.op == "gather" ? part_ : part_ * ranks_;
  }
  float* Input() const { return bench_.op == "all_reduce" ? buffers_[index_].out : buffers_[index_].in; }
  float* At(const Place& place) const {
    const Buffers& buffers = buffers_[place.rank];
    return (place.out ? buffers.out : buffers.in) + place.offset;
  }

  // ---- What is done in a call, by its root

  struct Plan {
    std::vector<FusedPass> passes;  // This rank's share.
    std::vector<Piece> results;     // What this rank needs, computed from what is published.
    std::vector<int> awaited;       // Who publishes what it needs.
    bool publishes = false;
    int64_t to_send = 0, to_receive = 0;  // Around the ring.
  };

  void Prepare() {
    plans_.assign(ranks_, {});
    const int64_t bytes = part_ * ranks_ * 4;
    for (int root = 0; root < ranks_; ++root) {
      Plan& plan = plans_[root];
      const std::vector<Piece> pieces = PiecesOf(bench_.op, ranks_, root, part_);
      for (size_t i = 0; i < pieces.size(); ++i) {
        if (pieces.size() == 1) AddPass(pieces[i], index_, ranks_, &plan);
        if (pieces.size() > 1 && i * ranks_ / pieces.size() == static_cast<size_t>(index_))
          AddPass(pieces[i], 0, 1, &plan);
        AddResult(pieces[i], &plan);
      }
      if (pieces.empty()) {  // A barrier.
        plan.publishes = true;
        for (int rank = 0; rank < ranks_; ++rank) plan.awaited.push_back(rank);
      }
      const int before = (index_ + ranks_ - 1) % ranks_;
      plan.to_send = RingBytes(bench_.op, ranks_, index_, root, bytes);
      plan.to_receive = RingBytes(bench_.op, ranks_, before, root, bytes);
    }
  }

  // Slice `slice` of `slices`, in whole cache lines.
  void AddPass(const Piece& piece, int slice, int slices, Plan* plan) {
    const auto bound = [&](int i) {
      return i == slices ? piece.elements : piece.elements / slices * i / 16 * 16;
    };
    FusedPass pass;
    pass.elements = bound(slice + 1) - bound(slice);
    if (pass.elements == 0) return;
    for (const Place& from : piece.from) pass.from[pass.from_count++] = At(from) + bound(slice);
    for (const Place& to : piece.to) pass.to[pass.to_count++] = At(to) + bound(slice);
    plan->passes.push_back(pass);
  }

  void AddResult(const Piece& piece, Plan* plan) {
    const bool gives = std::any_of(piece.from.begin(), piece.from.end(),
                                   [&](const Place& from) { return from.rank == index_; });
    for (const Place& to : piece.to) {
      plan->publishes |= gives && to.rank != index_;
      if (to.rank != index_) continue;
      plan->results.push_back({piece.from, {to}, piece.elements});
      for (const Place& from : piece.from) plan->awaited.push_back(from.rank);
    }
  }

  static void Run(void* context, int call) {
    Rank& rank = *static_cast<Rank*>(context);
    const Plan& plan = rank.plans_[call % rank.ranks_];
    switch (rank.way_) {
      case Way::kPublish:
        return rank.Publish(plan);
      case Way::kPass:
      case Way::kStream:
        for (const FusedPass& pass : plan.passes) RunFusedPass(pass, rank.way_ == Way::kStream);
        return Meet(context);
      case Way::kRing:
        return rank.Move(plan.to_send, plan.to_receive);
    }
  }

  // A slot is written again after kSlots calls: by then this rank has been the root, or has awaited all
  // others, in a call since, so everybody has read it.
  void Publish(const Plan& plan) {
    const uint64_t serial = ++serial_;
    if (plan.publishes) {
      Slot& slot = shared_.slots[index_][serial % kSlots];
      memcpy(slot.input, Input(), InputElements() * 4);
      slot.serial.store(serial, std::memory_order_release);
    }
    for (int rank : plan.awaited) {
      if (rank != index_) Await(shared_.slots[rank][serial % kSlots].serial, serial);
    }
    for (const Piece& result : plan.results) {
      FusedPass pass;
      pass.elements = result.elements;
      for (const Place& from : result.from) {
        const float* base = from.rank == index_ ? Input() : shared_.slots[from.rank][serial % kSlots].input;
        pass.from[pass.from_count++] = base + from.offset;
      }
      pass.to[pass.to_count++] = At(result.to[0]);
      RunFusedPass(pass, /*streaming=*/false);
    }
  }

  // Both directions at once.
  void Move(int64_t to_send, int64_t to_receive) {
    const char* out = reinterpret_cast<const char*>(buffers_[index_].in);
    char* in = reinterpret_cast<char*>(buffers_[index_].out);
    const int64_t most = part_ * ranks_ * 4;  // What goes beyond it goes there once more.
    for (int64_t sent = 0, received = 0; sent < to_send || received < to_receive;) {
      ssize_t moved_out = 0, moved_in = 0;
      if (sent < to_send) {
        const int64_t at = most == 0 ? 0 : sent % most;
        moved_out = send(next_.get(), out + at, most == 0 ? 1 : std::min(to_send - sent, most - at), kFlags);
        sent += std::max<ssize_t>(moved_out, 0);
      }
      if (received < to_receive) {
        const int64_t at = most == 0 ? 0 : received % most;
        moved_in = recv(previous_.get(), in + at, most == 0 ? 1 : std::min(to_receive - received, most - at),
                        kFlags);
        SHOAL_CHECK(moved_in != 0) << "a rank has ended";
        received += std::max<ssize_t>(moved_in, 0);
      }
      if (moved_out <= 0 && moved_in <= 0) (void)sched_yield();
    }
  }

  // ---- Meeting

  void Await(const std::atomic<uint64_t>& value, uint64_t least) const {
    for (int spins = 0; value.load(std::memory_order_acquire) < least; ++spins) {
      // Another process may be on the peer's core.
      if (crowded_ || spins > kSpins) (void)sched_yield();
    }
  }

  static void Meet(void* context) {
    Rank& rank = *static_cast<Rank*>(context);
    const uint64_t count = ++rank.met_;
    rank.shared_.met[rank.index_].value.store(count, std::memory_order_release);
    for (int other = 0; other < rank.ranks_; ++other) rank.Await(rank.shared_.met[other].value, count);
  }

  int AgreeOn(int value) {
    std::atomic<int>& agreed = shared_.agreed[agreements_++ % 2];
    if (index_ == 0) agreed = value;
    Meet(this);
    return agreed;
  }
  static int Agree(void* context, int value) { return static_cast<Rank*>(context)->AgreeOn(value); }

  // ---- Verifying and timing

  void Fill() {
    const int64_t whole = part_ * ranks_;
    std::fill_n(buffers_[index_].in, whole, 3.0f);
    std::fill_n(buffers_[index_].out, whole, 3.0f);
    for (int64_t i = 0; i < (part_ == 0 ? 0 : InputElements()); ++i)
      Input()[i] = static_cast<float>(BenchInput(index_, i));
    if (bench_.transport != "tcp") return;
    for (int64_t i = 0; i < whole; ++i) buffers_[index_].in[i] = static_cast<float>(BenchInput(index_, i));
  }

  int64_t CountWrong() const {
    int64_t wrong = 0;
    if (bench_.transport == "tcp") {
      const int before = (index_ + ranks_ - 1) % ranks_;
      const int64_t whole = part_ * ranks_;
      for (int64_t i = 0; i < std::min(plans_[0].to_receive / 4, whole); ++i)
        wrong += buffers_[index_].out[i] != static_cast<float>(BenchInput(before, i));
      return wrong;
    }
    const float* result = bench_.op == "broadcast" ? buffers_[index_].in : buffers_[index_].out;
    for (int64_t i = 0; i < CheckedElements(bench_.op, index_, ranks_, part_); ++i) {
      wrong += result[i] !=
               static_cast<float>(ExpectedElement(bench_.op, ReduceOp::kSum, index_, ranks_, part_, i));
    }
    return wrong;
  }

  void Verify(Way way) {
    way_ = way;
    Fill();
    Meet(this);
    Run(this, 0);
    Meet(this);
    shared_.wrong += CountWrong();
    Meet(this);
    // So that thousands of sums in place stay finite.
    std::fill_n(buffers_[index_].in, part_ * ranks_, 0.0f);
    std::fill_n(buffers_[index_].out, part_ * ranks_, 0.0f);
  }

  // Of one call, roughly.
  double TimeOf(Way way) {
    way_ = way;
    const BenchOperation operation = {this, Run, Meet, Agree};
    const int inner = part_ * ranks_ * 4 > 256 << 10 ? 1 : 64;
    double least = BenchTime(&operation, inner);
    for (int i = 0; i < 4; ++i) least = std::min(least, BenchTime(&operation, inner));
    return least;
  }

  void Say(const char* format, int64_t bytes) const {
    if (index_ != 0) return;
    printf(format, static_cast<long long>(bytes));
    fflush(stdout);
  }

  void Print(int64_t bytes, int samples) const {
    Say("result %lld", bytes);
    printf(" %lld", static_cast<long long>(shared_.wrong.load()));
    for (int i = 0; i < samples; ++i) {
      double slowest = 0;
      for (int rank = 0; rank < ranks_; ++rank) slowest = std::max(slowest, shared_.samples_us[rank][i]);
      printf(" %g", slowest);
    }
    printf("\n");
    fflush(stdout);
  }

  static constexpr int kFlags = MSG_DONTWAIT | MSG_NOSIGNAL;

  const int index_, ranks_;
  const BenchCase& bench_;
  Shared& shared_;
  const std::vector<Buffers>& buffers_;
  const Fd next_, previous_;  // Around the ring.
  const bool crowded_;        // More ranks than cores.
  int64_t part_ = 0;          // Elements.
  std::vector<Plan> plans_;
  Way way_ = Way::kPass;
  uint64_t serial_ = 0, met_ = 0;
  int agreements_ = 0;
};

// Shared with the ranks that are forked later.
float* NewBuffer(int64_t bytes, bool huge) {
  if (!huge) {
    absl::StatusOr<std::unique_ptr<Segment>> segment = Segment::Create(1, bytes);
    SHOAL_CHECK_OK(segment.status());
    return reinterpret_cast<float*>(segment->release()->base());  // To the end of the process.
  }
  const int64_t rounded = (bytes + (2 << 20) - 1) >> 21 << 21;
  void* base = mmap(nullptr, rounded, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE, -1, 0);
  SHOAL_CHECK(base != MAP_FAILED) << rounded << " bytes of 2 MiB pages: " << strerror(errno)
                                  << "; reserve them: sysctl vm.nr_hugepages=N";
  return static_cast<float*>(base);
}

struct Ring {
  std::vector<Fd> next, previous;  // By rank.
};
Ring ConnectRing(int ranks) {
  Ring ring;
  ring.next.resize(ranks);
  ring.previous.resize(ranks);
  Fd listener = *Listen(AnyAddress(AF_INET, /*loopback_only=*/true));
  const int64_t soon_ns = NowNs() + 5'000'000'000;
  for (int rank = 0; rank < ranks; ++rank) {
    ring.next[rank] = *Dial(LocalAddressOf(listener.get()), soon_ns);
    SHOAL_CHECK(PollOne(listener.get(), POLLIN, soon_ns));
    ring.previous[(rank + 1) % ranks] = *Accept(listener.get());
  }
  return ring;
}

int Measure(const BenchCase& bench, const std::vector<int64_t>& sizes, bool huge) {
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  SHOAL_CHECK(memory != MAP_FAILED) << strerror(errno);
  Shared& shared = *static_cast<Shared*>(memory);
  const int64_t most = std::max<int64_t>(*std::max_element(sizes.begin(), sizes.end()), 4 * bench.ranks);
  std::vector<Buffers> buffers(bench.ranks);
  for (Buffers& own : buffers) own = {NewBuffer(most, huge), NewBuffer(most, huge)};
  Ring ring;
  if (bench.transport == "tcp") {
    ring = ConnectRing(bench.ranks);
  } else {
    ring.next.resize(bench.ranks);
    ring.previous.resize(bench.ranks);
  }
  const pid_t parent = getpid();
  for (int index = 0; index < bench.ranks; ++index) {
    if (fork() != 0) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    Rank rank(index, bench, shared, buffers, std::move(ring.next[index]), std::move(ring.previous[index]));
    for (Fd& other : ring.next) other.Reset();
    for (Fd& other : ring.previous) other.Reset();
    for (int64_t bytes : sizes) rank.Measure(bytes);
    _exit(0);
  }
  int wait_status = 0;
  bool failed = false;
  while (waitpid(-1, &wait_status, 0) > 0) failed |= wait_status != 0;
  return failed ? 1 : 0;
}

bool IsKnown(const BenchCase& bench) {
  if (bench.op == "barrier") return true;
  if (bench.transport == "shm") return !PiecesOf(bench.op, 2, 0, 1).empty();
  return RingBytes(bench.op, 2, 0, 0, 8) + RingBytes(bench.op, 2, 1, 0, 8) > 0;
}

int Main(std::vector<std::string> arguments) {
  const bool huge = !arguments.empty() && arguments[0] == "--huge-pages";
  if (huge) arguments.erase(arguments.begin());
  if (arguments.size() < 5) {
    fprintf(stderr, "usage: bench_limits [--huge-pages] shm|tcp OP RANKS SECONDS BYTES...\n");
    return 2;
  }
  const BenchCase bench = {arguments[1], arguments[0], atoi(arguments[2].c_str()),
                           atof(arguments[3].c_str())};
  std::vector<int64_t> sizes;
  for (size_t i = 4; i < arguments.size(); ++i) sizes.push_back(atoll(arguments[i].c_str()));
  if (bench.ranks < 2 || bench.ranks > kRanksMax || !IsKnown(bench)) return 0;  // No limit is known.
  return Measure(bench, sizes, huge);
}

}  // namespace
}  // namespace shoal

int main(int argc, char** argv) { return shoal::Main(std::vector<std::string>(argv + 1, argv + argc)); }
