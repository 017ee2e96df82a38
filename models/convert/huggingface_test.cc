#include "models/convert/huggingface.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <functional>

#include "models/parameters.h"
#include "runtime/files/faulty_disk.h"
#include "runtime/files/json.h"
#include "tests/harness/temp_dir.h"

namespace shoal {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using testing::TempDir;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.vocab_size = 13;
  config.hidden_size = 8;
  config.intermediate_size = 6;
  config.dense_intermediate_size = 12;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 4;
  config.num_local_experts = 3;
  config.rope_theta = 12345.678901234567;
  config.rms_norm_eps = 1e-6;
  config.router_aux_loss_coef = 0.03;
  return config;
}

// A different value for each element of each parameter, all exact in bf16.
float ValueOf(const std::string& name, int64_t index) {
  return static_cast<float>((std::hash<std::string>()(name) + static_cast<size_t>(index) * 7) % 127) - 63.0f;
}

absl::Status Fill(const std::string& name, const Tensor& out) {
  for (int64_t i = 0; i < out.elements(); ++i) out.data<float>()[i] = ValueOf(name, i);
  return absl::OkStatus();
}

void ExpectHoldsFilledValues(const ModelFolder& folder, const ModelConfig& config) {
  for (const ParameterSpec& spec : ParameterSpecs(config)) {
    const Tensor out = Empty(spec.shape, DType::kF32);
    ASSERT_TRUE(folder.Read(spec.name, 0, out).ok());
    for (int64_t i = 0; i < out.elements(); ++i)
      ASSERT_EQ(out.data<float>()[i], ValueOf(spec.name, i)) << spec.name;
  }
}

absl::StatusOr<ModelConfig> Parse(std::string_view text) {
  const TempDir folder;
  SHOAL_RETURN_IF_ERROR(WriteFileAtomic(folder / "config.json", text));
  return ReadHuggingFaceConfig(folder / "config.json");
}

// As `mistralai/Mixtral-8x7B` has it, without keys of the tokenizer.
constexpr char kMixtral[] =
    R"({"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000})";

std::string Changed(const std::function<void(nlohmann::json&)>& change) {
  nlohmann::json json = nlohmann::json::parse(kMixtral);
  change(json);
  return json.dump();
}

TEST(HuggingFaceConfig, MixtralIsRead) {
  const auto config = Parse(kMixtral);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->num_key_value_heads, 8);
  EXPECT_EQ(config->router_aux_loss_coef, 0.02);
  EXPECT_EQ(config->aux_loss, AuxLoss::kHf);
  EXPECT_EQ(TotalParameters(*config), 46'702'792'704);  // The published size.
}

TEST(HuggingFaceConfig, KeysOfTransformers5GiveTheSame) {
  const auto old_keys = Parse(kMixtral);
  const auto new_keys = Parse(Changed([](nlohmann::json& json) {
    json.erase("rope_theta");
    json.erase("torch_dtype");
    json["dtype"] = "bfloat16";
    json["head_dim"] = nullptr;
    json["rope_parameters"] = {{"rope_theta", 1e6}, {"rope_type", "default"}};
  }));
  ASSERT_TRUE(new_keys.ok()) << new_keys.status();
  EXPECT_TRUE(*old_keys == *new_keys);
  const auto other = Parse(Changed([](nlohmann::json& json) {
    json["rope_parameters"] = {{"rope_theta", 5e5}};
  }));
  EXPECT_EQ(other->rope_theta, 5e5);
}

