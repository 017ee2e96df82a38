// Every operation over transport mpi, against values that can be told beforehand. Started by mpirun with 2 or more ranks;
// exits with 0 when all is right.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "collectives/communicator.h"
#include "runtime/base/check.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

// data[i] = rank + i.
Tensor Ramp(int64_t elements, int rank) {
  Tensor tensor = Empty({elements}, DType::kF32);
  for (int64_t i = 0; i < elements; ++i) tensor.data<float>()[i] = static_cast<float>(rank + i);
  return tensor;
}

void Expect(const Tensor& tensor, const char* what, const std::function<double(int64_t)>& want) {
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    SHOAL_CHECK(tensor.data<float>()[i] == want(i)) << what << ": element " << i << " is " << tensor.data<float>()[i] << ", want " << want(i);
  }
}

void Ok(const Work& work) {
  const absl::Status status = work.Await();
  SHOAL_CHECK(status.ok()) << status.ToString();
}

void CheckReductions(Communicator& group) {
  const int rank = group.index(), n = group.size();
  const double ranks = n * (n - 1) / 2.0;
  const Tensor in = Ramp(1000, rank), out = Empty({1000}, DType::kF32);
  Ok(group.AllReduce(in, out, ReduceOp::kSum, {}));
  Expect(out, "all_reduce", [&](int64_t i) { return ranks + static_cast<double>(n * i); });
  Expect(in, "its input", [&](int64_t i) { return static_cast<double>(rank + i); });
  Ok(group.AllReduce(in, in, ReduceOp::kMax, {}));
  Expect(in, "all_reduce in place", [&](int64_t i) { return static_cast<double>(n - 1 + i); });
  const Tensor half = Empty({100}, DType::kBF16);
  for (BFloat16& value : half.span<BFloat16>()) value = BFloat16(static_cast<float>(rank));
  Ok(group.AllReduce(half, half, ReduceOp::kAverage, {}));
  SHOAL_CHECK(static_cast<float>(half.data<BFloat16>()[99]) == static_cast<float>(BFloat16(static_cast<float>(ranks / n))));
  std::vector<int64_t> counts(n);
  std::iota(counts.begin(), counts.end(), 0);  // Rank 0 gets nothing.
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t begin = std::accumulate(counts.begin(), counts.begin() + rank, int64_t{0});
  const Tensor all = Ramp(total, rank);
  Ok(group.ReduceScatter(all, counts, all.Elements(begin, {counts[rank]}), ReduceOp::kSum, {}));
  Expect(all.Elements(begin, {counts[rank]}), "reduce_scatter",
         [&](int64_t i) { return ranks + static_cast<double>(n * (begin + i)); });
  const Tensor one = Ramp(10, rank);
  Ok(group.Reduce(one, one, n - 1, ReduceOp::kSum, {}));
  if (rank == n - 1) Expect(one, "reduce", [&](int64_t i) { return ranks + static_cast<double>(n * i); });
}

void CheckMoves(Communicator& group) {
  const int rank = group.index(), n = group.size();
  const std::vector<int64_t> counts(n, 7);
  const Tensor own = Ramp(7, 100 * rank), all = Empty({7 * n}, DType::kF32);
  const auto gathered = [](int64_t i) { return static_cast<double>(100 * (i / 7) + i % 7); };
  Ok(group.AllGather(own, counts, all, {}));
  Expect(all, "all_gather", gathered);
  const Tensor at_root = rank == 1 ? Zeros({7 * n}, DType::kF32) : Tensor();
  Ok(group.Gather(own, counts, at_root, 1, {}));
  Expect(at_root, "gather", gathered);
  const Tensor back = Zeros({7}, DType::kF32);
  Ok(group.Scatter(at_root, counts, back, 1, {}));
  Expect(back, "scatter", [&](int64_t i) { return static_cast<double>(100 * rank + i); });
  Ok(group.Broadcast(back, 0, {}));
  Expect(back, "broadcast", [](int64_t i) { return static_cast<double>(i); });
  const Tensor sent = Ramp(n, 10 * rank), received = Empty({n}, DType::kF32);
  Ok(group.AllToAll(sent, {}, received, {}, {}));
  Expect(received, "all_to_all", [&](int64_t i) { return static_cast<double>(10 * i + rank); });
  const Tensor mine = Ramp(5, rank), theirs = Empty({5}, DType::kF32);
  const Work send = group.Send(mine, (rank + 1) % n, 3, {});
  Ok(group.Receive(theirs, (rank + n - 1) % n, 3, {}));
  Ok(send);
  Expect(theirs, "receive", [&](int64_t i) { return static_cast<double>((rank + n - 1) % n + i); });
  const std::vector<Tensor> chunks = {rank <= 1 ? Ramp(9, 50 * rank) : Tensor()};
  const std::vector<SparseMove> moves = {{0, 0, {1}}};
  Ok(group.SparseReduceScatter(chunks, moves, ReduceOp::kSum, {}));
  Ok(group.SparseAllGather(chunks, moves, {}));
  if (rank <= 1) Expect(chunks[0], "sparse", [](int64_t i) { return static_cast<double>(50 + 2 * i); });
  Ok(group.Barrier({}));
}

