// A decoder's passes as a whole, on one rank. Comparison with an independent implementation: tests/oracle.
#include "models/zoo/decoder.h"

#include <cmath>
#include <map>
#include <random>

#include "collectives/communicator.h"
#include "gtest/gtest.h"

namespace shoal {
namespace {

ModelConfig SmallConfig() {
  ModelConfig config;
  config.vocab_size = 61;
  config.hidden_size = 32;
  config.intermediate_size = 40;
  config.dense_intermediate_size = 40;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.num_local_experts = 1;
  config.num_experts_per_tok = 1;
  config.aux_loss = AuxLoss::kNone;
  return config;
}

// One decoder with all that it stands on, whose tasks run in the order of the graph.
class Fixture {
 public:
  explicit Fixture(const ModelConfig& config, DType compute = DType::kF32, Decoder::Options options = {.seq = 12},
                   int chunks_forward = 1, int chunks_backward = 1)
      : config_(config), recompute_(options.recompute) {
    world_ = *ConnectWorld({});
    std::vector<ExpertPlacement> placement;
    for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
      placement.push_back(config.is_dense(layer) ? ExpertPlacement() : GroupedPlacement(1, config.num_local_experts, 1, 1)[0]);
    }
    store = *ParameterStore::Create(ParameterSpecs(config), placement, *world_, {.compute = compute});
    store->InitializeOwned(3, 0.1, stream);
    EXPECT_TRUE(store->GatherWeights(stream).ok());
    experts_.topology = Topology::OneHost(1);
    decoder = std::make_unique<Decoder>(config, options, *store, experts_, stream);
    schedule_.layers.assign(static_cast<size_t>(config.num_hidden_layers), {chunks_forward, chunks_backward});
    for (const OwnedPart& part : store->owned()) parts_[part.name] = part;
  }

  // The summed cross-entropy; leaves gradients of it.
  double Run(const Tensor& tokens, int part = 0) {
    return Pass({.tokens = Decoder::IdsAndTargets(tokens), .loss_scale = 1.0f, .part = part}, StepShape::Mode::kTrain);
  }
  double Evaluate(const Tensor& tokens) {
    return Pass({.mode = Decoder::Pass::Mode::kEvaluate, .tokens = Decoder::IdsAndTargets(tokens)}, StepShape::Mode::kForward);
  }
  Tensor NextLogits(const Tensor& ids) {
    Pass({.mode = Decoder::Pass::Mode::kNextLogits, .tokens = ids.Reshape({1, 1, ids.elements()})}, StepShape::Mode::kForward);
    return decoder->next_logits();
  }
  Tensor Weight(const std::string& name) const { return parts_.at(name).master; }
  Tensor Gradient(const std::string& name) const { return parts_.at(name).gradient; }

  Stream stream;
  std::unique_ptr<ParameterStore> store;
  std::unique_ptr<Decoder> decoder;

 private:
  double Pass(Decoder::Pass pass, StepShape::Mode mode) {
    StepShape shape;
    shape.mode = mode;
    shape.recompute = recompute_;
    shape.tied_head = config_.tie_word_embeddings;
    for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
      shape.layers.push_back({!config_.is_dense(layer), config_.shared_intermediate_size > 0});
    }
    pass.schedule = &schedule_;
    pass.losses = Zeros({schedule_.waves}, DType::kF64);
    const Tensor losses = pass.losses;
    decoder->Begin(std::move(pass), stream);
    for (const Task& task : EmitStep(shape, schedule_).tasks) {
      if (task.op == Op::kBalance) {
        decoder->SetRoutingGradients(std::vector<RoutingGradient>(static_cast<size_t>(decoder->routing().dim(0))));
      } else if (task.phase != Phase::kUpdate) {
        const auto units = decoder->Run(task, stream);
        EXPECT_TRUE(units.ok()) << Name(task) << ": " << units.status();
      }
    }
    double all = 0;
    for (double loss : losses.span<double>()) all += loss;
    return all;
  }

  ModelConfig config_;
  bool recompute_;
  std::unique_ptr<Communicator> world_;
  ExpertContext experts_;
  Schedule schedule_;
  std::map<std::string, OwnedPart> parts_;
};

Tensor Tokens(int64_t rows, int64_t seq) {
  std::mt19937 random(5);
  const Tensor tokens = Empty({rows, seq + 1}, DType::kI32);
  for (int32_t& id : tokens.span<int32_t>()) id = static_cast<int32_t>(random() % 61);
  return tokens;
}

std::vector<float> Copy(const Tensor& tensor) { return {tensor.span<float>().begin(), tensor.span<float>().end()}; }