TEST(HuggingFaceConfig, WhatShoalDoesNotComputeIsRefusedByKey) {
  const auto refused = [](const char* key, nlohmann::json value) {
    const absl::Status status = Parse(Changed([&](nlohmann::json& json) { json[key] = value; })).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << key;
    EXPECT_THAT(std::string(status.message()), HasSubstr("config.json"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(key));
  };
  refused("model_type", "qwen3_moe");
  refused("hidden_act", "gelu");
  refused("sliding_window", 4096);
  refused("rope_scaling", {{"type", "linear"}, {"factor", 2}});
  refused("rope_parameters", {{"rope_type", "yarn"}});
  refused("attention_bias", true);
  refused("router_jitter_noise", 0.1);
  refused("quantization_config", {{"bits", 4}});
}

TEST(HuggingFaceConfig, WrongKeysAreNamed) {
  const auto message = [](const char* key, nlohmann::json value) {
    const absl::Status status = Parse(Changed([&](nlohmann::json& json) {
                                  if (value.is_discarded()) {
                                    json.erase(key);
                                  } else {
                                    json[key] = value;
                                  }
                                })).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << key;
    return std::string(status.message());
  };
  const nlohmann::json gone(nlohmann::json::value_t::discarded);
  for (const char* key :
       {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "num_local_experts", "num_experts_per_tok"}) {
    EXPECT_THAT(message(key, gone), HasSubstr(absl::StrCat(key, " is missing")));
    EXPECT_THAT(message(key, "12"), HasSubstr(key));
    EXPECT_THAT(message(key, 1.5), HasSubstr(key));
    EXPECT_THAT(message(key, UINT64_MAX), HasSubstr(key));
    EXPECT_THAT(message(key, int64_t{1} << 31), HasSubstr(key));
    EXPECT_THAT(message(key, -1), HasSubstr(key));
  }
  EXPECT_THAT(message("rope_theta", "big"), HasSubstr("rope_theta"));
  EXPECT_THAT(message("rope_parameters", 3), HasSubstr("rope_parameters"));
  EXPECT_THAT(message("tie_word_embeddings", 1), HasSubstr("tie_word_embeddings"));
  EXPECT_THAT(message("aux_loss", "other"), HasSubstr("aux_loss"));
  EXPECT_THAT(message("shoal_dense_layers", {32}), HasSubstr("shoal_dense_layers"));
  EXPECT_EQ(Parse("[]").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ModelFolder, GoldenFoldersFitTheirConfig) {
  for (const char* name : {"mixtral_a", "mixtral_b", "topk_z_unnorm", "sigmoid_bias_shared", "switch_drop", "gshard_drop", "xmoe",
                           "expert_choice"}) {
    const std::string oracle = absl::StrCat(SHOAL_SOURCE_DIR "/tests/oracle/", name);
    const auto config = ReadHuggingFaceConfig(oracle + "/config.json");
    ASSERT_TRUE(config.ok()) << config.status();
    for (const char* file : {"/init.safetensors", "/final.safetensors"}) {
      const auto model = ModelFolder::Open(oracle + file);
      ASSERT_TRUE(model.ok()) << model.status();
      EXPECT_FALSE(model->config().has_value());
      EXPECT_TRUE(model->Check(*config).ok()) << model->Check(*config);
    }
  }
}

TEST(ModelFolder, WhatIsWrittenIsReadBack) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const bool tied : {false, true}) {
      const TempDir folder;
      ModelConfig config = SmallConfig();
      config.tie_word_embeddings = tied;
      config.aux_loss = tied ? AuxLoss::kSwitch : AuxLoss::kNone;
      ASSERT_TRUE(WriteModelFolder(folder / "a/b", config, Fill, {.dtype = dtype}).ok());
      const auto model = ModelFolder::Open(folder / "a/b");
      ASSERT_TRUE(model.ok()) << model.status();
      EXPECT_TRUE(*model->config() == config);
      EXPECT_TRUE(model->Check(config).ok()) << model->Check(config);
      ExpectHoldsFilledValues(*model, config);
    }
  }
}

TEST(ModelFolder, WhatMixtralCannotExpressIsNotCalledMixtral) {
  const TempDir folder;
  ModelConfig config = SmallConfig();
  config.dense_layers = {true, false};
  config.norm_topk_prob = false;
  ASSERT_TRUE(WriteModelFolder(folder.path(), config, Fill, {}).ok());
  const auto model = ModelFolder::Open(folder.path());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(*model->config() == config);
  EXPECT_TRUE(model->Check(config).ok());
  ExpectHoldsFilledValues(*model, config);
  EXPECT_THAT(*ReadFile(folder / "config.json"), Not(HasSubstr("ixtral")));
}

TEST(ModelFolder, OtherRoutersKeepTheirSettingsAndState) {
  ModelConfig sigmoid = SmallConfig();
  sigmoid.router = RouterKind::kSigmoidBias;
  sigmoid.aux_loss = AuxLoss::kNone;
  sigmoid.routed_scaling_factor = 2.5;
  sigmoid.bias_update_rate = 0.01;
  sigmoid.seq_aux_loss_coef = 0.02;
  sigmoid.shared_intermediate_size = 5;
  ModelConfig cosine = SmallConfig();
  cosine.router = RouterKind::kXMoe;
  cosine.router_dim = 3;
  cosine.router_temperature_init = 0.4;
  ModelConfig gshard = SmallConfig();
  gshard.router = RouterKind::kGShard;
  gshard.capacity_factor = 1.75;
  for (const ModelConfig& config : {sigmoid, cosine, gshard}) {
    SCOPED_TRACE(std::string(Name(config.router)));
    const TempDir folder;
    ASSERT_TRUE(WriteModelFolder(folder.path(), config, Fill, {.dtype = DType::kBF16}).ok());
    const auto model = ModelFolder::Open(folder.path());
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_TRUE(*model->config() == config);
    EXPECT_TRUE(model->Check(config).ok()) << model->Check(config);
    ExpectHoldsFilledValues(*model, config);
    for (const ParameterSpec& spec : RouterStateSpecs(config)) EXPECT_TRUE(model->Has(spec.name)) << spec.name;
    EXPECT_EQ(model->Has("model.layers.1.block_sparse_moe.e_score_correction_bias"), config.router == RouterKind::kSigmoidBias);
    EXPECT_THAT(*ReadFile(folder / "config.json"), Not(HasSubstr("ixtral")));
    EXPECT_THAT(std::string(model->Check(SmallConfig()).message()),
                HasSubstr(absl::StrCat("router is \"", AbslSv(Name(config.router)), "\", wanted is \"topk\"")));
  }
}

