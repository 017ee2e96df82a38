#include "models/optimizer/parameter_store.h"

#include <algorithm>

#include "runtime/kernels/elementwise.h"

namespace shoal {
namespace {

constexpr uint64_t kInitialWeights = 1;  // The op number of initial weights in random keys.

}  // namespace

absl::StatusOr<std::unique_ptr<ParameterStore>> ParameterStore::Create(std::vector<ParameterSpec> parameters,
                                                                       std::vector<ExpertPlacement> placement,
                                                                       Communicator& group, const Options& options) {
  std::unique_ptr<ParameterStore> store(new ParameterStore(std::move(parameters), options));
  const int layers = static_cast<int>(placement.size());
  SHOAL_ASSIGN_OR_RETURN(store->dense_, DenseStore::Create(store->parameters_, store->blocks_, layers, group,
                                                           {.compute = options.compute,
                                                            .training = options.training,
                                                            .policy = options.dense,
                                                            .buffers = DenseBuffers(options.prefetch, options.waves_max),
                                                            .numerics = options.numerics,
                                                            .stream = options.stream}));
  SHOAL_ASSIGN_OR_RETURN(store->experts_, ExpertStore::Create(store->parameters_, store->blocks_, std::move(placement), group,
                                                              {.compute = options.compute,
                                                               .training = options.training,
                                                               .policy = options.experts,
                                                               .prefetch = options.prefetch,
                                                               .copies = options.copies,
                                                               .topology = options.topology,
                                                               .numerics = options.numerics,
                                                               .stream = options.stream}));
  return store;
}

std::vector<OwnedPart> ParameterStore::owned() const {
  std::vector<OwnedPart> owned;
  dense_->AppendOwned(&owned);
  experts_->AppendOwned(&owned);
  std::stable_sort(owned.begin(), owned.end(),
                   [](const OwnedPart& a, const OwnedPart& b) { return a.parameter < b.parameter; });
  return owned;
}

void ParameterStore::InitializeOwned(uint64_t seed, double stddev, Stream& stream) {
  for (const OwnedPart& part : owned()) {
    if (part.full_shape.size() == 1) {
      const double initial = parameters_[static_cast<size_t>(part.parameter)].initial;
      const Tensor host = Empty(part.master.shape(), DType::kF32);
      std::fill(host.span<float>().begin(), host.span<float>().end(), static_cast<float>(initial));
      Copy(host, part.master, stream);
      continue;
    }
    const kernels::RandomKey key{seed, kernels::MakeStream(0, 0, static_cast<uint64_t>(part.parameter), kInitialWeights)};
    const int64_t row = ElementCount(part.full_shape) / part.full_shape[0];
    kernels::FillNormal(key, static_cast<uint64_t>(part.row_begin * row), 0.0, stddev, part.master, stream);
  }
  ZeroMoments(stream);
}

void ParameterStore::ZeroMoments(Stream& stream) {
  for (const OwnedPart& part : owned()) {
    FillWithZeros(part.exp_avg, stream);
    FillWithZeros(part.exp_avg_sq, stream);
  }
}

absl::Status ParameterStore::GatherWeights(Stream& stream) {
  dense_->Refresh(stream);
  experts_->Refresh(stream);
  SHOAL_RETURN_IF_ERROR(stream.Wait());
  for (int bucket = 0; bucket < dense_->buckets(); ++bucket) {
    if (!dense_->sharded(bucket)) SHOAL_RETURN_IF_ERROR(dense_->Gather(bucket));
  }
  return stream.status();
}

void ParameterStore::SquaresByBlock(const Tensor& squares, Stream& stream) const {
  SHOAL_CHECK_EQ(squares.elements(), static_cast<int64_t>(blocks_.size()));
  FillWithZeros(squares, stream);
  dense_->SumSquares(squares, stream);
  experts_->SumSquares(squares, stream);
}

ParameterStore::Memory ParameterStore::memory() const {
  const DenseStore::Memory dense = dense_->memory();
  const ExpertStore::Memory experts = experts_->memory();
  return {dense.weights_bytes + experts.weights_bytes, dense.gradients_bytes + experts.gradients_bytes,
          dense.state_bytes + experts.state_bytes};
}

}  // namespace shoal