TEST(Decoder, DenseLayerIsALayerWithOneExpert) {
  ModelConfig dense = SmallConfig();
  dense.dense_layers = {true, false};
  Fixture a(SmallConfig()), b(dense);
  // The same weights: experts.0.w1, w3, w2 are gate_proj, up_proj, down_proj.
  const auto name_in_a = [](std::string name) {
    const auto replace = [&](const std::string& from, const std::string& to) {
      if (const size_t at = name.find(from); at != std::string::npos) name.replace(at, from.size(), to);
    };
    replace("mlp.gate_proj", "block_sparse_moe.experts.0.w1");
    replace("mlp.up_proj", "block_sparse_moe.experts.0.w3");
    replace("mlp.down_proj", "block_sparse_moe.experts.0.w2");
    return name;
  };
  for (const ParameterSpec& spec : b.store->parameters()) {
    const std::vector<float> weights = Copy(a.Weight(name_in_a(spec.name)));
    std::copy(weights.begin(), weights.end(), b.Weight(spec.name).data<float>());
  }
  const Tensor tokens = Tokens(3, 12);
  const double loss_a = a.Run(tokens), loss_b = b.Run(tokens);
  EXPECT_NEAR(loss_a, loss_b, 1e-6 * loss_a);
  for (const ParameterSpec& spec : b.store->parameters()) {
    const std::vector<float> want = Copy(a.Gradient(name_in_a(spec.name)));
    const std::vector<float> got = Copy(b.Gradient(spec.name));
    double difference = 0, norm = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += std::pow(got[i] - want[i], 2);
      norm += std::pow(want[i], 2);
    }
    EXPECT_LE(std::sqrt(difference), 2e-6 * std::sqrt(norm) + 1e-9) << spec.name;
  }
}

TEST(Decoder, GradientIsTheSlopeOfTheLoss) {
  ModelConfig config = SmallConfig();
  config.num_local_experts = 3;
  config.num_experts_per_tok = 3;  // All: the choice, which has no slope, cannot change.
  config.dense_layers = {false, true};
  config.tie_word_embeddings = true;
  Fixture fixture(config);
  const Tensor tokens = Tokens(2, 12);
  fixture.Run(tokens);
  std::mt19937 random(11);
  for (const ParameterSpec& spec : fixture.store->parameters()) {
    // Along the gradient itself: the slope there is its squared norm.
    const std::vector<float> gradient = Copy(fixture.Gradient(spec.name));
    double squared = 0;
    for (float g : gradient) squared += static_cast<double>(g) * g;
    if (squared == 0) continue;
    const double step = 2e-3 / std::sqrt(squared);
    const Tensor weights = fixture.Weight(spec.name);
    const std::vector<float> saved = Copy(weights);
    const auto loss_at = [&](double distance) {
      for (size_t i = 0; i < saved.size(); ++i) {
        weights.data<float>()[i] = static_cast<float>(saved[i] + distance * gradient[i]);
      }
      return fixture.Evaluate(tokens);
    };
    const double slope = (loss_at(step) - loss_at(-step)) / (2 * step);
    std::copy(saved.begin(), saved.end(), weights.data<float>());
    EXPECT_NEAR(slope, squared, 0.02 * squared) << spec.name;
  }
}

TEST(Decoder, RecomputationPartsAndChunksGiveTheSameGradients) {
  ModelConfig config = SmallConfig();
  config.num_local_experts = 4;
  config.num_experts_per_tok = 2;
  Fixture plain(config), recomputed(config, DType::kF32, {.seq = 12, .recompute = true, .loss_chunk = 7}), parts(config);
  Fixture chunks(config, DType::kF32, {.seq = 12}, 3, 2);
  const Tensor tokens = Tokens(4, 12);
  const double loss = plain.Run(tokens);
  EXPECT_NEAR(chunks.Run(tokens), loss, 1e-6 * loss);
  EXPECT_NEAR(recomputed.Run(tokens), loss, 1e-6 * loss);
  EXPECT_NEAR(parts.Run(tokens.Rows(0, 3)) + parts.Run(tokens.Rows(3, 1), /*part=*/1), loss, 1e-6 * loss);
  for (const ParameterSpec& spec : plain.store->parameters()) {
    const std::vector<float> want = Copy(plain.Gradient(spec.name));
    const std::vector<float> first = Copy(recomputed.Gradient(spec.name));
    const std::vector<float> second = Copy(parts.Gradient(spec.name)), third = Copy(chunks.Gradient(spec.name));
    double norm = 0;
    for (float g : want) norm = std::max(norm, std::abs(static_cast<double>(g)));
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(first[i], want[i], 1e-5 * norm) << spec.name;
      ASSERT_NEAR(second[i], want[i], 1e-5 * norm) << spec.name;
      ASSERT_NEAR(third[i], want[i], 1e-5 * norm) << spec.name;
    }
  }
}

