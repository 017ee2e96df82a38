#include "models/optimizer/expert_store.h"

#include <algorithm>
#include <functional>
#include <mutex>
#include <random>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "models/optimizer/testing.h"
#include "runtime/kernels/elementwise.h"
#include "tests/harness/ranks.h"

namespace shoal {
namespace {

using store_testing::Number;
using store_testing::SmallConfig;

constexpr int kMoeLayers[] = {0, 2};  // Of SmallConfig.

struct Case {
  int ranks = 1, experts = 1;
  ExpertPolicy policy = ExpertPolicy::kKeep;
  DType compute = DType::kF32;
};
void PrintTo(const Case& c, std::ostream* os) {
  *os << c.ranks << "_ranks_" << c.experts << (c.policy == ExpertPolicy::kKeep ? "_keep_" : "_rematerialise_") << Name(c.compute);
}

int Draw(std::mt19937* random, int high) { return std::uniform_int_distribution<>(0, high)(*random); }

void DrawHolders(int ranks, std::mt19937* random, std::vector<ExpertPlacement>* placement) {
  for (ExpertPlacement& layer : *placement) {
    const double share = 0.5 * Draw(random, 2);
    for (ExpertCopies& expert : layer) {
      expert.holders.clear();
      for (int rank = 0; rank < ranks; ++rank) {
        if (rank != expert.owner && std::bernoulli_distribution(share)(*random)) expert.holders.push_back(rank);
      }
    }
  }
}

std::vector<ExpertPlacement> RandomPlacement(const Case& c, std::mt19937* random) {
  std::vector<ExpertPlacement> placement(3);
  for (int layer : kMoeLayers) {
    placement[static_cast<size_t>(layer)].resize(static_cast<size_t>(c.experts));
    for (ExpertCopies& expert : placement[static_cast<size_t>(layer)]) expert.owner = Draw(random, c.ranks - 1);
  }
  DrawHolders(c.ranks, random, &placement);
  return placement;
}

// One rank. Element i of an expert's master weights is Number(0, name, i), of its moments Number(1, ...) and Number(2, ...).
class Fixture {
 public:
  Fixture(const Case& c, Communicator& world, unsigned seed) : random(seed), case_(c), group(&world) {
    const ModelConfig config = SmallConfig(c.experts);
    specs_ = ParameterSpecs(config);
    blocks_ = MakeBlocks(specs_);
    store = *ExpertStore::Create(specs_, blocks_, RandomPlacement(c, &random), world,
                                 {.compute = c.compute, .policy = c.policy, .copies = c.experts});
    for (const OwnedPart& part : Owned()) Fill(part);
    store->Refresh(stream);
  }
  std::vector<OwnedPart> Owned() const {
    std::vector<OwnedPart> owned;
    store->AppendOwned(&owned);
    return owned;
  }
  static int Name(int layer, int expert) { return layer * 100 + expert; }
  // Of a layer in order, as a step would with a room for two layers.
  template <typename Use> void ForEachLayer(const Use& use) {
    for (int layer : kMoeLayers) {
      const auto bytes = store->Materialise(layer);
      EXPECT_TRUE(bytes.ok()) << bytes.status();
      use(layer);
    }
  }
  void ExpectWeights(int layer, float scale = 1) {
    std::vector<int> local;
    const ExpertPlacement& placement = store->placement()[static_cast<size_t>(layer)];
    for (int e = 0; e < static_cast<int>(placement.size()); ++e) {
      if (!placement[static_cast<size_t>(e)].On(group->index())) continue;
      local.push_back(e);
      const Tensor weights = store->Weights(layer, e), wide = Empty(weights.shape(), DType::kF32);
      ASSERT_EQ(weights.dtype(), case_.compute);
      kernels::Convert(weights, wide, stream);
      int64_t wrong = 0;
      for (int64_t i = 0; i < wide.elements(); ++i) wrong += wide.data<float>()[i] != scale * Number(0, Name(layer, e), i);
      EXPECT_EQ(wrong, 0) << "layer " << layer << " expert " << e << " on rank " << group->index();
    }
    EXPECT_EQ(store->Local(layer), local);
  }
  static float GradientOf(int rank, int part, int layer, int expert, int64_t i) {
    return Number(3 + rank + 10 * part, Name(layer, expert), i);
  }
  void WriteGradients(int layer, int part) {
    const kernels::Accumulate mode = store->BeginGradients(layer, part, stream);
    for (int e : store->Local(layer)) {
      const Tensor gradients = store->Gradients(layer, e);
      for (int64_t i = 0; i < gradients.elements(); ++i) {
        float& to = gradients.data<float>()[i];
        to = GradientOf(group->index(), part, layer, e, i) + (mode == kernels::Accumulate::kAdd ? to : 0);
      }
    }
  }
  void ExpectReduced(int parts) {
    for (int layer : kMoeLayers) {
      const ExpertPlacement& placement = store->placement()[static_cast<size_t>(layer)];
      for (int e = 0; e < case_.experts; ++e) {
        if (placement[static_cast<size_t>(e)].owner != group->index()) continue;
        const Tensor gradients = store->Gradients(layer, e);
        int64_t wrong = 0;
        for (int64_t i = 0; i < gradients.elements(); ++i) {
          float want = 0;
          for (int part = 0; part < parts; ++part) {
            for (int rank = 0; rank < case_.ranks; ++rank) {
              if (placement[static_cast<size_t>(e)].On(rank)) want += GradientOf(rank, part, layer, e, i);
            }
          }
          wrong += gradients.data<float>()[i] != want;
        }
        EXPECT_EQ(wrong, 0) << "layer " << layer << " expert " << e;
      }
    }
  }
  // Owners change places: as many experts on each rank as before.
  OwnerMap Shuffled() {
    OwnerMap owners = OwnersOf(store->placement());
    for (int swap = 0; swap < 4; ++swap) {
      const auto pick = [&]() -> int& {
        return owners[static_cast<size_t>(kMoeLayers[Draw(&random, 1)])][static_cast<size_t>(Draw(&random, case_.experts - 1))];
      };
      std::swap(pick(), pick());
    }
    return owners;
  }
  // Masters and moments of all owned experts, and which these are.
  void ExpectOwned(const OwnerMap& owners) {
    std::vector<std::string> names;
    for (int layer : kMoeLayers) {
      for (int e = 0; e < case_.experts; ++e) {
        if (owners[static_cast<size_t>(layer)][static_cast<size_t>(e)] != group->index()) continue;
        for (const char* matrix : {"w1", "w3", "w2"}) {
          names.push_back(absl::StrCat("model.layers.", layer, ".block_sparse_moe.experts.", e, ".", matrix, ".weight"));
        }
      }
    }
    const std::vector<OwnedPart> owned = Owned();
    ASSERT_EQ(owned.size(), names.size());
    for (size_t i = 0; i < owned.size(); ++i) {
      EXPECT_EQ(owned[i].name, names[i]);
      EXPECT_EQ(owned[i].master.shape(), owned[i].full_shape);
      int64_t wrong = 0;
      ForEachElement(owned[i], [&](const Tensor& tensor, int64_t at, float want) { wrong += tensor.data<float>()[at] != want; });
      EXPECT_EQ(wrong, 0) << names[i];
    }
    EXPECT_EQ(store->owned_elements(), static_cast<int64_t>(owned.size() / 3) * store->expert_elements());
  }

