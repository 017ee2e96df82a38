#include "models/optimizer/dense_store.h"

#include <cmath>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "models/optimizer/testing.h"
#include "runtime/kernels/elementwise.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using store_testing::FirstElement;
using store_testing::Number;
using store_testing::SmallConfig;

struct Case {
  int ranks = 1;
  DensePolicy policy = DensePolicy::kReplicated;
  DType compute = DType::kF32;
  bool tied = false;
};
void PrintTo(const Case& c, std::ostream* os) {
  *os << c.ranks << (c.policy == DensePolicy::kSharded ? "_sharded_" : "_replicated_") << Name(c.compute) << (c.tied ? "_tied" : "");
}

// What all ranks agree on.
struct Model {
  explicit Model(const Case& c) {
    config = SmallConfig();
    config.tie_word_embeddings = c.tied;
    specs = ParameterSpecs(config);
    blocks = MakeBlocks(specs);
  }
  bool IsExpert(size_t parameter) const { return specs[parameter].name.find(".experts.") != std::string::npos; }
  int Bucket(size_t parameter) const {
    const std::string& name = specs[parameter].name;
    const BucketIndex index{config.num_hidden_layers, !config.tie_word_embeddings};
    if (specs[parameter].shape.size() == 1) return BucketIndex::kVectors;
    if (name == "model.embed_tokens.weight") return BucketIndex::kEmbedding;
    if (name == "lm_head.weight") return index.OfHead();
    return index.OfLayer(name[std::string("model.layers.").size()] - '0');
  }
  int64_t DenseElements() const {
    int64_t elements = 0;
    for (size_t i = 0; i < specs.size(); ++i) elements += IsExpert(i) ? 0 : ElementCount(specs[i].shape);
    return elements;
  }
  ModelConfig config;
  std::vector<ParameterSpec> specs;
  std::vector<Block> blocks;
};

class Fixture {
 public:
  Fixture(const Case& c, Communicator& world) : model(c), group(&world) {
    store = *DenseStore::Create(model.specs, model.blocks, model.config.num_hidden_layers, world,
                                {.compute = c.compute, .policy = c.policy, .buffers = 2});
    store->AppendOwned(&owned);
    for (const OwnedPart& part : owned) {
      for (int64_t i = 0; i < part.master.elements(); ++i) {
        part.master.data<float>()[i] = Number(0, part.parameter, FirstElement(part) + i);
      }
    }
    store->Refresh(stream);
  }
  template <typename Visit> void ForEachParameterOf(int bucket, const Visit& visit) {
    for (size_t i = 0; i < model.specs.size(); ++i) {
      if (!model.IsExpert(i) && model.Bucket(i) == bucket) visit(model.specs[i], static_cast<int64_t>(i));
    }
  }
  void ExpectWeights(int bucket) {
    ForEachParameterOf(bucket, [&](const ParameterSpec& spec, int64_t parameter) {
      const Tensor weight = store->Weight(spec.name, spec.shape);
      const Tensor wide = Empty(spec.shape, DType::kF32);
      kernels::Convert(weight, wide, stream);
      int64_t wrong = 0;
      for (int64_t i = 0; i < wide.elements(); ++i) wrong += wide.data<float>()[i] != Number(0, parameter, i);
      EXPECT_EQ(wrong, 0) << spec.name;
    });
  }
  // As a backward pass of part `part` on this rank would.
  void WriteGradients(int bucket, int part) {
    const kernels::Accumulate mode = store->AccumulateOf(bucket, part);
    ForEachParameterOf(bucket, [&](const ParameterSpec& spec, int64_t parameter) {
      const Tensor gradient = store->Gradient(spec.name, spec.shape);
      for (int64_t i = 0; i < gradient.elements(); ++i) {
        float& to = gradient.data<float>()[i];
        to = Number(1 + group->index() + 10 * part, parameter, i) + (mode == kernels::Accumulate::kAdd ? to : 0);
      }
    });
  }
  // In three slices of unequal sizes, the last first.
  void Reduce(int bucket, int part) {
    const int64_t all = store->elements(bucket), first = all / 5, second = all / 2;
    for (auto [begin, end] : {std::pair{second, all}, {int64_t{0}, first}, {first, second}}) {
      const absl::Status status = store->Reduce(bucket, begin, end - begin, part);
      EXPECT_TRUE(status.ok()) << status;
    }
  }
  float WantedGradient(int64_t parameter, int64_t element, int parts) const {
    float sum = 0;
    for (int part = 0; part < parts; ++part) {
      for (int rank = 0; rank < group->size(); ++rank) sum += Number(1 + rank + 10 * part, parameter, element);
    }
    return sum;
  }

  Model model;
  Communicator* group;
  Stream stream;
  std::unique_ptr<DenseStore> store;
  std::vector<OwnedPart> owned;
};

class DenseStoreRanks : public testing::TestWithParam<Case> {};