TEST(Decoder, Bf16StaysWithinItsRoundingOfF32) {
  ModelConfig config = SmallConfig();
  config.num_local_experts = 4;
  config.num_experts_per_tok = 2;
  Fixture wide(config), narrow(config, DType::kBF16);
  const Tensor tokens = Tokens(4, 12);
  const double want = wide.Run(tokens), got = narrow.Run(tokens);
  // Each of about 10 roundings on the way to a logit is at most 2^-9; they average out over 48 tokens.
  EXPECT_NEAR(got, want, 10 * std::pow(2.0, -9) / std::sqrt(48.0) * want);
  for (const ParameterSpec& spec : wide.store->parameters()) {
    double dot = 0, a = 0, b = 0;
    const std::vector<float> f32 = Copy(wide.Gradient(spec.name));
    const std::vector<float> bf16 = Copy(narrow.Gradient(spec.name));
    for (size_t i = 0; i < f32.size(); ++i) {
      dot += static_cast<double>(f32[i]) * bf16[i];
      a += static_cast<double>(f32[i]) * f32[i];
      b += static_cast<double>(bf16[i]) * bf16[i];
    }
    EXPECT_GE(dot, 0.98 * std::sqrt(a * b)) << spec.name;
  }
}

// Documents of 1, 4, 2 and 5 tokens in one sequence, and one that a sequence begins in the middle of and does not end.
TEST(Decoder, DocumentsOfASequenceAreAsIfAlone) {
  constexpr int32_t kEnd = 60;
  ModelConfig config = SmallConfig();
  config.num_local_experts = 3;
  config.num_experts_per_tok = 2;
  config.dense_layers = {true, false};
  const Tensor tokens = Tokens(2, 12);
  for (int32_t& id : tokens.span<int32_t>()) id %= kEnd;
  const std::vector<int64_t> ends = {1, 5, 7, 12};
  for (const int64_t end : ends) tokens.data<int32_t>()[end - 1] = kEnd;
  for (const bool recompute : {false, true}) {
    Fixture packed(config, DType::kF32, {.seq = 12, .recompute = recompute, .end_of_document = kEnd}), alone(config), whole(config);
    const double loss = packed.Run(tokens);
    double sum = 0;
    int part = 0;
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t begin = 0, document = 0; begin < 12; ++document) {
        const int64_t end = row == 0 ? ends[static_cast<size_t>(document)] : 12;
        const Tensor own = tokens.Elements(row * 13 + begin, {1, end - begin + 1});  // With what follows its last token.
        sum += alone.Run(own, part++);
        begin = end;
      }
    }
    EXPECT_NEAR(loss, sum, 1e-6 * sum);
    EXPECT_NEAR(packed.Evaluate(tokens), sum, 1e-6 * sum);
    EXPECT_GT(std::abs(whole.Run(tokens) - sum), 1e-3 * sum) << "the documents would not matter";
    for (const ParameterSpec& spec : packed.store->parameters()) {
      const std::vector<float> got = Copy(packed.Gradient(spec.name)), want = Copy(alone.Gradient(spec.name));
      double norm = 0;
      for (float g : want) norm = std::max(norm, std::abs(static_cast<double>(g)));
      for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5 * norm) << spec.name;
    }
  }
}

// What is generated follows a prompt as a whole.
TEST(Decoder, NextLogitsSeeThePromptWhateverIsInIt) {
  Fixture documents(SmallConfig(), DType::kF32, {.seq = 12, .end_of_document = 7}), whole(SmallConfig());
  const Tensor tokens = Tokens(1, 12);
  tokens.data<int32_t>()[5] = 7;
  const Tensor ids = tokens.Reshape({13}).Elements(0, {12});
  EXPECT_EQ(Copy(documents.NextLogits(ids)), Copy(whole.NextLogits(ids)));
}

TEST(Decoder, NextLogitsAgreeWithTheLossOfThatToken) {
  Fixture fixture(SmallConfig());
  const Tensor tokens = Tokens(1, 12);
  const Tensor ids = tokens.Reshape({13}).Elements(0, {12});
  const double all = fixture.Evaluate(tokens);
  const double without_last = fixture.Evaluate(tokens.Reshape({13}).Elements(0, {1, 12}));
  const Tensor logits = fixture.NextLogits(ids);
  double sum = 0;
  for (float logit : logits.span<float>()) sum += std::exp(logit);
  const double loss = std::log(sum) - logits.data<float>()[tokens.data<int32_t>()[12]];
  EXPECT_NEAR(all - without_last, loss, 1e-4);
}

TEST(Decoder, NoTokensGiveNoGradients) {
  Fixture fixture(SmallConfig());
  fixture.Run(Tokens(2, 12));
  EXPECT_EQ(fixture.Run(Tokens(0, 12)), 0);
  for (const ParameterSpec& spec : fixture.store->parameters()) {
    for (float g : Copy(fixture.Gradient(spec.name))) ASSERT_EQ(g, 0) << spec.name;
  }
}

}  // namespace
}  // namespace shoal