TEST(ModelFolder, ShardedFoldersAreRead) {
  const TempDir folder;
  const ModelConfig config = SmallConfig();
  ASSERT_TRUE(WriteModelFolder(folder.path(), config, Fill, {}).ok());
  ASSERT_TRUE(RemoveTree(folder / "model.safetensors").ok());
  EXPECT_EQ(ModelFolder::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
  nlohmann::json weight_map;
  std::vector<SafetensorsSpec> halves[2];
  for (const ParameterSpec& spec : ParameterSpecs(config)) {
    const size_t file = spec.name.find("experts") != std::string::npos ? 1 : 0;
    halves[file].push_back({spec.name, DType::kF32, spec.shape});
    weight_map[spec.name] = absl::StrCat("model-0000", file + 1, "-of-00002.safetensors");
  }
  for (size_t file = 0; file < 2; ++file) {
    const auto source = [&](size_t i) -> absl::StatusOr<Tensor> {
      Tensor tensor = Empty(halves[file][i].shape, DType::kF32);
      SHOAL_RETURN_IF_ERROR(Fill(halves[file][i].name, tensor));
      return tensor;
    };
    const std::string path = folder / absl::StrCat("model-0000", file + 1, "-of-00002.safetensors");
    ASSERT_TRUE(WriteSafetensors(path, halves[file], {}, source).ok());
  }
  const nlohmann::json index = {{"metadata", {{"total_size", 1}}}, {"weight_map", weight_map}};
  ASSERT_TRUE(WriteFileAtomic(folder / "model.safetensors.index.json", index.dump()).ok());
  const auto model = ModelFolder::Open(folder.path());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->Check(config).ok()) << model->Check(config);
  ExpectHoldsFilledValues(*model, config);
}

TEST(ModelFolder, EveryDifferenceIsListed) {
  const TempDir folder;
  ASSERT_TRUE(WriteModelFolder(folder.path(), SmallConfig(), Fill, {}).ok());
  const auto model = ModelFolder::Open(folder.path());
  ASSERT_TRUE(model.ok());
  ModelConfig wanted = SmallConfig();
  wanted.num_local_experts = 4;
  wanted.vocab_size = 14;
  wanted.rope_theta = 1e4;
  wanted.norm_topk_prob = false;
  wanted.tie_word_embeddings = true;
  const absl::Status status = model->Check(wanted);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr(folder.path()));
  EXPECT_THAT(message, HasSubstr("config.json: rope_theta is 12345.678901234567, wanted is 10000.0"));
  EXPECT_THAT(message, HasSubstr("norm_topk_prob is true, wanted is false"));
  EXPECT_THAT(message, HasSubstr("misshapen tensor model.embed_tokens.weight: [13, 8], wanted is [14, 8]"));
  EXPECT_THAT(message, HasSubstr("misshapen tensor model.layers.1.block_sparse_moe.gate.weight"));
  EXPECT_THAT(message,
              HasSubstr("missing tensor model.layers.0.block_sparse_moe.experts.3.w1.weight [6, 8]"));
  EXPECT_THAT(message,
              HasSubstr("missing tensor model.layers.1.block_sparse_moe.experts.3.w2.weight [8, 6]"));
  EXPECT_THAT(message, HasSubstr("lm_head.weight differs from"));
  wanted = SmallConfig();
  wanted.num_local_experts = 2;
  EXPECT_THAT(std::string(model->Check(wanted).message()),
              HasSubstr("extra tensor model.layers.0.block_sparse_moe.experts.2.w3.weight [6, 8]"));
}