  std::mt19937 random;
  Stream stream;
  std::unique_ptr<ExpertStore> store;

 private:
  // With the number that each should be.
  template <typename Visit> void ForEachElement(const OwnedPart& part, const Visit& visit) const {
    for (size_t block = 0; block < blocks_.size(); ++block) {
      for (const BlockPart& piece : blocks_[block].parts) {
        if (piece.parameter != part.parameter) continue;
        const int name = Name(blocks_[block].layer, blocks_[block].expert);
        for (int64_t i = 0; i < part.master.elements(); ++i) {
          visit(part.master, i, Number(0, name, piece.offset + i));
          visit(part.exp_avg, i, Number(1, name, piece.offset + i));
          visit(part.exp_avg_sq, i, Number(2, name, piece.offset + i));
        }
      }
    }
  }
  void Fill(const OwnedPart& part) const {
    ForEachElement(part, [](const Tensor& tensor, int64_t at, float value) { tensor.data<float>()[at] = value; });
  }

  Case case_;
  Communicator* group;
  std::vector<ParameterSpec> specs_;
  std::vector<Block> blocks_;
};

class ExpertStoreRanks : public testing::TestWithParam<Case> {
 protected:
  // The same seed on all ranks.
  void ForEachSeed(const std::function<void(Fixture&)>& body) {
    for (unsigned seed = 0; seed < 4; ++seed) {
      SCOPED_TRACE(absl::StrCat("seed ", seed));
      RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
        Fixture fixture(GetParam(), world, seed);
        body(fixture);
      });
    }
  }
};

TEST_P(ExpertStoreRanks, HoldersGetTheOwnersWeights) {
  ForEachSeed([](Fixture& fixture) {
    for (int step = 0; step < 3; ++step) {
      for (int pass = 0; pass < 2; ++pass) {
        fixture.ForEachLayer([&](int layer) {
          fixture.ExpectWeights(layer);
          fixture.store->Release(layer);
        });
      }
      std::vector<ExpertPlacement> placement = fixture.store->placement();
      DrawHolders(static_cast<int>(GetParam().ranks), &fixture.random, &placement);
      fixture.store->SetHolders(placement);
      EXPECT_EQ(fixture.store->placement(), placement);
    }
  });
}