TEST_P(DenseStoreRanks, OwnersTileEveryParameter) {
  const Model model(GetParam());
  std::mutex mutex;
  std::vector<std::vector<int>> owners(model.specs.size());  // By row.
  for (size_t i = 0; i < model.specs.size(); ++i) owners[i].assign(static_cast<size_t>(model.specs[i].shape[0]), 0);
  int64_t elements = 0;
  RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
    Fixture fixture(GetParam(), world);
    const std::lock_guard<std::mutex> lock(mutex);
    elements += fixture.store->owned_elements();
    for (const OwnedPart& part : fixture.owned) {
      const size_t parameter = static_cast<size_t>(part.parameter);
      EXPECT_EQ(part.name, model.specs[parameter].name);
      EXPECT_EQ(part.full_shape, model.specs[parameter].shape);
      for (const Tensor& tensor : {part.gradient, part.exp_avg, part.exp_avg_sq}) EXPECT_EQ(tensor.shape(), part.master.shape());
      for (int64_t row = 0; row < part.master.dim(0); ++row) ++owners[parameter][static_cast<size_t>(part.row_begin + row)];
    }
  });
  for (size_t i = 0; i < owners.size(); ++i) {
    for (int count : owners[i]) ASSERT_EQ(count, model.IsExpert(i) ? 0 : 1) << model.specs[i].name;
  }
  EXPECT_EQ(elements, model.DenseElements());
}

TEST_P(DenseStoreRanks, GatherBringsTheOwnersWeights) {
  RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
    Fixture fixture(GetParam(), world);
    DenseStore& store = *fixture.store;
    EXPECT_EQ(store.buckets(), fixture.model.config.num_hidden_layers + (GetParam().tied ? 2 : 3));
    const BucketIndex index{fixture.model.config.num_hidden_layers, !GetParam().tied};
    for (int bucket = 0; bucket < store.buckets(); ++bucket) {
      EXPECT_EQ(store.sharded(bucket), GetParam().policy == DensePolicy::kSharded && GetParam().ranks > 1 && index.Shardable(bucket));
    }
    ASSERT_TRUE(store.Gather(BucketIndex::kVectors).ok());
    fixture.ExpectWeights(BucketIndex::kVectors);
    // One after the other.
    for (int bucket : {static_cast<int>(BucketIndex::kEmbedding), index.OfHead(), static_cast<int>(BucketIndex::kEmbedding)}) {
      ASSERT_TRUE(store.Gather(bucket).ok());
      fixture.ExpectWeights(bucket);
      store.Release(bucket);
    }
    // Two layers at a time, in turn and out of it: each buffer serves all.
    int last = 2;
    ASSERT_TRUE(store.Gather(last).ok());
    for (int next : {3, 4, 2, 3, 4, 3, 2}) {
      ASSERT_TRUE(store.Gather(next).ok());
      fixture.ExpectWeights(next);
      fixture.ExpectWeights(last);
      store.Release(last);
      last = next;
    }
    store.Release(last);
  });
}

TEST_P(DenseStoreRanks, ReduceIsTheSumOverRanksAndParts) {
  for (int parts = 1; parts <= 3; ++parts) {
    SCOPED_TRACE(absl::StrCat(parts, " parts"));
    RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
      Fixture fixture(GetParam(), world);
      DenseStore& store = *fixture.store;
      for (int step = 0; step < 2; ++step) {  // Nothing of the first is left in the second.
        for (int part = 0; part < parts; ++part) {
          for (int bucket = store.buckets() - 1; bucket >= 0; --bucket) {
            fixture.WriteGradients(bucket, part);
            if (store.sharded(bucket) || part + 1 == parts) fixture.Reduce(bucket, part);
          }
        }
      }
      double squares = 0, wanted_squares = 0;
      for (const OwnedPart& part : fixture.owned) {
        int64_t wrong = 0;
        for (int64_t i = 0; i < part.gradient.elements(); ++i) {
          const float want = fixture.WantedGradient(part.parameter, FirstElement(part) + i, parts);
          wrong += part.gradient.data<float>()[i] != want;
          wanted_squares += static_cast<double>(want) * want;
        }
        EXPECT_EQ(wrong, 0) << part.name;
      }
      const Tensor sums = Zeros({static_cast<int64_t>(fixture.model.blocks.size())}, DType::kF64);
      store.SumSquares(sums, fixture.stream);
      for (double sum : sums.span<double>()) squares += sum;
      EXPECT_DOUBLE_EQ(squares, wanted_squares);  // Integers: exact.
    });
  }
}