TEST(ModelFolder, TiedHeadMayBePresentIfItIsTheEmbedding) {
  ModelConfig config = SmallConfig();
  for (const bool equal : {true, false}) {
    const TempDir folder;
    config.tie_word_embeddings = false;
    ASSERT_TRUE(WriteModelFolder(folder.path(), config,
                                 [&](const std::string& name, const Tensor& out) {
                                   return Fill(
                                       equal && name == "lm_head.weight" ? "model.embed_tokens.weight" : name,
                                       out);
                                 },
                                 {})
                    .ok());
    const auto model = ModelFolder::Open(folder / "model.safetensors");
    config.tie_word_embeddings = true;
    EXPECT_EQ(model->Check(config).ok(), equal);
  }
}

TEST(ModelFolder, IntegersAreNoWeights) {
  const TempDir folder;
  const ModelConfig config = SmallConfig();
  std::vector<SafetensorsSpec> specs;
  for (const ParameterSpec& spec : ParameterSpecs(config)) {
    specs.push_back({spec.name, spec.name == "model.norm.weight" ? DType::kI32 : DType::kF32, spec.shape});
  }
  ASSERT_TRUE(WriteSafetensors(folder / "m.safetensors", specs, {}, [&](size_t i) -> absl::StatusOr<Tensor> {
                return Zeros(specs[i].shape, specs[i].dtype);
              }).ok());
  const absl::Status status = ModelFolder::Open(folder / "m.safetensors")->Check(config);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tensor model.norm.weight is I32"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("(1 differences)"));
}

TEST(ModelFolder, FailuresOfExportReachTheCaller) {
  const TempDir folder;
  const absl::Status source_failed =
      WriteModelFolder(folder / "a", SmallConfig(),
                       [](const std::string&, const Tensor&) { return absl::DataLossError("shard 3"); }, {});
  EXPECT_EQ(source_failed.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(*ListFolder(folder / "a"), ::testing::IsEmpty());
  for (int at = 0; at < 20; ++at) {
    FaultyDisk disk(FaultyDisk::Kind::kFull, at);
    EXPECT_EQ(WriteModelFolder(folder / "b", SmallConfig(), Fill, {.faults = &disk}).code(),
              absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(*ListFolder(folder / "b"), ::testing::IsEmpty()) << at;
  }
}

// Another program, which knows the format from its definition alone.
TEST(ModelFolder, PlainPythonReadsIt) {
  if (std::system("python3 -c 'import json, struct' > /dev/null 2>&1") != 0)
    GTEST_SKIP() << "no python3 here";
  const TempDir folder;
  ModelConfig config = SmallConfig();
  ASSERT_TRUE(WriteModelFolder(folder / "m", config, Fill, {.max_position_embeddings = 77}).ok());
  constexpr char kProgram[] = R"(
import json, struct, sys
folder = sys.argv[1]
config = json.load(open(folder + "/config.json"))
assert config["architectures"] == ["MixtralForCausalLM"] and config["model_type"] == "mixtral"
assert config["torch_dtype"] == "float32" and config["max_position_embeddings"] == 77
assert config["rope_theta"] == 12345.678901234567 and config["head_dim"] == 4
raw = open(folder + "/model.safetensors", "rb").read()
size = struct.unpack("<Q", raw[:8])[0]
assert size % 8 == 0
header = json.loads(raw[8:8 + size])
assert header.pop("__metadata__") == {"format": "pt"}
end = 0
for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
    count = 1
    for n in entry["shape"]: count *= n
    assert entry["dtype"] == "F32" and entry["data_offsets"] == [end, end + 4 * count]
    end += 4 * count
assert 8 + size + end == len(raw)
begin, end = header["model.norm.weight"]["data_offsets"]
for name in sorted(header): print(name, header[name]["shape"])
print(*struct.unpack("<8f", raw[8 + size + begin:8 + size + end]))
)";
  ASSERT_TRUE(WriteFileAtomic(folder / "read.py", kProgram).ok());
  const std::string command = absl::StrCat("python3 ", folder / "read.py", " ", folder / "m", " > ",
                                           folder / "out", " 2> ", folder / "err");
  ASSERT_EQ(std::system(command.c_str()), 0) << *ReadFile(folder / "err");
  std::map<std::string, Shape> sorted;
  for (const ParameterSpec& spec : ParameterSpecs(config)) sorted[spec.name] = spec.shape;
  std::string expected;
  for (const auto& [name, shape] : sorted) absl::StrAppend(&expected, name, " ", ShapeString(shape), "\n");
  for (int64_t i = 0; i < 8; ++i) {
    absl::StrAppend(&expected, ValueOf("model.norm.weight", i), i < 7 ? ".0 " : ".0\n");
  }
  EXPECT_EQ(*ReadFile(folder / "out"), expected);
}

}  // namespace
}  // namespace shoal