TEST_P(ExpertStoreRanks, ReduceIsTheSumOverHoldersAndParts) {
  for (int parts = 1; parts <= 3; ++parts) {
    ForEachSeed([&](Fixture& fixture) {
      for (int step = 0; step < 2; ++step) {
        for (int part = 0; part < parts; ++part) {
          fixture.ForEachLayer([&](int layer) {
            fixture.WriteGradients(layer, part);
            // Copies that are kept give their gradients away once.
            if (GetParam().policy == ExpertPolicy::kKeep && part + 1 < parts) return;
            const auto bytes = fixture.store->ReduceGradients(layer);
            EXPECT_TRUE(bytes.ok()) << bytes.status();
          });
        }
        fixture.ExpectReduced(parts);
      }
    });
  }
}

TEST_P(ExpertStoreRanks, AddedHoldersGetWeightsAndGiveGradientsBack) {
  const bool keep = GetParam().policy == ExpertPolicy::kKeep;
  ForEachSeed([&](Fixture& fixture) {
    ExpertStore& store = *fixture.store;
    for (int step = 0; step < 2; ++step) {
      fixture.ForEachLayer([&](int layer) {
        ExpertPlacement more = store.placement()[static_cast<size_t>(layer)];
        std::vector<ExpertPlacement> drawn = {more};
        DrawHolders(GetParam().ranks, &fixture.random, &drawn);
        for (size_t e = 0; e < more.size(); ++e) {
          std::vector<int> both;
          std::set_union(more[e].holders.begin(), more[e].holders.end(), drawn[0][e].holders.begin(), drawn[0][e].holders.end(),
                         std::back_inserter(both));
          more[e].holders = both;
        }
        store.AddHolders(layer, more);
        EXPECT_EQ(store.placement()[static_cast<size_t>(layer)], more);
        for (int call = 0; call < 2; ++call) {  // The second has nothing to bring.
          const auto bytes = store.MaterialiseAdded(layer);
          ASSERT_TRUE(bytes.ok()) << bytes.status();
          if (call == 1) {
            EXPECT_EQ(*bytes, 0);
          }
        }
        fixture.ExpectWeights(layer);
        store.Release(layer);
      });
      for (int part = 0; part < 2; ++part) {
        fixture.ForEachLayer([&](int layer) {  // Those that were released come back with the planned ones.
          fixture.ExpectWeights(layer);
          fixture.WriteGradients(layer, part);
          if (keep && part == 0) return;
          EXPECT_TRUE(store.ReduceGradients(layer).ok());
        });
      }
      fixture.ExpectReduced(2);
      std::vector<ExpertPlacement> planned = store.placement();
      DrawHolders(GetParam().ranks, &fixture.random, &planned);
      store.SetHolders(planned);
      EXPECT_EQ(store.placement(), planned);
    }
  });
}

TEST_P(ExpertStoreRanks, MoreRoomIsMadeBetweenSteps) {
  ForEachSeed([](Fixture& fixture) {
    ExpertStore& store = *fixture.store;
    fixture.ForEachLayer([&](int layer) { store.Release(layer); });
    const ExpertStore::Memory before = store.memory();
    const int room = store.copies();
    ASSERT_TRUE(store.MakeRoom(room - 1).ok());
    EXPECT_EQ(store.copies(), room);
    ASSERT_TRUE(store.MakeRoom(room + 2).ok());
    EXPECT_EQ(store.copies(), room + 2);
    const ExpertStore::Memory after = store.memory();
    EXPECT_EQ(after.weights_bytes + after.gradients_bytes, before.weights_bytes + before.gradients_bytes + 2 * store.copy_bytes());
    fixture.ForEachLayer([&](int layer) {
      fixture.ExpectWeights(layer);
      store.Release(layer);
    });
  });
}

TEST_P(ExpertStoreRanks, NewOwnersHaveTheSameBits) {
  ForEachSeed([](Fixture& fixture) {
    fixture.ExpectOwned(OwnersOf(fixture.store->placement()));
    for (int move = 0; move < 3; ++move) {
      const OwnerMap owners = fixture.Shuffled();
      const std::vector<ExpertPlacement> before = fixture.store->placement();
      const absl::Status status = fixture.store->SetOwners(owners);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(OwnersOf(fixture.store->placement()), owners);
      for (size_t layer = 0; layer < owners.size(); ++layer) {
        const bool moved = OwnersOf({before[layer]}) != OwnersOf({fixture.store->placement()[layer]});
        EXPECT_EQ(fixture.store->placement()[layer], moved ? OwnersOnly(owners[layer]) : before[layer]);
      }
      fixture.ExpectOwned(owners);
      std::vector<ExpertPlacement> placement = fixture.store->placement();
      DrawHolders(GetParam().ranks, &fixture.random, &placement);
      fixture.store->SetHolders(placement);
      fixture.ForEachLayer([&](int layer) {
        fixture.ExpectWeights(layer);
        fixture.store->Release(layer);
      });
    }
  });
}