// The graph lets who takes a buffer wait for who freed it so many takes before; a device may be behind with those that came later.
TEST(DenseStore, BuffersAreTakenInTheOrderInWhichTheyWereFreed) {
  RunRanks(2, "auto", [](Communicator& world) {
    Fixture fixture({.ranks = 2, .policy = DensePolicy::kSharded}, world);
    const BucketIndex index{fixture.model.config.num_hidden_layers, /*head=*/true};
    const auto gather = [&](int layer) -> const void* {
      EXPECT_TRUE(fixture.store->Gather(index.OfLayer(layer)).ok());
      const void* first = nullptr;
      fixture.ForEachParameterOf(index.OfLayer(layer), [&](const ParameterSpec& spec, int64_t) {
        if (first == nullptr) first = fixture.store->Weight(spec.name, spec.shape).raw();
      });
      return first;
    };
    const void *first = gather(0), *second = gather(1);
    fixture.store->Release(index.OfLayer(1));
    fixture.store->Release(index.OfLayer(0));
    EXPECT_EQ(gather(0), second);
    EXPECT_EQ(gather(1), first);
  });
}

TEST_P(DenseStoreRanks, UpdateIsOfWhatIsOwned) {
  RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
    Fixture fixture(GetParam(), world);
    DenseStore& store = *fixture.store;
    const kernels::AdamWStep step{.learning_rate = 0.01, .weight_decay = 0.1, .update = 1};
    int64_t updated = 0;
    for (int bucket = store.buckets() - 1; bucket >= 0; --bucket) {
      fixture.WriteGradients(bucket, 0);
      fixture.Reduce(bucket, 0);
      updated += store.Update(bucket, step, AdamWNumbersOf(step), fixture.stream);
    }
    EXPECT_EQ(updated, store.owned_elements());
    for (int bucket = 0; bucket < store.buckets(); ++bucket) {
      ASSERT_TRUE(store.Gather(bucket).ok());
      fixture.ForEachParameterOf(bucket, [&](const ParameterSpec& spec, int64_t parameter) {
        const Tensor weight = store.Weight(spec.name, spec.shape), wide = Empty(spec.shape, DType::kF32);
        kernels::Convert(weight, wide, fixture.stream);
        const double decay = spec.shape.size() == 1 ? 0 : 0.1, tolerance = GetParam().compute == DType::kF32 || decay == 0 ? 1e-5 : 0.2;
        int64_t wrong = 0;
        for (int64_t i = 0; i < wide.elements(); ++i) {
          const double gradient = fixture.WantedGradient(parameter, i, 1);
          // The first update moves each weight by the rate, against its gradient.
          const double want = Number(0, parameter, i) * (1 - 0.01 * decay) - (gradient == 0 ? 0 : std::copysign(0.01, gradient));
          wrong += std::abs(wide.data<float>()[i] - want) > tolerance;
        }
        EXPECT_EQ(wrong, 0) << spec.name;
      });
      store.Release(bucket);
    }
  });
}

TEST_P(DenseStoreRanks, MemoryAddsUp) {
  const Model model(GetParam());
  std::mutex mutex;
  DenseStore::Memory sum;
  RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
    Fixture fixture(GetParam(), world);
    const DenseStore::Memory memory = fixture.store->memory();
    const std::lock_guard<std::mutex> lock(mutex);
    sum.weights_bytes += memory.weights_bytes;
    sum.gradients_bytes += memory.gradients_bytes;
    sum.state_bytes += memory.state_bytes;
  });
  const BucketIndex index{model.config.num_hidden_layers, !GetParam().tied};
  std::vector<int64_t> elements(static_cast<size_t>(index.count()));
  for (size_t i = 0; i < model.specs.size(); ++i) {
    if (!model.IsExpert(i)) elements[static_cast<size_t>(model.Bucket(i))] += ElementCount(model.specs[i].shape);
  }
  const int64_t all = model.DenseElements(), vectors = elements[0], ranks = GetParam().ranks, width = SizeOf(GetParam().compute);
  // Everywhere, or once and in buffers on each rank: two for layers, one for embedding and head.
  int64_t copies = 0, of_layers = 0, of_ends = 0;
  for (int bucket = 1; bucket < index.count(); ++bucket) {
    const int64_t count = elements[static_cast<size_t>(bucket)];
    const bool sharded = GetParam().policy == DensePolicy::kSharded && ranks > 1 && index.Shardable(bucket);
    copies += sharded ? count : ranks * count;
    int64_t& largest = index.IsLayer(bucket) ? of_layers : of_ends;
    if (sharded) largest = std::max(largest, count);
  }
  copies += ranks * (2 * of_layers + of_ends);
  EXPECT_EQ(sum.weights_bytes, copies * width + ranks * vectors * 4);
  EXPECT_EQ(sum.gradients_bytes, copies * 4 + ranks * vectors * 4);
  EXPECT_EQ(sum.state_bytes, 8 * all + (width == 4 ? 0 : 4 * (all - vectors)));
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int ranks = 1; ranks <= 4; ++ranks) {
    cases.push_back({ranks, DensePolicy::kReplicated, ranks == 2 ? DType::kBF16 : DType::kF32, ranks == 3});
    cases.push_back({ranks, DensePolicy::kSharded, ranks == 3 ? DType::kBF16 : DType::kF32, ranks == 2});
  }
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Ranks, DenseStoreRanks, testing::ValuesIn(Cases()), testing::PrintToStringParamName());

}  // namespace
}  // namespace shoal