void CheckErrors(Communicator& group) {
  const Tensor data = Ramp(4, 0);
  SHOAL_CHECK(absl::IsInvalidArgument(group.Broadcast(data, group.size(), {}).Await()));
  // A part of another size than the counts say: MPI itself would read or write past its end.
  const int64_t n = group.size();
  const std::vector<int64_t> counts(n, 4);
  const Tensor whole = Ramp(4 * n, 0), small = Ramp(3, 0), large = Ramp(5, 0);
  for (const Tensor& part : {small, large}) {
    SHOAL_CHECK(absl::IsInvalidArgument(group.ReduceScatter(whole, counts, part, ReduceOp::kSum, {}).Await()));
    SHOAL_CHECK(absl::IsInvalidArgument(group.AllGather(part, counts, whole, {}).Await()));
    SHOAL_CHECK(absl::IsInvalidArgument(group.Gather(part, counts, whole, 0, {}).Await()));
    SHOAL_CHECK(absl::IsInvalidArgument(group.Scatter(whole, counts, part, 0, {}).Await()));
  }
  SHOAL_CHECK(absl::IsInvalidArgument(group.Gather(data, {}, Tensor(), n - 1, {}).Await()));
  const absl::StatusOr<std::unique_ptr<Communicator>> part = group.Split(std::vector<int>{group.index()});
  SHOAL_CHECK(part.ok() && (*part)->size() == 1);
  Ok((*part)->AllReduce(data, data, ReduceOp::kSum, {}));
}

// One rank splits on one thread while another thread of it does what the others want before they split.
void CheckSplitBesideOthers(Communicator& group) {
  std::vector<int> all(group.size());
  std::iota(all.begin(), all.end(), 0);
  const auto beside = group.Split(all);
  SHOAL_CHECK(beside.ok()) << beside.status().ToString();
  absl::StatusOr<std::unique_ptr<Communicator>> part = absl::UnknownError("");
  std::thread early;
  if (group.index() == 1) early = std::thread([&] { part = group.Split(all); });
  for (int i = 0; i < 1000; ++i) Ok((*beside)->Barrier({}));
  if (early.joinable()) {
    early.join();
  } else {
    part = group.Split(all);
  }
  SHOAL_CHECK(part.ok()) << part.status().ToString();
  Ok((*part)->Barrier({}));
}

void CheckAbort(Communicator& group) {
  const Tensor data = Ramp(4, 0);
  if (group.index() == 0) group.Abort(absl::CancelledError("enough"));
  const absl::Status status = group.AllReduce(data, data, ReduceOp::kSum, {}).Await();
  SHOAL_CHECK(absl::IsAborted(status) && StdSv(status.message()).find("rank 0 aborted: enough") != std::string_view::npos)
      << status.ToString();
}

int Main() {
  WorldOptions options;
  options.transport = "mpi";
  options.rank = std::atoi(std::getenv("OMPI_COMM_WORLD_RANK"));
  options.size = std::atoi(std::getenv("OMPI_COMM_WORLD_SIZE"));
  absl::StatusOr<std::unique_ptr<Communicator>> world = ConnectWorld(options);
  SHOAL_CHECK(world.ok()) << world.status().ToString();
  CheckReductions(**world);
  CheckMoves(**world);
  CheckErrors(**world);
  CheckSplitBesideOthers(**world);
  std::vector<int> all(options.size);
  std::iota(all.begin(), all.end(), 0);
  {
    absl::StatusOr<std::unique_ptr<Communicator>> again = (*world)->Split(all);
    SHOAL_CHECK(again.ok()) << again.status().ToString();
    CheckReductions(**again);
    CheckAbort(**again);
  }
  Ok((*world)->Barrier({}));
  if (options.rank == 0) std::printf("mpi: all operations right on %d ranks\n", options.size);
  return 0;
}

}  // namespace
}  // namespace shoal

int main() { return shoal::Main(); }