// As DenseStore's buffers.
TEST(ExpertStore, RoomsAreTakenInTheOrderInWhichTheyWereFreed) {
  RunRanks(2, "auto", [](Communicator& world) {
    Fixture fixture({.ranks = 2, .experts = 1, .policy = ExpertPolicy::kRematerialise}, world, /*seed=*/1);
    ExpertStore& store = *fixture.store;
    std::vector<ExpertPlacement> placement = store.placement();
    for (int layer : kMoeLayers) {
      ExpertCopies& expert = placement[static_cast<size_t>(layer)][0];
      expert.holders = {1 - expert.owner};
    }
    store.SetHolders(placement);
    const int first = kMoeLayers[0], second = kMoeLayers[1];
    for (int layer : kMoeLayers) ASSERT_TRUE(store.Materialise(layer).ok());
    const void* const before = store.Weights(first, 0).raw();
    store.Release(second);
    store.Release(first);
    ASSERT_TRUE(store.Materialise(first).ok());
    const bool copied = placement[static_cast<size_t>(first)][0].owner != world.index();
    EXPECT_EQ(store.Weights(first, 0).raw() != before, copied) << "the other layer's room was free first";
    fixture.ExpectWeights(first);
    store.Release(first);
  });
}

TEST_P(ExpertStoreRanks, UpdateIsOfWhatIsOwnedAndReachesCopies) {
  ForEachSeed([](Fixture& fixture) {
    fixture.ForEachLayer([&](int layer) {
      fixture.WriteGradients(layer, 0);
      EXPECT_TRUE(fixture.store->ReduceGradients(layer).ok());
    });
    // Without gradients and moments a step only decays: exactly to a half.
    for (const OwnedPart& part : fixture.Owned()) {
      for (const Tensor& tensor : {part.gradient, part.exp_avg, part.exp_avg_sq}) {
        std::fill(tensor.span<float>().begin(), tensor.span<float>().end(), 0.0f);
      }
    }
    const kernels::AdamWStep step{.learning_rate = 0.5, .weight_decay = 1};
    int64_t updated = 0;
    for (int layer = 0; layer < 3; ++layer) updated += fixture.store->Update(layer, step, AdamWNumbersOf(step), fixture.stream);
    EXPECT_EQ(updated, fixture.store->owned_elements());
    fixture.ForEachLayer([&](int layer) {
      fixture.ExpectWeights(layer, 0.5f);
      fixture.store->Release(layer);
    });
  });
}

TEST_P(ExpertStoreRanks, MemoryAddsUp) {
  std::mutex mutex;
  int64_t owned = 0, state = 0, weights = 0;
  RunRanks(GetParam().ranks, "auto", [&](Communicator& world) {
    Fixture fixture(GetParam(), world, 1);
    const int64_t width = SizeOf(GetParam().compute), elements = fixture.store->expert_elements();
    const ExpertStore::Memory memory = fixture.store->memory();
    const int64_t experts = memory.gradients_bytes / 4 / elements;  // Places for owned ones and for copies.
    EXPECT_EQ(memory.weights_bytes, experts * elements * width);
    const int64_t copies = 2 * GetParam().experts;  // Two layers, or two rooms.
    EXPECT_EQ(memory.state_bytes, (experts - copies) * elements * (width == 4 ? 8 : 12));
    EXPECT_GE((experts - copies) * elements, fixture.store->owned_elements());
    const std::lock_guard<std::mutex> lock(mutex);
    owned += fixture.store->owned_elements() / elements;
    state += memory.state_bytes;
    weights += memory.weights_bytes;
  });
  EXPECT_EQ(owned, 2 * GetParam().experts);
  EXPECT_GT(state, 0);
  EXPECT_GT(weights, 0);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int ranks = 1; ranks <= 4; ++ranks) {
    cases.push_back({ranks, 2, ExpertPolicy::kKeep, ranks == 3 ? DType::kBF16 : DType::kF32});
    cases.push_back({ranks, 5, ExpertPolicy::kRematerialise, ranks == 2 ? DType::kBF16 : DType::kF32});
  }
  cases.push_back({3, 1, ExpertPolicy::kRematerialise});  // Fewer experts than ranks.
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Ranks, ExpertStoreRanks, testing::ValuesIn(Cases()), testing::PrintToStringParamName());

}  // namespace
}  // namespace shoal
